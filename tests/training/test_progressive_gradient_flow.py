from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.core.patterns import NM
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, PatternError
from gossamer.measure.training_flops import TrainingFlops
from gossamer.papers.byte_language import ByteGPT
from gossamer.training.progressive_gradient_flow import (
    ATTENTION_INPUTS,
    FEED_FORWARD,
    MaskDecay,
    StructureDecay,
    gradient_noise,
    steps_at_equal_flops,
    training_flops,
)
from gossamer.training.sr_ste import STE


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 12, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def one_step(net, optimizer, batch):
    optimizer.zero_grad()
    functional.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


def test_the_factor_falls_along_its_curve_from_the_end_of_the_dense_phase():
    paper = MaskDecay(total=100_000)
    assert paper.dense_until == 5000
    assert [paper.fade_at(step) for step in (0, 4999, 5000)] == [1, 1, 1]
    assert paper.fade_at(15_000) == pytest.approx(math.exp(-1))
    assert paper.fade_at(89_999) == pytest.approx(math.exp(-8.4999))
    assert [paper.fade_at(step) for step in (90_000, 100_000)] == [0, 0]
    linear = MaskDecay(total=100, decay="linear", rate=0.02)
    assert linear.fade_at(30) == pytest.approx(0.5)
    assert linear.fade_at(55) == pytest.approx(0)
    assert linear.fade_at(70) == 0


def test_the_coefficient_follows_from_a_half_life_or_a_final_value():
    assert MaskDecay(half_life=50).fade_at(100) == pytest.approx(0.5)
    assert MaskDecay(half_life=50, decay="linear").fade_at(100) == pytest.approx(0.5)
    for decay in ("exponential", "linear"):
        method = MaskDecay(total=200, final_value=0.02, decay=decay)
        assert method.fade_at(179) > 0.02 > method.fade_at(180) == 0
        assert method.fade_at(179) == pytest.approx(0.02, abs=0.01)
    assert MaskDecay(final_value=0.0, decay="linear").coefficient == pytest.approx(1 / 850)


def test_frames_part_the_sparse_phase_equally_and_end_with_the_pattern():
    method = StructureDecay(pattern="1:16", total=120, dense_fraction=0.1, finetune_fraction=0.15)
    final = NM(1, 16)
    at = [method.pattern_at(step, final) for step in range(121)]
    assert at[:12] == [None] * 12
    assert at[12:102] == [NM(n, 16) for n in (15, 8, 4, 2, 1) for _ in range(18)]
    assert at[102:] == [final] * 19


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pattern": "1:8"}, "7:8 4:8 2:8 1:8"),
        ({"pattern": "2:8"}, "7:8 4:8 2:8"),
        ({"pattern": "2:4"}, "3:4 2:4"),
        ({"pattern": "1:2"}, "1:2"),
        ({"pattern": "1:8@0"}, "7:8@0 4:8@0 2:8@0 1:8@0"),
        ({"pattern": "1:8", "kind": "geometric"}, "8:64 4:32 2:16 1:8"),
        ({"pattern": "2:6", "kind": "geometric", "frames": 2}, "4:12 2:6"),
        ({"pattern": "1:4", "kind": "densify"}, "1:32 1:16 1:8 1:4"),
        ({"pattern": "1:8", "kind": ("6:8", "3:8", "1:8")}, "6:8 3:8 1:8"),
    ],
)
def test_the_patterns_of_the_frames(options, expected):
    method = StructureDecay(**options)
    assert " ".join(map(str, method.patterns(method.pattern))) == expected


@pytest.mark.parametrize(
    "method",
    [
        MaskDecay(pattern="1:16", total=30, final_value=0.05),
        MaskDecay(pattern="1:16", total=30, rate=0.2, decay="linear", flow="ste"),
        StructureDecay(pattern="2:8", total=30),
        StructureDecay(pattern="1:8", total=30, kind="geometric", frames=3),
        StructureDecay(pattern="1:4", total=30, kind="densify"),
    ],
)
@pytest.mark.parametrize("steps", [1, 13, 30])
def test_exactly_the_pattern_remains_even_if_training_ends_early(method, steps, net, batch):
    run = method.attach(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    for _ in range(steps):
        one_step(net, run.optimizer, batch)
    masks = run.finalize()
    for name in run.targets:
        method.pattern.verify(masks[name])
    assert masks.violations(net) == {}


def test_where_the_factor_is_zero_the_mask_rests_under_the_chain_rule_only(net, batch):
    masks = {}
    for flow in ("chain", "ste"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))
        method = MaskDecay(pattern="2:8", total=60, dense_fraction=0, decay="linear", rate=0.2, flow=flow)
        run = method.attach(model, torch.optim.AdamW(model.parameters(), lr=2e-2))
        seen = []
        for step in range(30):
            one_step(model, run.optimizer, batch)
            if step >= 5:
                seen.append(run.masks)
        masks[flow] = seen
        assert method.wants_gradient(20) == (flow == "ste")
        assert run.phase == ("frozen" if flow == "chain" else "ramp")
    assert all(each == masks["chain"][0] for each in masks["chain"])
    assert any(each != masks["ste"][0] for each in masks["ste"])


def test_feed_forward_layers_and_queries_keys_and_values_have_patterns_of_their_own():
    model = ByteGPT(2, 16, 2, 8)
    placed = {target.module_name for target in find_targets(model, FEED_FORWARD)}
    assert placed == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")}
    method = MaskDecay(
        pattern="1:16", include=(*FEED_FORWARD, *ATTENTION_INPUTS), own=dict.fromkeys(ATTENTION_INPUTS, "2:4")
    )
    found = {target.module_name: str(method.pattern_of(target)) for target in method.targets(model)}
    assert found == {
        f"blocks.{i}.{name}": pattern
        for i in (0, 1)
        for name, pattern in (("qkv", "2:4"), ("up", "1:16"), ("down", "1:16"))
    }
    names = ["h.0.mlp.c_fc", "layers.1.self_attn.q_proj", "encoder.layer.0.attention.self.key", "layers.1.mlp.up_proj"]
    from fnmatch import fnmatchcase

    assert [any(fnmatchcase(name, glob) for glob in FEED_FORWARD) for name in names] == [True, False, False, True]
    assert [any(fnmatchcase(name, glob) for glob in ATTENTION_INPUTS) for name in names] == [False, True, True, False]


def test_operations_follow_the_density_of_each_step():
    flops = TrainingFlops(linear=100.0, attention=10.0, head=5.0)
    dense, sparse = 3 * 115 * 7, 3 * (100 / 16 + 15) * 7
    faded = MaskDecay(pattern="1:16", total=100)
    assert training_flops(faded, flops, 7, 100) == pytest.approx(90 * dense + 10 * sparse)
    stepped = StructureDecay(pattern="1:4", total=100, dense_fraction=0.1, finetune_fraction=0.0)
    expected = [1.0] * 10 + [0.75] * 30 + [0.5] * 30 + [0.25] * 30
    assert [stepped.density_at(step) for step in range(100)] == pytest.approx(expected)
    budget = training_flops(faded, flops, 7, 100)
    steps = steps_at_equal_flops(STE(pattern="1:16"), flops, budget, 7)
    assert steps == int((90 * dense + 10 * sparse) // sparse)
    assert training_flops(STE(pattern="1:16"), flops, 7, steps) <= budget
    with pytest.raises(ConfigurationError, match="MaskDecay has phases"):
        steps_at_equal_flops(faded, flops, budget, 7)


def test_gradient_noise_is_the_mean_second_moment_of_both_kinds_of_weights(net, batch):
    run = STE(pattern="1:8").attach(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    with pytest.raises(ConfigurationError, match=r"no squared gradients of 2\.weight"):
        gradient_noise(run)
    for _ in range(3):
        one_step(net, run.optimizer, batch)
    moment, mask = run.optimizer.state[net[2].weight]["exp_avg_sq"].double(), run.mask("2.weight")
    found = gradient_noise(run)
    assert found.chosen == pytest.approx(float(moment[mask].mean()))
    assert found.removed == pytest.approx(float(moment[~mask].mean()))
    faded = MaskDecay(pattern="1:8", total=30, dense_fraction=0, decay="linear", rate=0.5)
    run.finalize()
    run = faded.attach(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    for _ in range(12):
        one_step(net, run.optimizer, batch)
    quiet = gradient_noise(run)
    assert quiet.removed / quiet.chosen < 0.2 * found.removed / found.chosen


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (lambda: StructureDecay(pattern="3:8"), PatternError, "3:8 cannot be reached by halving"),
        (lambda: StructureDecay(pattern="4:4"), PatternError, "4:4 cannot be reached by halving"),
        (lambda: StructureDecay(pattern="1:8", own={"*": "3:8"}), PatternError, "3:8"),
        (lambda: StructureDecay(pattern="1:8", kind=("4:8", "2:8")), PatternError, "must end with 1:8"),
        (lambda: StructureDecay(pattern="1:8", kind=()), PatternError, "ends with nothing"),
        (lambda: StructureDecay(kind="cubic"), ConfigurationError, "kind is 'cubic'"),
        (lambda: StructureDecay(frames=0), ConfigurationError, "frames is 0"),
        (lambda: StructureDecay(kind=("1:8",), own={"*": "1:8"}), ConfigurationError, "own"),
        (lambda: MaskDecay(rate=0.1, half_life=3), ConfigurationError, "rate and half_life are given"),
        (lambda: MaskDecay(rate=0.0), ConfigurationError, "above 0"),
        (lambda: MaskDecay(half_life=-1), ConfigurationError, "half_life"),
        (lambda: MaskDecay(final_value=0.0), ConfigurationError, "final_value"),
        (lambda: MaskDecay(final_value=1.5, decay="linear"), ConfigurationError, "final_value"),
        (lambda: MaskDecay(decay="cosine"), ConfigurationError, "'cosine'"),
        (lambda: MaskDecay(flow="none"), ConfigurationError, "'none'"),
        (lambda: MaskDecay(dense_fraction=0.6, finetune_fraction=0.4), ConfigurationError, "at least one step"),
        (lambda: MaskDecay(total=0), ConfigurationError, "of 0 steps"),
    ],
)
def test_impossible_settings_are_refused(make, error, named):
    with pytest.raises(error, match=named):
        make()


def test_a_layer_that_a_pattern_on_the_way_does_not_divide_is_refused(net):
    with pytest.raises(PatternError, match=r"2\.weight has shape \(64, 32\): 8:64"):
        StructureDecay(pattern="1:8", kind="geometric").attach(net, torch.optim.SGD(net.parameters(), lr=0.1))

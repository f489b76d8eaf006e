from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import nn

from gossamer.core.roles import roles
from gossamer.errors import (
    ConfigurationError,
    NonFiniteError,
    PatternError,
    SparsityError,
    TargetError,
    UnknownNameError,
)
from gossamer.measure import footprint
from gossamer.training.gmp import GradualMagnitudePruning, Polynomial


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 17), nn.ReLU(), nn.Linear(17, 5))


def language_model(layers=1, bidirectional=False):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(16, 8),
            "lstm": nn.LSTM(8, 12, num_layers=layers, bidirectional=bidirectional, batch_first=True),
            "head": nn.Linear(24 if bidirectional else 12, 16),
        }
    )


def train(model, method, steps, after=lambda run: None):
    """Train on drawn data, with momentum and decay; `after` sees the run after every step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    run = method.attach(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 20, generator=generator)).square().mean().backward()
        optimizer.step()
        after(run)
    return run


def zeros(run):
    return {name: run.targets[name].shape.numel() - run.active(name) for name in run.targets}


def test_the_ramp_has_the_values_of_the_paper_at_both_ends_and_between():
    method = GradualMagnitudePruning(sparsity=0.8, begin=100, end=300)
    assert [method.sparsity_at(step) for step in (0, 100, 300, 1000)] == [0, 0, 0.8, 0.8]
    assert method.sparsity_at(200) == pytest.approx(0.8 * 7 / 8)
    started = GradualMagnitudePruning(sparsity=0.8, initial_sparsity=0.4, begin=100, end=300)
    assert started.sparsity_at(99) == 0
    for step in range(100, 301, 20):
        assert started.sparsity_at(step) == pytest.approx(0.8 + (0.4 - 0.8) * (1 - (step - 100) / 200) ** 3)


def test_the_power_bends_the_ramp():
    assert GradualMagnitudePruning(sparsity=0.8, end=100, power=1).sparsity_at(25) == pytest.approx(0.2)
    assert Polynomial(1.0, 4, power=2)(1) == pytest.approx(1 - 0.75**2)
    with pytest.raises(ConfigurationError, match="power"):
        Polynomial(1.0, 4, power=0)


def test_every_choice_is_exact_in_every_matrix_and_only_made_when_due():
    method = GradualMagnitudePruning(sparsity=0.83, begin=2, end=21, every=4)
    seen = []

    def check(run):
        seen.append(sum(zeros(run).values()))
        due = max((step for step in (6, 10, 14, 18, 21) if step <= run.step), default=None)
        expected = 0 if due is None else method.sparsity_at(due)
        for name, count in zeros(run).items():
            size = run.targets[name].shape.numel()
            assert count == int(Fraction(repr(float(expected))) * size), (run.step, name)

    train(network(), method, 30, check)
    assert seen == sorted(seen)
    assert len(set(seen)) == 6


def test_the_smallest_weights_go():
    model = network()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    run = GradualMagnitudePruning(sparsity=0.5, begin=0, end=0).attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1)
    )
    for name in run.targets:
        weight, mask = before[name].abs(), run.mask(name)
        assert weight[~mask].max() <= weight[mask].min()
        assert int((~mask).sum()) == weight.numel() // 2


def test_masked_weights_neither_move_nor_come_back():
    model = network()
    masks = []

    def check(run):
        current = run.masks
        assert not current.violations(model)
        masks.append(current)

    train(model, GradualMagnitudePruning(sparsity=0.9, end=15, every=5), 20, check)
    for earlier, later in pairwise(masks):
        assert (earlier & later) == later


def test_equal_weights_do_not_break_the_count():
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    run = GradualMagnitudePruning(sparsity=0.3, end=0).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert zeros(run) == {"0.weight": 180, "2.weight": 153}


def test_one_threshold_for_the_model_leaves_layers_of_their_own_sparsity():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(10)
    run = train(model, GradualMagnitudePruning(sparsity=0.7, end=6, every=2, scope="model"), 6)
    assert sum(zeros(run).values()) == int(0.7 * 1110)
    shares = {name: count / run.targets[name].shape.numel() for name, count in zeros(run).items()}
    assert shares["0.weight"] < 0.6 < shares["2.weight"]


def test_before_the_beginning_nothing_is_pruned_and_then_the_initial_sparsity():
    found = []
    method = GradualMagnitudePruning(sparsity=0.8, initial_sparsity=0.4, begin=5, end=9, every=2)
    train(network(), method, 6, lambda run: found.append((run.step, round(run.sparsity, 2), run.phase)))
    assert found == [(s, 0.0, "warm-up") for s in range(1, 5)] + [(5, 0.4, "ramp"), (6, 0.4, "ramp")]


def test_a_ramp_of_no_length_prunes_at_once():
    found = []
    train(
        network(),
        GradualMagnitudePruning(sparsity=0.8, begin=3, end=3),
        5,
        lambda run: found.append(round(run.sparsity, 2)),
    )
    assert found == [0, 0, 0.8, 0.8, 0.8]


def test_finalize_reaches_the_sparsity_of_a_ramp_that_was_cut_short_and_leaves_a_plain_model():
    model = network()
    run = train(model, GradualMagnitudePruning(sparsity=0.9, end=1000, every=10), 25)
    assert run.sparsity < 0.2
    masks = run.finalize()
    assert masks.layer_sparsity() == {"0.weight": 0.9, "2.weight": 0.9}
    assert not masks.violations(model)
    assert not model[0]._forward_hooks
    assert type(model[0].weight) is nn.Parameter


def test_gates_of_a_recurrent_layer_compete_in_one_ranking():
    model = language_model(layers=2, bidirectional=True)
    with torch.no_grad():
        model.lstm.weight_ih_l0.mul_(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = GradualMagnitudePruning(sparsity=0.75, end=0, heads=True, embeddings=True).attach(model, optimizer)
    missing = zeros(run)
    for layer in ("l0", "l0_reverse", "l1", "l1_reverse"):
        names = [f"lstm.weight_{side}_{layer}" for side in ("ih", "hh")]
        weights = torch.cat([run.targets[name].matrix().flatten() for name in names])
        assert sum(missing[name] for name in names) == int(0.75 * weights.numel())
    assert missing["lstm.weight_ih_l0"] < 0.5 * 48 * 8
    assert missing["embedding.weight"] == 96
    assert missing["head.weight"] == 288
    assert not any("bias" in name for name in missing)


def test_embeddings_and_heads_stay_dense_unless_asked_for():
    model = nn.ModuleDict({**language_model(), "projection": nn.Linear(16, 8)})
    run = GradualMagnitudePruning(sparsity=0.5, end=0).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert set(run.targets) == {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"}


def test_tied_weights_are_pruned_once():
    model = language_model()
    model["out"] = nn.Linear(8, 16, bias=False)
    model["out"].weight = model["embedding"].weight
    method = GradualMagnitudePruning(sparsity=0.5, end=0, heads=True, embeddings=True)
    run = method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [name for name in run.targets if name in ("embedding.weight", "out.weight")] == ["embedding.weight"]
    assert zeros(run)["embedding.weight"] == 64
    assert run.targets["embedding.weight"].aliases == ("out.weight",)


def test_layers_are_left_out_by_role_and_by_name():
    def targets(**options):
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        )
        return [t.name for t in GradualMagnitudePruning(heads=True, **options).targets(model)]

    assert targets(keep=("first", "last")) == ["1.weight", "3.weight", "4.weight"]
    assert targets(keep=("convolution",)) == ["3.weight", "4.weight", "5.weight"]
    assert targets(keep=("linear",), exclude=("1",)) == ["0.weight"]
    with pytest.raises(TargetError, match="convolution, linear"):
        targets(keep=("linear", "convolution"))
    with pytest.raises(UnknownNameError, match="did you mean 'first'"):
        targets(keep=("frist",))


def test_roles_follow_what_a_layer_is_for():
    assert roles(language_model()) == {
        "embedding.weight": {"embedding", "first"},
        "lstm.weight_ih_l0": {"recurrent"},
        "lstm.weight_hh_l0": {"recurrent"},
        "head.weight": {"linear", "last"},
    }


def test_a_pattern_with_its_own_sparsity_comes_at_the_end():
    found = []
    model = nn.Sequential(nn.Linear(20, 24), nn.Linear(24, 4))
    run = train(
        model,
        GradualMagnitudePruning(sparsity=0.5, end=4, every=1, pattern="2:4"),
        6,
        lambda run: found.append(run.sparsity),
    )
    assert found == [0, 0, 0, 0.5, 0.5, 0.5]
    assert (run.mask("0.weight").unflatten(1, (-1, 4)).sum(2) == 2).all()


def test_random_scores_are_a_control_that_a_seed_repeats():
    masks = []
    for seed in (0, 0, 1):
        method = GradualMagnitudePruning(sparsity=0.7, end=6, every=2, score="random", seed=seed)
        masks.append(train(network(), method, 6).masks)
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]
    assert masks[2].layer_sparsity() == {"0.weight": 0.7, "2.weight": 0.7}


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"sparsity": 1.0}, SparsityError, r"\[0, 1\)"),
        ({"begin": 10, "end": 9}, ConfigurationError, "begin, end and every are 10, 9"),
        ({"every": 0}, ConfigurationError, "every"),
        ({"initial_sparsity": 0.95}, ConfigurationError, "initial_sparsity"),
        ({"score": "gradient"}, ConfigurationError, "magnitude or random"),
        ({"scope": "row"}, ConfigurationError, "scope"),
        ({"pattern": "2:4"}, SparsityError, "2:4"),
        ({"pattern": "5:4"}, PatternError, "5:4"),
    ],
)
def test_impossible_settings_are_refused(options, error, named):
    with pytest.raises(error, match=named):
        GradualMagnitudePruning(**{"sparsity": 0.9} | options)


def test_a_damaged_weight_and_a_model_without_layers_are_named():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        GradualMagnitudePruning(sparsity=0.5, end=0).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TargetError):
        GradualMagnitudePruning(sparsity=0.5, exclude=("*",)).attach(
            network(), torch.optim.SGD(model.parameters(), lr=0.1)
        )


def test_torchs_own_sparsifier_on_the_same_ramp_gives_the_same_masks_and_weights_bit_for_bit():
    from torch.ao.pruning import WeightNormSparsifier

    ours, theirs = network(), network()
    method = GradualMagnitudePruning(sparsity=0.9, begin=4, end=20, every=4)
    layers = ("0", "2")
    peer = WeightNormSparsifier(sparse_block_shape=(1, 1))
    peer.prepare(theirs, [{"tensor_fqn": f"{layer}.weight"} for layer in layers])
    peer.enable_mask_update = False
    one = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    run = method.attach(ours, one)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 31):
        x, y = torch.randn(16, 20, generator=generator), torch.randint(5, (16,), generator=generator)
        for model, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        if step in (8, 12, 16, 20):
            # it rounds where we cut off: ask it for whole weights
            for group in peer.groups:
                size = group["module"].weight.numel()
                ramp = 0.9 * (1 - (1 - (step - 4) / 16) ** 3) if step < 20 else 0.9
                group["sparsity_level"] = int(Fraction(repr(ramp)) * size) / size
            peer.enable_mask_update = True
            peer.step()
            peer.enable_mask_update = False
        for layer in layers:
            mask = theirs.get_submodule(layer).parametrizations.weight[0].mask
            assert torch.equal(run.mask(f"{layer}.weight"), mask.bool()), (step, layer)
            assert torch.equal(ours.get_submodule(layer).weight, theirs.get_submodule(layer).weight + 0.0), (
                step,
                layer,
            )


def test_footprint_counts_values_and_what_says_where_they_are():
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30))
    vectors = 4 * (30 + 30 + 30 + 30 + 30) + 8
    with torch.no_grad():
        model[0].weight.zero_().view(-1)[::10] = 1  # 120 of 1200
    assert footprint(model, "dense") == 4 * 1200 + vectors
    assert footprint(model, "bitmask") == 4 * 120 + 150 + vectors
    assert footprint(model, "csr16") == 6 * 120 + 4 * 31 + vectors
    assert footprint(model, "csr32") == 8 * 120 + 4 * 31 + vectors
    assert footprint(model.to(torch.bfloat16), "bitmask") == 2 * 120 + 150 + (vectors - 8) // 2 + 8


def test_footprint_never_exceeds_dense_and_counts_tied_weights_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    assert footprint(model) == footprint(model, "dense") == 144
    with pytest.raises(ConfigurationError, match="'csr64'"):
        footprint(model, "csr64")
    wide = nn.Linear(70_000, 1, bias=False)
    nn.init.zeros_(wide.weight)
    with pytest.raises(ConfigurationError, match=r"weight has 70000 weights.*csr32"):
        footprint(wide, "csr16")
    assert footprint(wide, "csr32") == 8

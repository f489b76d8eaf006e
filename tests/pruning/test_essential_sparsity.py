from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer
from gossamer.core.masks import MaskSet
from gossamer.core.selection import dropped_count
from gossamer.errors import (
    ConfigurationError,
    ModelError,
    NonFiniteError,
    PatternError,
    SparsityError,
    TargetError,
    UnknownNameError,
)
from gossamer.pruning.essential_sparsity import EssentialMagnitude, essential_sparsity, pattern_ladder
from gossamer.pruning.one_shot import one_shot_masks


def network(seed=0, width=32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def zeros(model):
    weights = [model[0].weight, model[2].weight]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def cliff(at):
    """Quality that is flat up to a sparsity and then falls steeply."""
    return lambda model: 0.9 - 0.01 * min(zeros(model), at) - 3 * max(0.0, zeros(model) - at)


def bits(model):
    return {name: value.clone().view(torch.uint8) for name, value in model.state_dict().items()}


def linear_model():
    """Two layers of 4 × 4 whose weights are 1 … 16 and 0.1 … 1.6, and a head."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 17).view(4, 4))
        model[1].weight.copy_(torch.arange(1.0, 17).view(4, 4) / 10)
    return model


@pytest.mark.parametrize("at", [0.32, 0.5, 0.68])
def test_a_known_cliff_is_found_by_both_estimators(at):
    result = essential_sparsity(network(), cliff(at))
    assert result.knee.position == pytest.approx(at, abs=0.03)
    # between the last point on the plateau and the next one
    assert at - 0.05 <= result.es <= at + 0.05
    assert result.reached
    assert result.knee.ratio > 100


def test_a_quality_that_never_falls_gives_a_lower_bound():
    result = essential_sparsity(network(), lambda model: 1.0, sparsities=(0.2, 0.5, 0.8))
    assert not result.reached
    assert result.es == pytest.approx(0.8, abs=0.001)
    assert "≥" in repr(result)


@pytest.mark.parametrize("finetune", [None, lambda model, masks: None])
def test_the_model_keeps_every_bit(finetune):
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before = bits(model)
    training = model.training
    essential_sparsity(model, cliff(0.5), sparsities=(0.3, 0.6), finetune=finetune, seeds=2)
    pattern_ladder(model, cliff(0.5), ("1:2",), finetune=finetune)
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())
    assert model.training == training


def test_the_model_keeps_every_bit_when_the_evaluation_fails():
    model = network()
    before = bits(model)
    with pytest.raises(NonFiniteError, match=r"nan at sparsity 0\.5"):
        essential_sparsity(model, lambda m: math.nan if zeros(m) > 0.4 else 1.0, sparsities=(0.25, 0.5, 0.75))
    assert all(torch.equal(value, before[name]) for name, value in bits(model).items())


def test_global_scores_compete_across_layers_and_layer_scores_within():
    model = linear_model()
    everywhere = one_shot_masks(model, 0.5)
    # the 16 smallest of 32 are 0.1 … 1.5 and the 1.0 of the first layer
    assert everywhere["1.weight"].flatten().nonzero().tolist() == [[15]]
    assert (~everywhere["0.weight"]).flatten().nonzero().tolist() == [[0]]
    assert everywhere.sparsity == 0.5
    within = one_shot_masks(model, 0.5, scope="layer")
    assert [int(mask.sum()) for mask in within.values()] == [8, 8]
    assert torch.equal(within["0.weight"], model[0].weight > 8)
    rows = one_shot_masks(model, 0.5, scope="row")
    assert rows["0.weight"].sum(1).tolist() == [2, 2, 2, 2]


def test_a_floor_keeps_the_largest_weights_of_a_badly_scaled_layer():
    model = linear_model()
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    assert int(one_shot_masks(model, 0.5)["1.weight"].sum()) == 0
    masks = one_shot_masks(model, 0.5, min_density=0.25)
    assert torch.equal(masks["1.weight"].flatten().nonzero().flatten(), torch.arange(12, 16))
    assert masks.sparsity == 0.5
    result = gossamer.prune(model, "global-magnitude", sparsity=0.5, min_density=0.25, progress=False)
    assert result.masks == masks


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 1), st.integers(0, 1000))
def test_the_floor_holds_in_every_layer_at_the_exact_sparsity(sparsity, share, seed):
    model = network(seed, width=13)
    floor = share * (1 - sparsity)
    masks = one_shot_masks(model, sparsity, min_density=floor)
    assert masks.kept == masks.total - dropped_count(masks.total, sparsity)
    for name, mask in masks.items():
        assert int(mask.sum()) >= math.floor(floor * mask.numel()), name


def test_the_pruner_equals_the_global_masks_and_zeroes_them():
    model = network()
    masks = one_shot_masks(model, 0.37)
    result = EssentialMagnitude(sparsity=0.37).prune(model, progress=False)
    assert result.masks == masks
    assert not masks.violations(model)


def test_a_floor_needs_competition_between_layers_and_room():
    with pytest.raises(ConfigurationError, match="unstructured:model"):
        EssentialMagnitude(pattern="2:4", min_density=0.1)
    with pytest.raises(SparsityError, match=r"\[0, 0\.1\]"):
        EssentialMagnitude(sparsity=0.9, min_density=0.2)
    with pytest.raises(SparsityError, match="min_density"):
        essential_sparsity(network(), lambda m: pytest.fail("evaluated"), sparsities=(0.5, 0.9), min_density=0.2)


@pytest.mark.parametrize("scope", ["global", "layer", "row", "erdos-renyi", "erdos-renyi-kernel"])
def test_random_masks_follow_the_seed_and_have_the_sparsity(scope):
    model = network()
    a, b, again = (one_shot_masks(model, 0.6, score="random", scope=scope, seed=s) for s in (0, 1, 0))
    assert a == again
    assert a != b
    assert a.sparsity == pytest.approx(0.6, abs=0.02)


def test_erdos_renyi_gives_small_layers_more_density():
    masks = one_shot_masks(network(), 0.8, score="random", scope="erdos-renyi")
    shares = masks.layer_sparsity()
    assert shares["0.weight"] < shares["2.weight"]


def test_a_score_may_be_a_function_of_the_layer():
    model = linear_model()
    masks = one_shot_masks(model, 0.5, score=lambda target: -target.matrix().abs().float(), scope="layer")
    assert torch.equal(masks["0.weight"], model[0].weight <= 8)


def test_random_pruning_is_drawn_anew_for_each_seed_and_gives_an_interval():
    model = network()
    inputs = torch.randn(64, 16)
    target = model(inputs).detach()

    def agreement(pruned):
        with torch.no_grad():
            return -float((pruned(inputs) - target).norm() / target.norm())

    result = essential_sparsity(
        model, agreement, score="random", seeds=4, tolerance=0.4, relative=False, sparsities=np.linspace(0, 0.9, 10)
    )
    assert result.quality.shape == (4, 10)
    assert len(np.unique(result.quality[:, 5])) == 4
    low, high = result.ci
    assert low <= result.es <= high
    assert low < high
    magnitude = essential_sparsity(model, agreement, tolerance=0.4, relative=False, sparsities=np.linspace(0, 0.9, 10))
    assert magnitude.es > result.es
    assert magnitude.ci is None


def test_finetuning_trains_a_copy_under_static_masks_at_every_point():
    model = network()
    seen = []

    def finetune(copy, masks):
        assert copy is not model
        steps = torch.optim.AdamW(copy.parameters(), lr=0.1)
        copy(torch.randn(8, 16)).square().sum().backward()
        steps.step()
        seen.append((masks.sparsity, bool(masks.violations(copy))))

    qualities = []

    def evaluate(trained):
        qualities.append(trained[4].bias.sum().item())
        return zeros(trained) * -1.0

    result = essential_sparsity(model, evaluate, sparsities=(0.25, 0.5), finetune=finetune, seeds=(3, 7))
    assert seen == [(0.0, False)] * 2 + [(0.25, False)] * 2 + [(0.5, False)] * 2
    assert result.sparsities.tolist() == [0, 0.25, 0.5]
    assert -result.quality[0] == pytest.approx([0, 0.25, 0.5])
    assert all(value != model[4].bias.sum().item() for value in qualities)


def test_finetuning_may_return_another_module():
    other = network(9)
    result = essential_sparsity(
        network(), lambda m: 1.0 if m is other else 0.0, sparsities=(0.5,), finetune=lambda copy, masks: other
    )
    assert result.quality.tolist() == [[1.0, 1.0]]


def test_randomness_inside_follows_the_seed_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a = essential_sparsity(network(), lambda m: float(torch.rand(())), sparsities=(0.5,), seeds=2)
    torch.manual_seed(5)
    b = essential_sparsity(network(), lambda m: float(torch.rand(())), sparsities=(0.5,), seeds=2)
    assert a.quality.tolist() == b.quality.tolist()
    assert a.quality[0, 0] != a.quality[1, 0]
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    torch.manual_seed(5)
    essential_sparsity(model, lambda m: float(torch.rand(())), sparsities=(0.5,))
    assert torch.equal(torch.rand(1), expected)


def test_the_tolerance_is_relative_or_in_units_of_quality():
    def quality(model):
        return 100 * (1 - zeros(model))

    grid = (0.25, 0.5, 0.75)
    assert essential_sparsity(network(), quality, sparsities=grid, tolerance=0.4).es == pytest.approx(0.4)
    absolute = essential_sparsity(network(), quality, sparsities=grid, tolerance=30, relative=False)
    assert absolute.es == pytest.approx(0.3)
    assert absolute.threshold == pytest.approx(70)


def test_one_unlucky_evaluation_ends_the_range_unless_the_curve_is_levelled():
    def quality(model):
        return 1.0 - (0.02 if abs(zeros(model) - 0.2) < 0.01 else 0) - (zeros(model) > 0.75)

    grid = np.linspace(0, 0.9, 10)
    assert essential_sparsity(network(), quality, sparsities=grid).es < 0.2
    assert essential_sparsity(network(), quality, sparsities=grid, monotone=True).es > 0.69


def test_block_patterns_have_a_sweep_and_nm_patterns_a_ladder():
    model = network()
    result = essential_sparsity(model, cliff(0.5), pattern="4x1", sparsities=np.linspace(0, 0.9, 7))
    assert result.knee.position == pytest.approx(0.5, abs=0.05)
    ladder = pattern_ladder(model, cliff(0.6), tolerance=0.01)
    assert [point.pattern for point in ladder] == ["1:2", "2:4", "4:8", "1:4"]
    assert [point.sparsity for point in ladder] == [0.5, 0.5, 0.5, 0.75]
    assert [point.within for point in ladder] == [True, True, True, False]
    assert ladder[3].drop == pytest.approx((0.006 + 3 * 0.15) / 0.9)
    with pytest.raises(ConfigurationError, match="pattern_ladder"):
        essential_sparsity(model, cliff(0.5), pattern="2:4")
    with pytest.raises(SparsityError, match="open"):
        pattern_ladder(model, cliff(0.5), ("unstructured",))
    with pytest.raises(PatternError, match="multiple of 5"):
        pattern_ladder(model, cliff(0.5), ("2:5",))


def test_layers_and_the_emptiest_of_them_are_reported():
    model = linear_model()
    result = essential_sparsity(model, lambda m: 1.0, sparsities=(0.25, 0.5))
    assert [set(layers) for layers in result.layers] == [{"0.weight", "1.weight"}] * 3
    assert result.lowest_density[0] == 1
    assert result.lowest_density[2] == pytest.approx(1 - max(result.layers[2].values()))
    assert result.lowest_density[2] < 0.5


def test_a_result_becomes_json_and_a_picture(tmp_path):
    result = essential_sparsity(network(), cliff(0.5), seeds=2)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["es"] == result.es
    assert stored["settings"]["tolerance"] == 0.01
    assert stored["knee"]["position"] == result.knee.position
    figure = result.plot()
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any(f"{result.es:.2f}" in label for label in labels)
    figure.savefig(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"sparsities": (0.5, 0.2)}, SparsityError, "0.2 follows 0.5"),
        ({"sparsities": (0.2, 0.2)}, SparsityError, "0.2 follows 0.2"),
        ({"sparsities": (0.2, 1.0)}, SparsityError, r"sparsities\[1\] is 1.0"),
        ({"sparsities": (0.0,)}, SparsityError, "nothing above 0"),
        ({"sparsities": (0.5, 0.5001)}, SparsityError, "coarser grid"),
        ({"tolerance": -0.1}, ConfigurationError, "tolerance is -0.1"),
        ({"tolerance": math.nan}, ConfigurationError, "tolerance is nan"),
        ({"seeds": 0}, ConfigurationError, "seeds is 0"),
        ({"seeds": (1, 1)}, ConfigurationError, "different integers"),
        ({"seeds": 1.5}, ConfigurationError, "seeds is 1.5"),
        ({"seeds": "ab"}, ConfigurationError, "different integers"),
        ({"tolerance": None}, ConfigurationError, "tolerance is None"),
        ({"score": lambda target: target.matrix().sum(1)}, ConfigurationError, r"score of 0\.weight is \(32,\)"),
        ({"score": lambda target: None}, ConfigurationError, r"NoneType.*shape \(32, 16\)"),
        ({"score": "magnitud"}, UnknownNameError, "did you mean 'magnitude'"),
        ({"scope": "layers"}, UnknownNameError, "did you mean 'layer'"),
        ({"include": ("nothing*",)}, TargetError, "no layer to prune"),
    ],
)
def test_bad_settings_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        essential_sparsity(network(), lambda m: 1.0, **changes)


def test_an_evaluation_that_gives_no_number_is_refused():
    with pytest.raises(ConfigurationError, match="evaluate returned NoneType"):
        essential_sparsity(network(), lambda m: None)
    assert essential_sparsity(network(), lambda m: torch.tensor(1.0), sparsities=(0.5,)).quality.tolist() == [[1, 1]]


def test_weights_that_are_nowhere_are_named():
    with torch.device("meta"):
        model = network()
    with pytest.raises(ModelError, match=r"0\.weight is on the meta device"):
        one_shot_masks(model, 0.5)


def test_a_level_curve_has_no_slope_ratio():
    result = essential_sparsity(network(), lambda model: 0.3)
    assert result.knee.ratio == 1
    assert result.knee.explained == 0


def test_damaged_weights_are_named():
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        essential_sparsity(model, lambda m: 1.0)


def test_masks_are_a_mask_set_of_the_model():
    masks = one_shot_masks(network(), 0.5)
    assert isinstance(masks, MaskSet)
    assert set(masks) == {"0.weight", "2.weight"}

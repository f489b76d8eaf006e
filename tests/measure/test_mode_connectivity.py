from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.core.permutations import align_permutation
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, TargetError, UnknownNameError
from gossamer.measure.barrier_theory import barrier_curvature, predict_barrier
from gossamer.measure.landscape_forks import (
    SplittingValley,
    connected_from,
    fork_experiment,
    look_steps,
    ridge_profile,
    roll,
)
from gossamer.measure.loss_surface import LossSurface, between, difference
from gossamer.measure.mode_connectivity import (
    barrier,
    barrier_on,
    error_rate,
    layers_of,
    layerwise_barrier,
    linear_path,
    rank_correlation,
)

ROOT = math.sqrt(2)
LEFT, RIGHT = ({"place": torch.tensor([side * ROOT, 2.0], dtype=torch.float64)} for side in (-1, 1))


def perceptron(seed=0, activation=nn.Tanh, width=12):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, 3))


def convolutional(seed=0):
    torch.manual_seed(seed)
    block = [nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*block, nn.Linear(6 * 4, 3))


def data(*shape, count=40, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def surface(model, batches=None, **options):
    return LossSurface(model, nn.functional.cross_entropy, batches or [data(5)], **options)


# ---------------------------------------------------------------------------------------------- the toy, by hand


def test_the_toy_has_a_barrier_of_exactly_one():
    found = barrier(SplittingValley(), LEFT, RIGHT, lambda out, _: out.mean(), [(torch.zeros(1, 1), torch.zeros(1, 1))])
    assert found.height == pytest.approx(1, abs=1e-6)
    assert found.argmax == pytest.approx(0.5, abs=1e-6)
    assert found.losses[0] == found.losses[-1] == pytest.approx(-0.5, abs=1e-6)
    assert found.lowest == 0


def test_predictions_on_the_toy_are_those_calculated_by_hand():
    toy = SplittingValley().surface()
    assert predict_barrier(toy, LEFT, RIGHT, "midpoint") == pytest.approx(2, abs=1e-6)
    assert predict_barrier(toy, LEFT, RIGHT, "endpoints") == pytest.approx(4, abs=1e-6)
    fork = {"place": torch.tensor([0.0, -1.0], dtype=torch.float64)}  # H_xx = 1 there: a valley, and no ridge yet
    assert predict_barrier(toy, LEFT, RIGHT, "fork", fork=fork) == pytest.approx(-1, abs=1e-6)
    assert predict_barrier(toy, LEFT, RIGHT, "trace", samples=64) == pytest.approx(8 * (5 + 5) / 32, rel=0.2)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_the_identity_is_exact_on_the_toy(order, alpha):
    toy = SplittingValley().surface()
    exact = 1 - (2 * alpha - 1) ** 2 * (2 - (2 * alpha - 1) ** 2)  # with x = √2 (2α − 1): ¼ x⁴ − x² + 1
    found = barrier_curvature(toy, LEFT, RIGHT, alpha=alpha, nodes=8, order=order)
    assert found.barrier == pytest.approx(exact, abs=1e-6)
    assert found.nodes == tuple(sorted(found.nodes))


def test_runs_that_part_before_the_split_end_on_both_sides_of_the_ridge():
    before, after = fork_experiment(SplittingValley(), roll, 700, [5, 90], SplittingValley().surface(), looks=9)
    assert before.a["place"].tolist() == pytest.approx([ROOT, 2], abs=1e-6)
    assert before.b["place"].tolist() == pytest.approx([-ROOT, 2], abs=1e-6)
    for branch in (after.a, after.b):
        assert branch["place"].tolist() == pytest.approx([-ROOT, 2], abs=1e-6)
    toy = SplittingValley().surface()
    heights = {
        fork.step: barrier_on(lambda share, fork=fork: toy.value(between(fork.a, fork.b, share))).height
        for fork in (before, after)
    }
    assert heights[5] == pytest.approx(1, abs=1e-6)
    assert heights[90] == pytest.approx(0, abs=1e-6)
    assert connected_from(heights, 0.01) == 90


def test_the_ridge_shows_in_the_curvature_before_it_shows_in_the_barrier():
    (fork,) = fork_experiment(SplittingValley(), roll, 700, [5], SplittingValley().surface(), looks=11)
    assert fork.records[0].curvature > 0
    assert fork.ridge_step is not None
    assert fork.barrier_step is not None
    assert fork.ridge_step <= fork.barrier_step
    last = fork.records[-1]
    assert last.ridge == pytest.approx(1, abs=1e-6)
    assert last.distance == pytest.approx(2 * ROOT, abs=1e-6)
    assert last.curvature == pytest.approx(-2, abs=1e-6)
    assert last.bend == pytest.approx(-2 + 0.5 * (0.1 * 2 * ROOT) ** 2, abs=1e-6)
    angle = 2 * math.degrees(math.atan2(ROOT, 2 - float(fork.parent["place"][1])))
    assert last.angle == pytest.approx(angle, abs=0.01)


def test_slices_across_the_way_turn_from_valley_to_ridge():
    (fork,) = fork_experiment(SplittingValley(), roll, 700, [5], SplittingValley().surface())
    profile = ridge_profile(SplittingValley().surface(), fork, along=(0.0, 1.0), across=(-0.01, 0.0, 0.01))
    valley, ridge = profile.curvature()
    assert valley > 0 > ridge
    assert ridge == pytest.approx(-2 * 2, rel=1e-3)  # H_xx ‖½Δ‖²
    with pytest.raises(ConfigurationError, match="across is"):
        ridge_profile(SplittingValley().surface(), fork, across=(0.0, 1.0))


# ---------------------------------------------------------------------------------------------- the line


def test_a_convex_loss_sags_and_has_no_barrier():
    found = barrier_on(lambda alpha: (alpha - 0.3) ** 2, n=11)
    assert found.height == 0
    assert found.lowest == pytest.approx(-0.25, abs=1e-12)
    assert found.at(0.5) == pytest.approx(-0.25)
    with pytest.raises(ConfigurationError, match="was not measured"):
        found.at(0.123)


def test_the_chord_and_not_the_mean_is_subtracted():
    assert barrier_on(lambda alpha: 5 * alpha).height == pytest.approx(0, abs=1e-12)


def test_refining_finds_the_top_between_two_points():
    def peak(alpha):
        return math.exp(-(((alpha - 0.437) / 0.05) ** 2))

    assert barrier_on(peak, n=11, refine=0).height < 0.6
    fine = barrier_on(peak, n=11, refine=20)
    assert fine.height == pytest.approx(1, abs=1e-4)
    assert fine.argmax == pytest.approx(0.437, abs=1e-3)


def test_loss_and_error_on_the_line_against_a_loop_written_out():
    a, b = perceptron(0), perceptron(1)
    inputs, labels = data(5)
    for measure in (nn.functional.cross_entropy, error_rate):
        batches = [(inputs[:30], labels[:30]), (inputs[30:], labels[30:])]  # of unequal sizes
        found = barrier(a, a, b, measure, batches, n=5, refine=0)
        for alpha, loss in zip(found.alphas, found.losses):
            middle = copy.deepcopy(a).double()
            for ours, one, other in zip(middle.parameters(), a.parameters(), b.parameters()):
                ours.data = (1 - alpha) * one.data.double() + alpha * other.data.double()
            assert loss == pytest.approx(measure(middle(inputs.double()), labels).item(), abs=1e-9)


def test_statistics_of_batch_norm_are_measured_anew_at_every_point():
    a, b = convolutional(0), convolutional(1)
    inputs, labels = data(1, 6, 6)
    inputs = 3 * inputs + 1
    for model in (a, b):
        model[1].running_mean.fill_(-9)
    fresh = barrier(a, a, b, nn.functional.cross_entropy, [(inputs, labels)], n=3)
    stale = barrier(a, a, b, nn.functional.cross_entropy, [(inputs, labels)], n=3, recalibrate_bn=False)
    model = copy.deepcopy(a).double().train()
    expected = float(nn.functional.cross_entropy(model(inputs.double()), labels))
    assert fresh.losses[0] == pytest.approx(expected, rel=0.01)  # but for the unbiased variance
    assert abs(stale.losses[0] - expected) > 0.1
    assert float(a[1].running_mean[0]) == -9


def test_a_path_between_different_models_is_refused_by_name():
    with pytest.raises(ConfigurationError, match=r"'0\.bias' is \(12,\) and \(7,\)"):
        linear_path(perceptron(), perceptron(width=7))
    path = linear_path(perceptron(0), perceptron(1))
    assert torch.equal(path(1.0)["2.weight"], perceptron(1)[2].weight)
    with pytest.raises(TargetError, match="missing"):
        surface(perceptron()).point({})


def test_bad_numbers_and_missing_data_are_refused():
    with pytest.raises(CalibrationError, match="no batch"):
        LossSurface(perceptron(), nn.functional.cross_entropy, [])
    with pytest.raises(ConfigurationError, match="n and refine are 2"):
        barrier_on(lambda alpha: 0.0, n=2)
    with pytest.raises(ConfigurationError, match="kind is 'guess'"):
        predict_barrier(surface(perceptron()), perceptron(), perceptron(1), "guess")
    with pytest.raises(ConfigurationError, match="give fork"):
        predict_barrier(surface(perceptron()), perceptron(), perceptron(1), "fork")
    with pytest.raises(ConfigurationError, match="nodes"):
        barrier_curvature(surface(perceptron()), perceptron(), perceptron(1), nodes=3)
    diverged = perceptron()
    diverged[0].weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="diverged"):
        surface(perceptron()).value(surface(perceptron()).point(diverged))


# ---------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("make", [perceptron, convolutional])
def test_slope_and_curvature_against_differences(make):
    a, b = make(0), make(1)
    batches = [data(5)] if make is perceptron else [data(1, 6, 6)]
    there = surface(a, batches, statistics="batch")
    point, direction = there.point(a), difference(there.point(a), there.point(b))

    def along(step):
        return there.value({name: part + step * direction[name] for name, part in point.items()})

    h = 1e-4
    assert there.slope(point, direction) == pytest.approx((along(h) - along(-h)) / (2 * h), rel=1e-5)
    second = (along(h) + along(-h) - 2 * along(0)) / h**2
    assert there.curvature(point, direction) == pytest.approx(second, rel=1e-4)


def test_hessian_products_and_trace_against_the_whole_hessian():
    model = nn.Linear(5, 3)
    there = surface(model)
    point = there.point(model)
    names = list(point)
    flat = torch.cat([point[name].flatten() for name in names])

    def loss(vector):
        weight, bias = vector[:15].view(3, 5), vector[15:]
        inputs, labels = there.batches[0]
        return nn.functional.cross_entropy(inputs @ weight.T + bias, labels)

    assert names == ["weight", "bias"]
    whole = torch.autograd.functional.hessian(loss, flat)
    direction = {name: torch.randn_like(part) for name, part in point.items()}
    product = there.times_hessian(point, direction)
    expected = whole @ torch.cat([direction[name].flatten() for name in names])
    torch.testing.assert_close(torch.cat([product[name].flatten() for name in names]), expected)
    assert there.trace(point, samples=400) == pytest.approx(float(whole.trace()), rel=0.1)


@pytest.mark.parametrize(("make", "scale"), [(perceptron, 4), (convolutional, 2)])
def test_integrated_curvature_gives_the_barrier(make, scale):
    a, b = make(0), make(1)
    for model in (a, b):
        for parameter in model.parameters():
            parameter.data *= scale  # so that the line is far from a parabola
    batches = [data(5)] if make is perceptron else [data(1, 6, 6)]
    there = surface(a, batches, statistics="batch")
    for alpha, nodes in ((0.5, 32), (0.25, 64)):
        truth = there.value(between(there.point(a), there.point(b), alpha))
        truth -= (1 - alpha) * there.value(there.point(a)) + alpha * there.value(there.point(b))
        assert abs(truth) > 0.01
        for order in (1, 2):
            found = barrier_curvature(there, a, b, alpha=alpha, nodes=nodes, order=order)
            assert found.barrier == pytest.approx(truth, rel=0.02)


def test_relu_hides_curvature_in_its_kinks_and_the_first_order_form_finds_it():
    a, b = perceptron(0, nn.ReLU), perceptron(1, nn.ReLU)
    there = surface(a)
    ends = [there.point(model) for model in (a, b)]
    truth = there.value(between(*ends, 0.5)) - sum(map(there.value, ends)) / 2
    first, second = (barrier_curvature(there, a, b, nodes=64, order=order).barrier for order in (1, 2))
    assert first == pytest.approx(truth, rel=0.05)
    assert abs(second - truth) > 2 * abs(first - truth)


# ---------------------------------------------------------------------------------------------- layers


def test_a_normalisation_belongs_to_the_layer_before_it():
    assert layers_of(convolutional()) == {
        "0": ["0.weight", "1.weight", "1.bias"],
        "5": ["5.weight", "5.bias"],
    }


def test_moving_all_layers_cumulatively_is_the_whole_barrier():
    a, b = perceptron(0), perceptron(1)
    rows = layerwise_barrier(a, a, b, nn.functional.cross_entropy, [data(5)], cumulative=True)
    whole = barrier(a, a, b, nn.functional.cross_entropy, [data(5)], n=11, refine=0)
    assert [row["layer"] for row in rows] == ["0", "2", "4"]
    assert rows[-1]["barrier"] == pytest.approx(whole.height, abs=1e-12)
    assert rows[-1]["middle"] == pytest.approx(whole.at(0.5), abs=1e-9)
    assert rows[0]["distance"] < rows[1]["distance"] < rows[2]["distance"]


@pytest.mark.parametrize("rest", ["a", "b", "mean"])
def test_the_last_layer_alone_is_convex_and_predicted_exactly_when_the_loss_is_quadratic(rest):
    a, b = perceptron(0), perceptron(1)
    inputs, _ = data(5)
    targets = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    rows = layerwise_barrier(a, a, b, nn.functional.mse_loss, [(inputs, targets)], rest=rest)
    assert rows[-1]["barrier"] == 0
    assert rows[-1]["middle"] == pytest.approx(-rows[-1]["curvature"] / 8, rel=1e-6)
    assert rows[-1]["midpoint"] == pytest.approx(rows[-1]["middle"], rel=1e-6)
    # from the ends a parabola looks like its own mirror image: there the sign is that of a double well
    assert rows[-1]["start"] == pytest.approx(rows[-1]["curvature"] / 8, rel=1e-6)


def test_unknown_layers_are_named():
    with pytest.raises(UnknownNameError, match="did you mean"):
        layerwise_barrier(
            perceptron(), perceptron(), perceptron(1), nn.functional.cross_entropy, [data(5)], layers={"x": ["0.weigt"]}
        )


def test_rank_correlation_worked_by_hand():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 1e9]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert rank_correlation([1, 1], [1, 2]) == 0


# ---------------------------------------------------------------------------------------------- permutations


@pytest.mark.parametrize("make", [lambda seed: perceptron(seed, nn.ReLU), convolutional])
def test_a_network_whose_units_were_shuffled_is_put_in_order_again(make):
    from gossamer.core.channel_groups import find_channel_groups

    model = make(0)
    shuffled = copy.deepcopy(model)
    for group in find_channel_groups(shuffled):
        if group.free and group.outputs():
            group.permute_(shuffled, torch.randperm(group.size))
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), shuffled.parameters()))
    aligned = align_permutation(model, shuffled)
    for name, tensor in aligned.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_alignment_keeps_the_function_and_brings_the_weights_nearer():
    a, b = convolutional(0).eval(), convolutional(1).eval()
    inputs, _ = data(1, 6, 6)
    aligned = align_permutation(a, b)

    def distance(model):
        return sum(float((p - q).square().sum()) for p, q in zip(a.parameters(), model.parameters()))

    torch.testing.assert_close(aligned(inputs), b(inputs))
    assert distance(aligned) < distance(b)
    with pytest.raises(TargetError, match=r"0\.bias"):
        align_permutation(perceptron(width=12), perceptron(width=7))


# ---------------------------------------------------------------------------------------------- forks


def test_looks_get_rarer_with_the_distance_from_the_fork():
    assert look_steps(10, 74, 4) == [18, 26, 42, 74]
    assert look_steps(0, 3, 8) == [1, 2, 3]


def test_both_branches_start_from_the_same_state_and_memory():
    calls = []

    def train(model, first, last, order, memory):
        calls.append((first, last, order, memory))
        model.place.data[1] += 1
        return [*(memory or []), order]

    forks = fork_experiment(SplittingValley(0, 0), train, 8, [4, 2], SplittingValley().surface(), looks=1, pair=1)
    assert [fork.step for fork in forks] == [2, 4]
    assert calls == [
        (0, 2, 3, None),
        (2, 8, 4, [3]),
        (2, 8, 5, [3]),
        (2, 4, 3, [3]),
        (4, 8, 4, [3, 3]),
        (4, 8, 5, [3, 3]),
    ]
    assert [float(fork.parent["place"][1]) for fork in forks] == [1, 2]
    with pytest.raises(ConfigurationError, match=r"\[0, 8\)"):
        fork_experiment(SplittingValley(), train, 8, [8], SplittingValley().surface())


def test_connection_must_last_to_the_latest_fork():
    assert connected_from({0: 1.0, 5: 0.0, 10: 0.2, 20: 0.0, 40: 0.0}, 0.01) == 20
    assert connected_from({0: 1.0}, 0.01) is None

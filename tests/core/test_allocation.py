from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import schedules
from gossamer.core.allocation import (
    ALLOCATIONS,
    allocate,
    around,
    erdos_renyi,
    erdos_renyi_kernel_plus,
    exact_counts,
    outlier_weighted,
    sensitivity_weighted,
    shares_of_highest,
    total_sparsity,
    uniform,
)
from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError

SHAPES = {"a": (64, 32), "b": (10, 300), "c": (8, 4, 3, 3), "d": (5, 7)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("kernel", [False, True])
def test_erdos_renyi_reaches_its_total(sparsity, kernel):
    result = erdos_renyi(SHAPES, sparsity, kernel=kernel)
    assert total_sparsity(result, SHAPES) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= value < 1 for value in result.values())


def test_erdos_renyi_by_hand():
    result = erdos_renyi({"wide": (10, 10), "narrow": (5, 5)}, 0.8)
    assert (1 - result["narrow"]) / (1 - result["wide"]) == pytest.approx(2.0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.98), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_weighted_allocations_reach_their_total(sparsity, values):
    given_values = dict(zip(SHAPES, values))
    for result in (
        outlier_weighted(given_values, SHAPES, sparsity),
        sensitivity_weighted(given_values, SHAPES, sparsity),
    ):
        assert total_sparsity(result, SHAPES) == pytest.approx(sparsity, abs=1e-5)
        assert all(0 <= value < 1 for value in result.values())


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.98))
def test_counts_are_exact(sparsity):
    counts = exact_counts(erdos_renyi(SHAPES, sparsity), SHAPES, sparsity)
    sizes = {"a": 2048, "b": 3000, "c": 288, "d": 35}
    zeros = sum(share * sizes[name] for name, share in counts.items())
    assert zeros == int(sum(sizes.values()) * sparsity + 1e-9)


def test_more_outliers_mean_fewer_zeros():
    result = outlier_weighted({"a": 0.1, "b": 0.0, "c": 0.05, "d": 0.0}, SHAPES, 0.5)
    assert result["a"] < result["c"] < result["b"]


def test_unknown_and_incomplete_allocations_are_named():
    with pytest.raises(UnknownNameError, match="did you mean 'uniform'"):
        allocate("unifrom", SHAPES, 0.5)
    with pytest.raises(UnknownNameError, match="'d'"):
        allocate({"a": 0.1, "b": 0.2, "c": 0.3}, SHAPES, 0.5)
    with pytest.raises(SparsityError, match="sparsity of d"):
        allocate(dict.fromkeys(SHAPES, 0.5) | {"d": 1.2}, SHAPES, 0.5)


@pytest.mark.parametrize("name", ["OneShot", "Linear", "Cubic", "Cosine", "Sine", "Geometric", "Ladder"])
def test_schedules_start_end_and_never_fall(name):
    schedule = getattr(schedules, name)(0.9, end=100, initial=0.2, begin=10)
    values = [schedule(step) for step in range(120)]
    assert values[:11] == [0.2] * 11
    assert values[100:] == [0.9] * 20
    assert all(later >= earlier for earlier, later in pairwise(values))


def test_a_schedule_that_ends_before_it_begins_is_refused():
    with pytest.raises(ConfigurationError, match="not after its beginning"):
        schedules.Cubic(0.9, end=5, begin=5)


MIXED = {"first": (8, 3, 3, 3), "middle": (16, 8, 3, 3), "last": (10, 16)}


def kept_of(sparsities, shapes):
    return sum((1 - sparsities[name]) * math.prod(shape) for name, shape in shapes.items())


@pytest.mark.parametrize("rule", sorted(ALLOCATIONS))
@given(sparsity=st.floats(0, 0.8), seed=st.integers(0, 10**6))
def test_every_rule_of_shapes_meets_the_budget(rule, sparsity, seed):
    generator = random.Random(seed)
    shapes = {
        "first": (4, 3, 3, 3),
        **{f"layer {i}": (generator.randint(20, 60), 40) for i in range(4)},
        "last": (4, 20),
    }
    found = allocate(rule, shapes, sparsity)
    assert all(0 <= value <= 1 for value in found.values())
    total = sum(math.prod(shape) for shape in shapes.values())
    assert kept_of(found, shapes) == pytest.approx((1 - sparsity) * total, rel=1e-6)


@pytest.mark.parametrize("rule", ["uniform", "erdos-renyi", "erdos-renyi-kernel"])
def test_the_order_of_layers_does_not_matter(rule):
    backwards = dict(reversed(MIXED.items()))
    assert allocate(rule, backwards, 0.7) == pytest.approx(allocate(rule, MIXED, 0.7))


def test_uniform_plus_spares_the_first_layer_and_from_a_fifth_on_the_last():
    gentle = allocate("uniform-plus", MIXED, 0.6)
    assert gentle["first"] == 0
    assert gentle["middle"] == gentle["last"] == pytest.approx(0.6 * 1528 / 1312)
    strong = allocate("uniform-plus", MIXED, 0.82)
    assert (strong["first"], strong["last"]) == (0, 0.8)
    assert strong["middle"] == pytest.approx((0.82 * 1528 - 0.8 * 160) / 1152)


def test_erk_plus_keeps_the_last_layer_and_spreads_the_rest_by_erk():
    found = allocate("erdos-renyi-kernel-plus", MIXED, 0.7)
    assert found["last"] == 0
    others = {name: MIXED[name] for name in ("first", "middle")}
    spread = allocate("erdos-renyi-kernel", others, 0.7 * 1528 / 1368)
    assert {name: found[name] for name in others} == pytest.approx(spread)
    half = erdos_renyi_kernel_plus(MIXED, 0.7, last_density=0.5)
    assert half["last"] == 0.5
    assert kept_of(half, MIXED) == pytest.approx(0.3 * 1528)


def test_the_power_takes_erdos_renyi_to_uniform_and_beyond():
    shapes = {"wide": (100, 100), "narrow": (10, 30)}
    assert erdos_renyi(shapes, 0.9, power=0) == pytest.approx(dict.fromkeys(shapes, 0.9))
    ratios = [erdos_renyi(shapes, 0.9, power=power)["wide"] for power in (0, 0.5, 1)]
    assert ratios == sorted(ratios)
    half = erdos_renyi(shapes, 0.95, power=0.5)
    assert (1 - half["narrow"]) / (1 - half["wide"]) == pytest.approx(((40 / 300) / (200 / 10_000)) ** 0.5)


def test_layers_with_a_sparsity_of_their_own_leave_the_rest_to_the_others():
    found = around({"last": 0.25}, MIXED, 0.5, uniform)
    assert found["last"] == 0.25
    assert found["first"] == found["middle"] == pytest.approx((764 - 40) / 1368)
    assert around({}, MIXED, 0.5, uniform) == uniform(MIXED, 0.5)
    with pytest.raises(SparsityError, match="middle have theirs"):
        around({"middle": 0.0}, MIXED, 0.5, uniform)
    with pytest.raises(SparsityError, match="middle have theirs"):
        around({"middle": 0.99}, MIXED, 0.5, uniform)


def test_shares_of_the_highest_scores_are_counts_of_one_ranking():
    scores = {"a": torch.tensor([[9.0, 1.0], [8.0, 2.0]]), "b": torch.tensor([[3.0, 7.0, 0.0, 4.0]])}
    assert shares_of_highest(scores, 0.5) == {"a": 0.5, "b": 0.5}
    assert shares_of_highest(scores, 0.625) == {"a": 0.5, "b": 0.75}

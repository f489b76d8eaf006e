from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import schedules
from gossamer.core.allocation import (
    allocate,
    erdos_renyi,
    exact_counts,
    outlier_weighted,
    sensitivity_weighted,
    total_sparsity,
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

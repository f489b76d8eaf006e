from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.core.changepoint import curve_interval, fit_knee, isotonic_decreasing, largest_jump, last_within
from gossamer.errors import ConfigurationError, NonFiniteError

GRID = np.linspace(0, 0.95, 20)


def broken_line(position, left, right, x=GRID):
    return np.where(x < position, left * (x - position), right * (x - position)) + 0.8


@given(
    position=st.floats(0.15, 0.8),
    left=st.floats(-0.2, 0.1),
    right=st.floats(-6.0, -1.0),
)
def test_knee_of_an_exact_broken_line_is_found_exactly(position, left, right):
    knee = fit_knee(GRID, broken_line(position, left, right))
    assert knee.position == pytest.approx(position, abs=1e-6)
    assert knee.left_slope == pytest.approx(left, abs=1e-6)
    assert knee.right_slope == pytest.approx(right, abs=1e-6)
    assert knee.value == pytest.approx(0.8, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("position", [0.3, 0.52, 0.7])
def test_knee_under_noise_is_off_by_less_than_three_hundredths(position, seed):
    noise = np.random.default_rng(seed).normal(0, 0.01, len(GRID))
    assert abs(fit_knee(GRID, broken_line(position, -0.05, -2) + noise).position - position) < 0.03


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=12))
def test_no_joint_on_a_fine_grid_beats_the_fit(values):
    x = np.arange(len(values), dtype=float)
    y = np.array(values)
    knee = fit_knee(x, y)
    assert np.sum((y - knee.predict(x)) ** 2) == pytest.approx(knee.sse, abs=1e-9)
    for joint in np.linspace(1, len(values) - 2, 60):
        design = np.stack([np.ones_like(x), x, np.maximum(x - joint, 0)], 1)
        residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
        assert knee.sse <= residual @ residual + 1e-9


def test_a_straight_line_has_slope_ratio_one_and_little_to_explain():
    straight = fit_knee(np.arange(6), [5.5, 4, 3, 2, 1, -0.5])
    assert 0 <= straight.explained < 0.5
    assert fit_knee(GRID, 1 - GRID).ratio == pytest.approx(1, abs=1e-6)
    assert fit_knee(GRID, np.ones(20)).sse == pytest.approx(0, abs=1e-20)


def test_ratio_behind_a_level_piece_is_infinite_or_huge():
    knee = fit_knee([0, 1, 2, 3, 4, 5], [1, 1, 1, 0.5, 0, -0.5])
    assert knee.ratio > 1e6


def test_last_within_interpolates_the_first_crossing():
    assert last_within([0, 0.5, 1], [1.0, 0.98, 0.96], 0.99) == (pytest.approx(0.25), True)
    # a later recovery does not count: everything up to the point has to be good
    position, crossed = last_within([0, 0.2, 0.4, 0.6], [1, 0.5, 1, 1], 0.9)
    assert (position, crossed) == (pytest.approx(0.04), True)


def test_last_within_says_when_the_curve_never_falls():
    assert last_within([0, 0.5, 0.9], [1, 1, 0.99], 0.99) == (0.9, False)


def test_last_within_refuses_a_curve_that_starts_below():
    with pytest.raises(ConfigurationError, match=r"starts at 0\.5"):
        last_within([0, 1], [0.5, 0.4], 0.9)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_isotonic_sequence_never_rises_keeps_the_mean_and_is_idempotent(values):
    fitted = isotonic_decreasing(values)
    assert (np.diff(fitted) <= 1e-9).all()
    assert fitted.mean() == pytest.approx(np.mean(values), abs=1e-9)
    assert isotonic_decreasing(fitted) == pytest.approx(fitted, abs=1e-9)


def test_isotonic_worked_by_hand():
    assert isotonic_decreasing([3, 1, 2, 0]).tolist() == [3, 1.5, 1.5, 0]


@pytest.mark.parametrize("seed", range(10))
def test_a_step_in_noise_is_abrupt_and_found_at_its_place(seed):
    series = np.random.default_rng(seed).normal(0, 0.01, 20)
    series[12:] += 0.3
    jump = largest_jump(series)
    assert jump.index == 11
    assert jump.abrupt
    assert jump.size == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("seed", range(10))
def test_noise_alone_is_not_abrupt(seed):
    assert not largest_jump(np.random.default_rng(seed).normal(0, 0.01, 20)).abrupt


@pytest.mark.parametrize("rate", [0.7, 0.8, 0.9])
def test_a_smooth_saturation_is_not_abrupt_however_steep_it_begins(rate):
    assert not largest_jump(1 - rate ** np.arange(20)).abrupt


def test_a_downward_jump_has_a_negative_size_and_a_clean_one_no_noise():
    jump = largest_jump([1, 1, 1, 0, 0, 0])
    assert (jump.index, jump.size, jump.noise) == (2, -1, 0)
    assert jump.over_noise == jump.over_neighbours == math.inf
    assert not largest_jump([1, 1, 1, 1]).abrupt


def test_interval_covers_the_spread_of_the_curves_and_is_repeatable():
    curves = [[1, 0.0], [1, 0.25], [1, 0.5]]
    low, high = curve_interval(curves, lambda mean: mean[1])
    assert 0 <= low < 0.25 < high <= 0.5
    assert curve_interval(curves, lambda mean: mean[1]) == (low, high)


def test_one_curve_has_no_interval():
    assert curve_interval([[1, 0.5]], lambda mean: mean[1]) is None


@pytest.mark.parametrize(
    ("x", "y", "error", "match"),
    [
        ([0, 1, 2], [1, 1, 1], ConfigurationError, "at least 4"),
        ([0, 1, 1, 2], [1, 1, 1, 1], ConfigurationError, "increase strictly"),
        ([0, 1, 2, 3], [1, 1, float("nan"), 1], NonFiniteError, "NaN"),
        ([0, 1, 2, 3], [1, 1, 1], ConfigurationError, "shapes"),
    ],
)
def test_bad_curves_are_refused(x, y, error, match):
    with pytest.raises(error, match=match):
        fit_knee(x, y)


@pytest.mark.parametrize("level", [0.0, 0.3, -7.1, 1e6])
def test_rounding_is_no_knee(level):
    knee = fit_knee(GRID, np.full(20, level))
    assert (knee.left_slope, knee.right_slope, knee.ratio) == (0, 0, 1)
    assert knee.value == pytest.approx(level)
    straight = fit_knee(GRID, level - 0.1 * GRID * max(1, abs(level)))
    assert straight.ratio == 1
    assert straight.left_slope == pytest.approx(-0.1 * max(1, abs(level)))

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.papers.statistics import bootstrap_interval, mean_interval, paired_difference, t_quantile

numbers = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12)


@pytest.mark.parametrize(
    ("probability", "degrees", "tabulated"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.95, 9, 1.833),
        (0.995, 19, 2.861),
        (0.9, 30, 1.310),
        (0.975, 120, 1.980),
        (0.9995, 60, 3.460),
    ],
)
def test_t_quantile_agrees_with_the_printed_table(probability, degrees, tabulated):
    assert round(t_quantile(probability, degrees), 3) == tabulated


@given(st.floats(0.001, 0.999))
def test_t_quantile_with_one_degree_is_the_cauchy_quantile(probability):
    assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-6, abs=1e-7)


@given(st.floats(0.001, 0.999))
def test_t_quantile_with_two_degrees_has_its_closed_form(probability):
    expected = (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    assert t_quantile(probability, 2) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(st.floats(0.501, 0.999), st.integers(1, 200))
def test_t_quantile_is_odd_and_falls_with_more_degrees(probability, degrees):
    assert t_quantile(1 - probability, degrees) == pytest.approx(-t_quantile(probability, degrees), rel=1e-9)
    assert t_quantile(probability, degrees + 1) < t_quantile(probability, degrees)


def test_mean_interval_worked_out_by_hand():
    # 1, 2, 3: mean 2, deviation 1, standard error 1/sqrt(3), quantile for two degrees 4.30265
    interval = mean_interval([1, 2, 3])
    half = 4.302652729749464 / math.sqrt(3)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-12)
    assert not interval.above_zero
    assert not interval.below_zero


def test_mean_interval_of_equal_values_is_a_point():
    interval = mean_interval([0.25, 0.25, 0.25])
    assert (interval.low, interval.mean, interval.high) == (0.25, 0.25, 0.25)
    assert interval.above_zero


@given(numbers)
def test_more_confidence_gives_a_wider_interval(values):
    narrow, wide = mean_interval(values, 0.8), mean_interval(values, 0.99)
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high


def test_mean_interval_covers_the_truth_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(size=(2000, 4))
    covered = sum(interval.low <= 0 <= interval.high for interval in map(mean_interval, samples))
    # 1900 expected, binomial deviation 9.7: five deviations either side
    assert 1851 <= covered <= 1949


def test_paired_difference_ignores_what_both_share():
    shared = [10.0, 50.0, -30.0]
    difference = paired_difference([s + 2 for s in shared], [s + 1 for s in shared])
    assert (difference.low, difference.high) == (1, 1)
    assert difference.above_zero


@given(numbers)
def test_paired_difference_of_a_thing_with_itself_is_zero(values):
    interval = paired_difference(values, values)
    assert (interval.low, interval.mean, interval.high) == (0, 0, 0)


def test_bootstrap_repeats_itself_and_stays_within_the_values():
    values = [0.0, 0.0, 0.0, 1.0, 10.0]
    interval = bootstrap_interval(values, np.median, seed=3)
    assert interval == bootstrap_interval(values, np.median, seed=3)
    assert interval.mean == 0
    assert (interval.low, interval.high) == (0, 10)


def test_bootstrap_of_many_normal_values_agrees_with_the_t_interval():
    values = np.random.default_rng(1).normal(3, 1, size=400)
    resampled, exact = bootstrap_interval(values), mean_interval(values)
    assert resampled.mean == pytest.approx(exact.mean)
    # a bootstrap end has a standard error of about 3% of the half width here
    half = exact.high - exact.mean
    assert abs(resampled.low - exact.low) < 0.15 * half
    assert abs(resampled.high - exact.high) < 0.15 * half


def test_bad_input_says_what_to_do():
    with pytest.raises(ConfigurationError, match="at least 2 values"):
        mean_interval([1.0])
    with pytest.raises(ConfigurationError, match="confidence is 95"):
        mean_interval([1.0, 2.0], 95)
    with pytest.raises(NonFiniteError, match="holds nan"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ConfigurationError, match="a has 2 values and b has 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(ConfigurationError, match="resamples is 0"):
        bootstrap_interval([1, 2], resamples=0)
    with pytest.raises(ConfigurationError, match="degrees of freedom"):
        t_quantile(0.9, 0)

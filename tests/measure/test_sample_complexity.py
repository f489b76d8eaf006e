from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.measure.sample_complexity import geometric_grid, growth, log_slope, sample_complexity


def learner(scale, repetitions=5, noise=0.0):
    """Error 0.5 / (1 + n / scale): a quarter at n = scale."""
    generator = np.random.default_rng(0)
    calls = []

    def errors(n):
        calls.append(n)
        return 0.5 / (1 + n / scale) + noise * generator.standard_normal(repetitions)

    errors.calls = calls
    return errors


def test_a_grid_is_geometric_and_ends_where_it_should():
    assert geometric_grid(4, 64) == [4, 8, 16, 32, 64]
    grid = geometric_grid(10, 1000, 2)
    assert (grid[0], grid[-1]) == (10, 1000)
    assert all(1.3 < b / a < 1.6 for a, b in pairwise(grid))


@pytest.mark.parametrize("scale", [9.0, 33.0, 100.0, 470.0])
def test_the_crossing_is_found_between_grid_points(scale):
    errors = learner(scale)
    found = sample_complexity(errors, geometric_grid(4, 1024), 0.25)
    low, high = found.bracket
    assert low < scale <= high
    assert high == 2 * low
    assert found.n == pytest.approx(scale, rel=0.02)
    assert len(errors.calls) <= 4  # of nine


@pytest.mark.parametrize(("scale", "bracket"), [(2.0, (None, 4)), (5000.0, (1024, None))])
def test_a_crossing_outside_the_grid_is_censored(scale, bracket):
    found = sample_complexity(learner(scale), geometric_grid(4, 1024), 0.25)
    assert found.bracket == bracket
    assert found.censored
    assert found.n is None


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_is_recovered(exponent):
    found = {
        k: sample_complexity(learner(3 * k**exponent, 20, 0.005), geometric_grid(2, 4096), 0.25) for k in (4, 8, 16, 32)
    }
    fitted = growth(found)
    assert fitted.low <= fitted.slope <= fitted.high
    assert fitted.slope == pytest.approx(exponent, abs=0.1)
    assert fitted.high - fitted.low < 0.3


def test_censored_sizes_do_not_bend_the_slope():
    grid = geometric_grid(4, 256)
    found = {k: sample_complexity(learner(2.0 * k**1.5), grid, 0.25) for k in (1, 4, 8, 16, 64)}
    fitted = growth(found)
    assert fitted.sizes == (4, 8, 16)
    assert fitted.slope == pytest.approx(1.5, abs=0.05)
    with pytest.raises(CalibrationError, match="widen the grid"):
        growth({k: found[k] for k in (1, 4, 64)})


def test_slopes_are_compared_with_an_interval():
    grid = geometric_grid(2, 4096)
    steep, flat = (
        growth({k: sample_complexity(learner(3 * k**e, 20, 0.01), grid, 0.25) for k in (4, 8, 16)}) for e in (2.0, 1.0)
    )
    gap, low, high = steep.above(flat)
    assert 0 < low <= gap <= high
    assert gap == pytest.approx(1, abs=0.2)


def test_missing_values_are_left_out_of_a_slope():
    assert log_slope([1, 2, 4, 8], [3, None, 12, 24]) == pytest.approx(1)
    with pytest.raises(CalibrationError, match="1 sizes"):
        log_slope([1, 2], [3, None])


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="ascending"):
        sample_complexity(learner(9), [4, 4, 8], 0.25)
    with pytest.raises(ConfigurationError, match=r"\(0, 1\)"):
        sample_complexity(learner(9), [4, 8], 1.0)
    with pytest.raises(ConfigurationError, match="per_octave"):
        geometric_grid(8, 4)
    with pytest.raises(CalibrationError, match="same positive number"):
        sample_complexity(lambda n: [0.5] * n, [4, 8, 16], 0.25)
    with pytest.raises(NonFiniteError, match="learning rate"):
        sample_complexity(lambda n: [float("nan")], [4, 8], 0.25)

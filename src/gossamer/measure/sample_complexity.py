"""How many samples a learner needs for a target error, and how that number grows with the size of the task.

The number is searched by bisection on a geometric grid and then read off the curve between its two neighbours, so that
it is not tied to the grid. Only tasks whose crossing lies inside the grid tell anything about growth: one that the
learner solves with the fewest samples already, or never, is *censored*, and no slope is fitted through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError

ErrorRates = Callable[[int], Sequence[float]]


@dataclass(frozen=True)
class SampleComplexity:
    """What :func:`sample_complexity` found.

    Attributes
    ----------
    target_error
        What was asked for.
    errors
        Number of samples → error of each repetition, for the numbers that were tried.
    bracket
        The two neighbours on the grid between which the mean error crosses the target; the first is None if the
        smallest number suffices already, the second if the largest does not.
    """

    target_error: float
    errors: Mapping[int, tuple[float, ...]]
    bracket: tuple[int | None, int | None]

    @property
    def censored(self) -> bool:
        """Whether the crossing lies outside the grid."""
        return None in self.bracket

    @property
    def n(self) -> float | None:
        """Number of samples at which the mean error reaches the target, interpolated; None if censored."""
        return None if self.censored else self._crossing([float(np.mean(self.errors[n])) for n in self._ends()])

    def resampled(self, generator: np.random.Generator) -> float | None:
        """The same with repetitions drawn anew with replacement; None if the target is not crossed then."""
        if self.censored:
            return None
        count = len(self.errors[self._ends()[0]])
        drawn = generator.integers(count, size=count)
        return self._crossing([float(np.mean(np.asarray(self.errors[n])[drawn])) for n in self._ends()])

    def _ends(self) -> tuple[int, int]:
        low, high = self.bracket
        assert low is not None
        assert high is not None
        return low, high

    def _crossing(self, means: list[float]) -> float | None:
        """Linear in log n and error; extrapolated by at most the width of the bracket."""
        low, high = (math.log(n) for n in self._ends())
        if not means[0] > means[1]:
            return None
        share = (means[0] - self.target_error) / (means[0] - means[1])
        return math.exp(low + min(max(share, -1.0), 2.0) * (high - low))


def geometric_grid(low: int, high: int, per_octave: int = 1) -> list[int]:
    """Whole numbers from `low` to `high`, each about ``2^(1/per_octave)`` times the one before.

    Raises
    ------
    ConfigurationError
        If ``1 <= low < high`` and ``per_octave >= 1`` do not hold.
    """
    if not 1 <= low < high or per_octave < 1:
        raise ConfigurationError(
            f"low, high and per_octave are {low}, {high} and {per_octave}; 1 <= low < high and at least 1 are needed"
        )
    count = max(1, round(per_octave * math.log2(high / low)))
    return sorted({round(low * (high / low) ** (i / count)) for i in range(count + 1)})


def sample_complexity(errors: ErrorRates, n_grid: Sequence[int], target_error: float) -> SampleComplexity:
    """Find the smallest number of samples whose mean error over repetitions is at most the target.

    Lahoti et al., 2024, arXiv 2403.15707, count samples this way; the search is bisection, which takes for granted
    that more samples do not hurt.

    Parameters
    ----------
    errors
        ``errors(n)`` trains on n samples and returns the test error of each repetition.
    n_grid
        Numbers to choose from, ascending.
    target_error
        In (0, 1).

    Raises
    ------
    ConfigurationError
        If the grid is not ascending or has fewer than two numbers, or the target is outside (0, 1).
    CalibrationError
        If `errors` returns nothing, or not always the same number of repetitions.
    NonFiniteError
        If an error is NaN or infinite.
    """
    grid = list(n_grid)
    if len(grid) < 2 or any(a >= b for a, b in pairwise(grid)):
        raise ConfigurationError(f"n_grid is {grid}; give at least two numbers in ascending order")
    if not 0 < target_error < 1:
        raise ConfigurationError(f"target_error is {target_error}; it must lie in (0, 1)")
    seen: dict[int, tuple[float, ...]] = {}

    def reached(place: int) -> bool:
        n = grid[place]
        if n not in seen:
            seen[n] = _checked(errors(n), n, seen)
        return float(np.mean(seen[n])) <= target_error

    low, high = -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    bracket = (grid[low] if low >= 0 else None, grid[high] if high < len(grid) else None)
    return SampleComplexity(target_error, dict(sorted(seen.items())), bracket)


def _checked(found: Sequence[float], n: int, seen: Mapping[int, tuple[float, ...]]) -> tuple[float, ...]:
    values = tuple(float(value) for value in found)
    counts = {len(each) for each in seen.values()} | {len(values)}
    if not values or len(counts) > 1:
        raise CalibrationError(f"at n = {n} there are {len(values)} errors; each n needs the same positive number")
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"an error at n = {n} is not finite; lower the learning rate of this learner")
    return values


@dataclass(frozen=True)
class Growth:
    """How a sample complexity grows: the slope of ``log n`` over the logarithm of a size.

    Attributes
    ----------
    slope
        Least squares.
    low, high
        Interval by resampling the repetitions.
    sizes
        Those that counted: neither solved at the first number of the grid nor unsolved at the last.
    resampled
        All the slopes, for differences between learners.
    """

    slope: float
    low: float
    high: float
    sizes: tuple[float, ...]
    resampled: tuple[float, ...] = field(repr=False, default=())

    def above(self, other: Growth, confidence: float = 0.95) -> tuple[float, float, float]:
        """Difference of two slopes with its interval, the resamples of both paired in their order."""
        gaps = np.asarray(self.resampled) - np.asarray(other.resampled)
        tail = (1 - confidence) / 2
        low, high = np.quantile(gaps, [tail, 1 - tail])
        return self.slope - other.slope, float(low), float(high)


def growth(
    found: Mapping[float, SampleComplexity], confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Growth:
    """Fit the exponent with which the sample complexity grows.

    Parameters
    ----------
    found
        Size of the task → its sample complexity; the censored ones are left out.
    confidence
        Of the interval, in (0, 1).
    resamples
        How often the repetitions are drawn anew; at least 1.
    seed
        Of the resampling.

    Raises
    ------
    CalibrationError
        If fewer than two sizes have a crossing.
    ConfigurationError
        If `confidence` or `resamples` is out of range.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise ConfigurationError(
            f"confidence and resamples are {confidence} and {resamples}; give one in (0, 1), and at least 1"
        )
    sizes = tuple(size for size, each in sorted(found.items()) if each.n is not None)
    if len(sizes) < 2:
        raise CalibrationError(
            f"{len(sizes)} of {len(found)} tasks reach the target inside the grid; a slope needs two: widen the grid"
        )
    generator = np.random.default_rng(seed)
    slope = log_slope(sizes, [found[size].n for size in sizes])
    drawn = []
    for _ in range(resamples):
        values = [found[size].resampled(generator) for size in sizes]
        drawn.append(slope if None in values else log_slope(sizes, values))
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Growth(slope, float(low), float(high), sizes, tuple(drawn))


def log_slope(sizes: Sequence[float], values: Sequence[float | None]) -> float:
    """Least-squares slope of ``log value`` over ``log size``; values that are None are left out.

    Raises
    ------
    CalibrationError
        If fewer than two different sizes remain.
    """
    pairs = [(math.log(size), math.log(value)) for size, value in zip(sizes, values, strict=True) if value is not None]
    if len({x for x, _ in pairs}) < 2:
        raise CalibrationError(f"{len(pairs)} sizes have a value; a slope needs two different ones: widen the grid")
    x, y = np.array(pairs).T
    x = x - x.mean()
    return float((x @ y) / (x @ x))

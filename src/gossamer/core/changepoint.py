"""Where a curve bends and where it jumps, and how sure one can be of it.

Three questions come up wherever quality is drawn against sparsity, or sparsity against time: up to which point is the
loss within a tolerance (:func:`last_within`), where does a slow decline turn into a steep one (:func:`fit_knee`), and
does a series jump at one step more than its noise explains (:func:`largest_jump`). :func:`curve_interval` puts a
bootstrap interval around any such number, and :func:`isotonic_decreasing` takes out the wiggles of a noisy
measurement of something that can only fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gossamer.errors import ConfigurationError, NonFiniteError

Array = npt.NDArray[np.float64]
Vector = Sequence[float] | npt.NDArray[Any]

_JUMP_OVER_NOISE = 5.0
_JUMP_OVER_NEIGHBOURS = 3.0
_ROUNDING = 1e-12  # of the largest ordinate
_NEIGHBOURHOOD = 3  # steps on either side that tell the local pace


@dataclass(frozen=True)
class Knee:
    """A continuous line of two pieces, fitted by least squares.

    Attributes
    ----------
    position
        Abscissa at which the pieces meet.
    value
        Fitted ordinate there.
    left_slope, right_slope
        Slopes before and after.
    sse
        Sum of squared residuals.
    line_sse
        The same for one straight line: where it is no larger, there is no knee.
    """

    position: float
    value: float
    left_slope: float
    right_slope: float
    sse: float
    line_sse: float

    @property
    def ratio(self) -> float:
        """|right slope| / |left slope|; infinite behind a level piece, 1 where both are level."""
        left, right = abs(self.left_slope), abs(self.right_slope)
        if left == 0:
            return math.inf if right > 0 else 1.0
        return right / left

    @property
    def explained(self) -> float:
        """Share of the straight line's residual that the second piece takes away, in [0, 1]."""
        return 1 - self.sse / self.line_sse if self.line_sse > 0 else 0.0

    def predict(self, x: Vector) -> Array:
        """Ordinates of the fit at `x`."""
        distance = np.asarray(x, np.float64) - self.position
        return self.value + np.where(distance < 0, self.left_slope, self.right_slope) * distance


@dataclass(frozen=True)
class Jump:
    """The largest step of a series, and what it is compared with.

    Attributes
    ----------
    index
        The jump lies between positions ``index`` and ``index + 1``.
    size
        Signed height.
    noise
        Robust standard deviation of all steps (1.4826 times their median absolute deviation).
    over_noise
        Distance of the jump from the median step, in units of the noise; infinite without noise.
    over_neighbours
        Height over the median height of the three steps on either side: what tells a jump from a curve that is
        merely steep there. Infinite beside a level neighbourhood.
    """

    index: int
    size: float
    noise: float
    over_noise: float
    over_neighbours: float

    @property
    def abrupt(self) -> bool:
        """Whether it is at least 5 times the noise and at least 3 times the local pace."""
        return self.over_noise >= _JUMP_OVER_NOISE and self.over_neighbours >= _JUMP_OVER_NEIGHBOURS


def fit_knee(x: Vector, y: Vector) -> Knee:
    """Fit two connected line segments; the position of their joint is part of the fit.

    The minimum is exact: for each way to divide the points it is either where the two separate regression lines cross
    (if they cross between the groups) or a joint at one of the points [Hudson, 1966].

    Parameters
    ----------
    x
        At least 4 strictly increasing numbers.
    y
        As many finite numbers.

    Raises
    ------
    ConfigurationError
        If there are too few points, or they are not increasing.
    NonFiniteError
        If a number is NaN or infinite.

    Examples
    --------
    >>> knee = fit_knee([0, 1, 2, 3, 4, 5], [1, 1, 1, 0.5, 0, -0.5])
    >>> round(knee.position, 6), round(knee.right_slope, 6)
    (2.0, -0.5)
    """
    x, y = check_curve(x, y, at_least=4)
    line_sse, (level, slope, _) = _fit_joint(x, y, None)
    rounding = _ROUNDING * float(np.abs(y).max())
    if line_sse <= len(x) * rounding**2:
        # a straight line: whatever a second piece would explain is rounding
        slope = slope if abs(slope) * (x[-1] - x[0]) > rounding else 0.0
        middle = float(x[len(x) // 2])
        return Knee(middle, float(level + slope * middle), slope, slope, line_sse, line_sse)
    best = min(((*_fit_joint(x, y, joint), joint) for joint in _joints(x, y)), key=lambda fit: fit[0])
    sse, (level, left, bend), position = best
    value = level + left * position
    return Knee(float(position), float(value), float(left), float(left + bend), min(sse, line_sse), line_sse)


def _joints(x: Array, y: Array) -> list[float]:
    candidates = list(x[1:-1])
    for split in range(2, len(x) - 1):
        left, right = (np.polyfit(x[part], y[part], 1) for part in (slice(split), slice(split, None)))
        if left[0] != right[0]:
            crossing = (right[1] - left[1]) / (left[0] - right[0])
            if x[split - 1] < crossing < x[split]:
                candidates.append(float(crossing))
    return candidates


def _fit_joint(x: Array, y: Array, joint: float | None) -> tuple[float, tuple[float, float, float]]:
    """Residual, and level at 0, slope before, change of slope, of the best fit with a joint there (or without)."""
    columns = [np.ones_like(x), x] + ([np.maximum(x - joint, 0)] if joint is not None else [])
    design = np.stack(columns, 1)
    solution = np.linalg.lstsq(design, y, rcond=None)[0]
    residual = y - design @ solution
    level, slope, *bend = solution
    return float(residual @ residual), (float(level), float(slope), float(bend[0]) if bend else 0.0)


def last_within(x: Vector, y: Vector, threshold: float) -> tuple[float, bool]:
    """Largest x up to which the curve never falls below a threshold, by linear interpolation between the points.

    Parameters
    ----------
    x
        At least one number, strictly increasing.
    y
        As many finite numbers; the first must reach the threshold.
    threshold
        Lowest ordinate that is allowed.

    Returns
    -------
    tuple of float and bool
        The position, and whether the curve really falls below the threshold after it. If not, the position is the
        end of the curve, and a lower bound.

    Raises
    ------
    ConfigurationError
        If the numbers do not increase, or the curve starts below the threshold.
    NonFiniteError
        If a number is NaN or infinite.
    """
    x, y = check_curve(x, y, at_least=1)
    below = np.flatnonzero(y < threshold)
    if not len(below):
        return float(x[-1]), False
    after = int(below[0])
    if after == 0:
        raise ConfigurationError(
            f"the curve starts at {y[0]:g}, below the threshold {threshold:g}; lower the threshold"
        )
    before = after - 1
    share = (y[before] - threshold) / (y[before] - y[after])
    return float(x[before] + share * (x[after] - x[before])), True


def isotonic_decreasing(y: Vector) -> Array:
    """The non-increasing sequence nearest to `y` in least squares, by pooling adjacent violators.

    Examples
    --------
    >>> isotonic_decreasing([3.0, 1.0, 2.0, 0.0]).tolist()
    [3.0, 1.5, 1.5, 0.0]
    """
    pools: list[tuple[float, int]] = []  # mean, count
    for value in np.asarray(y, np.float64):
        mean, count = float(value), 1
        while pools and pools[-1][0] < mean:
            earlier, size = pools.pop()
            mean = (earlier * size + mean * count) / (size + count)
            count += size
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


def largest_jump(values: Vector) -> Jump:
    """The largest step between neighbours of a series, measured against the noise and against its surroundings.

    Parameters
    ----------
    values
        At least 4 finite numbers, in order.

    Raises
    ------
    ConfigurationError
        If there are too few.
    NonFiniteError
        If a number is NaN or infinite.
    """
    _, series = check_curve(np.arange(len(values)), values, at_least=4)
    steps = np.diff(series)
    index = int(np.abs(steps).argmax())
    typical = float(np.median(steps))
    noise = 1.4826 * float(np.median(np.abs(steps - typical)))
    near = np.r_[steps[max(0, index - _NEIGHBOURHOOD) : index], steps[index + 1 : index + 1 + _NEIGHBOURHOOD]]
    pace = float(np.median(np.abs(near)))
    size = float(steps[index])
    return Jump(index, size, noise, _over(abs(size - typical), noise), _over(abs(size), pace))


def _over(size: float, scale: float) -> float:
    if scale > 0:
        return size / scale
    return math.inf if size > 0 else 0.0


def curve_interval(
    curves: npt.ArrayLike,
    statistic: Callable[[Array], float],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a number read off a mean curve, by drawing whole curves with replacement.

    Parameters
    ----------
    curves
        ``(repetitions, points)``, one curve a seed.
    statistic
        Mean curve ``(points,)`` → number.
    confidence
        In (0, 1).
    resamples
        How many draws.
    seed
        Of the draws.

    Returns
    -------
    tuple of float, or None
        Lower and upper end; None for a single curve, of which nothing can be said.
    """
    rows = np.atleast_2d(np.asarray(curves, np.float64))
    if not 0 < confidence < 1 or resamples < 1:
        raise ConfigurationError(f"confidence {confidence} must lie in (0, 1) and resamples {resamples} be at least 1")
    if len(rows) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(rows), size=(resamples, len(rows)))
    # few curves give few different samples: evaluate each of them once
    distinct, counts = np.unique(np.sort(drawn, axis=1), axis=0, return_counts=True)
    values = np.repeat([statistic(rows[chosen].mean(0)) for chosen in distinct], counts)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def check_curve(x: Vector, y: Vector, at_least: int) -> tuple[Array, Array]:
    """Return `x` and `y` as float64 vectors.

    Raises
    ------
    ConfigurationError
        If they differ in length, are too few, or `x` does not increase strictly.
    NonFiniteError
        If a number is NaN or infinite.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < at_least:
        raise ConfigurationError(f"a curve of shapes {a.shape} and {b.shape}; at least {at_least} pairs are needed")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise NonFiniteError("a point of the curve is NaN or infinite; leave it out")
    if (np.diff(a) <= 0).any():
        raise ConfigurationError("the positions of a curve must increase strictly; sort them and drop repetitions")
    return a, b

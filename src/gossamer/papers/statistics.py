"""The small statistics that verdicts rest on: intervals of a mean, of a paired difference, and by resampling.

A claim is judged over a handful of seeds, so intervals use Student's t and not the normal distribution: for three
seeds its 95% quantile is 4.30 and not 1.96.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.errors import ConfigurationError, NonFiniteError


@dataclass(frozen=True)
class Interval:
    """An estimate with a confidence interval.

    Attributes
    ----------
    mean
        The estimate (a mean, or the statistic that was resampled).
    low, high
        Ends of the interval.
    confidence
        Its level, such as 0.95.
    """

    mean: float
    low: float
    high: float
    confidence: float = 0.95

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is positive."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is negative."""
        return self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent, roughly normal values.

    Parameters
    ----------
    values
        At least two finite numbers, usually one a seed.
    confidence
        Level of the interval, in (0, 1).

    Raises
    ------
    ConfigurationError
        If there are fewer than two values or `confidence` is outside (0, 1).
    NonFiniteError
        If a value is NaN or infinite.

    Examples
    --------
    >>> print(mean_interval([1.0, 2.0, 3.0]))
    2 [-0.4841, 4.484]
    """
    array = _checked(values, confidence, "values")
    mean = float(array.mean())
    half = t_quantile(0.5 + confidence / 2, array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half, confidence)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of ``a - b``, where both were measured under the same seeds.

    Parameters
    ----------
    a, b
        Equally many finite numbers; position i of both belongs to the same seed.
    confidence
        Level of the interval, in (0, 1).

    Raises
    ------
    ConfigurationError
        If the lengths differ, there are fewer than two pairs, or `confidence` is outside (0, 1).
    NonFiniteError
        If a value is NaN or infinite.
    """
    if len(a) != len(b):
        raise ConfigurationError(
            f"a has {len(a)} values and b has {len(b)}; a paired difference needs one of each for every seed"
        )
    return mean_interval(_checked(a, confidence, "a") - _checked(b, confidence, "b"), confidence)


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], float] = np.mean,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of any statistic, for many values that are far from normal.

    Parameters
    ----------
    values
        At least two finite numbers.
    statistic
        Function of a vector (n,) that returns a number, such as ``np.median``.
    confidence
        Level of the interval, in (0, 1).
    resamples
        How many samples with replacement are drawn; at least 1.
    seed
        Of the generator, so that the same values give the same interval.

    Raises
    ------
    ConfigurationError
        If there are fewer than two values, or `confidence` or `resamples` is out of range.
    NonFiniteError
        If a value is NaN or infinite.
    """
    array = _checked(values, confidence, "values")
    if resamples < 1:
        raise ConfigurationError(f"resamples is {resamples}; it must be at least 1, such as 2000")
    generator = np.random.default_rng(seed)
    # drawn one at a time: a matrix (resamples, n) would not fit for token-level values
    drawn = [statistic(array[generator.integers(array.size, size=array.size)]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(statistic(array)), float(low), float(high), confidence)


def t_quantile(probability: float, degrees: float) -> float:
    """Return the value below which Student's t with `degrees` degrees of freedom falls with `probability`.

    Parameters
    ----------
    probability
        In (0, 1).
    degrees
        Degrees of freedom, positive.

    Raises
    ------
    ConfigurationError
        If an argument is outside its range.
    """
    if not 0 < probability < 1 or not degrees > 0:
        raise ConfigurationError(
            f"no t quantile for probability {probability!r} and {degrees!r} degrees of freedom; "
            "the first must lie in (0, 1) and the second be positive"
        )
    if probability == 0.5:
        return 0.0
    tail = min(probability, 1 - probability)
    # with x = nu / (nu + t^2) the two tails together hold I_x(nu/2, 1/2), which rises with x
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        if _incomplete_beta(middle, degrees / 2, 0.5) < 2 * tail:
            low = middle
        else:
            high = middle
    size = math.sqrt(degrees * (1 - high) / high)
    return size if probability > 0.5 else -size


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b) by its continued fraction (Lentz's evaluation)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    # the fraction converges fast only below the mean; beyond it the mirrored one is used
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1.0 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def _checked(values: Sequence[float], confidence: float, name: str) -> np.ndarray:
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence is {confidence!r}; it must lie in (0, 1), such as 0.95")
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < 2:
        raise ConfigurationError(
            f"{name} has shape {array.shape}; an interval needs a vector of at least 2 values, so run more seeds"
        )
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} holds {array[~np.isfinite(array)][0]}; leave out or repair the run it comes from")
    return array

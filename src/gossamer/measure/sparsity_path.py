"""The way a model takes to its final sparsity, and how dense it was on average.

A schedule says how sparse the model is at each moment. What the moment is measured in matters: a step late in the run
is cheaper than an early one, so that a quarter of the compute is over before a quarter of the tokens. A path knows both
clocks.
"""

from __future__ import annotations

import math
from bisect import bisect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from torch import nn

from gossamer.core.schedules import Cosine, Cubic, Geometric, Ladder, Linear, OneShot, Schedule, Sine
from gossamer.errors import ConfigurationError, check_sparsity
from gossamer.measure.size import Denominator, density

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_NEWTON = 4
_PIECES = 32  # within which the ramp is as good as a polynomial of degree 63


@dataclass(frozen=True)
class SparsityPath:
    """A schedule of sparsity over a whole run.

    Parameters
    ----------
    schedule
        Sparsity at each moment from 0 to `total`.
    total
        Length of the run, in the unit of the schedule.
    unit
        ``"tokens"`` (or steps of equal size), or ``"compute"``.
    fixed_cost
        Share of the operations of the dense model that pruning cannot remove, in [0, 1): attention, output head. Only
        the clock of compute depends on it.

    Raises
    ------
    ConfigurationError
        If the schedule does not end within the run, or a number is out of range.
    SparsityError
        If the schedule leaves [0, 1).

    Examples
    --------
    >>> path = SparsityPath(Cubic(0.8, end=75, begin=25), total=100)
    >>> round(path.average_sparsity(), 12)  # 0.8 · (0.5 · 3/4 + 0.25)
    0.5
    """

    schedule: Schedule
    total: float
    unit: Literal["tokens", "compute"] = "tokens"
    fixed_cost: float = 0.0
    _knots: list[float] = field(init=False, repr=False, compare=False)
    _tokens: list[float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.unit not in ("tokens", "compute"):
            raise ConfigurationError(f"unit is {self.unit!r}; it must be 'tokens' or 'compute'")
        if not 0 <= self.fixed_cost < 1:
            raise ConfigurationError(f"fixed_cost is {self.fixed_cost}; it is a share of the dense cost, in [0, 1)")
        if not self.schedule.end <= self.total or self.schedule.begin < 0:
            raise ConfigurationError(
                f"the schedule runs from {self.schedule.begin} to {self.schedule.end}, but the run from 0 to "
                f"{self.total}; end the schedule within the run"
            )
        for sparsity in (self.schedule.initial, self.schedule.final):
            check_sparsity(sparsity, "a sparsity of the schedule")
        knots = _knots(self.schedule, self.total)
        tokens = [0.0]
        for low, high in pairwise(knots):
            tokens.append(tokens[-1] + self._integral(low, high, power=0))
        object.__setattr__(self, "_knots", knots)
        object.__setattr__(self, "_tokens", tokens)

    def average_sparsity(self) -> float:
        """Mean sparsity over the tokens of the run; in closed form where there is one."""
        if self.unit == "tokens":
            begin, end = self.schedule.begin, self.schedule.end
            ramp = _mean_of_ramp(self.schedule)
            if ramp is not None:
                parts = self.schedule.initial * begin + ramp * (end - begin) + self.schedule.final * (self.total - end)
                return parts / self.total
        return self.average_by_quadrature()

    def average_by_quadrature(self) -> float:
        """Mean sparsity over tokens, integrated numerically: Gauss's rule on each smooth piece."""
        integral = sum(self._integral(low, high, power=1) for low, high in pairwise(self._knots))
        return integral / self._tokens[-1]

    def average_density(self) -> float:
        """One less the mean sparsity: the share of the prunable weights that is active on average over tokens."""
        return 1 - self.average_sparsity()

    def sparsity(self, tokens: float) -> float:
        """Sparsity after a share of the tokens, in [0, 1]."""
        return float(self.schedule(self._moment(tokens)))  # type: ignore[arg-type]

    def tokens_at(self, moment: float) -> float:
        """Share of the tokens that is over at a moment of the schedule, in [0, 1]."""
        if not 0 <= moment <= self.total:
            raise ConfigurationError(f"moment is {moment}; the run lasts from 0 to {self.total}")
        place = min(max(bisect(self._knots, moment) - 1, 0), len(self._knots) - 2)
        return (self._tokens[place] + self._integral(self._knots[place], moment, power=0)) / self._tokens[-1]

    def _moment(self, tokens: float) -> float:
        """The moment at which a share of the tokens is over."""
        if not 0 <= tokens <= 1:
            raise ConfigurationError(f"the share of the tokens is {tokens}; it must lie in [0, 1]")
        if self.unit == "tokens":
            return tokens * self.total
        wanted = tokens * self._tokens[-1]
        place = min(max(bisect(self._tokens, wanted) - 1, 0), len(self._knots) - 2)
        low, high = self._knots[place], self._knots[place + 1]
        moment = low + (high - low) * (wanted - self._tokens[place]) / (self._tokens[place + 1] - self._tokens[place])
        for _ in range(_NEWTON):
            missing = wanted - self._tokens[place] - self._integral(low, moment, power=0)
            price = float(self._price(self.schedule(moment)))  # type: ignore[arg-type]
            moment = min(max(moment + missing * price, low), high)
        return moment

    def _price(self, sparsity: Any) -> Any:
        """Moments that a token takes, where the dense model takes one."""
        if self.unit == "tokens":
            return np.ones_like(sparsity)
        return self.fixed_cost + (1 - self.fixed_cost) * (1 - sparsity)

    def _integral(self, low: float, high: float, power: int) -> float:
        """Integral of sparsityᵖ over tokens between two moments of one piece."""
        places = (low + high) / 2 + (high - low) / 2 * _NODES
        sparsities = np.array([self.schedule(place) for place in places])
        # a moment of compute holds the more tokens, the cheaper they are
        values = sparsities**power / self._price(sparsities)
        return float((high - low) / 2 * (_WEIGHTS * values).sum())


def average_parameters(
    model: nn.Module, path: SparsityPath, of: Denominator = "without embeddings", prunable: list[str] | None = None
) -> float:
    """Mean number of active parameters over the tokens of a run [Jin et al., 2025, arXiv 2501.12486, eq. 2].

    Parameters
    ----------
    model
        Dense, as it starts.
    path
        Of its prunable weights.
    of
        Which parameters count; the law must be fitted with the same ones.
    prunable
        Names of the parameters that the path is about, by default all that pruning may touch.
    """
    counted = density(model, prunable)
    pruned = counted.total("prunable").total
    return counted.total(of).total - pruned * path.average_sparsity()


def _knots(schedule: Schedule, total: float) -> list[float]:
    """Moments between which the sparsity is smooth."""
    begin, end = float(schedule.begin), float(schedule.end)
    if isinstance(schedule, OneShot):
        inner = [begin]
    else:
        pieces = schedule.rungs if isinstance(schedule, Ladder) else _PIECES
        inner = [begin + (end - begin) * piece / pieces for piece in range(pieces + 1)]
    return sorted({0.0, float(total), *inner})


def _mean_of_ramp(schedule: Schedule) -> float | None:
    """Mean of a schedule between its beginning and its end, or None where no closed form is known."""
    first, last = schedule.initial, schedule.final
    if type(schedule) is Geometric:
        kept = [1 - first, 1 - last]
        return 1 - ((kept[1] - kept[0]) / math.log(kept[1] / kept[0]) if kept[0] != kept[1] else kept[0])
    if type(schedule) is Ladder:
        return first + (last - first) * (schedule.rungs - 1) / (2 * schedule.rungs)
    share = {OneShot: 1.0, Linear: 0.5, Cubic: 0.75, Cosine: 0.5, Sine: 2 / math.pi}.get(type(schedule))
    return None if share is None else first + (last - first) * share

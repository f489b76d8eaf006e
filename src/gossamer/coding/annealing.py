"""How a run of expectation maximization is cooled: temperature, data cut, jitter and batches over its steps.

At a high temperature posteriors are flat, so that causes share the data before they specialise; the cut leaves out
points that have more active causes than any state considered; jitter and batches help out of poor optima.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.errors import ConfigurationError

Curve = float | Sequence[tuple[float, float]]
"""A number, or points ``(share of the steps, value)`` that are joined by lines."""


@dataclass(frozen=True, kw_only=True)
class Annealing:
    """Schedule of a run; each part is a number or points ``(share of the steps, value)`` joined by straight lines.

    Parameters
    ----------
    temperature
        T ≥ 1; the log-likelihood is multiplied by 1/T.
    cut
        c in [0, 1]: of N points the ``N (1 − (1 − A) c)`` with the largest evidence are used, where A is the prior
        probability of at most γ active causes.
    component_jitter, prior_jitter, noise_jitter
        Standard deviation of what is added to components, prior and standard deviation of the noise before a step.
    batch
        Share of the points used in a step, in (0, 1], drawn anew each time.

    Raises
    ------
    ConfigurationError
        If a value is out of range, or points are not in order.
    """

    temperature: Curve = ((0.0, 5.0), (0.8, 1.0))
    cut: Curve = ((0.0, 0.0), (2 / 3, 1.0))
    component_jitter: Curve = 0.0
    prior_jitter: Curve = 0.0
    noise_jitter: Curve = 0.0
    batch: Curve = 1.0

    def __post_init__(self) -> None:
        ranges = {"temperature": (1.0, float("inf")), "cut": (0.0, 1.0), "batch": (1e-9, 1.0)}
        for name in ("temperature", "cut", "component_jitter", "prior_jitter", "noise_jitter", "batch"):
            low, high = ranges.get(name, (0.0, float("inf")))
            points = _points(name, getattr(self, name))
            wrong = next((value for _, value in points if not low <= value <= high), None)
            if wrong is not None:
                raise ConfigurationError(f"{name} reaches {wrong}; it must stay in [{low:g}, {high:g}]")

    @classmethod
    def none(cls) -> Annealing:
        """Plain expectation maximization: temperature one, and all points."""
        return cls(temperature=1.0, cut=0.0)

    def at(self, name: str, position: float) -> float:
        """Value of a part at a share of the steps, from 0 to 1."""
        points = _points(name, getattr(self, name))
        for (left, below), (right, above) in itertools.pairwise(points):
            if position < right:
                return below + (above - below) * max(0.0, position - left) / (right - left)
        return points[-1][1]


def _points(name: str, curve: Curve) -> list[tuple[float, float]]:
    if isinstance(curve, int | float):
        return [(0.0, float(curve))]
    try:
        points = [(float(where), float(value)) for where, value in curve]
    except (TypeError, ValueError):
        points = []
    places = [where for where, _ in points]
    if not points or sorted(set(places)) != places or places[0] < 0 or places[-1] > 1:
        raise ConfigurationError(
            f"{name} is {curve!r}; give a number, or points such as ((0, 5), (0.8, 1)) with shares of the steps "
            "that rise within [0, 1]"
        )
    return points

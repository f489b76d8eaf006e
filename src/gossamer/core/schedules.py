"""When: sparsity (or any fraction) as a pure function of the step.

Every schedule is a frozen dataclass that is called with a step and returns a number. Before `begin` it gives the
initial value, from `end` on exactly the final one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class Schedule(ABC):
    """A number for every step.

    Parameters
    ----------
    final
        Value from `end` on.
    end
        Step at which it is reached.
    initial
        Value up to `begin`.
    begin
        Step at which the way starts.

    Raises
    ------
    ConfigurationError
        If it ends before it begins, or a value is NaN or infinite.
    """

    final: float
    end: int = 1
    initial: float = 0.0
    begin: int = 0

    def __post_init__(self) -> None:
        if self.end <= self.begin:
            raise ConfigurationError(f"the schedule ends at step {self.end}, not after its beginning at {self.begin}")
        for name in ("initial", "final"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigurationError(f"{name} is {getattr(self, name)}; a schedule needs finite numbers")

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if step <= self.begin:
            return self.initial
        if step >= self.end:
            return self.final
        progress = (step - self.begin) / (self.end - self.begin)
        return self.initial + (self.final - self.initial) * self.shape(progress)

    @abstractmethod
    def shape(self, progress: float) -> float:
        """Share of the way covered after a share `progress` of the time, both in (0, 1)."""


class OneShot(Schedule):
    """All at once, at the first step after `begin`."""

    def shape(self, progress: float) -> float:  # noqa: D102
        return 1.0


class Linear(Schedule):
    """A straight line."""

    def shape(self, progress: float) -> float:  # noqa: D102
        return progress


class Cubic(Schedule):
    """Fast first, then ever more slowly: ``1 − (1 − t)³`` [Zhu & Gupta, 2017, arXiv 1710.01878]."""

    def shape(self, progress: float) -> float:  # noqa: D102
        return 1 - (1 - progress) ** 3


class Cosine(Schedule):
    """Half a cosine wave: slow at both ends."""

    def shape(self, progress: float) -> float:  # noqa: D102
        return (1 - math.cos(math.pi * progress)) / 2


class Sine(Schedule):
    """A quarter of a sine wave: fast first, gentle at the end."""

    def shape(self, progress: float) -> float:  # noqa: D102
        return math.sin(math.pi * progress / 2)


class Geometric(Schedule):
    """The same share of what remains is removed in every step: densities form a geometric series.

    Both values are sparsities: at most 1.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.initial, self.final) > 1:
            raise ConfigurationError(
                f"a geometric schedule from {self.initial:g} to {self.final:g} is impossible: sparsities are at most 1"
            )

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if self.begin < step < self.end:
            progress = (step - self.begin) / (self.end - self.begin)
            return 1 - (1 - self.initial) ** (1 - progress) * (1 - self.final) ** progress
        return super().__call__(step)

    def shape(self, progress: float) -> float:  # noqa: D102
        return progress


@dataclass(frozen=True)
class Ladder(Schedule):
    """Equal rungs at equal intervals.

    Parameters
    ----------
    rungs
        Number of rises; the last one is at `end`.
    """

    rungs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rungs < 1:
            raise ConfigurationError(f"a ladder of {self.rungs} rungs is impossible; at least one is needed")

    def shape(self, progress: float) -> float:  # noqa: D102
        # a share such as 29/100 of 100 rungs must not fall short of 29 by a rounding error
        return math.floor(progress * self.rungs + 1e-9) / self.rungs

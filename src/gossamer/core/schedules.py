"""When: sparsity (or any fraction) as a pure function of the step.

Every schedule is a frozen dataclass that is called with a step and returns a number. Before `begin` it gives the
initial value, from `end` on exactly the final one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

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


@dataclass(frozen=True)
class Exponential(Schedule):
    """Equal ratios in equal times, from one positive value to another, such as a width that is annealed."""

    initial: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.initial > 0 and self.final > 0):
            raise ConfigurationError(f"initial and final are {self.initial:g} and {self.final:g}; both must be above 0")

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if self.begin < step < self.end:
            progress = (step - self.begin) / (self.end - self.begin)
            return self.initial ** (1 - progress) * self.final**progress
        return super().__call__(step)

    def shape(self, progress: float) -> float:  # noqa: D102
        return progress


@dataclass(frozen=True)
class SineStages:
    """A factor that rises in stages, each half a sine wave long: gentle where a stage begins and where it ends.

    Up to `begin` it is 0, then the first peak up to the first step. In every later stage, from step a to step b and
    from peak p to peak q, it is ``p + η (q − p)`` with ``η = (sin(−π/2 + π (t − a)/(b − a)) + 1)/2``; two equal peaks
    in a row make a stage that waits for the model to settle. From the last step on it is the last peak.

    Song et al., 2024, "ProSparse", arXiv 2402.13516, algorithm 1.

    Parameters
    ----------
    peaks
        Values that the stages reach: at least 0, none below the one before.
    steps
        Where each stage ends, ever later.
    begin
        Steps before the first stage, in which the value is 0.

    Raises
    ------
    ConfigurationError
        If peaks fall, steps do not rise, or their numbers differ.

    Examples
    --------
    >>> factor = SineStages(peaks=(0.5, 2.0), steps=(10, 20), begin=5)
    >>> [factor(step) for step in (5, 6, 10, 15, 20, 99)]
    [0.0, 0.5, 0.5, 1.25, 2.0, 2.0]
    """

    peaks: tuple[float, ...]
    steps: tuple[int, ...]
    begin: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "peaks", tuple(self.peaks))
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.peaks or len(self.peaks) != len(self.steps):
            raise ConfigurationError(
                f"{len(self.peaks)} peaks and {len(self.steps)} steps; give one step for each peak"
            )
        if not all(math.isfinite(p) for p in self.peaks) or any(q < p for p, q in pairwise((0.0, *self.peaks))):
            raise ConfigurationError(f"peaks are {self.peaks}; they must be finite, at least 0 and never fall")
        if self.begin < 0 or any(b <= a for a, b in pairwise((self.begin, *self.steps))):
            raise ConfigurationError(
                f"steps are {self.steps} after a beginning at {self.begin}; every stage must end later than the last"
            )

    def __call__(self, step: int) -> float:
        """Value at a step."""
        if step <= self.begin:
            return 0.0
        stage = bisect_left(self.steps, step)
        if stage in (0, len(self.steps)):
            return self.peaks[min(stage, len(self.peaks) - 1)]
        progress = (step - self.steps[stage - 1]) / (self.steps[stage] - self.steps[stage - 1])
        share = (1 + math.sin(math.pi * (progress - 0.5))) / 2
        return self.peaks[stage - 1] + share * (self.peaks[stage] - self.peaks[stage - 1])

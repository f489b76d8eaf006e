"""Prune a little after every few steps, in whatever shapes a method's masks have."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.schedules import Cubic
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps


@dataclass(kw_only=True)
class GradualPruning(Sparsifier):
    """Sparsity that follows a cubic schedule [Zhu & Gupta, 2017, arXiv 1710.01878], with masks of a method's own.

    Parameters
    ----------
    begin, end
        Steps at which pruning starts, and reaches the sparsity.
    every
        Steps between two choices of what is zero.
    """

    begin: int = 0
    end: int = 1000
    every: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.begin, self.end, self.every)

    @abstractmethod
    def masks(self, model: nn.Module, sparsity: float | None = None) -> MaskSet:
        """Masks of the present weights at a sparsity, by default the final one."""

    def change(self, training: SparseTraining) -> None:
        """Prune a little more, if it is time."""
        step = training.step
        if self.begin < step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end):
            sparsity = Cubic(self.sparsity, self.end, begin=self.begin)(step)
            training.assign(self.masks(training.model, sparsity))

    def finish(self, training: SparseTraining) -> None:
        """Prune to the full sparsity, if training has ended before the ramp."""
        if training.step < self.end:
            training.assign(self.masks(training.model))

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "warm-up" if step < self.begin else "ramp" if step < self.end else "frozen"

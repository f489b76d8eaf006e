"""The journey matters: prune between a quarter and three quarters of the compute of pretraining.

How good a model becomes depends on how large it was on average while it learned, not on how large it is in the end. A
model that starts dense, loses its smallest weights in the middle of its training, and recovers in the last quarter, is
as good as a dense one of the average size that cost as much, and is smaller. (The law, its fit and the planner are in
:mod:`gossamer.measure.scaling_law` and :mod:`gossamer.measure.pretraining_plan`.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gossamer.core.registry import register
from gossamer.core.schedules import Cubic, Geometric, Linear, OneShot, Schedule
from gossamer.errors import ConfigurationError, UnknownNameError, check_sparsity
from gossamer.measure.pretraining_plan import pretraining_path
from gossamer.measure.sparsity_path import SparsityPath
from gossamer.training.gmp import GradualMagnitudePruning

RAMPS: dict[str, type[Schedule]] = {"geometric": Geometric, "cubic": Cubic, "linear": Linear, "one-shot": OneShot}
"""Shapes of the ramp."""


@register(
    "journey-matters",
    paper="journey-matters",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="global",
)
@dataclass(kw_only=True)
class PretrainingSchedule(GradualMagnitudePruning):
    """Gradual magnitude pruning between two shares of the compute of a run.

    Jin et al., 2025, "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling
    Laws", arXiv 2501.12486. Late steps are cheaper, so that shares of compute are not shares of steps:
    :attr:`path` turns one into the other.

    Parameters
    ----------
    total
        Steps of the whole run.
    start_compute, stop_compute
        Shares of its compute at which pruning begins and ends.
    ramp
        ``geometric``: at every choice the same share of what is left goes, as in the authors' code; ``cubic``,
        ``linear``, or ``one-shot``: everything at `start_compute`.
    fixed_cost
        Share of the dense model's operations that pruning cannot remove:
        :attr:`gossamer.measure.training_flops.TrainingFlops.fixed_share`.
    scope
        One threshold for the model, as in the authors' code, or one for each ``layer``.
    every
        Steps between two choices; 100 in the authors' code.

    Attributes
    ----------
    begin, end
        Steps at which pruning begins and ends.
    path
        Sparsity over the run; gives its average.
    """

    sparsity: float = 0.5
    total: int = 1000
    start_compute: float = 0.25
    stop_compute: float = 0.75
    ramp: str = "geometric"
    fixed_cost: float = 0.0
    scope: Literal["layer", "model"] = "model"
    begin: int = field(init=False)
    end: int = field(init=False)
    path: SparsityPath = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.ramp not in RAMPS:
            raise UnknownNameError("ramp", self.ramp, RAMPS)
        if self.total < 2:
            raise ConfigurationError(f"total is {self.total} steps; a run of at least 2 is needed")
        if self.initial_sparsity:
            raise ConfigurationError(f"initial_sparsity is {self.initial_sparsity}; this schedule starts dense, with 0")
        self.path = pretraining_path(
            self.sparsity, self.start_compute, self.stop_compute, RAMPS[self.ramp], self.fixed_cost
        )
        self.begin = round(self.path.tokens_at(self.path.schedule.begin) * self.total)
        last = self.path.schedule.begin if self.ramp == "one-shot" else self.path.schedule.end
        self.end = max(round(self.path.tokens_at(last) * self.total), self.begin)
        super().__post_init__()

    def sparsity_at(self, step: int) -> float:
        """What the ramp asks for after a number of steps."""
        if step >= self.end:
            return self.sparsity
        return 0.0 if step < self.begin else self.path.sparsity(step / self.total)

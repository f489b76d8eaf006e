"""Dynamic pruning with feedback: what was pruned goes on learning from the mistakes that its absence causes.

The model computes with the largest weights only, but the gradient at that sparse point is applied to all of them. A
weight that was pruned too early grows in the background, and comes back when the masks are chosen anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gossamer.core.masking import LazyScores
from gossamer.core.projected_weight import ProjectedWeight
from gossamer.core.registry import register
from gossamer.core.schedules import Cubic
from gossamer.core.selection import dropped_count, keep_highest_jointly
from gossamer.core.sparse_sites import Site
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError


@register(
    "dpf",
    paper="sparse-model-soups",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="dynamic",
    criterion=("magnitude",),
    allocation="global",
    aims=("inference",),
)
@dataclass(kw_only=True)
class DynamicPruningWithFeedback(Sparsifier):
    """Compute with the largest weights of the whole model, and train them all.

    Lin, Stich, Barba, Dmitriev & Jaggi, 2020, "Dynamic Model Pruning with Feedback", arXiv 2006.07253.

    Parameters
    ----------
    sparsity
        Of all targets together from `end` on; before it along a cubic ramp.
    begin, end
        Steps of the ramp.
    every
        p: steps between two choices; the paper takes 16.
    freeze
        Step from which on masks stay, so that several copies that go on from there share theirs; never by default.
    """

    begin: int = 0
    end: int = 1000
    every: int = 16
    freeze: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.begin, self.end, self.every)
        if self.freeze is not None and self.freeze < self.end:
            raise ConfigurationError(f"freeze is {self.freeze}; masks must not stay before the ramp ends at {self.end}")

    def site(self, name: str, targets: Sequence[Target]) -> Site | None:
        """A dense weight, and the part of it that counts."""
        if isinstance(targets[0].module, SparseWeight):
            raise ConfigurationError(f"{name} stores no zeros, but DPF trains them; attach it before replacing layers")
        return ProjectedWeight(name, targets[0].parameter, targets)

    def wants_gradient(self, step: int) -> bool:
        """Whether zeros learn: they do, which costs a dense product in each step."""
        return True

    def start(self, training: SparseTraining) -> None:
        """Nothing is pruned before the ramp begins."""

    def change(self, training: SparseTraining) -> None:
        """Choose anew, if it is time."""
        step = training.step
        if self.begin < step <= self._last(step) and ((step - self.begin) % self.every == 0 or step == self.end):
            self._choose(training, self.sparsity_at(step))

    def finish(self, training: SparseTraining) -> None:
        """Choose by the final sparsity, if training ended before the ramp."""
        if training.step < self.end:
            self._choose(training, self.sparsity)

    def sparsity_at(self, step: int) -> float:
        """What the ramp asks for after a number of steps."""
        return Cubic(self.sparsity, self.end, begin=self.begin)(step)

    def _last(self, step: int) -> int:
        return step if self.freeze is None else self.freeze

    def _choose(self, training: SparseTraining, sparsity: float) -> None:
        def magnitude(target: Target) -> Tensor:
            target.check_finite()
            return training.weight(target.name).abs().float()

        for site in training.projected().values():
            site.restore()
        lazy = LazyScores(training.targets.values(), magnitude)
        training.assign(keep_highest_jointly(lazy, dropped_count(training.total, sparsity)))

    def phase(self, step: int) -> Phase:  # noqa: D102
        if step < self.begin:
            return "warm-up"
        return "ramp" if step < self.end else "explore" if step < self._last(step + 1) else "frozen"

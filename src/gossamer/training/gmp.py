"""Gradual magnitude pruning: raise the sparsity while the model trains, and always remove the smallest weights.

Early on a network has many weights to spare, and they go fast; the ramp flattens as fewer are left. What the paper
made of it is a comparison: of two models of equally many bytes, is it the large sparse one or the small dense one
that is better? (:func:`gossamer.measure.footprint` counts those bytes, indices included.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core.patterns import NM, Pattern, Unstructured
from gossamer.core.registry import register
from gossamer.core.roles import Role, without_roles
from gossamer.core.schedules import Schedule
from gossamer.core.selection import dropped_count, keep_highest_jointly
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps
from gossamer.core.targets import Target, find_targets
from gossamer.core.topology import Scores, magnitude, random_numbers
from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class Polynomial(Schedule):
    """``1 − (1 − t)^power``: the ramp of Zhu & Gupta, 2017, arXiv 1710.01878, eq. 1, cubic by default."""

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ConfigurationError(f"the power of a ramp is {self.power}; it must be above 0, such as 3")

    def shape(self, progress: float) -> float:  # noqa: D102
        return 1 - (1 - progress) ** self.power


@register(
    "gmp",
    paper="gmp",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude",),
    allocation="uniform",
    patterns=("unstructured", "n:m", "blocks"),
    aims=("inference",),
)
@dataclass(kw_only=True)
class GradualMagnitudePruning(Sparsifier):
    """Prune the smallest weights along a cubic ramp while training, and train on under the last mask.

    Zhu & Gupta, 2017, "To prune, or not to prune", arXiv 1710.01878. Masked weights neither train nor come back. A
    choice is made after the steps ``begin + every, begin + 2 every, …``, with the sparsity of eq. 1 at that step, and
    at `end`, where the sparsity is exact: ⌊s · n⌋ of the n weights of each matrix are zero. The matrices of a
    recurrent layer that act on its input and on its state are one matrix in the paper, and compete in one ranking.

    Parameters
    ----------
    sparsity, initial_sparsity
        At `end`, and at `begin`; before that nothing is pruned.
    begin, end
        Steps of the ramp. The learning rate should still be high enough after `end` for the model to recover, and
        some steps before `begin` should have told the weights apart; from a pretrained model `begin` may be 0. With
        ``begin == end`` everything goes at once.
    every
        Steps between two choices; the paper takes 100 to 1000.
    power
        3 is the cubic ramp, 1 a straight line.
    scope
        ``layer``: every layer gets the same sparsity, as in the paper; ``model``: one threshold for all.
    pattern
        Shape of the zeros; one that fixes its own sparsity, such as N:M, comes at `end` at once.
    score
        ``magnitude``, or ``random`` for the control.
    keep
        Roles of layers that stay dense, such as ``("first",)``; see :mod:`gossamer.core.roles`. Names are left out
        with `exclude`.
    heads, embeddings
        Whether the softmax and the embeddings are pruned too, as in the paper's language models.
    """

    initial_sparsity: float = 0.0
    begin: int = 0
    end: int = 1000
    every: int = 100
    power: float = 3.0
    scope: Literal["layer", "model"] = "layer"
    pattern: str | Pattern | None = None
    score: Literal["magnitude", "random"] = "magnitude"
    keep: tuple[Role, ...] = ()
    embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        # a ramp of no length is allowed: everything at once
        check_steps(self.begin, self.end + (self.end == self.begin), self.every)
        if not 0 <= self.initial_sparsity <= self.sparsity:
            raise ConfigurationError(
                f"initial_sparsity is {self.initial_sparsity}; it must lie between 0 and sparsity = {self.sparsity}"
            )
        if self.score not in SCORES:
            raise ConfigurationError(f"score is {self.score!r}; use {' or '.join(SCORES)}")
        if self.scope not in ("layer", "model"):
            raise ConfigurationError(f"scope is {self.scope!r}; use 'layer' or 'model'")
        self.pattern = None if self.pattern is None else Pattern.parse(self.pattern)
        if isinstance(self.pattern, NM):
            self.pattern.resolve(self.sparsity)

    def targets(self, model: nn.Module) -> list[Target]:  # noqa: D102
        found = find_targets(
            model, self.include, self.exclude, heads=self.heads, recurrent=True, embeddings=self.embeddings
        )
        return without_roles(model, found, self.keep) if self.keep else found

    def sparsity_at(self, step: int) -> float:
        """What the ramp asks for after a number of steps."""
        if step >= self.end:
            return self.sparsity
        if step < self.begin:
            return 0.0
        ramp = Polynomial(self.sparsity, self.end, initial=self.initial_sparsity, begin=self.begin, power=self.power)
        return ramp(step)

    def prunes(self, step: int) -> bool:
        """Whether weights are chosen after a step."""
        within = self.begin <= step <= self.end
        return within and ((step - self.begin) % self.every == 0 or step == self.end)

    def start(self, training: SparseTraining) -> None:
        """Prune what is due before the first step."""
        self.change(training)

    def change(self, training: SparseTraining) -> None:
        """Prune a little more, if it is time."""
        if self.prunes(training.step):
            self._prune(training, self.sparsity_at(training.step))

    def finish(self, training: SparseTraining) -> None:
        """Prune to the full sparsity, if training has ended before the ramp."""
        if training.step < self.end:
            self._prune(training, self.sparsity)

    def _prune(self, training: SparseTraining, sparsity: float) -> None:
        pattern = self.pattern or Unstructured(self.scope)
        assert isinstance(pattern, Pattern)
        if sparsity == 0 or (pattern.sparsity is not None and sparsity < self.sparsity):
            return
        score = SCORES[self.score]
        if pattern != Unstructured("layer"):
            training.prune(sparsity, pattern, score)
            return
        for names in _matrices(training):
            _prune_together(training, names, sparsity, score)

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "warm-up" if step < self.begin else "ramp" if step < self.end else "frozen"


SCORES: dict[str, Scores] = {"magnitude": magnitude, "random": random_numbers}
"""What may say which weights go."""


def _matrices(training: SparseTraining) -> list[list[str]]:
    """Names of the targets; those that stand side by side in a recurrent layer together."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, target in training.targets.items():
        recurrent = isinstance(target.module, nn.RNNBase) and target.attribute.startswith(("weight_ih", "weight_hh"))
        layer = target.attribute.replace("weight_hh", "weight_ih") if recurrent else target.attribute
        found.setdefault((id(target.module), layer, target.index), []).append(name)
    return list(found.values())


def _prune_together(training: SparseTraining, names: list[str], sparsity: float, score: Scores) -> None:
    """Prune matrices by one ranking, until exactly a share of all their weights is zero."""

    def alive(name: str) -> Tensor:
        training.targets[name].check_finite()
        return score(training, name).cpu().float().masked_fill(~training.mask(name).cpu(), -torch.inf)

    total = sum(training.targets[name].shape.numel() for name in names)
    zeros = total - sum(training.active(name) for name in names)
    dropped = max(dropped_count(total, sparsity), zeros)
    training.assign(keep_highest_jointly({name: alive(name) for name in names}, dropped))

"""Pruning plasticity: how well a network recovers from being pruned at a given moment of its training.

From one checkpoint the training goes on several times: as it was, and after a share of the weights has been removed,
with or without letting some of them grow back elsewhere. What the pruned network reaches after a while, less what the
network had before it was pruned, is its plasticity.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from gossamer.core.selection import keep_highest
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.topology import Scores, magnitude, random_numbers
from gossamer.errors import ConfigurationError, check_sparsity

CRITERIA: dict[str, Scores] = {"magnitude": magnitude, "random": random_numbers}
"""Ways to choose what is pruned, by name."""


class TrainingFunction(Protocol):
    """What goes on from a checkpoint: trains for a number of steps (maybe none), and measures."""

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, /) -> float:
        """Train in place, as the original training would have gone on, and return the metric."""


@dataclass(frozen=True)
class Plasticity:
    """One continuation of a training; a list of these is what ``pandas.DataFrame`` takes.

    Attributes
    ----------
    amount
        Share of the active weights that was pruned.
    regeneration
        What grew back: 0 for nothing, a share of what was left, or ``"all"``.
    before, pruned
        Metric at the checkpoint, and right after pruning.
    after, unpruned
        Metric after the horizon, and that of the continuation in which nothing was pruned.
    sparsity
        At the end of the horizon, of the weights that may become zero.
    """

    amount: float
    regeneration: float | Literal["all"]
    before: float
    pruned: float
    after: float
    unpruned: float
    sparsity: float

    @property
    def plasticity(self) -> float:
        """What was reached after the horizon, less what there was before pruning."""
        return self.after - self.before

    @property
    def against_unpruned(self) -> float:
        """What was reached, less what the unpruned network reached meanwhile."""
        return self.after - self.unpruned


def pruning_plasticity(
    train: TrainingFunction,
    checkpoint: tuple[nn.Module, torch.optim.Optimizer],
    amounts: Sequence[float] = (0.2, 0.5, 0.8, 0.9, 0.98),
    criterion: str | Scores = "magnitude",
    horizon: int = 1000,
    *,
    scope: Literal["model", "layer"] = "model",
    regeneration: Sequence[float | Literal["all"]] = (0.0,),
    heads: bool = True,
    seed: int = 0,
) -> list[Plasticity]:
    """Prune a network at one moment of its training by several amounts, and see how it recovers.

    Liu et al., 2021, arXiv 2106.10404, section 3. To follow it over training, call this for several checkpoints; over
    learning rates, change that of the optimiser.

    Parameters
    ----------
    train
        Called with copies of the model and the optimiser, and with 0 or `horizon` steps. For comparable results it
        must draw its batches from the same seed each time.
    checkpoint
        The model and its optimiser at that moment; neither is changed. A weight that is exactly zero counts as
        pruned already.
    amounts
        Shares of the active weights to prune.
    criterion
        ``magnitude``, ``random``, or scores of one's own, the lowest of which go.
    horizon
        Steps of recovery.
    scope
        Whether the weights of the whole model compete, or those of each layer.
    regeneration
        What to grow, by the largest gradient of the first step: a share ρ in [0, 1) of what each layer has left, which
        is removed beforehand, so that the sparsity stays the same; or ``"all"``, as many as were pruned, so that the
        sparsity becomes what it was at the checkpoint (as in the authors' code). 0 grows nothing.
    heads
        Whether the last layer is pruned too.
    seed
        Of a random criterion.

    Returns
    -------
    list of Plasticity
        For every amount and every kind of regeneration, in this order.

    Raises
    ------
    ConfigurationError
        If an amount, a regeneration, the horizon, the criterion or the scope is out of range.
    """
    scores = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    if scores is None:
        raise ConfigurationError(f"criterion is {criterion!r}; use {', '.join(CRITERIA)}, or a function of your own")
    if scope not in ("model", "layer"):
        raise ConfigurationError(f"scope is {scope!r}; use 'model' or 'layer'")
    if horizon < 1:
        raise ConfigurationError(f"horizon is {horizon} steps; at least one is needed")
    methods = [
        _PruneOnce(amount=amount, regeneration=share, scores=scores, scope=scope, heads=heads, seed=seed)
        for amount in amounts
        for share in regeneration
    ]
    before = train(*copy.deepcopy(checkpoint), 0)
    unpruned = train(*copy.deepcopy(checkpoint), horizon)
    return [_continue(train, checkpoint, method, horizon, before, unpruned) for method in methods]


def _continue(
    train: TrainingFunction,
    checkpoint: tuple[nn.Module, torch.optim.Optimizer],
    method: _PruneOnce,
    horizon: int,
    before: float,
    unpruned: float,
) -> Plasticity:
    model, optimizer = copy.deepcopy(checkpoint)
    run = method.attach(model, optimizer)
    pruned = train(model, optimizer, 0)
    after = train(model, optimizer, horizon)
    run.finalize()
    return Plasticity(method.amount, method.regeneration, before, pruned, after, unpruned, run.sparsity)


@dataclass(kw_only=True)
class _PruneOnce(Sparsifier):
    """Prune at attachment, and grow after the first step."""

    amount: float
    regeneration: float | Literal["all"]
    scores: Callable
    scope: Literal["model", "layer"]

    def __post_init__(self) -> None:
        check_sparsity(self.amount, "an amount to prune")
        if self.regeneration != "all" and not (
            isinstance(self.regeneration, (int, float)) and 0 <= self.regeneration < 1
        ):
            raise ConfigurationError(f"regeneration is {self.regeneration!r}; use a share in [0, 1) or 'all'")

    def start(self, training: SparseTraining) -> None:
        training.assign({name: training.weight(name) != 0 for name in training.targets})
        active = {name: training.active(name) for name in training.targets}
        sizes = {name: target.shape.numel() for name, target in training.targets.items()}
        if self.scope == "model":
            left = (1 - self.amount) * sum(active.values())
            training.prune(1 - left / training.total, "model", self.scores)
        else:
            training.prune(
                {name: 1 - (1 - self.amount) * active[name] / sizes[name] for name in active}, "layer", self.scores
            )
        training.extra["pruned"] = {name: active[name] - training.active(name) for name in active}

    def wants_gradient(self, step: int) -> bool:
        return step == 1 and self.regeneration != 0

    def change(self, training: SparseTraining) -> None:
        if not self.wants_gradient(training.step):
            return
        if self.regeneration == "all":
            for name, count in training.extra["pruned"].items():
                mask = training.mask(name).cpu()
                wanted = training.gradient(name).abs().cpu().float().masked_fill(mask, -torch.inf)
                grown = keep_highest(wanted.reshape(1, -1), wanted.numel() - count).view(mask.shape)
                training.assign({name: mask | grown})
        else:
            training.exchange(self.regeneration)

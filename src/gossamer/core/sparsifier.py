"""Methods that act while a model trains: what they are asked, and when.

A :class:`Sparsifier` is a description; attached to a model and its optimiser it becomes a
:class:`~gossamer.core.sparse_training.SparseTraining`, which asks it after every step. The loop of the user stays as
it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from gossamer.core import scores
from gossamer.core.allocation import Shapes, allocate, exact_counts
from gossamer.core.patterns import Unstructured
from gossamer.core.sparse_sites import Site
from gossamer.core.targets import Target, find_targets
from gossamer.errors import ConfigurationError, SparsityError, check_sparsity

if TYPE_CHECKING:
    from gossamer.core.sparse_training import SparseTraining

Phase = Literal["warm-up", "ramp", "explore", "frozen"]


@dataclass(kw_only=True)
class Sparsifier:
    """What becomes zero while a model trains, which zeros, how many and when.

    A method overrides the questions whose answers are its own; the answers here are those of training dense.

    Parameters
    ----------
    sparsity
        Share of the weights of all targets together that are zero in the end.
    include, exclude, heads
        Which layers; see :func:`gossamer.core.targets.find_targets`.
    seed
        Of everything that is drawn.
    """

    sparsity: float = 0.9
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    heads: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    def targets(self, model: nn.Module) -> list[Target]:
        """Which matrices may become sparse.

        Raises
        ------
        TargetError
            If there is none.
        """
        return find_targets(model, self.include, self.exclude, heads=self.heads, recurrent=True)

    def start(self, training: SparseTraining) -> None:
        """Choose the first masks; by default everything stays."""

    def wants_gradient(self, step: int) -> bool:
        """Whether the gradient of the weights that are zero is needed at a step, counted from 1."""
        return False

    def site(self, name: str, targets: Sequence[Target]) -> Site | None:
        """How the zeros of a parameter are held; None for what is usual.

        Parameters
        ----------
        name
            Of the parameter.
        targets
            The matrices that it holds: one, or several stacked experts.
        """
        return None

    def prepare(self, training: SparseTraining) -> None:
        """Act before a step, when gradients are complete, clipped and unscaled; ``training.step`` have been made."""

    def change(self, training: SparseTraining) -> None:
        """Change masks after a step; ``training.step`` steps have been made."""

    def finish(self, training: SparseTraining) -> None:
        """Reach what the method promises, if training ended early."""

    def phase(self, step: int) -> Phase:
        """What the method is doing after a number of steps."""
        return "frozen"

    def attach(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any] | None = None
    ) -> SparseTraining:
        """Start: from now on every step of the optimiser is followed by the method.

        Parameters
        ----------
        model
            Changed in place.
        optimizer
            Any of torch that holds the weights of all targets.
        state
            Of a run that goes on (:meth:`SparseTraining.state_dict`), when model and optimiser have been loaded
            already; nothing is chosen anew then.

        Raises
        ------
        TargetError
            If no layer is left to make sparse.
        ConfigurationError
            If a weight is frozen, not in the optimiser, or already followed by another method.
        """
        from gossamer.core.sparse_training import SparseTraining

        return SparseTraining(self, model, optimizer, state)


def check_steps(begin: int, end: int, every: int) -> None:
    """Refuse steps that make no schedule.

    Raises
    ------
    ConfigurationError
        If they do not satisfy 0 <= begin < end and every >= 1.
    """
    if every < 1 or end <= begin or begin < 0:
        raise ConfigurationError(
            f"begin, end and every are {begin}, {end} and {every} steps; 0 <= begin < end and every >= 1 are needed"
        )


def random_masks(
    targets: Iterable[Target],
    sparsity: float,
    allocation: str = "erdos-renyi-kernel",
    generator: torch.Generator | None = None,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Draw positions at random, with exact numbers for every layer.

    Parameters
    ----------
    targets
        The matrices.
    sparsity
        Of all of them together.
    allocation
        Name of a rule that knows nothing but shapes.
    generator
        On the CPU.

    Returns
    -------
    dict, list of str
        Target name → bool mask; and a sentence for every layer that the allocation leaves dense.

    Raises
    ------
    UnknownNameError
        If there is no such allocation.
    SparsityError
        If a layer would be left without a weight.
    """
    found = list(targets)
    shapes: Shapes = {each.name: tuple(each.shape) for each in found}
    counts = exact_counts(allocate(allocation, shapes, sparsity), shapes, sparsity)
    empty = [name for name, share in counts.items() if share == 1]
    if empty:
        raise SparsityError(
            f"at sparsity {sparsity} the allocation {allocation} leaves {empty[0]} without a single weight; "
            f"ask for less, exclude it, or take another allocation"
        )
    notes = [
        f"{name} stays dense: {allocation} makes none of its {tuple(shapes[name])} weights zero at sparsity {sparsity}"
        for name, share in counts.items()
        if sparsity > 0 and share == 0
    ]
    pattern = Unstructured("layer")
    masks = {each.name: pattern.select(_random(each, generator), counts[each.name]) for each in found}
    return masks, notes


def _random(target: Target, generator: torch.Generator | None) -> torch.Tensor:
    return scores.random(torch.empty(target.shape), generator)

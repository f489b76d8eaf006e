"""Random pruning: draw the zeros before training, and let the density of each layer be all that is chosen.

The larger the network and the better its densities are spread over the layers, the less it matters *which* weights
stay. So this method knows only rules for densities. Two of them look at one batch, score every weight by SNIP or by
GraSP, keep from the scores nothing but how many weights each layer would have, and draw anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.allocation import (
    ALLOCATIONS,
    Shapes,
    allocate,
    around,
    erdos_renyi,
    erdos_renyi_kernel_plus,
    exact_counts,
    shares_of_highest,
)
from gossamer.core.patterns import Unstructured
from gossamer.core.registry import register
from gossamer.core.roles import Role, roles
from gossamer.core.selection import dropped_count, keep_highest_jointly
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparse_weight import SparseWeight
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.training.saliency import SALIENCIES, count_paths, saliency

Rule = Callable[[Shapes, float], dict[str, float]]


@register(
    "random-pruning",
    paper="random-pruning",
    when="during training",
    needs_data=False,
    timing="before training",
    path=("sparse-to-sparse",),
    topology="static",
    criterion=("random",),
    allocation="erdos-renyi",
)
@dataclass(kw_only=True)
class RandomPruning(Sparsifier):
    """Train under a random mask whose layers have well-chosen densities.

    Liu et al., 2022, "The Unreasonable Effectiveness of Random Pruning", arXiv 2202.02643, section 3. (With a mask
    that is exchanged meanwhile it would be :class:`~gossamer.training.set.SET`.)

    Parameters
    ----------
    sparsity
        Of all targets together; the last layer counts.
    allocation
        How many weights each layer gets: ``uniform``, ``uniform-plus``, ``erdos-renyi``, ``erdos-renyi-kernel``,
        ``erdos-renyi-kernel-plus``, ``snip``, ``grasp``, or sparsities by the names of the weights.
    draw
        ``exact``: as many weights as the allocation says; ``bernoulli``: each with its probability, as in the paper.
    keep
        Roles of layers that stay dense, such as ``("first",)``; the others make up for it.
    power
        Of the Erdős–Rényi ratio.
    last_density
        Of the last layer with ``erdos-renyi-kernel-plus``.
    batch
        Inputs and what the loss needs, for ``snip`` and ``grasp``.
    loss
        Of outputs and the second part of `batch`.
    redraw
        Whether places are drawn; if not, the weights with the highest scores of ``snip`` or ``grasp`` stay, which is
        what those methods are.
    min_per_unit
        Weights that every output of a layer keeps at least, at the cost of those with most. With 0, a unit may lose
        all its inputs.
    init
        ``dense``: weights as they are, as in the paper; ``sparse fan-in``: divided by √density of their layer, which
        keeps the variance of what the layer computes.
    example
        Inputs with which to check that a path of weights leads through the network; by default those of `batch`. For
        networks of linear layers, convolutions, pooling, batch norm and ReLU.
    """

    heads: bool = True
    allocation: str | Mapping[str, float] = "erdos-renyi-kernel"
    draw: Literal["exact", "bernoulli"] = "exact"
    keep: tuple[Role, ...] = ()
    power: float = 1.0
    last_density: float = 1.0
    batch: tuple[Tensor, Tensor] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy
    redraw: bool = True
    min_per_unit: int = 0
    init: Literal["dense", "sparse fan-in"] = "dense"
    example: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [*ALLOCATIONS, *SALIENCIES]
        if isinstance(self.allocation, str) and self.allocation not in known:
            raise ConfigurationError(f"allocation is {self.allocation!r}; known are {', '.join(known)}")
        for name, allowed in {"draw": ("exact", "bernoulli"), "init": ("dense", "sparse fan-in")}.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; use {' or '.join(allowed)}")
        if self.min_per_unit < 0:
            raise ConfigurationError(f"min_per_unit is {self.min_per_unit}; it must be at least 0")
        if not 0 < self.last_density <= 1:
            raise ConfigurationError(f"last_density is {self.last_density}; it must be a number in (0, 1]")
        scored = isinstance(self.allocation, str) and self.allocation in SALIENCIES
        if not self.redraw and (not scored or self.keep or self.draw != "exact"):
            raise ConfigurationError("redraw=False keeps the highest scores of snip or grasp, of all layers, exactly")
        if scored and self.batch is None:
            raise ConfigurationError(f"the densities of {self.allocation} need a batch of inputs and labels; give one")

    def start(self, training: SparseTraining) -> None:
        """Choose the densities and draw the mask."""
        shares, masks = self._chosen(training)
        for name, mask in masks.items():
            if not mask.any():
                raise SparsityError(
                    f"at sparsity {self.sparsity} {name} is left without a single weight; ask for less, or take "
                    f"another allocation than {self.allocation}"
                )
        if self.min_per_unit:
            masks = {name: _repaired(mask, self.min_per_unit, name, training.generator) for name, mask in masks.items()}
        training.assign(masks)
        self._describe(training, shares)
        if self.init == "sparse fan-in":
            for name, target in training.targets.items():
                stored = isinstance(target.module, SparseWeight)  # whose dense weight would be a copy
                weight = target.parameter.detach() if stored else training.weight(name)
                weight.mul_((target.shape.numel() / training.active(name)) ** 0.5)
        self._check_paths(training)

    def _chosen(self, training: SparseTraining) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Sparsity of each target, and its mask."""
        shapes: Shapes = {name: tuple(target.shape) for name, target in training.targets.items()}
        if not self.redraw:
            found = self._saliency(training)
            total = sum(values.numel() for values in found.values())
            masks = keep_highest_jointly(found, dropped_count(total, self.sparsity))
            return {name: 1 - float(mask.double().mean()) for name, mask in masks.items()}, masks
        kept = {name: 0.0 for name, own in roles(training.model).items() if name in shapes and own & set(self.keep)}
        rule = self._rule(training)
        shares = around(kept, shapes, self.sparsity, rule) if kept else rule(shapes, self.sparsity)
        return shares, self._drawn(shares, shapes, training.generator)

    def _saliency(self, training: SparseTraining) -> dict[str, Tensor]:
        assert self.batch is not None
        targets = training.targets.values()
        return saliency(training.model, targets, *self.batch, kind=str(self.allocation), loss=self.loss)

    def _rule(self, training: SparseTraining) -> Rule:
        if not isinstance(self.allocation, str):
            given = self.allocation
            return lambda shapes, sparsity: allocate(given, shapes, sparsity)
        if self.allocation in SALIENCIES:
            found = self._saliency(training)
            return lambda shapes, sparsity: shares_of_highest({name: found[name] for name in shapes}, sparsity)
        if self.allocation == "erdos-renyi-kernel-plus":
            return lambda shapes, sparsity: erdos_renyi_kernel_plus(shapes, sparsity, last_density=self.last_density)
        if self.allocation.startswith("erdos-renyi"):
            kernel = self.allocation.endswith("kernel")
            return lambda shapes, sparsity: erdos_renyi(shapes, sparsity, kernel=kernel, power=self.power)
        return ALLOCATIONS[self.allocation]

    def _drawn(
        self, shares: Mapping[str, float], shapes: Shapes, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        drawn = {name: scores.random(torch.empty(shape), generator) for name, shape in shapes.items()}
        if self.draw == "bernoulli":
            return {name: values >= shares[name] for name, values in drawn.items()}
        given = not isinstance(self.allocation, str)
        counts = {name: round(shares[name] * values.numel()) for name, values in drawn.items()}
        exact = None if given else exact_counts(shares, shapes, self.sparsity)
        pattern = Unstructured("layer")
        masks = {}
        for name, values in drawn.items():
            share = counts[name] / values.numel() if exact is None else exact[name]
            masks[name] = torch.zeros_like(values, dtype=torch.bool) if share == 1 else pattern.select(values, share)
        return masks

    def _describe(self, training: SparseTraining, shares: Mapping[str, float]) -> None:
        for name, share in shares.items():
            if share == 0 and self.sparsity > 0:
                training.notes.append(f"{name} stays dense: {_name_of(self.allocation)} gives it all its weights")
            mask = training.mask(name)
            lost = int((~mask.flatten(1).any(1)).sum())
            if lost:
                training.notes.append(
                    f"{lost} of {len(mask)} units of {name} have no input left; min_per_unit=1 gives them one"
                )

    def _check_paths(self, training: SparseTraining) -> None:
        example = self.example if self.example is not None or self.batch is None else self.batch[0]
        if example is not None and not bool((count_paths(training.model, example[:1]) > 0).any()):
            raise SparsityError(
                f"at sparsity {self.sparsity} no path of weights leads from the inputs to an output; ask for less, or "
                f"set min_per_unit=1"
            )


def _name_of(allocation: str | Mapping[str, float]) -> str:
    return allocation if isinstance(allocation, str) else "the given allocation"


def _repaired(mask: Tensor, least: int, name: str, generator: torch.Generator | None) -> Tensor:
    """The mask with at least so many weights in every row; each that is added is taken from a row with most."""
    rows = mask.flatten(1).clone()
    counts = rows.sum(1)
    if least > rows.shape[1] or least * len(rows) > int(counts.sum()):
        raise SparsityError(
            f"{name} keeps {int(counts.sum())} weights in {len(rows)} units of {rows.shape[1]} inputs; min_per_unit = "
            f"{least} is out of reach: ask for less sparsity"
        )
    for row in (counts < least).nonzero().flatten().tolist():
        while int(counts[row]) < least:
            richest = int(counts.argmax())
            for place, value in ((richest, True), (row, False)):
                choices = (rows[place] == value).nonzero().flatten()
                rows[place, choices[torch.randint(len(choices), (), generator=generator)]] = not value
            counts[richest] -= 1
            counts[row] += 1
    return rows.view(mask.shape)

"""Whole filters of super-resolution networks pressed to zero, the same ones wherever a residual connection adds them.

A filter can only be taken out of a residual network if all layers that are added to one another lose the one at the
same place. Structure-regularised pruning (SRP) draws these places at random, for the network adapts to any while they
are pressed down slowly. Aligned structured sparsity learning (ASSL) lets the layers agree first: a term of the loss
rewards filters that are large in one layer for being large in the others too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gossamer.core.channel_groups import ChannelGroup
from gossamer.core.masks import MaskSet
from gossamer.core.nodes import node_groups, node_masks
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps
from gossamer.errors import ConfigurationError, SparsityError

_GROUPS: WeakKeyDictionary[SparseTraining, dict[str, ChannelGroup]] = WeakKeyDictionary()


@dataclass(kw_only=True)
class AlignedFilters(Sparsifier):
    """Press chosen filters down with a growing penalty, cut them at `end`, and train on.

    SRP: Zhang, Wang, Qin & Fu, 2022, "Learning Efficient Image Super-Resolution Networks via Structure-Regularized
    Pruning" (ICLR). ASSL: Zhang, Wang, Qin & Fu, 2021, "Aligned Structured Sparsity Learning for Efficient Image
    Super-Resolution" (NeurIPS). Both start from a trained network. The filters of a layer by itself are chosen by the
    mean of their absolute weights. ASSL writes each filter as a scale times a direction and acts on the scales; here
    the scale is the filter's norm, on which the penalty is the same, so that no layer has to be exchanged.

    Parameters
    ----------
    sparsity
        Of the weights of all targets, which is reached or just exceeded: all groups keep one share of their filters,
        as many as possible. A share q leaves about q² of the weights.
    align
        ``learned`` for ASSL, ``random`` for SRP.
    begin, agreed, end
        Steps at which filters are chosen and the penalty begins to grow; at which ASSL's layers have agreed, and their
        shared filters are chosen; and of the cut.
    alignment
        Weight of ASSL's term.
    penalty_step, penalty_every, penalty_limit
        What the penalty λ of ``½ λ (‖W_i‖² + b_i²)`` grows by, every so many steps, and where it stops.
    exclude
        By default, as there, the layers for the mean of colours and those that put the image together.
    """

    sparsity: float = 0.95
    align: Literal["learned", "random"] = "learned"
    begin: int = 0
    agreed: int = 17_260
    end: int = 143_000
    alignment: float = 1.0
    penalty_step: float = 1e-4
    penalty_every: int = 20
    penalty_limit: float = 0.5
    exclude: tuple[str, ...] = ("*mean*", "*tail*")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.begin, self.end, self.penalty_every)
        if self.align not in ("learned", "random"):
            raise ConfigurationError(f"align is {self.align!r}; use 'learned' (ASSL) or 'random' (SRP)")
        if self.align == "learned" and not self.begin <= self.agreed <= self.end:
            raise ConfigurationError(f"agreed is {self.agreed}; it must lie in [{self.begin}, {self.end}]")
        if not (self.penalty_step > 0 and self.penalty_limit > 0 and self.alignment >= 0):
            raise ConfigurationError(
                f"penalty_step, penalty_limit and alignment are {self.penalty_step}, {self.penalty_limit} and "
                f"{self.alignment}; the first two must be > 0, the last >= 0"
            )

    # ------------------------------------------------------------------------------------------ what happens when

    def start(self, training: SparseTraining) -> None:
        """Find out how many filters stay; nothing is masked before the cut."""
        shares = self._groups(training)
        sizes = {name: group.size for name, group in shares.items()}
        training.extra["kept filters"] = kept_counts(training.model, sizes, set(training.targets), self.sparsity)
        self._choose(training)

    def prepare(self, training: SparseTraining) -> None:
        """Add the gradients of the penalty, and of the alignment, before a step."""
        if not self.begin <= training.step < self.end:
            return
        if self.align == "learned" and training.step < self.agreed and self.alignment > 0:
            for names in self._shared(training).values():
                self._align(training, names)
        for name, kept in _nodes(training).items():
            press(training.model, self._groups(training)[name], kept, training.extra[f"penalty of {name}"])

    def change(self, training: SparseTraining) -> None:
        """Choose, let the penalty grow, or cut; afterwards hold what belongs to the filters that are gone at zero."""
        step = training.step
        if self.begin < step < self.end and (step - self.begin) % self.penalty_every == 0:
            for name in _nodes(training):
                grown = training.extra[f"penalty of {name}"] + self.penalty_step
                training.extra[f"penalty of {name}"] = min(grown, self.penalty_limit)
        if step in (self.begin, self.agreed):
            self._choose(training)
        if step == self.end:
            self._cut(training)
        elif step > self.end:
            self._clear(training)

    def finish(self, training: SparseTraining) -> None:
        """Cut, if training has ended before."""
        if training.step < self.end:
            self._cut(training)
        _GROUPS.pop(training, None)

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "warm-up" if step < self.begin else "explore" if step < self.end else "frozen"

    # ------------------------------------------------------------------------------------------ which filters

    def _groups(self, training: SparseTraining) -> dict[str, ChannelGroup]:
        """Filters that can go: those all of whose weights are targets."""
        if training not in _GROUPS:
            found = node_groups(training.model)
            own = {name: group for name, group in found.items() if set(group.outputs()) <= set(training.targets)}
            _GROUPS[training] = own
        return _GROUPS[training]

    def _shared(self, training: SparseTraining) -> dict[str, list[str]]:
        """Groups whose filters several layers add up, and those layers' weights."""
        return {name: g.outputs() for name, g in self._groups(training).items() if len(g.outputs()) > 1}

    def _choose(self, training: SparseTraining, last: bool = False) -> None:
        """Choose the filters whose time has come, of all groups in which none are chosen yet."""
        for name, group in self._groups(training).items():
            learned = self.align == "learned" and len(group.outputs()) > 1
            due = last or training.step >= (self.agreed if learned else self.begin)
            if not due or f"filters of {name}" in training.extra:
                continue
            if len(group.outputs()) == 1:
                score = training.weight(name).abs().flatten(1).mean(1).cpu()
            elif learned:
                score = self._soft(training, group.outputs()).sum(0).detach().cpu()
            else:
                score = torch.rand(group.size, generator=training.generator)
            kept = torch.zeros(group.size, dtype=torch.bool)
            kept[score.argsort(descending=True, stable=True)[: training.extra["kept filters"][name]]] = True
            training.extra |= {f"filters of {name}": kept, f"penalty of {name}": 0.0}

    # ------------------------------------------------------------------------------------------ pressing and cutting

    def _soft(self, training: SparseTraining, names: list[str]) -> Tensor:
        kept = next(n for name, n in training.extra["kept filters"].items() if name in names)
        return soft_masks([training.targets[name].parameter for name in names], kept)

    def _align(self, training: SparseTraining, names: list[str]) -> None:
        """Add the gradient of ``−mean(M Mᵀ)``, which is lower where all layers keep the same filters."""
        parameters = [training.targets[name].parameter for name in names]
        if any(parameter.grad is None for parameter in parameters):
            return
        with torch.enable_grad():
            masks = self._soft(training, names)
            gradients = torch.autograd.grad(-(masks @ masks.t()).mean(), parameters)
        for parameter, gradient in zip(parameters, gradients):
            assert parameter.grad is not None
            parameter.grad.add_(gradient, alpha=self.alignment)

    def _cut(self, training: SparseTraining) -> None:
        self._choose(training, last=True)
        masks = node_masks(training.model, _nodes(training))
        training.extra["mask of the rest"] = {n: masks[n] for n in masks if n not in training.targets}
        training.assign({name: masks[name] for name in masks if name in training.targets})
        self._clear(training)

    @torch.no_grad()
    def _clear(self, training: SparseTraining) -> None:
        parameters = dict(training.model.named_parameters())
        for name, mask in training.extra["mask of the rest"].items():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def _nodes(training: SparseTraining) -> dict[str, Tensor]:
    prefix = "filters of "
    return {key.removeprefix(prefix): kept for key, kept in training.extra.items() if key.startswith(prefix)}


def kept_filters(training: SparseTraining) -> dict[str, Tensor]:
    """Which filters stay, as :func:`gossamer.core.nodes.shrink` takes them to build the smaller network.

    Parameters
    ----------
    training
        A run of :class:`AlignedFilters`.

    Raises
    ------
    ConfigurationError
        If the filters have not been cut yet.
    """
    if "mask of the rest" not in training.extra:
        raise ConfigurationError(f"no filter has been cut after {training.step} steps; finalize() the run first")
    return _nodes(training)


def soft_masks(weights: list[Tensor], kept: int) -> Tensor:
    """M of ASSL: ``σ(γ − γ')`` of the norms γ of each layer's filters, where γ' is the norm of the last that is kept.

    As in the authors' program, the gradient reaches γ' too.

    Parameters
    ----------
    weights
        Of layers with as many filters.
    kept
        Filters that stay.

    Returns
    -------
    Tensor
        ``(layers, filters)``, at least ½ for those that stay.
    """
    norms = torch.stack([weight.flatten(1).norm(dim=1) for weight in weights])
    return torch.sigmoid(norms - norms.sort(1, descending=True).values[:, kept - 1 : kept])


@torch.no_grad()
def press(model: nn.Module, group: ChannelGroup, kept: Tensor, penalty: float) -> None:
    """Add the gradient of ``½ λ (‖W_i‖² + b_i²)`` of all filters of a group that are to go.

    Parameters
    ----------
    model
        Whose gradients are complete.
    group, kept
        The filters, and which of them stay, ``(filters,)`` bool.
    penalty
        λ.
    """
    parameters = dict(model.named_parameters())
    for axis in group.axes:
        parameter = parameters.get(axis.name)
        if axis.dim or parameter is None or parameter.grad is None or penalty == 0:
            continue
        going = (~kept).to(parameter.device).view(-1, *[1] * (parameter.dim() - 1))
        parameter.grad.addcmul_(going.to(parameter), parameter, value=penalty)


def kept_counts(model: nn.Module, sizes: Mapping[str, int], targets: set[str], sparsity: float) -> dict[str, int]:
    """How many filters of every group stay, if all keep one share of theirs: the most with which a sparsity is reached.

    Parameters
    ----------
    model
        Whose filters.
    sizes
        Filters of every group.
    targets
        Names of the weights that count.
    sparsity
        To be reached.

    Raises
    ------
    SparsityError
        If it is not reached with one filter in each group, or there is no group.
    """
    if not sizes:
        raise SparsityError("no filter of the targets may go; include hidden layers that torch.fx can follow")
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if name in targets)
    finest = max(sizes.values())

    def counts(share: int) -> dict[str, int]:
        return {name: max(1, size * share // finest) for name, size in sizes.items()}

    def reached(share: int) -> bool:
        nodes = {name: torch.arange(sizes[name]) < kept for name, kept in counts(share).items()}
        masks: MaskSet = node_masks(model, nodes)
        gone = sum(int((~masks[name]).sum()) for name in masks if name in targets)
        return gone >= math.ceil(sparsity * total - 1e-6)

    if not reached(1):
        raise SparsityError(f"sparsity is {sparsity}; with one filter left in each group less is zero, so ask for less")
    low, high = 1, finest + 1  # reached, not reached
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle) else (low, middle)
    return counts(low)

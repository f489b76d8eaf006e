"""Wanda: a weight matters as much as the signal that flows through it.

Language models have a few input features that are a hundred times larger than the rest. A small weight on a loud
feature does more than a large weight on a silent one, so Wanda multiplies each weight's magnitude with the norm of
its input feature over a little calibration text, and lets weights compete only within their output row. No gradient,
no weight update, one forward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.calibration import InputNorm, Statistic, Statistics, observe, per_weight
from gossamer.core.patterns import Pattern, Unstructured
from gossamer.core.registry import register
from gossamer.core.scores import input_weighted, magnitude, relative_importance
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target, find_targets
from gossamer.errors import ConfigurationError
from gossamer.models.blocks import Batch, stages
from gossamer.pruning.base import LayerwisePruner, PruningResult

_FEW = 16  # tokens: the norm of a feature is then known to about a fifth, if the feature is Gaussian


@dataclass
class _NormScored(LayerwisePruner):
    """What pruners share whose only statistic is the norm of each input feature."""

    pattern: Pattern | str = Unstructured("row")

    statistics: ClassVar[tuple[type[Statistic], ...]] = (InputNorm,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._starved: dict[str, int] = {}

    def prune(self, model: nn.Module, data: Iterable[Batch] | None = None, **options: Any) -> PruningResult:
        """Prune a model in place; see :meth:`LayerwisePruner.prune`.

        Warns
        -----
        UserWarning
            Once, naming the layers that fewer than 16 calibration tokens reached, as happens to experts. Without any
            token, or where all inputs were zero, the norm is taken as one, so that magnitude decides.
        """
        self._starved.clear()
        result = super().prune(model, data, **options)
        if self._starved:
            some = ", ".join(f"{name} ({tokens})" for name, tokens in list(self._starved.items())[:5])
            more = ", …" if len(self._starved) > 5 else ""
            warnings.warn(
                f"{len(self._starved)} layers saw fewer than {_FEW} calibration tokens: {some}{more}; where there was "
                f"none, magnitude decided; calibrate on more text",
                stacklevel=2,
            )
        return result

    def _norm(self, target: Target, stats: Statistics | None) -> Tensor | None:
        """``‖X_j‖₂``, broadcastable to the weight; None if nothing is known of the inputs."""
        tokens = 0 if stats is None else stats.tokens
        if tokens < _FEW:
            self._starved[target.name] = tokens
        norm = None if stats is None else stats[InputNorm].norm
        return per_weight(target, norm) if norm is not None and norm.any() else None


@register("wanda", paper="wanda", when="after training", criterion=("magnitude", "activation"))
@dataclass
class Wanda(_NormScored):
    """Prune weights by |W| times the norm of their input, compared within each output row.

    Sun, Liu, Bair & Kolter, 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695, eq. 1. Peers on the same statistic: :class:`RelativeImportance`, and OWL as
    ``allocation="outliers"``.

    Parameters
    ----------
    adaptive_rows
        The paper's variant in which rows differ: every row loses the weights that hold the same share of its total
        score (found there by bisection on that share; here by ranking the cumulative shares, which hits the
        sparsity exactly). For unstructured patterns.
    sequential
        Whether a block's norms are taken with the blocks before it already pruned. Otherwise all are taken from the
        dense model in one pass beforehand, as an ablation.
    """

    adaptive_rows: bool = False
    sequential: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._dense: dict[str, Statistics] = {}
        if self.adaptive_rows and not isinstance(self.pattern, Unstructured):
            raise ConfigurationError(
                f"adaptive_rows is True, but the pattern {self.pattern} fixes the zeros of every row; "
                f"use an unstructured pattern"
            )

    def prune(self, model: nn.Module, data: Iterable[Batch] | None = None, **options: Any) -> PruningResult:
        """Prune a model in place; see :meth:`LayerwisePruner.prune`.

        Warns
        -----
        UserWarning
            Once, naming the layers that fewer than 16 calibration tokens reached, as happens to experts. Without any
            token, or where all inputs were zero, the norm is taken as one, so that magnitude decides.
        """
        batches = self._check_data(data)
        if not self.sequential and batches:
            targets = find_targets(model, self.include, self.exclude, heads=self.heads)
            self._dense = _dense_norms(model, targets, batches, options.get("device"))
        try:
            return super().prune(model, batches, **options)
        finally:
            self._dense = {}

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """``|W_ij| · ‖X_j‖₂``; plain magnitude for an expert that no calibration token reached."""
        if not self.sequential:
            if not self._dense:
                raise ConfigurationError("sequential is False, which only Wanda's own prune can do; set it to True")
            stats = self._dense.get(target.name, stats)  # an output head is part of no block
        norm = self._norm(target, stats)
        return magnitude(target.matrix()) if norm is None else input_weighted(target.matrix(), norm)

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:  # noqa: D102
        if not self.adaptive_rows:
            return super().prune_layer(target, stats, sparsity)
        share = cumulative_share(self.score(target, stats).flatten(1)).view(target.shape)
        mask = Unstructured("layer").select(share, sparsity, target.name)
        target.matrix().masked_fill_(~mask, 0)
        return mask


def _dense_norms(
    model: nn.Module, targets: Sequence[Target], batches: list[Batch], device: torch.device | str | None
) -> dict[str, Statistics]:
    found: dict[str, Statistics] = {}
    for stage in stages(model, batches, device=device):
        here = [target for target in targets if stage.owns(target.module_name)]
        with observe(here, (InputNorm,)) as observation:
            stage.forward(store=bool(stage.name))
        found.update(observation)
    return found


def cumulative_share(scores: Tensor) -> Tensor:
    """Share of its row's total score held by each element together with all lower ones, ``(rows, n)`` float64."""
    ordered, order = scores.double().sort(dim=1, stable=True)
    total = ordered.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(ordered).scatter_(1, order, ordered.cumsum(1) / total)


@register("ria", paper="wanda", when="after training", criterion=("magnitude", "activation"))
@dataclass
class RelativeImportance(_NormScored):
    """Prune weights by their share of their row and column, times the root of the norm of their input.

    Zhang et al., 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR.

    Parameters
    ----------
    power
        Exponent of the input norm.
    """

    power: float = 0.5

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """``(|W| / column sum + |W| / row sum) · ‖X_j‖₂^power``."""
        norm = self._norm(target, stats)
        return relative_importance(target.matrix(), torch.ones(()) if norm is None else norm, self.power)

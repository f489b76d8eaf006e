"""Wanda: a weight matters as much as the signal that flows through it.

Language models have a few input features that are a hundred times larger than the rest. A small weight on a loud
feature does more than a large weight on a silent one, so Wanda multiplies each weight's magnitude with the norm of
its input feature over a little calibration text, and lets weights compete only within their output row. No gradient,
no weight update, one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.calibration import InputNorm, Statistic, Statistics, per_weight
from gossamer.core.patterns import Pattern, Unstructured
from gossamer.core.registry import register
from gossamer.core.scores import input_weighted, magnitude, relative_importance
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target
from gossamer.pruning.base import LayerwisePruner


@register("wanda", paper="wanda", when="after training")
@dataclass
class Wanda(LayerwisePruner):
    """Prune weights by |W| times the norm of their input, compared within each output row.

    Sun, Liu, Bair & Kolter, 2023, "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv 2306.11695, eq. 1. Peers on the same statistic: :class:`RelativeImportance`, and OWL as
    ``allocation="outliers"``.

    Parameters
    ----------
    adaptive_rows
        The paper's variant in which rows differ: every row loses the weights that hold the same share of its total
        score (found there by bisection on that share; here by ranking the cumulative shares, which hits the
        sparsity exactly).
    """

    pattern: Pattern | str = Unstructured("row")
    adaptive_rows: bool = False

    statistics: ClassVar[tuple[type[Statistic], ...]] = (InputNorm,)

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """``|W_ij| · ‖X_j‖₂``; plain magnitude for an expert that no calibration token reached."""
        if stats is None:
            return magnitude(target.matrix())
        return input_weighted(target.matrix(), per_weight(target, stats[InputNorm].norm))

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:  # noqa: D102
        if not self.adaptive_rows or not isinstance(self.pattern, Unstructured):
            return super().prune_layer(target, stats, sparsity)
        share = cumulative_share(self.score(target, stats).flatten(1)).view(target.shape)
        mask = Unstructured("layer").select(share, sparsity, target.name)
        target.matrix().masked_fill_(~mask, 0)
        return mask


def cumulative_share(scores: Tensor) -> Tensor:
    """Share of its row's total score held by each element together with all lower ones, ``(rows, n)`` float64."""
    ordered, order = scores.double().sort(dim=1, stable=True)
    total = ordered.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(ordered).scatter_(1, order, ordered.cumsum(1) / total)


@register("ria", paper="wanda", when="after training")
@dataclass
class RelativeImportance(LayerwisePruner):
    """Prune weights by their share of their row and column, times the root of the norm of their input.

    Zhang et al., 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR.

    Parameters
    ----------
    power
        Exponent of the input norm.
    """

    pattern: Pattern | str = Unstructured("row")
    power: float = 0.5

    statistics: ClassVar[tuple[type[Statistic], ...]] = (InputNorm,)

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """``(|W| / column sum + |W| / row sum) · ‖X_j‖₂^power``."""
        norm = torch.ones(()) if stats is None else per_weight(target, stats[InputNorm].norm)
        return relative_importance(target.matrix(), norm, self.power)

"""Static sparse training: a random mask, drawn once and kept; the baseline of everything that explores."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.core.masks import MaskSet
from gossamer.core.registry import register
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier


@register(
    "static",
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
class Static(Sparsifier):
    """Train under a mask that never changes: one that is given, or a random one drawn at the start.

    Mocanu et al., 2016, arXiv 1604.04618, and as the baseline of Evci et al., 2020, arXiv 1911.11134.

    Parameters
    ----------
    allocation
        How many weights each layer gets if the mask is drawn: ``uniform``, ``erdos-renyi``, ``erdos-renyi-kernel``, ….
    masks
        What remains, by the names of parameters; then `sparsity` and `allocation` are not asked.
    """

    allocation: str = "erdos-renyi-kernel"
    masks: MaskSet | None = None

    def start(self, training: SparseTraining) -> None:
        """Take the mask, or draw it."""
        if self.masks is not None:
            training.assign(self.masks)
        else:
            training.start_at_random(self.sparsity, self.allocation)

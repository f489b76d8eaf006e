"""Static sparse training: a random mask, drawn once and kept; the baseline of everything that explores."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.core.registry import register
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier, random_masks


@register("static", paper="random-pruning", when="during training", needs_data=False)
@dataclass(kw_only=True)
class Static(Sparsifier):
    """Train under a random mask that is drawn at the start and never changes.

    Mocanu et al., 2016, arXiv 1604.04618, and as the baseline of Evci et al., 2020, arXiv 1911.11134.

    Parameters
    ----------
    allocation
        How many weights each layer gets: ``uniform``, ``erdos-renyi`` or ``erdos-renyi-kernel``.
    """

    allocation: str = "erdos-renyi-kernel"

    def start(self, training: SparseTraining) -> None:
        """Draw the mask."""
        masks, notes = random_masks(training.targets.values(), self.sparsity, self.allocation, training.generator)
        training.notes.extend(notes)
        training.assign(masks)

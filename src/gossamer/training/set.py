"""SET: sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.core.registry import register
from gossamer.core.sparse_training import SparseTraining
from gossamer.training.exchanging import Exchanging


@register(
    "set",
    paper="granet",
    when="during training",
    needs_data=False,
    path=("sparse-to-sparse",),
    topology="dynamic",
    criterion=("magnitude", "random"),
    allocation="erdos-renyi",
)
@dataclass(kw_only=True)
class SET(Exchanging):
    """Drop the smallest weights of each layer every few steps, and grow as many at random.

    Mocanu et al., 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science", arXiv 1707.04780: Erdős–Rényi start, a constant share ζ = 0.3, to the end of training; the paper
    exchanges after every epoch. It drops the smallest positive and the largest negative weights, which is the smallest
    magnitude on either side.
    """

    def change(self, training: SparseTraining) -> None:
        """Exchange weights, if it is time."""
        if self.exchanges(training.step):
            training.exchange(self.exchange, "random")

"""SET: sparse evolutionary training."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.core.registry import register
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps, random_masks
from gossamer.errors import ConfigurationError


@register("set", paper="granet", when="during training", needs_data=False)
@dataclass(kw_only=True)
class SET(Sparsifier):
    """Drop the smallest weights of each layer every few steps, and grow as many at random.

    Mocanu et al., 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
    network science", arXiv 1707.04780: Erdős–Rényi start, a constant share ζ = 0.3, to the end of training. The paper
    drops the smallest positive and the largest negative weights, which is the smallest magnitude on either side.

    Parameters
    ----------
    begin, end, every
        Steps between which, and after how many, weights are exchanged; the paper does so after every epoch.
    exchange
        Share ζ of a layer's weights.
    allocation
        How many weights each layer gets.
    """

    begin: int = 0
    end: int = 1000
    every: int = 100
    exchange: float = 0.3
    allocation: str = "erdos-renyi-kernel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.begin, self.end, self.every)
        if not 0 <= self.exchange <= 1:
            raise ConfigurationError(f"exchange is {self.exchange}; it must be a share in [0, 1]")

    def start(self, training: SparseTraining) -> None:
        """Draw the first mask."""
        masks, notes = random_masks(training.targets.values(), self.sparsity, self.allocation, training.generator)
        training.notes.extend(notes)
        training.assign(masks)

    def change(self, training: SparseTraining) -> None:
        """Exchange weights, if it is time."""
        step = training.step
        if self.begin < step < self.end and (step - self.begin) % self.every == 0:
            training.exchange(self.exchange, "random")

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "warm-up" if step < self.begin else "explore" if step < self.end else "frozen"

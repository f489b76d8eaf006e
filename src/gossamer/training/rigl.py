"""RigL and SET: a constant number of weights whose places change while they train."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.core.registry import register
from gossamer.core.schedules import Cosine
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps, random_masks
from gossamer.errors import ConfigurationError


@register("rigl", paper="granet", when="during training", needs_data=False)
@dataclass(kw_only=True)
class RigL(Sparsifier):
    """Drop the smallest weights of each layer every few steps, and grow those with the largest gradient.

    Evci et al., 2020, "Rigging the Lottery", arXiv 1911.11134: a random start, a share that is exchanged which falls
    along a cosine (eq. 1), and grown weights that start at zero.

    Parameters
    ----------
    begin, end
        Steps between which weights are exchanged; the paper ends after three quarters of training.
    every
        Steps between two exchanges.
    exchange
        Share of a layer's weights that are exchanged at first.
    last_exchange
        That share at `end`.
    growth
        ``gradient`` or ``random``.
    allocation
        How many weights each layer gets at the start.
    """

    begin: int = 0
    end: int = 1000
    every: int = 100
    exchange: float = 0.3
    last_exchange: float = 0.0
    growth: str = "gradient"
    allocation: str = "erdos-renyi-kernel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.begin, self.end, self.every)
        if not 0 <= self.last_exchange <= self.exchange <= 1:
            raise ConfigurationError(
                f"exchange falls from {self.exchange} to {self.last_exchange}; 0 <= last <= first <= 1 is needed"
            )

    def start(self, training: SparseTraining) -> None:
        """Draw the first mask."""
        masks, notes = random_masks(training.targets.values(), self.sparsity, self.allocation, training.generator)
        training.notes.extend(notes)
        training.assign(masks)

    def exchanges(self, step: int) -> bool:
        """Whether weights are exchanged after a step."""
        return self.begin < step < self.end and (step - self.begin) % self.every == 0

    def wants_gradient(self, step: int) -> bool:  # noqa: D102
        return self.growth == "gradient" and self.exchanges(step)

    def change(self, training: SparseTraining) -> None:
        """Exchange weights, if it is time."""
        if self.exchanges(training.step):
            share = Cosine(self.last_exchange, self.end, initial=self.exchange, begin=self.begin)(training.step)
            training.exchange(share, self.growth)  # type: ignore[arg-type]

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "warm-up" if step < self.begin else "explore" if step < self.end else "frozen"

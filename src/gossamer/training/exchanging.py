"""What SET and RigL share: a random start, and a constant number of weights whose places change at set steps."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps
from gossamer.errors import ConfigurationError


@dataclass(kw_only=True)
class Exchanging(Sparsifier):
    """Exchange a share of each layer's weights every few steps.

    Parameters
    ----------
    begin, end
        Steps between which weights are exchanged.
    every
        Steps between two exchanges.
    exchange
        Share of a layer's weights.
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
        training.start_at_random(self.sparsity, self.allocation)

    def exchanges(self, step: int) -> bool:
        """Whether weights are exchanged after a step."""
        return self.begin < step < self.end and (step - self.begin) % self.every == 0

    def phase(self, step: int) -> Phase:  # noqa: D102
        return "warm-up" if step < self.begin else "explore" if step < self.end else "frozen"

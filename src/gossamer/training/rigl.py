"""RigL: a constant number of weights whose places follow the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gossamer.core.registry import register
from gossamer.core.schedules import Cosine
from gossamer.core.sparse_training import SparseTraining
from gossamer.errors import ConfigurationError
from gossamer.training.exchanging import Exchanging


@register(
    "rigl",
    paper="granet",
    when="during training",
    needs_data=False,
    path=("sparse-to-sparse",),
    topology="dynamic",
    criterion=("magnitude", "gradient"),
    allocation="erdos-renyi",
)
@dataclass(kw_only=True)
class RigL(Exchanging):
    """Drop the smallest weights of each layer every few steps, and grow those with the largest gradient.

    Evci et al., 2020, "Rigging the Lottery", arXiv 1911.11134: a random start, a share that is exchanged which falls
    along a cosine (eq. 1), and grown weights that start at zero. The paper ends after three quarters of training.

    Parameters
    ----------
    last_exchange
        What `exchange` falls to at `end`.
    growth
        ``gradient`` or ``random``.
    """

    last_exchange: float = 0.0
    growth: Literal["gradient", "random"] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.last_exchange <= self.exchange:
            raise ConfigurationError(
                f"exchange falls from {self.exchange} to {self.last_exchange}; 0 <= last <= first <= 1 is needed"
            )

    def wants_gradient(self, step: int) -> bool:  # noqa: D102
        return self.growth == "gradient" and self.exchanges(step)

    def change(self, training: SparseTraining) -> None:
        """Exchange weights, if it is time."""
        if self.exchanges(training.step):
            share = Cosine(self.last_exchange, self.end, initial=self.exchange, begin=self.begin)(training.step)
            training.exchange(share, self.growth)

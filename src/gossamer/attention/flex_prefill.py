"""FlexPrefill: as many columns and diagonals as hold a share of the last queries' attention.

Heads differ: one looks at three tokens, another at everything. Instead of one number of lines for all, every head gets
the smallest number whose weights together reach a share, so that the budget goes where attention is spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.attention.base import SparseAttention, check_share
from gossamer.attention.last_queries import strips
from gossamer.attention.vertical_slash import check_line_options, line_ranks, line_weights
from gossamer.core.block_mask import BlockMask
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.models.attention_sites import AttentionCall, Phase


@register(
    "flex-prefill",
    paper="sparse-frontier",
    when="at inference",
    granularity="tokens",
    needs_data=False,
    criterion=("activation",),
    patterns=("blocks",),
    allocation="measured",
)
@dataclass(kw_only=True)
class FlexPrefill(SparseAttention):
    """Read the fewest columns and diagonals that hold a share of the last queries' attention.

    Source: Lai et al. [2025, arXiv 2502.20766], without its second pattern, as Nawrot et al. [2025, arXiv 2504.17768]
    compare it.

    Parameters
    ----------
    alpha
        Share of the attention that the columns of a head hold, and its diagonals, in (0, 1]. How much is computed
        depends on the text: :func:`gossamer.attention.budget_solver.budget_for` finds the share for a sparsity.
    min_budget
        Fewest columns, and fewest diagonals, of a head.
    approximation
        How many last queries are asked.
    sinks, local, block_size
        As in :class:`~gossamer.attention.vertical_slash.VerticalSlash`.
    """

    alpha: float = 0.9
    min_budget: int = 256
    approximation: int = 512
    sinks: int = 4
    local: int = 64
    block_size: int = 64

    phase: ClassVar[Phase] = "prefill"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_line_options(self)
        check_share(self.alpha, "alpha")
        if self.min_budget < 1:
            raise ConfigurationError(f"min_budget is {self.min_budget}; it must be 1 or more")

    def prefill(self, call: AttentionCall) -> BlockMask | None:
        """Columns and diagonals of every head, forced ones first."""
        if not call.causal or self.alpha == 1:
            return None
        weights = line_weights(call, self.approximation)
        places = line_ranks(call, *weights, self.sinks, self.local)
        columns, diagonals = (place < self._count(shares) for place, shares in zip(places, weights))
        return strips(call, columns, diagonals, self.block_size)

    def _count(self, shares: Tensor) -> Tensor:
        """The smallest number of lines that reaches alpha, ``(batch, heads, 1)``.

        Counted before lines are forced, as in the released code: forced ones displace the lightest.
        """
        cumulated = shares.sort(-1, descending=True).values.cumsum(-1)
        return ((cumulated < self.alpha).sum(-1, keepdim=True) + 1).clamp(min=self.min_budget)

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, for a prompt of `length` tokens."""
        return 2.0 * min(self.approximation, length) * length * size * heads

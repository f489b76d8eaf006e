"""Ada-SnapKV: heads whose attention is spread keep more tokens, and those that look at little keep less.

The budget of a layer is shared by its heads: each gets a fifth of an equal share for certain, the rest goes to
whichever tokens are most important, whatever head they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.attention.base import check_share
from gossamer.attention.selection import ranks
from gossamer.attention.snap_kv import SnapKV
from gossamer.core.registry import register
from gossamer.models.attention_sites import AttentionCall


@register(
    "ada-snap-kv",
    paper="sparse-frontier",
    when="at inference",
    granularity="tokens",
    needs_data=False,
    criterion=("activation",),
    patterns=("blocks",),
    allocation="measured",
)
@dataclass(kw_only=True)
class AdaSnapKV(SnapKV):
    """Evict as SnapKV does, from a budget that all heads of a layer share.

    What is stored is as wide as the head that keeps most; memory falls to that, reads fall to the budget.

    Source: Feng et al. [2024, arXiv 2407.11550, algorithm 1], as compared by Nawrot et al. [2025, arXiv 2504.17768].

    Parameters
    ----------
    token_capacity
        Tokens of the prompt that a key head keeps on average.
    min_head_capacity_ratio
        Share of it that every head gets for certain, in (0, 1].
    approximation, kernel_size, local_window, sinks
        As in :class:`~gossamer.attention.snap_kv.SnapKV`.
    """

    min_head_capacity_ratio: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.min_head_capacity_ratio, "min_head_capacity_ratio")

    def grouped(self, weights: Tensor) -> Tensor:
        """The highest weight that any head of the group or any query gives."""
        return weights.amax(2).amax(2)

    def kept(self, call: AttentionCall) -> Tensor:
        """Tokens that every key head keeps, bool ``(batch, key heads, tokens)``."""
        importance = self._importance(call)
        heads = importance.shape[1]
        certain = max(int(self.token_capacity * self.min_head_capacity_ratio), self.local_window + self.sinks)
        chosen = ranks(importance) < certain
        rest = importance.masked_fill(chosen, float("-inf")).flatten(1)
        chosen = chosen | (ranks(rest) < (self.token_capacity - certain) * heads).view_as(chosen)
        return chosen if call.key_mask is None else chosen & call.key_mask[:, None]

"""Block-Sparse: each block of queries reads the blocks of keys whose mean agrees best with its own.

Means of neighbouring queries and keys stand for them; their products, one for a pair of blocks, say which blocks to
compute. The first block, the block itself and the one before it are always among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer.attention.base import SparseAttention
from gossamer.attention.scores import pool_blocks
from gossamer.attention.selection import sinks_and_diagonal, top_blocks
from gossamer.core.block_mask import BlockMask, block_count
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.models.attention_sites import AttentionCall, Phase

SMALLEST_CHUNK = 8
FORCED = 3  # the first block, the block itself, the one before


@register(
    "block-sparse",
    paper="sparse-frontier",
    when="at inference",
    granularity="blocks",
    needs_data=False,
    criterion=("activation",),
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class BlockSparse(SparseAttention):
    """Read the blocks whose mean key agrees best with the mean query.

    Source: Jiang et al. [2024, arXiv 2407.02490, section 3.2], as compared by Nawrot et al. [2025, arXiv 2504.17768].

    Parameters
    ----------
    chunk_size
        Tokens of a block, 8 or more.
    top_chunks
        Blocks of keys that a block of queries reads, 3 or more: three are read whatever their score.
    """

    chunk_size: int = 16
    top_chunks: int = 64

    phase: ClassVar[Phase] = "prefill"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_size < SMALLEST_CHUNK:
            raise ConfigurationError(f"chunk_size is {self.chunk_size}; it must be {SMALLEST_CHUNK} or more")
        if self.top_chunks < FORCED:
            raise ConfigurationError(
                f"top_chunks is {self.top_chunks}; it must be {FORCED} or more, since so many are always read"
            )

    def prefill(self, call: AttentionCall) -> BlockMask | None:
        """The best blocks of every row."""
        queries, keys = call.query.shape[2], call.key.shape[2]
        if self.top_chunks >= block_count(keys, self.chunk_size):
            return None
        geometry = BlockMask.full(queries, keys, self.chunk_size, call.causal, call.query.device)
        query, _ = pool_blocks(call.query, self.chunk_size)
        key, filled = pool_blocks(call.key, self.chunk_size, call.key_mask)
        scores = query @ key.repeat_interleave(call.group, 1).mT
        scores = scores.masked_fill((filled == 0)[:, None, None, :], -1e30)
        always = sinks_and_diagonal(geometry, 1, FORCED - 1, call.key_mask)
        blocks = top_blocks(scores, self.top_chunks, geometry.allowed, always)
        return BlockMask(blocks, queries, keys, geometry.block_size, call.causal)

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, for a prompt of `length` tokens."""
        return 2.0 * block_count(length, self.chunk_size) ** 2 * size * heads

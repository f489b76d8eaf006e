"""SparseD: a diffusion language model finds each head's pattern once and keeps it.

Over the denoising steps of a masked-diffusion language model a head hardly changes where it looks, while any two heads
look elsewhere. So a few early steps, which decide most of what will be written, are dense; the last of them sums the
attention weights of every block, head by head; and all later steps read the blocks that weighed most. A prompt has many
more blocks than what is being written, and would take all the places: the blocks of either are chosen apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from gossamer.attention.base import Answer, check_share
from gossamer.attention.selection import top_blocks
from gossamer.attention.state import StepwiseAttention
from gossamer.core.block_mask import BlockMask, block_count
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import attention_with_lse, block_mass, block_sparse_attention
from gossamer.models.attention_sites import AttentionCall


@register(
    "sparsed",
    paper="sparsed",
    when="at inference",
    granularity="blocks",
    needs_data=False,
    criterion=("activation",),
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class SparseD(StepwiseAttention):
    """Dense early steps, one exact pattern for each head, reused to the end [Wang et al., 2025, arXiv 2509.24014].

    Steps 0 … e with e = ⌊skip · N⌋ + 1 are dense; at step e the weights of every block are summed, and each block of
    queries keeps max(1, ⌊n_k · select⌋ + 1) of its n_k blocks of keys: first among all, of which those of the written
    part are dropped again; then among those of the written part, whose weights are normalised without the prompt's.

    Parameters
    ----------
    skip
        Share of the steps that stay dense, in [0, 1]; at 1 all do.
    select
        Share of the key blocks that each block of queries keeps, in (0, 1]; the paper takes 0.3 for long contexts and
        0.5, with blocks of 32, for short ones.
    block_size
        Tokens of a block.
    generation_length
        Tokens at the end that are being written. By default all behind the context that ``begin`` was told.
    isolated
        Whether prompt and written part are chosen apart; without, both compete for the same places.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.
    """

    skip: float = 0.2
    select: float = 0.3
    block_size: int = 128
    generation_length: int | None = None
    isolated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.skip <= 1:
            raise ConfigurationError(f"skip is {self.skip!r}; it must be in [0, 1], where 1 leaves all steps dense")
        check_share(self.select, "select")
        if self.block_size < 1:
            raise ConfigurationError(f"block_size is {self.block_size}; it must be 1 or more, such as 128")
        if self.generation_length is not None and self.generation_length < 1:
            raise ConfigurationError(f"generation_length is {self.generation_length}; it must be 1 or more, or None")

    @property
    def pattern_step(self) -> int:
        """The last dense step, at which patterns are found; beyond the last step if all are dense."""
        # a product such as 0.29 · 100 must not lose its step to rounding
        return math.floor(round(self.skip * self.cache.steps, 9)) + 1

    def mix(self, call: AttentionCall) -> Answer | None:
        """Dense up to the pattern step; from then on the blocks of the pattern."""
        if self.cache.index < self.pattern_step:
            return None
        if self.cache.index == self.pattern_step:
            output, lse = attention_with_lse(
                call.query, call.key, call.value, causal=False, scale=call.scale, key_mask=call.key_mask
            )
            self.cache.put(call, "pattern", self.pattern(call, lse))
            return Answer(output, 1.0)
        mask: BlockMask = self.cache.get(call, "pattern")
        output = block_sparse_attention(
            call.query, call.key, call.value, mask, scale=call.scale, key_mask=call.key_mask
        )
        return Answer(output, mask.real_density(call.key_mask))

    def pattern(self, call: AttentionCall, lse: Tensor) -> BlockMask:
        """The blocks to keep, from exact weights; no n × n matrix is formed.

        Parameters
        ----------
        call
            Queries and keys of a layer.
        lse
            Log-sum-exp of their scores, ``(batch, heads, n)``.
        """
        first = self.first_written_block(call)
        blocks = self._chosen(call, call.key, lse, call.key_mask)
        if self.isolated:
            start = first * self.block_size
            key, value = call.key[:, :, start:], call.value[:, :, start:]
            key_mask = None if call.key_mask is None else call.key_mask[:, start:].contiguous()
            _, own = attention_with_lse(call.query, key, value, causal=False, scale=call.scale, key_mask=key_mask)
            blocks[..., first:] = self._chosen(call, key, own, key_mask)
        n = call.query.shape[2]
        return BlockMask(blocks, n, n, (self.block_size, self.block_size), causal=False)

    def _chosen(self, call: AttentionCall, key: Tensor, lse: Tensor, key_mask: Tensor | None) -> Tensor:
        options = {"causal": False, "scale": call.scale, "key_mask": key_mask}
        mass = self.ranked_by(block_mass(call.query, key, lse, self.block_size, **options))
        allowed = mass.new_ones(mass.shape[-2:], dtype=bool)
        return top_blocks(mass, min(mass.shape[-1], self.kept(mass.shape[-1])), allowed)

    def ranked_by(self, mass: Tensor) -> Tensor:
        """What blocks are chosen by, of their weights ``(batch, heads, query blocks, key blocks)``: each head's own."""
        return mass

    def kept(self, blocks: int) -> int:
        """How many of so many blocks of keys a block of queries keeps, at most."""
        return max(1, math.floor(round(self.select * blocks, 9)) + 1)

    def first_written_block(self, call: AttentionCall) -> int:
        """The first block that holds written tokens only; the last block if there is none.

        Raises
        ------
        ConfigurationError
            If neither a generation length nor a context is known, or nothing is being written.
        """
        n = call.query.shape[2]
        written = n - self.cache.context.stop if self.generation_length is None else self.generation_length
        if not 0 < written <= n:
            raise ConfigurationError(
                f"{written} of {n} tokens are being written; begin a sample with its context, or set generation_length"
            )
        return min(block_count(n - written, self.block_size), block_count(n, self.block_size) - 1)

    def expected_cost(self, steps: int, density: float) -> float:
        """Attention of a sample relative to dense, where sparse steps compute `density` of the pairs.

        Dense steps, one pass over the weights of all blocks and over those of the written part (two passes of half a
        dense attention at most), and the sparse rest.
        """
        dense = min(steps, math.floor(round(self.skip * steps, 9)) + 2)
        searched = dense < steps
        return (dense + searched + (steps - dense) * density) / steps

"""Which blocks of keys every block of queries reads: the common currency of sparse attention.

Scores of blocks become a :class:`BlockMask`, kernels read one, and FlexAttention accepts one. Fields and names follow
``torch.nn.attention.flex_attention.BlockMask`` where both have them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.block_geometry import BlockGeometry, block_count
from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Blocks of an attention matrix that are computed; all others are skipped.

    Attributes
    ----------
    blocks
        Bool ``(batch, heads, query blocks, key blocks)``; batch or heads may be 1, which means the same for all.
    query_length, key_length
        Tokens; where they are no multiple of the block size, the last block is shorter.
    block_size
        Queries and keys of a block.
    causal
        Whether query i reads only keys j ≤ i + key_length − query_length: sequences are aligned at their ends. Blocks
        on the edge then are triangles, and blocks behind it are not kept, whatever was asked for.
    geometry
        What masks of these lengths and this block size have in common.

    Raises
    ------
    ConfigurationError
        If shapes do not fit the lengths.
    """

    blocks: Tensor
    query_length: int
    key_length: int
    block_size: tuple[int, int] = (64, 64)
    causal: bool = True
    geometry: BlockGeometry = field(init=False, repr=False)

    def __post_init__(self) -> None:
        about = (self.query_length, self.key_length, self.block_size, self.causal, self.blocks.device)
        object.__setattr__(self, "geometry", BlockGeometry.of(*about))
        wanted = self.grid
        if self.blocks.dim() != 4 or tuple(self.blocks.shape[-2:]) != wanted or self.blocks.dtype is not torch.bool:
            raise ConfigurationError(
                f"blocks is {self.blocks.dtype} of shape {tuple(self.blocks.shape)}; {self.query_length} queries × "
                f"{self.key_length} keys in blocks of {self.block_size[0]} × {self.block_size[1]} need bool "
                f"(batch, heads, {wanted[0]}, {wanted[1]})"
            )
        if self.causal:
            object.__setattr__(self, "blocks", self.blocks & self.allowed)

    @classmethod
    def full(
        cls,
        query_length: int,
        key_length: int | None = None,
        block_size: int | tuple[int, int] = 64,
        causal: bool = True,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """All blocks: dense attention.

        Parameters
        ----------
        query_length, key_length
            Tokens; as many keys as queries unless given.
        block_size
            One number, or that of queries and that of keys.
        causal
            See :class:`BlockMask`.
        device
            Where the mask is to live.
        """
        size = _pair(block_size)
        keys = query_length if key_length is None else key_length
        grid = BlockGeometry(query_length, keys, size, causal, torch.device("cpu")).grid
        return cls(torch.ones(1, 1, *grid, dtype=torch.bool, device=device), query_length, keys, size, causal)

    @classmethod
    def from_tokens(cls, links: Tensor, block_size: int | tuple[int, int] = 64, causal: bool = True) -> BlockMask:
        """The blocks that hold any of the links ``(batch, heads, queries, keys)`` given as bool."""
        if links.dim() != 4:
            raise ConfigurationError(f"links have shape {tuple(links.shape)}; give (batch, heads, queries, keys)")
        size = _pair(block_size)
        queries, keys = links.shape[-2:]
        return cls(_any_of_tiles(links, size), queries, keys, size, causal)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of queries, blocks of keys."""
        return self.geometry.grid

    @property
    def allowed(self) -> Tensor:
        """Blocks with any pair that causality allows, ``(query blocks, key blocks)``; not to be written to."""
        return self.geometry.allowed

    @property
    def diagonal(self) -> Tensor:
        """The block of each block of queries that holds its last query's own key, ``(query blocks,)``."""
        return self.geometry.diagonal

    @property
    def pairs(self) -> Tensor:
        """Query–key pairs that each block allows, int64 ``(query blocks, key blocks)``."""
        return self.geometry.pairs

    @property
    def density(self) -> float:
        """Share of the allowed pairs that is computed; of the causal triangle where the mask is causal."""
        return float(self.densities.mean())

    @property
    def densities(self) -> Tensor:
        """:attr:`density` of every head, float64 ``(batch, heads)``."""
        kept = torch.where(self.blocks, self.pairs, 0).sum((-2, -1))
        return kept.double() / self.geometry.pair_count

    def real_density(self, real: Tensor | None, window: int | None = None) -> float:
        """:attr:`density` of the pairs that padding and a window leave; see :meth:`BlockGeometry.real_pairs`.

        Parameters
        ----------
        real
            Bool ``(batch, key_length)``, False at padding; None if there is none.
        window
            Keys up to its own that a query reads at most; None for all.
        """
        if real is None and (window is None or window >= self.key_length):
            return self.density
        if real is None:
            real = torch.ones(1, self.key_length, dtype=torch.bool, device=self.blocks.device)
        pairs = self.geometry.real_pairs(real, window)
        kept = torch.where(self.blocks, pairs[:, None], 0).sum((-2, -1)).double().mean()
        return float(kept) / max(float(pairs.sum((-2, -1)).double().mean()), 1e-12)

    @cached_property
    def _lists(self) -> tuple[Tensor, Tensor]:
        return _compressed(self.blocks)

    def lists(self) -> tuple[Tensor, Tensor]:
        """How many key blocks each block of queries reads, and which.

        Returns
        -------
        counts, indices
            int32 ``(batch, heads, query blocks)`` and ``(batch, heads, query blocks, key blocks)``; ascending, and 0
            behind the last.
        """
        return self._lists

    @cached_property
    def _transposed_lists(self) -> tuple[Tensor, Tensor]:
        return _compressed(self.blocks.transpose(-1, -2))

    def transposed_lists(self) -> tuple[Tensor, Tensor]:
        """How many query blocks read each block of keys, and which, as :meth:`lists` does."""
        return self._transposed_lists

    def to_dense(self) -> Tensor:
        """Every single link, bool ``(batch, heads, queries, keys)``."""
        links = self.blocks.repeat_interleave(self.block_size[0], -2).repeat_interleave(self.block_size[1], -1)
        links = links[..., : self.query_length, : self.key_length]
        if self.causal:
            links = links.tril(self.key_length - self.query_length)
        return links

    def to_flex(self) -> FlexBlockMask:
        """The same for ``torch.nn.attention.flex_attention``.

        Its compiled kernels skip blocks by their lists, but uncompiled it looks at the function of tokens alone, which
        therefore knows the blocks as well.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        complete = self.pairs == self.block_size[0] * self.block_size[1]
        partial = _compressed(self.blocks & ~complete)
        full = _compressed(self.blocks & complete)
        return FlexBlockMask.from_kv_blocks(
            *partial,
            *full,
            BLOCK_SIZE=self.block_size,
            mask_mod=self._mask_mod(),
            seq_lengths=(self.query_length, self.key_length),
        )

    def _mask_mod(self):  # type: ignore[no-untyped-def]
        shift, causal = self.key_length - self.query_length, self.causal
        queries, keys = self.query_length, self.key_length
        blocks, (rows, columns) = self.blocks, self.block_size
        batches, heads = blocks.shape[:2]

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            inside = (query < queries) & (key < keys)
            inside = inside & (key <= query + shift) if causal else inside
            return inside & blocks[batch % batches, head % heads, query // rows, key // columns]

        return allowed

    @classmethod
    def from_flex(cls, mask: FlexBlockMask, causal: bool = True) -> BlockMask:
        """The blocks that a mask of FlexAttention reads; of its token-level function only causality is taken over."""
        blocks = mask.to_dense().bool()
        queries, keys = mask.seq_lengths
        rows, columns = mask.BLOCK_SIZE
        return cls(blocks, queries, keys, (rows, columns), causal)

    def __or__(self, other: BlockMask) -> BlockMask:
        self._check_twin(other)
        return replace(self, blocks=self.blocks | other.blocks)

    def __and__(self, other: BlockMask) -> BlockMask:
        self._check_twin(other)
        return replace(self, blocks=self.blocks & other.blocks)

    def _check_twin(self, other: BlockMask) -> None:
        mine = (self.query_length, self.key_length, self.block_size, self.causal)
        theirs = (other.query_length, other.key_length, other.block_size, other.causal)
        if mine != theirs:
            raise ConfigurationError(
                f"two masks of different geometry, {mine} and {theirs} (queries, keys, block size, causal); make both "
                "for the same lengths and block size"
            )

    def split(self, factor: int) -> BlockMask:
        """The same links in blocks of a `factor`-th of the size.

        Raises
        ------
        ConfigurationError
            If the factor does not divide the block size.
        """
        if factor < 1 or any(size % factor for size in self.block_size):
            raise ConfigurationError(f"factor is {factor}; it must divide the block size {self.block_size}")
        size = (self.block_size[0] // factor, self.block_size[1] // factor)
        rows, columns = block_count(self.query_length, size[0]), block_count(self.key_length, size[1])
        finer = self.blocks.repeat_interleave(factor, -2).repeat_interleave(factor, -1)[..., :rows, :columns]
        return BlockMask(finer, self.query_length, self.key_length, size, self.causal)

    def merge(self, factor: int) -> BlockMask:
        """Blocks `factor` times as large that cover the links of this mask, and possibly more.

        Raises
        ------
        ConfigurationError
            If the factor is below 1.
        """
        if factor < 1:
            raise ConfigurationError(f"factor is {factor}; it must be 1 or more")
        size = (self.block_size[0] * factor, self.block_size[1] * factor)
        return BlockMask(
            _any_of_tiles(self.blocks, (factor, factor)), self.query_length, self.key_length, size, self.causal
        )

    @property
    def is_causal(self) -> bool:
        """Whether no query reads a key behind it."""
        if self.causal:
            return True
        return not bool((self.blocks & (self.pairs > replace(self, causal=True).pairs)).any())

    @property
    def is_union_complete(self) -> bool:
        """Whether the heads together read every allowed block [Lin et al., 2024, arXiv 2407.17678]."""
        return bool((self.blocks.any(1) | ~self.allowed).all())

    @property
    def is_cache_efficient(self) -> bool:
        """Whether a key block that a query block skips is skipped by all later ones, so that it can be freed.

        The rule of Lin et al. [2024, arXiv 2407.17678]: once a block has left the window it never returns.
        """
        later = self.blocks[..., 1:, :] & ~self.blocks[..., :-1, :]
        new = ~self.allowed[:-1] | (self.diagonal[:-1, None] == torch.arange(self.grid[1], device=later.device))
        return not bool((later & ~new).any())

    def recall(self, mass: Tensor) -> Tensor:
        """Share of attention that lies in the kept blocks.

        Parameters
        ----------
        mass
            Attention weights summed over every block, ``(batch, heads, query blocks, key blocks)``.

        Returns
        -------
        Tensor
            ``(batch, heads)``, between 0 and 1.
        """
        if tuple(mass.shape[-2:]) != self.grid:
            raise ConfigurationError(f"mass has shape {tuple(mass.shape)}; it must end with {self.grid}")
        kept = torch.where(self.blocks, mass, 0).sum((-2, -1), dtype=torch.float64)
        return kept / mass.sum((-2, -1), dtype=torch.float64)

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on another device."""
        return replace(self, blocks=self.blocks.to(device))

    def __repr__(self) -> str:
        kind = "causal" if self.causal else "bidirectional"
        return (
            f"BlockMask({self.query_length} × {self.key_length} tokens, blocks of {self.block_size[0]} × "
            f"{self.block_size[1]}, {kind}, {tuple(self.blocks.shape[:2])} batch and heads, density {self.density:.3f})"
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _any_of_tiles(links: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = block_count(links.shape[-2], size[0]), block_count(links.shape[-1], size[1])
    padded = pad(links, (0, columns * size[1] - links.shape[-1], 0, rows * size[0] - links.shape[-2]))
    return padded.unflatten(-1, (columns, size[1])).unflatten(-3, (rows, size[0])).any(-1).any(-2)


def _compressed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    counts = blocks.sum(-1, dtype=torch.int32)
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(blocks.shape[-1], device=blocks.device)
    return counts, torch.where(places < counts[..., None], order, 0).to(torch.int32).contiguous()

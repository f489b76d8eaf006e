"""The pattern of S2-Attention: a local window for all heads, and for each head a stripe of blocks of its own.

Also how a pattern fits the tiles of a kernel, which may be smaller or larger than its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gossamer.core.block_mask import BlockMask, block_count
from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class LocalStridePattern:
    """Which blocks a head reads: the last few, and one in so many of all before.

    Block i of the queries of head h reads block j ≤ i of the keys if ``i − j < local_blocks``, or if ``j + h·step +
    offset`` is a multiple of ``vert_stride`` [Lin et al., 2024, arXiv 2407.17678, section 3]. With at most as many
    strides as heads the heads rotate through all of them, and together read everything; with more, steps spread them.

    Parameters
    ----------
    num_heads
        Query heads.
    num_kv_heads
        Heads of keys and values, by default as many; queries that share one share a pattern, for only then is a block
        that none of them reads not stored either.
    local_blocks
        L, the query's own block included.
    vert_stride
        v; 1 is dense.
    num_dense_heads
        How many heads of keys and values, the last ones, read everything.
    homogeneous
        Whether all heads read the same blocks, which the paper compares with.
    offset
        Shifts all stripes.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range, or a query would be left without a key.

    Examples
    --------
    >>> pattern = LocalStridePattern(4, local_blocks=1, vert_stride=4)
    >>> pattern.is_union_complete
    True
    >>> round(pattern.mask(8192, 64).density, 3)
    0.256
    """

    num_heads: int
    num_kv_heads: int | None = None
    local_blocks: int = 4
    vert_stride: int = 4
    num_dense_heads: int = 0
    homogeneous: bool = False
    offset: int = 0

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ConfigurationError(
                f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; the first must be a multiple of "
                "the second"
            )
        if self.vert_stride < 1:
            raise ConfigurationError(f"vert_stride is {self.vert_stride}; it must be 1 (dense) or more, such as 8")
        if self.local_blocks < 0 or (self.local_blocks == 0 and self.vert_stride > 1):
            raise ConfigurationError(
                f"local_blocks is {self.local_blocks}; it must be at least 1, or some queries have no key"
            )
        if not 0 <= self.num_dense_heads <= self.kv_heads:
            raise ConfigurationError(
                f"num_dense_heads is {self.num_dense_heads}; it must lie between 0 and {self.kv_heads}, the heads of "
                "keys and values"
            )

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def step(self) -> int:
        """By how many blocks the stripes of two neighbouring heads differ."""
        # of heads with a pattern of their own: query heads of a group are not different ones
        return max(1, self.vert_stride // max(1, self.kv_heads - self.num_dense_heads))

    @property
    def stripes(self) -> list[int | None]:
        """For each head of keys and values the remainder of the blocks it keeps, modulo the stride; None if dense."""
        sparse = self.kv_heads - self.num_dense_heads
        shifts = [0 if self.homogeneous else head * self.step for head in range(sparse)]
        return [-(shift + self.offset) % self.vert_stride for shift in shifts] + [None] * self.num_dense_heads

    @property
    def is_union_complete(self) -> bool:
        """Whether, at any length, all heads together read all earlier blocks."""
        stripes = self.stripes
        return None in stripes or len(set(stripes)) == self.vert_stride

    @property
    def is_kv_cache_efficient(self) -> bool:
        """Whether a block that a head has once skipped can be freed: of this family always."""
        return True

    def mask(self, seq_len: int, block_size: int = 64, past: int = 0) -> BlockMask:
        """The blocks of a sequence, or of the end of it.

        Parameters
        ----------
        seq_len
            Keys; the last block may be shorter.
        block_size
            Tokens of a block.
        past
            Tokens whose queries are not asked for again, a multiple of the block size.

        Returns
        -------
        BlockMask
            One batch, all query heads.

        Raises
        ------
        ConfigurationError
            If a number is out of range.
        """
        if block_size < 1 or not 0 <= past < seq_len or past % block_size:
            raise ConfigurationError(
                f"seq_len is {seq_len}, block_size {block_size} and past {past}; the last must be a multiple of the "
                "block size below the first"
            )
        return _mask(self, seq_len, block_size, past)

    def kept_blocks(self, current: int) -> list[list[int]]:
        """Blocks that each head of keys and values must keep while queries of block `current` are computed."""
        local = max(0, current - self.local_blocks + 1)
        found = []
        for stripe in self.stripes:
            if stripe is None:
                found.append(list(range(current + 1)))
            else:
                kept = range(stripe, local, self.vert_stride)
                found.append([*kept, *range(local, current + 1)])
        return found

    def tokens(self, length: int, block_size: int) -> tuple[Tensor, Tensor]:
        """What the last of `length` tokens reads.

        Returns
        -------
        indices, counts
            Positions ``(key heads, most tokens)`` int64, 0 behind the last, and how many there are, ``(key heads,)``.
        """
        within = torch.arange(block_size)
        rows = []
        for blocks in self.kept_blocks((length - 1) // block_size):
            places = (torch.tensor(blocks)[:, None] * block_size + within).flatten()
            rows.append(places[places < length])
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])

    def kv_share(self, length: int, block_size: int) -> float:
        """Share of the keys and values of a sequence that has to be kept, averaged over heads."""
        return float(self.tokens(length, block_size)[1].double().mean()) / length


@lru_cache(maxsize=32)
def _mask(pattern: LocalStridePattern, length: int, size: int, past: int) -> BlockMask:
    keys = torch.arange(block_count(length, size))
    queries = torch.arange(past // size, len(keys))[:, None]
    local = (queries - keys < pattern.local_blocks) & (keys <= queries)
    heads = [
        keys <= queries if stripe is None else local | ((keys % pattern.vert_stride == stripe) & (keys <= queries))
        for stripe in pattern.stripes
    ]
    blocks = torch.stack(heads).repeat_interleave(pattern.num_heads // pattern.kv_heads, 0)
    return BlockMask(blocks[None], length - past, length, (size, size))


def split_tiles(mask: BlockMask, query_tile: int, key_tile: int) -> BlockMask:
    """The same links in smaller blocks.

    Raises
    ------
    ConfigurationError
        If a tile does not divide the block.
    """
    rows, columns = mask.block_size
    if query_tile < 1 or key_tile < 1 or rows % query_tile or columns % key_tile:
        raise ConfigurationError(
            f"tiles of {query_tile} × {key_tile} do not divide blocks of {rows} × {columns}; give divisors of them"
        )
    finer = mask.blocks.repeat_interleave(rows // query_tile, -2).repeat_interleave(columns // key_tile, -1)
    grid = block_count(mask.query_length, query_tile), block_count(mask.key_length, key_tile)
    return BlockMask(
        finer[..., : grid[0], : grid[1]], mask.query_length, mask.key_length, (query_tile, key_tile), mask.causal
    )


def common_and_rest(mask: BlockMask, factor: int) -> tuple[BlockMask, BlockMask]:
    """A pattern as two that do not overlap: what whole tiles of query blocks read alike, and what is left.

    The first has tiles `factor` times as high as the blocks of the second, which are those of the pattern.
    """
    whole = _in_tiles(mask.blocks, factor, fill=True).all(-2)
    size = (mask.block_size[0] * factor, mask.block_size[1])
    common = BlockMask(whole, mask.query_length, mask.key_length, size, mask.causal)
    repeated = common.blocks.repeat_interleave(factor, -2)[..., : mask.blocks.shape[-2], :]
    rest = BlockMask(mask.blocks & ~repeated, mask.query_length, mask.key_length, mask.block_size, mask.causal)
    return common, rest


def _in_tiles(blocks: Tensor, factor: int, fill: bool = False) -> Tensor:
    if factor < 1:
        raise ConfigurationError(f"factor is {factor}; a tile holds at least 1 block of queries")
    spare = -blocks.shape[-2] % factor
    padded = torch.nn.functional.pad(blocks, (0, 0, 0, spare), value=fill)
    return padded.unflatten(-2, (-1, factor))

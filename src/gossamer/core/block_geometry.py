"""Lengths cut into blocks: what all masks of one shape have in common, whatever they keep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.errors import ConfigurationError

_REMEMBERED = 64  # geometries of which the tables stay in memory: a model has few at a time


def block_count(length: int, size: int) -> int:
    """Number of blocks that cover a length; the last may be shorter."""
    return -(-length // size)


@dataclass(frozen=True)
class BlockGeometry:
    """Queries and keys in blocks, and which pairs of them causality allows.

    Two are equal if their attributes are. The tables belong to all masks of this geometry: do not write to them.

    Attributes
    ----------
    query_length, key_length, block_size, causal
        As of :class:`~gossamer.core.block_mask.BlockMask`.
    device
        Where the tables live.

    Raises
    ------
    ConfigurationError
        If a length or a block is empty, or causal queries have no key of their own.
    """

    query_length: int
    key_length: int
    block_size: tuple[int, int]
    causal: bool
    device: torch.device

    def __post_init__(self) -> None:
        if min(self.block_size) < 1:
            raise ConfigurationError(f"block_size is {self.block_size}; it must be 1 or more, such as 64")
        if self.query_length < 1 or self.key_length < 1:
            raise ConfigurationError(
                f"{self.query_length} queries and {self.key_length} keys; there must be at least one of each"
            )
        if self.causal and self.query_length > self.key_length:
            raise ConfigurationError(
                f"{self.query_length} queries but {self.key_length} keys; causal attention needs at least as many keys "
                "as queries"
            )

    @classmethod
    def of(
        cls, query_length: int, key_length: int, block_size: tuple[int, int], causal: bool, device: torch.device
    ) -> BlockGeometry:
        """The geometry with tables that are made once for all its masks."""
        if torch.compiler.is_compiling():  # tensors of a trace are no tables for later
            return cls(query_length, key_length, block_size, causal, device)
        return _shared(query_length, key_length, block_size, causal, device)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of queries, blocks of keys."""
        return block_count(self.query_length, self.block_size[0]), block_count(self.key_length, self.block_size[1])

    @cached_property
    def allowed(self) -> Tensor:
        """Blocks with any pair that causality allows, bool ``(query blocks, key blocks)``."""
        with torch.inference_mode(False):  # a later gradient may need the table
            if not self.causal:
                return torch.ones(self.grid, dtype=torch.bool, device=self.device)
            last = self._last_queries + (self.key_length - self.query_length)
            return self._starts(1) <= last[:, None]

    @cached_property
    def diagonal(self) -> Tensor:
        """The block of each block of queries that holds its last query's own key, ``(query blocks,)``."""
        with torch.inference_mode(False):
            return (self._last_queries + self.key_length - self.query_length) // self.block_size[1]

    @cached_property
    def pairs(self) -> Tensor:
        """Query–key pairs that each block allows, int64 ``(query blocks, key blocks)``."""
        with torch.inference_mode(False):
            starts, firsts = self._starts(1), self._starts(0)[:, None]
            widths = (self.key_length - starts).clamp(max=self.block_size[1])
            ends = self._last_queries[:, None] + 1
            if not self.causal:
                return (ends - firsts) * widths
            seen = self.key_length - self.query_length + 1 - starts  # keys of a block that query 0 reads, unclipped
            return _clipped_sum(seen + ends, widths) - _clipped_sum(seen + firsts, widths)

    @cached_property
    def pair_count(self) -> int:
        """All pairs that are allowed."""
        return int(self.pairs.sum())

    def real_pairs(self, real: Tensor, window: int | None = None) -> Tensor:
        """Pairs that each block allows of which neither is padding, and that a window allows.

        Parameters
        ----------
        real
            Which keys are no padding, bool ``(batch, key_length)``. Queries are the last of the keys, and padding like
            them; only if nothing is causal, fewer or more queries are not keys, and none is padding.
        window
            Keys up to its own that a causal query reads at most; None for all.

        Returns
        -------
        Tensor
            int64 ``(batch, query blocks, key blocks)``.
        """
        queries, keys = self.query_length, self.key_length
        past = (
            keys - queries if self.causal else keys
        )  # query i reads the first past + i + 1 keys, if there are so many
        reach = window if self.causal and window is not None else keys + queries
        among = self.causal or queries == keys
        asks = real[:, keys - queries :].long() if among else real.new_ones(len(real), queries, dtype=torch.int64)
        rows = pad(self._starts(0), (0, 1), value=queries)[:, None]
        edges = pad(self._starts(1), (0, 1), value=keys)
        # pairs of the queries before a row with the keys before an edge: the first queries read no key behind it,
        # those from `inside` on read up to it and further, and those from `beyond` on read only what is behind it
        inside, beyond = (edges - past - 1).clamp(0, queries), (edges - past + reach).clamp(0, queries)
        ends = (torch.arange(queries, device=real.device) + past + 1).clamp(max=keys)
        before = pad(real.cumsum(1), (1, 0))
        count, low, high = (
            pad(part.cumsum(1), (1, 0))
            for part in (asks, asks * before[:, (ends - reach).clamp(min=0)], asks * before[:, ends])
        )
        within = count[:, rows.clamp(inside, beyond)] - count[:, inside][:, None]
        found = high[:, rows.minimum(inside)] + within * before[:, edges][:, None]
        found += low[:, rows.maximum(beyond)] - low[:, beyond][:, None]
        return found.diff(dim=1).diff(dim=2)

    def ends(self, first: int, last: int) -> Tensor:
        """The first blocks of every row and the last ones up to the row's own, bool, as :attr:`allowed`."""
        if (first, last) not in self._ends:
            with torch.inference_mode(False):
                columns, own = torch.arange(self.grid[1], device=self.device), self.diagonal[:, None]
                near = (columns <= own) & (columns > own - last)
                self._ends[first, last] = ((columns < first) | near) & self.allowed
        return self._ends[first, last]

    @cached_property
    def _ends(self) -> dict[tuple[int, int], Tensor]:
        return {}

    @property
    def _last_queries(self) -> Tensor:
        return (self._starts(0) + self.block_size[0]).clamp(max=self.query_length) - 1

    def _starts(self, side: int) -> Tensor:
        return torch.arange(self.grid[side], device=self.device) * self.block_size[side]


@lru_cache(maxsize=_REMEMBERED)
def _shared(
    query_length: int, key_length: int, block_size: tuple[int, int], causal: bool, device: torch.device
) -> BlockGeometry:
    return BlockGeometry(query_length, key_length, block_size, causal, device)


def _clipped_sum(end: Tensor, width: Tensor) -> Tensor:
    """Σ min(t, width) over 0 ≤ t < end."""
    short = end.clamp(min=0).minimum(width)
    return short * (short - 1) // 2 + (end - width).clamp(min=0) * width

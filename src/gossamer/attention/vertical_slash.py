"""Vertical-Slash: a prompt's queries read the columns and diagonals that its last queries look at.

Attention of language models, drawn as a square, shows lines: columns, tokens that all later ones look at, and
diagonals, fixed distances at which many tokens look. Both are there in the last rows already, so those rows are
computed first, and their heaviest columns and diagonals are what all rows read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.attention.base import SparseAttention, check_share
from gossamer.attention.last_queries import diagonal_sums, largest_strips, last_query_weights, strips
from gossamer.attention.selection import ranks
from gossamer.core.block_mask import BlockMask
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.models.attention_sites import AttentionCall, Phase


@register(
    "vertical-slash",
    paper="sparse-frontier",
    when="at inference",
    granularity="tokens",
    needs_data=False,
    criterion=("activation",),
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class VerticalSlash(SparseAttention):
    """Read the heaviest columns and diagonals of the last queries' attention.

    Source: Jiang et al. [2024, arXiv 2407.02490, section 3.2], as compared by Nawrot et al. [2025, arXiv 2504.17768].

    Parameters
    ----------
    vertical_size, slash_size
        Columns and diagonals that every head reads.
    density
        Instead of both sizes: share of the causal triangle to compute, in (0, 1]. Each head then takes as many columns
        as diagonals, as many as fit.
    approximation
        How many last queries are asked.
    sinks
        First columns that are read whatever their weight.
    local
        Diagonals from the main one on that are read whatever their weight.
    block_size
        Queries that are computed together.
    """

    vertical_size: int = 512
    slash_size: int = 512
    density: float | None = None
    approximation: int = 64
    sinks: int = 4
    local: int = 64
    block_size: int = 64

    phase: ClassVar[Phase] = "prefill"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_line_options(self)
        if self.vertical_size < 1 or self.slash_size < 1:
            raise ConfigurationError(
                f"vertical_size is {self.vertical_size} and slash_size {self.slash_size}; both must be 1 or more"
            )
        if self.density is not None:
            check_share(self.density, "density")

    def prefill(self, call: AttentionCall) -> BlockMask | None:
        """Columns and diagonals, forced ones first."""
        if not call.causal or self.density == 1:
            return None
        weights = line_weights(call, self.approximation)
        columns, diagonals = line_ranks(call, *weights, self.sinks, self.local)
        if self.density is None:
            return strips(call, columns < self.vertical_size, diagonals < self.slash_size, self.block_size)
        count = largest_strips(call, columns, diagonals, self.density, self.block_size)
        return strips(call, columns < count, diagonals < count, self.block_size)

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, for a prompt of `length` tokens."""
        return 2.0 * min(self.approximation, length) * length * size * heads


def check_line_options(method: SparseAttention) -> None:
    """Check what all methods of columns and diagonals have in common.

    Raises
    ------
    ConfigurationError
        If an option is below what makes sense.
    """
    for name, least in (("approximation", 1), ("sinks", 0), ("local", 1), ("block_size", 1)):
        value = getattr(method, name)
        if value < least:
            raise ConfigurationError(f"{name} is {value}; it must be {least} or more")


def line_weights(call: AttentionCall, approximation: int) -> tuple[Tensor, Tensor]:
    """Share of the last queries' attention on every column and every diagonal, each ``(batch, heads, keys)``."""
    weights = last_query_weights(call, approximation)
    return weights.mean(-2), diagonal_sums(weights) / weights.shape[-2]


def line_ranks(
    call: AttentionCall, columns: Tensor, diagonals: Tensor, sinks: int, local: int
) -> tuple[Tensor, Tensor]:
    """Places of columns and diagonals in order of weight; the first real columns and diagonals come before all."""
    places = torch.arange(columns.shape[-1], device=columns.device)
    first: Tensor | int = 0
    if call.key_mask is not None:
        columns = columns.masked_fill(~call.key_mask[:, None], -1.0)
        first = call.key_mask.int().argmax(-1)[:, None, None]
    foremost = (places >= first) & (places < first + sinks)
    forced = columns.masked_fill(foremost, float("inf")), diagonals.masked_fill(places < local, float("inf"))
    return ranks(forced[0]), ranks(forced[1])

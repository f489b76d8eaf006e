"""What the last queries of a prompt say about its keys: columns, diagonals, and the strips that cover them.

The last queries of a prompt are its question, and what they look at is what the answer will need. Their attention is
cheap: a few rows instead of all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.block_mask import BlockMask, block_count
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention_reference import grouped_product
from gossamer.models.attention_sites import AttentionCall

_CHUNK = 1 << 25  # links that are looked at together
_SAMPLED_ROWS = 32


def last_query_weights(call: AttentionCall, count: int) -> Tensor:
    """Attention weights of the last `count` queries, float32 ``(batch, heads, count, keys)``.

    Fewer where there are fewer queries. Rows without any key are zeros.
    """
    count = min(count, call.query.shape[2])
    keys = call.key.shape[2]
    query = call.query[:, :, -count:].float() * call.scale
    scores = grouped_product(query, call.key.float().mT)
    place = torch.arange(keys - count, keys, device=query.device)[:, None]
    column = torch.arange(keys, device=query.device)
    hidden = column > place if call.causal else torch.zeros(count, keys, dtype=torch.bool, device=query.device)
    if call.window is not None:
        hidden = hidden | (column <= place - call.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if call.key_mask is not None:
        scores = scores.masked_fill(~call.key_mask[:, None, None, :], float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0)


def diagonal_sums(weights: Tensor) -> Tensor:
    """Weights of the last queries summed by the distance from query to key, ``(batch, heads, keys)``.

    Parameters
    ----------
    weights
        As of :func:`last_query_weights`.
    """
    count, keys = weights.shape[-2:]
    place = torch.arange(keys - count, keys, device=weights.device)[:, None]
    column = place - torch.arange(keys, device=weights.device)
    shifted = weights.gather(-1, column.clamp(min=0).expand_as(weights))
    return shifted.masked_fill(column < 0, 0.0).sum(-2)


def strips(call: AttentionCall, columns: Tensor, diagonals: Tensor, block_size: int) -> BlockMask:
    """The mask of some columns and diagonals: columns one by one, diagonals as blocks of rows.

    Parameters
    ----------
    call
        The prompt.
    columns
        Bool ``(batch, heads, keys)``: keys that all queries read.
    diagonals
        Bool ``(batch, heads, keys)``: distances from query to key that are read.
    block_size
        Queries that are computed together: a diagonal costs them as many keys, whichever query asked for them.

    Returns
    -------
    BlockMask
        In blocks of `block_size` queries and one key.
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    touched = _touched(diagonals, queries, keys, block_size).flip(-2)
    blocks = touched | columns[..., None, :]
    return BlockMask(blocks, queries, keys, (block_size, 1), call.causal)


def _touched(diagonals: Tensor, queries: int, keys: int, size: int) -> Tensor:
    """Keys that the diagonals reach from each block of queries, the last block first."""
    rows = block_count(queries, size)
    first, last = keys - queries, keys - queries + (rows - 1) * size
    # a block whose first query stands at f reaches key c if any distance from f − c to f − c + size − 1 is read
    distance = torch.arange(last, first - keys, -1, device=diagonals.device)
    before = pad(diagonals.int().cumsum(-1), (1, 0))
    low, high = distance.clamp(0, keys), (distance + size).clamp(0, keys)
    reached = before[..., high] > before[..., low]
    return reached.unfold(-1, keys, size)


def largest_strips(
    call: AttentionCall, column_ranks: Tensor, diagonal_ranks: Tensor, density: float, block_size: int
) -> Tensor:
    """The largest number of columns, and of diagonals, that stays within a density; one for each head.

    Parameters
    ----------
    call, block_size
        As of :func:`strips`.
    column_ranks, diagonal_ranks
        Places of columns and diagonals, ``(batch, heads, keys)``; those below the number are read.
    density
        Share of the allowed pairs, in (0, 1].

    Returns
    -------
    Tensor
        int64 ``(batch, heads, 1)``, at least 1. Long prompts are judged by a sample of their rows.

    Raises
    ------
    ConfigurationError
        If the density is outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ConfigurationError(f"density is {density}; it must be in (0, 1], where 1 is dense")
    keys = call.key.shape[2]
    geometry = BlockMask.full(call.query.shape[2], keys, (block_size, 1), call.causal, call.query.device)
    sample = _sampled(geometry.grid[0], call.query.device)
    pairs = geometry.pairs[sample].double()
    low = torch.ones(*column_ranks.shape[:2], 1, dtype=torch.int64, device=call.query.device)
    high = torch.full_like(low, keys)
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        kept = _pairs_kept(call, column_ranks < middle, diagonal_ranks < middle, block_size, sample, pairs)
        fits = kept <= density * pairs.sum()
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return low


def _sampled(rows: int, device: torch.device) -> Tensor:
    if rows <= 2 * _SAMPLED_ROWS:
        return torch.arange(rows, device=device)
    return torch.linspace(0, rows - 1, _SAMPLED_ROWS, device=device).round().long()


def _pairs_kept(
    call: AttentionCall, columns: Tensor, diagonals: Tensor, size: int, sample: Tensor, pairs: Tensor
) -> Tensor:
    """Pairs in the sampled rows that strips compute, float64 ``(batch, heads, 1)``."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    heads = max(1, _CHUNK // pairs.numel())
    found = []
    flat = zip(columns.flatten(0, 1).split(heads), diagonals.flatten(0, 1).split(heads))
    for some, others in flat:
        touched = _touched(others, queries, keys, size)
        blocks = touched[..., touched.shape[-2] - 1 - sample, :] | some[..., None, :]
        found.append(torch.where(blocks, pairs, 0.0).sum((-2, -1)))
    return torch.cat(found).view(*columns.shape[:2], 1)

"""Cheap scores of blocks of an attention matrix, to choose by.

All give ``(batch, heads, query blocks, key blocks)`` in float32 for queries ``(batch, heads, queries, size)`` and keys
``(batch, key heads, keys, size)``. Scores of one kind can be compared within a row and not across kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.core.block_mask import BlockMask, block_count
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import antidiagonal_mass, attention_with_lse, block_mass
from gossamer.models.attention_sites import AttentionCall

Scoring = Literal["antidiagonal", "diagonal", "random", "mean", "sum", "exact"]


def score_blocks(call: AttentionCall, scoring: Scoring, stride: int, block_size: int) -> Tensor:
    """Estimated attention mass of every block of a call.

    Parameters
    ----------
    call
        Queries and keys.
    scoring
        ``antidiagonal``, what [Xu et al., 2025, arXiv 2503.16428] propose; ``diagonal`` and ``random``, the same with
        the queries of a stride in the order of the keys, or in random order; ``mean`` and ``sum``, products of
        pooled queries and keys; ``exact``, the mass itself, which costs as much as dense attention.
    stride
        Adjacent tokens that are folded into one.
    block_size
        Queries and keys of a block, a multiple of the stride.

    Raises
    ------
    ConfigurationError
        If the stride does not divide the block size, or there is no such scoring.
    """
    check_scoring(scoring, stride, block_size)
    return _SCORES[scoring](call, stride, block_size)


def check_scoring(scoring: str, stride: int, block_size: int) -> None:
    """Refuse what :func:`score_blocks` does not know.

    Raises
    ------
    ConfigurationError
        If the stride is no whole number that divides the block size, or there is no such scoring.
    """
    if scoring not in _SCORES:
        raise ConfigurationError(f"scoring is {scoring!r}; it must be one of {', '.join(_SCORES)}")
    whole = all(isinstance(size, int) and size >= 1 for size in (stride, block_size))
    if not whole or block_size % stride:
        raise ConfigurationError(
            f"stride is {stride}; it must be a whole number that divides the block size {block_size}"
        )


def exact_mass(call: AttentionCall, block_size: int) -> Tensor:
    """Attention weights summed over every block: the oracle."""
    options = {"causal": call.causal, "scale": call.scale, "window": call.window, "key_mask": call.key_mask}
    _, lse = attention_with_lse(call.query, call.key, call.value, **options)
    return block_mass(call.query, call.key, lse, block_size, **options)


def _antidiagonal(call: AttentionCall, stride: int, block_size: int) -> Tensor:
    return antidiagonal_mass(
        call.query, call.key, stride, block_size, causal=call.causal, scale=call.scale, key_mask=call.key_mask
    )


def _diagonal(call: AttentionCall, stride: int, block_size: int) -> Tensor:
    # the kernel reverses the queries of a stride; reversed beforehand, they meet the keys in order
    return _antidiagonal(_permuted(call, torch.arange(stride - 1, -1, -1)), stride, block_size)


def _random(call: AttentionCall, stride: int, block_size: int) -> Tensor:
    order = torch.randperm(stride, generator=torch.Generator().manual_seed(call.layer or 0))
    return _antidiagonal(_permuted(call, order), stride, block_size)


def _permuted(call: AttentionCall, order: Tensor) -> AttentionCall:
    """The call with the queries of every whole stride in another order."""
    stride = len(order)
    whole = call.query.shape[2] // stride * stride
    strides = call.query[:, :, :whole].unflatten(2, (-1, stride))[:, :, :, order.to(call.query.device)]
    return replace(call, query=torch.cat([strides.flatten(2, 3), call.query[:, :, whole:]], 2))


def _pooled(call: AttentionCall, block_size: int, power: int) -> Tensor:
    geometry = BlockMask.full(call.query.shape[2], call.key.shape[2], block_size, call.causal, call.query.device)
    query, _ = pool_blocks(call.query, block_size)
    key, filled = pool_blocks(call.key, block_size, call.key_mask)
    if power:
        sizes = torch.full((query.shape[2],), float(block_size), device=query.device)
        sizes[-1] = call.query.shape[2] - (query.shape[2] - 1) * block_size
        query, key = query * sizes[:, None], key * filled[:, None, :, None]
    key = key.repeat_interleave(call.group, 1)
    scores = (query @ key.transpose(-1, -2)) * call.scale
    hidden = ~geometry.allowed | (filled == 0)[:, None, None, :]
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)


def pool_blocks(tokens: Tensor, block_size: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means of blocks of tokens.

    Parameters
    ----------
    tokens
        ``(batch, heads, tokens, size)``.
    block_size
        Tokens of a block; the last may have fewer.
    real
        Bool ``(batch, tokens)``, False at padding, which does not count.

    Returns
    -------
    means, counts
        Float32 ``(batch, heads, blocks, size)`` and ``(batch, blocks)``: how many tokens counted; where none did, the
        mean is 0.
    """
    batch, _, length, _ = tokens.shape
    blocks = block_count(length, block_size)
    weights = torch.ones(batch, length, device=tokens.device) if real is None else real.float()
    spare = blocks * block_size - length
    counts = pad(weights, (0, spare)).view(batch, blocks, block_size).sum(-1)
    sums = pad(tokens.float() * weights[:, None, :, None], (0, 0, 0, spare)).unflatten(2, (blocks, block_size)).sum(3)
    return sums / counts.clamp(min=1)[:, None, :, None], counts


_SCORES: dict[str, Callable[[AttentionCall, int, int], Tensor]] = {
    "antidiagonal": _antidiagonal,
    "diagonal": _diagonal,
    "random": _random,
    "mean": lambda call, stride, block_size: _pooled(call, block_size, 0),
    "sum": lambda call, stride, block_size: _pooled(call, block_size, 1),
    "exact": lambda call, stride, block_size: exact_mass(call, block_size),
}

"""Attention over chosen blocks, its statistics, and attention over chosen tokens.

Queries are ``(batch, heads, queries, head size)``, keys and values ``(batch, key heads, keys, head size)``; the heads
are a multiple of the key heads, of which adjacent ones share one (grouped queries), and values may have another head
size. Sequences are aligned at their ends: causal attention shows query i the keys j ≤ i + keys − queries. Sums are
formed in float32, of float64 in float64. No n × n matrix is ever in memory.

Online softmax after Milakov & Gimelshein [2018, arXiv 1805.02867], blocks and backward pass after Dao et al. [2022,
arXiv 2205.14135].
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.kernels import attention_operators as operators
from gossamer.kernels import attention_passes as passes
from gossamer.kernels.attention_inputs import (
    check_heads,
    check_key_mask,
    check_lengths,
    check_window,
    pair_of,
    scale_of,
)
from gossamer.kernels.attention_reference import Visibility
from gossamer.kernels.attention_tokens import gather_attention, label_attention, label_topk, page_scores

__all__ = [
    "antidiagonal_mass",
    "attention_with_lse",
    "block_mass",
    "block_sparse_attention",
    "gather_attention",
    "label_attention",
    "label_topk",
    "page_scores",
]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    window: int | None = None,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention inside the blocks of a mask; everything else is skipped.

    Parameters
    ----------
    q, k, v
        ``(batch, heads, queries, size)``, ``(batch, key heads, keys, size)``, ``(batch, key heads, keys, value size)``.
    mask
        Which blocks are read, of any size, and whether attention is causal inside them.
    scale
        What scores are multiplied by; by default 1 / √size.
    window
        Query i sees the keys i − window < j ≤ i only; without causality, those less than `window` positions away.
    key_mask
        ``(batch, keys)`` bool, True for real keys.
    return_lse
        Whether to return the log-sum-exp of every row's scores, too.

    Returns
    -------
    Tensor, or Tensor and Tensor
        ``(batch, heads, queries, value size)`` in the dtype of `q`; with `return_lse` also ``(batch, heads, queries)``
        float32. A row that sees no key gives zeros and −∞. Both can be differentiated.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes, lengths or parameters do not fit.
    """
    check_heads(q, k, v)
    _check_mask(mask, q, k)
    found = _attend(q, k, v, mask.blocks, key_mask, mask.block_size, mask.causal, window, scale)
    return found if return_lse else found[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention together with the log-sum-exp of every row's scores.

    Parameters
    ----------
    q, k, v, scale, window, key_mask
        As in :func:`block_sparse_attention`.
    causal
        Whether query i sees only the keys j ≤ i + keys − queries.

    Returns
    -------
    outputs, lse
        As in :func:`block_sparse_attention`.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes, lengths or parameters do not fit.
    """
    check_heads(q, k, v)
    check_lengths(q, k, causal)
    return _attend(q, k, v, None, key_mask, (64, 64), causal, window, scale)


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_size: int | tuple[int, int],
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Exact attention weights summed over blocks: the second of two passes, after that which found `lse`.

    Parameters
    ----------
    q, k, causal, scale, window, key_mask
        As in :func:`attention_with_lse`.
    lse
        ``(batch, heads, queries)``, as :func:`attention_with_lse` returns it.
    block_size
        Tokens of a block, or queries and keys of it; the last block may be shorter.

    Returns
    -------
    Tensor
        ``(batch, heads, query blocks, key blocks)`` float32; a row of blocks sums to its number of queries.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes, lengths or parameters do not fit.
    """
    check_heads(q, k)
    check_lengths(q, k, causal)
    check_key_mask(key_mask, k)
    check_window(window)
    if lse.shape != q.shape[:3] or not lse.is_floating_point():
        raise ConfigurationError(
            f"lse is {tuple(lse.shape)} {lse.dtype}; q {tuple(q.shape)} takes floating-point {tuple(q.shape[:3])}"
        )
    size, factor = pair_of(block_size), scale_of(q, scale)
    if torch.compiler.is_compiling():
        return operators.block_mass(q, k, lse, list(size), causal, window, key_mask, factor)
    with torch.no_grad():
        return passes.block_mass(q, k, lse, size, Visibility(causal, window, key_mask), factor)


def antidiagonal_mass(
    q: Tensor,
    k: Tensor,
    stride: int,
    block_size: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Estimated attention of blocks from strided antidiagonals [Xu et al., 2025, arXiv 2503.16428, section 2.1].

    `stride` adjacent keys are laid end to end, `stride` adjacent queries likewise but in reverse order, so that one
    product of two such rows is the sum over the antidiagonal of a stride × stride tile of scores. Rows of these means
    are normalised by softmax, and summed over blocks.

    Parameters
    ----------
    q, k, causal, scale, key_mask
        As in :func:`attention_with_lse`. Masked keys count as zeros inside a tile with real keys.
    stride
        Size of a tile; the work is 1 / stride of that of all scores.
    block_size
        Tokens of a block, a multiple of `stride`; the last block may be shorter.

    Returns
    -------
    Tensor
        ``(batch, heads, query blocks, key blocks)`` float32; a row of full blocks sums to block_size / stride.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes, lengths or parameters do not fit.
    """
    check_heads(q, k)
    check_lengths(q, k, causal)
    check_key_mask(key_mask, k)
    if stride < 1 or block_size < 1 or block_size % stride:
        raise ConfigurationError(
            f"stride is {stride} and block_size {block_size}; the stride must divide the block size, such as 8 and 64"
        )
    chosen = operators if torch.compiler.is_compiling() else passes
    with torch.no_grad():
        return chosen.antidiagonal_mass(q, k, stride, block_size, causal, scale_of(q, scale), key_mask)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    key_mask: Tensor | None,
    block_size: tuple[int, int],
    causal: bool,
    window: int | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    check_key_mask(key_mask, k)
    check_window(window)
    return operators.block_attention(q, k, v, blocks, key_mask, list(block_size), causal, window, scale_of(q, scale))


def _check_mask(mask: BlockMask, q: Tensor, k: Tensor) -> None:
    if (mask.query_length, mask.key_length) != (q.shape[2], k.shape[2]):
        raise ConfigurationError(
            f"the mask is made for {mask.query_length} queries and {mask.key_length} keys, but q has {q.shape[2]} and "
            f"k {k.shape[2]}; select blocks again for these lengths"
        )
    batch, heads = mask.blocks.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
        raise ConfigurationError(
            f"the mask is made for a batch of {batch} and {heads} heads; q {tuple(q.shape)} takes 1 or {q.shape[0]}, "
            f"and 1 or {q.shape[1]}"
        )
    if mask.blocks.device != q.device:
        raise ConfigurationError(f"the mask lies on {mask.blocks.device} and q on {q.device}; move it with mask.to(…)")

"""Attention of few queries over chosen tokens, as decoding with a long context needs it, and the choice of tokens."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels import attention_operators as operators
from gossamer.kernels import attention_passes as passes
from gossamer.kernels.attention_inputs import (
    LabelChoice,
    check_heads,
    check_indices,
    check_key_mask,
    scale_of,
    wants_gradients,
)
from gossamer.kernels.attention_labels import Labels, of_values
from gossamer.kernels.attention_reference import grouped_product, wide


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention of every query over the listed keys, whose rows are read where they lie.

    Parameters
    ----------
    q, k, v
        As in :func:`gossamer.kernels.attention.block_sparse_attention`; there are few queries, such as 1. All of them
        see all the listed keys.
    indices
        ``(batch, heads or key heads, tokens)`` int32 or int64: keys for each head, or for all heads that share one key
        head. A key that is listed twice counts twice.
    counts
        ``(batch, heads or key heads)``: how many of the indices are meant; by default all.
    scale, return_lse
        As in :func:`gossamer.kernels.attention.block_sparse_attention`.

    Returns
    -------
    Tensor, or Tensor and Tensor
        As of :func:`gossamer.kernels.attention.block_sparse_attention`, with gradients by torch alone; zeros and −∞
        where a count is 0.

    Raises
    ------
    ConfigurationError
        If shapes or dtypes do not fit, or an index lies outside the keys.
    """
    check_heads(q, k, v)
    factor = scale_of(q, scale)
    if torch.compiler.is_compiling() and not wants_gradients(q, k, v):
        found: tuple[Tensor, Tensor | None] = operators.gather_attention(q, k, v, indices, counts, factor)
    else:
        check_indices(indices, counts, q, k)
        found = passes.gather(q, k, v, indices, counts, factor, return_lse)
    return cast(tuple[Tensor, Tensor], found) if return_lse else found[0]


def label_topk(
    q_labels: Tensor,
    k_labels: Tensor | Labels,
    count: int,
    *,
    key_mask: Tensor | None = None,
    pooling: Literal["sum", "max"] | None = "sum",
) -> Tensor:
    """The keys whose few label channels agree best with the query [Yang et al., 2024, arXiv 2408.07092, section 3].

    Parameters
    ----------
    q_labels
        ``(batch, heads, labels)``.
    k_labels
        ``(batch, heads or key heads, keys, labels)``; of 4 or 8 bits as :func:`make_labels` of
        :mod:`gossamer.kernels.attention_labels` rounds them, which are read as they lie.
    count
        How many keys to choose, at least 1; at most all are.
    key_mask
        ``(batch, keys)`` bool, True for real keys. Masked ones are chosen only where there are not enough others.
    pooling
        How heads that share labels choose together: by the sum of their scores or by the highest; None lets each
        choose for itself.

    Returns
    -------
    Tensor
        int64 ``(batch, heads of k_labels, count)``, with ``pooling=None`` ``(batch, heads, count)``: ascending. Of
        equal scores the lower index is chosen; a NaN counts as the highest.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or count do not fit.
    """
    queries = q_labels.unsqueeze(2) if q_labels.dim() == 3 else q_labels
    k_labels, like = _held(k_labels), of_values(k_labels)
    check_heads(queries, like)
    check_key_mask(key_mask, like)
    _check_choice(queries, count, pooling, 1)
    count = min(count, k_labels.shape[2])
    if torch.compiler.is_compiling():
        plain = k_labels.values() if isinstance(k_labels, Labels) else k_labels
        return operators.label_topk(queries, plain, count, key_mask, pooling)
    return passes.label_topk(queries, k_labels, count, key_mask, pooling)


def label_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    channels: Tensor,
    k_labels: Tensor | Labels,
    count: int,
    *,
    newest: bool = False,
    key_mask: Tensor | None = None,
    pooling: Literal["sum", "max"] | None = "sum",
    scale: float | None = None,
) -> Tensor:
    """:func:`label_topk`, and :func:`gather_attention` over what it finds, in one pass.

    A step of decoding with a long context takes a millisecond or two, in which every call of Python is felt, and
    threads that wait for each other; and what a thread has chosen, it reads while it still knows where.

    Parameters
    ----------
    q, k, v, scale
        As in :func:`gather_attention`, of a single query.
    channels
        ``(key heads or heads, labels)`` int64: the channels of a query that are its labels, rounded to the dtype of
        those of keys.
    k_labels
        ``(batch, as many heads as channels has, keys, labels)``, as in :func:`label_topk`. With `newest`, the last key
        has none.
    count
        How many keys to choose by labels, at least 1, or 0 with `newest`; at most all are.
    newest
        Whether the last key is read as well.
    key_mask, pooling
        As in :func:`label_topk`, for the keys that have labels.

    Returns
    -------
    Tensor
        ``(batch, heads, 1, value size)``. Gradients are those of attention to the chosen tokens.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or count do not fit, or a channel lies outside the head.
    """
    k_labels, like = _held(k_labels), of_values(k_labels)
    check_heads(q, k, v)
    check_key_mask(key_mask, like)
    _check_choice(q, count, pooling, 0 if newest else 1)
    heads, keys = q.shape[1], k.shape[2] - newest
    wanted = (q.shape[0], channels.shape[0], keys, channels.shape[-1])
    fits = channels.ndim == 2 and channels.dtype == torch.int64 and channels.device == q.device
    if not fits or len(channels) not in (heads, k.shape[1]) or like.shape != wanted:
        raise ConfigurationError(
            f"channels is {tuple(channels.shape)} {channels.dtype} and k_labels {tuple(like.shape)}; "
            f"q {tuple(q.shape)} and k {tuple(k.shape)} take ({k.shape[1]} or {heads}, labels) int64 and "
            f"({len(q)}, as many, {keys}, labels)"
        )
    if not like.is_floating_point() or like.device != q.device:
        raise ConfigurationError(f"k_labels is {like.dtype} on {like.device}; it must be floating-point on {q.device}")
    choice, factor = LabelChoice(channels, k_labels, min(count, keys), newest, key_mask, pooling), scale_of(q, scale)
    if torch.compiler.is_compiling() and not wants_gradients(q, k, v):
        plain = k_labels.values() if isinstance(k_labels, Labels) else k_labels
        return operators.label_attention(q, k, v, *choice._replace(k_labels=plain), factor)
    return passes.label_attention(q, k, v, choice, factor)


def _held(k_labels: Tensor | Labels) -> Tensor | Labels:
    """Labels that are not rounded as a tensor."""
    return k_labels.codes if isinstance(k_labels, Labels) and k_labels.low is None else k_labels


def _check_choice(queries: Tensor, count: int, pooling: str | None, least: int) -> None:
    if count < least or queries.shape[2] != 1:
        raise ConfigurationError(
            f"count is {count} for queries {tuple(queries.shape)}; choose at least {least} key, for one query of "
            f"each head"
        )
    if pooling not in ("sum", "max", None):
        raise ConfigurationError(f"pooling is {pooling!r}; it must be 'sum', 'max' or None")


def page_scores(q: Tensor, page_minimum: Tensor, page_maximum: Tensor) -> Tensor:
    """The highest score of any key within a page's bounds [Tang et al., 2024, arXiv 2406.10774, section 3.2].

    ``Σ_c max(q_c · minimum_c, q_c · maximum_c)``, which is the product of the positive part of q with the maxima plus
    that of its negative part with the minima.

    Parameters
    ----------
    q
        ``(batch, heads, queries, size)``.
    page_minimum, page_maximum
        ``(batch, key heads, pages, size)``: of each channel over the keys of a page.

    Returns
    -------
    Tensor
        ``(batch, heads, queries, pages)`` float32, not scaled.

    Raises
    ------
    ConfigurationError
        If shapes or dtypes do not fit.
    """
    check_heads(q, page_minimum, page_maximum)
    check_heads(q, page_maximum)
    dtype = wide(q.dtype)
    least, most = page_minimum.to(dtype).mT, page_maximum.to(dtype).mT
    wide_q = q.to(dtype)
    return grouped_product(wide_q.clamp(min=0), most) + grouped_product(wide_q.clamp(max=0), least)

"""Attention of few queries over chosen tokens, as decoding with a long context needs it, and the choice of tokens."""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels import attention_operators as operators
from gossamer.kernels import attention_passes as passes
from gossamer.kernels.attention_inputs import check_heads, check_indices, check_key_mask, scale_of
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
        As of :func:`gossamer.kernels.attention.block_sparse_attention`, without gradients; zeros and −∞ where a count
        is 0.

    Raises
    ------
    ConfigurationError
        If shapes or dtypes do not fit, or an index lies outside the keys.
    """
    check_heads(q, k, v)
    factor = scale_of(q, scale)
    if torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor | None] = operators.gather_attention(q, k, v, indices, counts, factor)
    else:
        check_indices(indices, counts, q, k)
        found = passes.gather(q, k, v, indices, counts, factor, return_lse)
    return cast(tuple[Tensor, Tensor], found) if return_lse else found[0]


def label_topk(
    q_labels: Tensor,
    k_labels: Tensor,
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
        ``(batch, heads or key heads, keys, labels)``.
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
    check_heads(queries, k_labels)
    check_key_mask(key_mask, k_labels)
    if count < 1 or queries.shape[2] != 1:
        raise ConfigurationError(
            f"count is {count} and q_labels {tuple(q_labels.shape)}; at least 1 key must be chosen, for "
            f"(batch, heads, labels)"
        )
    if pooling not in ("sum", "max", None):
        raise ConfigurationError(f"pooling is {pooling!r}; it must be 'sum', 'max' or None")
    count = min(count, k_labels.shape[2])
    if torch.compiler.is_compiling():
        return operators.label_topk(queries, k_labels, count, key_mask, pooling)
    return passes.label_topk(queries, k_labels, count, key_mask, pooling)


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

"""Attention with torch alone, on any device: what the compiled kernels are compared with and what replaces them.

Rows of queries are taken a chunk at a time, so that no more than a chunk of scores is ever in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.kernels.attention_labels import Labels

_CHUNK = 1 << 24  # scores that are in memory at a time


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees.

    Attributes
    ----------
    causal
        No key that is later than the query.
    window
        Of keys before the query those less than so many positions away; without `causal`, of those after it too.
        None means all.
    key_mask
        ``(batch, keys)`` bool, True for real keys; None means all.
    blocks
        ``(batch | 1, heads | 1, query blocks, key blocks)`` bool; None means all.
    block_size
        Queries and keys of a block.
    offset
        The key that the first query meets; None aligns queries and keys at their ends.
    """

    causal: bool = True
    window: int | None = None
    key_mask: Tensor | None = None
    blocks: Tensor | None = None
    block_size: tuple[int, int] = (64, 64)
    offset: int | None = None

    def rows(self, first: int, last: int, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Mask ``(batch | 1, heads | 1, last − first, keys)`` of some queries; None if they see everything."""
        row = torch.arange(first, last, device=device)
        key = torch.arange(keys, device=device)
        distance = row[:, None] + (keys - queries if self.offset is None else self.offset) - key
        found: list[Tensor] = []
        if self.causal:
            found.append(distance >= 0)
        if self.window is not None:
            found.append(distance.abs() < self.window)
        if self.key_mask is not None:
            found.append(self.key_mask[:, None, None, :])
        if self.blocks is not None:
            some = self.blocks[:, :, row // self.block_size[0]]
            found.append(some[..., key // self.block_size[1]])
        if not found:
            return None
        mask = found[0].view(1, 1, *found[0].shape) if found[0].dim() == 2 else found[0]
        for other in found[1:]:
            mask = mask & other
        return mask.expand(*mask.shape[:2], last - first, keys)


def forward(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs in the dtype of `q`, and log-sum-exp of the scores: zeros and −∞ for rows that see nothing."""
    outputs = q.new_empty(*q.shape[:3], v.shape[3])
    sums = q.new_empty(q.shape[:3], dtype=wide(q.dtype))
    values = real(v, visible).to(sums.dtype)
    for first, last, scores in _chunks(q, k, visible, scale):
        total = scores.logsumexp(-1)
        sums[:, :, first:last] = total
        shares = (scores - finite(total)[..., None]).exp_()
        outputs[:, :, first:last] = grouped_product(shares, values).to(q.dtype)
    return outputs, sums


def backward(
    grads: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    visible: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values.

    Parameters
    ----------
    grads
        Of the outputs, and of the log-sum-exps.
    saved
        Queries, keys, values, outputs and log-sum-exps of :func:`forward`.
    """
    q, k, v, outputs, sums = saved
    dtype = sums.dtype
    grad = grads[0].to(dtype)
    shift = (grad * outputs.to(dtype)).sum(-1)
    if grads[1] is not None:
        shift = shift - grads[1].to(dtype)
    keys, values = real(k, visible).to(dtype), real(v, visible).to(dtype)
    to_q = torch.empty_like(q, dtype=dtype)
    to_k, to_v = torch.zeros_like(keys), torch.zeros_like(values)
    for first, last, scores in _chunks(q, k, visible, scale):
        part = grad[:, :, first:last]
        shares = (scores - finite(sums[:, :, first:last])[..., None]).exp_()
        to_v += grouped_sum(shares, part, v.shape[1])
        flow = shares * (grouped_product(part, values.mT) - shift[:, :, first:last, None]) * scale
        to_q[:, :, first:last] = grouped_product(flow, keys)
        to_k += grouped_sum(flow, q[:, :, first:last].to(dtype), k.shape[1])
    return to_q.to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_size: tuple[int, int], visible: Visibility, scale: float
) -> Tensor:
    """Sums of ``exp(score − lse)`` over blocks, ``(batch, heads, query blocks, key blocks)``."""
    found = []
    for first, last, scores in _chunks(q, k, visible, scale, block_size[0]):
        shares = (scores - finite(lse[:, :, first:last]).to(scores.dtype)[..., None]).exp_()
        found.append(block_sums(shares, block_size))
    return torch.cat(found, 2)


def antidiagonal_mass(
    q: Tensor, k: Tensor, stride: int, block_size: int, causal: bool, scale: float, key_mask: Tensor | None
) -> Tensor:
    """What :func:`gossamer.kernels.attention.antidiagonal_mass` returns."""
    offset = -((q.shape[2] - k.shape[2]) // stride)  # a folded row sees what any of its queries sees
    if key_mask is not None:
        k = torch.where(key_mask[:, None, :, None], k, 0.0)
        key_mask = fold_mask(key_mask, stride)
    visible = Visibility(causal, key_mask=key_mask, offset=offset)
    rows = block_size // stride
    found = []
    for _, _, scores in _chunks(fold(q, stride, True), fold(k, stride), visible, scale / stride, rows):
        shares = (scores - finite(scores.logsumexp(-1))[..., None]).exp_()
        found.append(block_sums(shares, (rows, rows)))
    return torch.cat(found, 2)


def gather(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs over listed keys, and log-sum-exps."""
    dtype, heads, shared = wide(q.dtype), indices.shape[1], k.shape[1]
    if heads != shared:
        k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
    places = indices.long()[..., None]
    keys, values = (x.gather(2, places.expand(-1, -1, -1, x.shape[3])).to(dtype) for x in (k, v))
    scores = grouped_product(q.to(dtype) * scale, keys.mT)
    if counts is not None:
        meant = torch.arange(indices.shape[2], device=q.device) < counts[..., None]
        meant = meant.repeat_interleave(q.shape[1] // heads, 1)[:, :, None]
        scores = scores.masked_fill(~meant, float("-inf"))
    lse = scores.logsumexp(-1)
    shares = (scores - finite(lse)[..., None]).exp()
    return grouped_product(shares, values).to(q.dtype), lse


def label_topk(q: Tensor, k: Tensor | Labels, count: int, key_mask: Tensor | None, pooling: str | None) -> Tensor:
    """The keys of the highest scores, ascending; of equal ones the lower, and NaN above all."""
    dtype = wide(q.dtype)
    labels = k.values(dtype) if isinstance(k, Labels) else k.to(dtype)
    scores = grouped_product(q.to(dtype), labels.mT)[:, :, 0]
    if pooling is not None:
        shared = scores.unflatten(1, (k.shape[1], -1))
        scores = shared.sum(2) if pooling == "sum" else shared.amax(2)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None], float("-inf"))
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(-1).values


def fold(x: Tensor, stride: int, reverse: bool = False) -> Tensor:
    """`stride` adjacent rows as one, zeros behind the last: ``(…, ⌈n / stride⌉, stride · d)``."""
    length = x.shape[2]
    whole = pad(x, (0, 0, 0, -length % stride)).unflatten(2, (-1, stride))
    return (whole.flip(3) if reverse else whole).flatten(3)


def fold_mask(mask: Tensor, stride: int) -> Tensor:
    """Whether any of `stride` adjacent keys is real."""
    return pad(mask, (0, -mask.shape[-1] % stride)).unflatten(-1, (-1, stride)).any(-1)


def block_sums(shares: Tensor, block_size: tuple[int, int]) -> Tensor:
    """Sums over blocks of rows and columns, of which the last may be smaller."""
    rows, columns = block_size
    padded = pad(shares, (0, -shares.shape[-1] % columns, 0, -shares.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).sum((-1, -3), dtype=torch.float32)


def grouped_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where adjacent heads of `left` share one of `right`."""
    heads, shared = left.shape[1], right.shape[1]
    if heads == shared:
        return left @ right
    flat = left.unflatten(1, (shared, -1)).flatten(2, 3) @ right
    return flat.unflatten(2, (-1, left.shape[2])).flatten(1, 2)


def grouped_sum(left: Tensor, right: Tensor, shared: int) -> Tensor:
    """``leftᵀ @ right``, summed over the adjacent heads that share one result."""
    found = left.mT @ right
    return found.unflatten(1, (shared, -1)).sum(2)


def real(x: Tensor, visible: Visibility) -> Tensor:
    """Keys or values with zeros where they are masked: what lies there may be anything, and 0 · NaN is NaN."""
    mask = visible.key_mask
    return x if mask is None else torch.where(mask[:, None, :, None], x, 0.0)


def finite(lse: Tensor) -> Tensor:
    """0 instead of −∞, so that rows without keys give ``exp(−∞ − 0) = 0``."""
    return torch.where(lse == float("-inf"), 0.0, lse)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(
    q: Tensor, k: Tensor, visible: Visibility, scale: float, multiple: int = 1
) -> Iterator[tuple[int, int, Tensor]]:
    """First and last row of each chunk, and its scores ``(batch, heads, rows, keys)``, −∞ where nothing is seen."""
    batch, heads, queries, _ = q.shape
    keys, dtype = k.shape[2], wide(q.dtype)
    step = max(_CHUNK // max(batch * heads * keys, 1), 1)
    step = -(-step // multiple) * multiple
    turned = k.to(dtype).mT
    for first in range(0, queries, step):
        last = min(first + step, queries)
        scores = grouped_product(q[:, :, first:last].to(dtype) * scale, turned)
        mask = visible.rows(first, last, queries, keys, q.device)
        yield first, last, scores if mask is None else scores.masked_fill_(~mask, float("-inf"))

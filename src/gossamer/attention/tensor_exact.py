"""Attention over tuples of tokens, exactly: all of them by an online softmax, or only the best of each query.

Tuples but for their last member are numbered and taken a chunk at a time; with the last one they make a matrix
product. Nothing of size ``n^{k−1}`` is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 20  # scores held at once


def column_kronecker(a: Tensor, b: Tensor) -> Tensor:
    """Product of all pairs of rows, column by column: ``(…, n, d), (…, m, d) → (…, n m, d)``.

    Row ``j m + l`` is ``a_j ⊙ b_l``: the Kronecker product of each column of a with that of b.
    """
    return (a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2)


def exact_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float, causal: bool, key_mask: Tensor | None
) -> Tensor:
    """Softmax over all tuples; time ``n^k d``, memory of a chunk.

    Shapes are those of :func:`~gossamer.attention.kronecker_attention.tensor_attention`.
    """
    total, norm, highest = None, None, None
    for scores, outer in _chunks(q, keys, values, scale, causal, key_mask):
        peak = scores.amax((-1, -2))
        new = peak if highest is None else torch.maximum(highest, peak)
        # a query that has seen nothing but −∞ so far has no peak to subtract
        base = torch.where(new == -math.inf, torch.zeros_like(new), new)
        weights = torch.exp(scores - base[..., None, None])
        mixed = (weights @ values[-1].unsqueeze(-3)).mul(outer.unsqueeze(-3)).sum(-2)
        sums = weights.sum((-1, -2))
        if total is None or norm is None or highest is None:
            total, norm = mixed, sums
        else:
            decay = torch.exp(torch.where(highest == -math.inf, highest, highest - base))
            total, norm = total * decay.unsqueeze(-1) + mixed, norm * decay + sums
        highest = new
    assert total is not None
    assert norm is not None
    return torch.where(norm.unsqueeze(-1) > 0, total / norm.unsqueeze(-1), torch.zeros_like(total))


def topk_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    causal: bool,
    key_mask: Tensor | None,
    count: int,
) -> Tensor:
    """Softmax over the `count` tuples of highest score of each query: what the best choice of tuples could do."""
    best: Tensor | None = None
    places: Tensor | None = None
    n, start = keys[-1].shape[-2], 0
    for scores, outer in _chunks(q, keys, values, scale, causal, key_mask):
        flat = scores.flatten(-2)
        numbers = torch.arange(start * n, start * n + flat.shape[-1], device=q.device).expand_as(flat)
        start += outer.shape[-2]
        if best is not None and places is not None:
            flat, numbers = torch.cat([best, flat], -1), torch.cat([places, numbers], -1)
        best, chosen = flat.topk(min(count, flat.shape[-1]), -1)
        places = numbers.gather(-1, chosen)
    assert best is not None
    assert places is not None
    weights = torch.where(best > -math.inf, best, torch.full_like(best, torch.finfo(best.dtype).min)).softmax(-1)
    weights = weights * (best > -math.inf)
    product = torch.ones_like(weights).unsqueeze(-1)
    for value in reversed(values):
        product = product * _rows(value, places % n)
        places = places // n
    return (weights.unsqueeze(-1) * product).sum(-2)


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """``(…, n, e)`` at places ``(…, q, c)`` → ``(…, q, c, e)``."""
    flat = places.flatten(-2)
    found = table.gather(-2, flat.unsqueeze(-1).expand(*flat.shape, table.shape[-1]))
    return found.view(*places.shape, -1)


def _chunks(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float, causal: bool, key_mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores ``(…, queries, tuples, n)`` of a chunk of tuples, and the products of their values ``(…, tuples, e)``."""
    n = keys[-1].shape[-2]
    tuples = n ** (len(keys) - 1)
    step = max(1, _CHUNK // max(1, q[..., 0].numel() * n))
    token = torch.arange(n, device=q.device)
    for start in range(0, tuples, step):
        number = torch.arange(start, min(tuples, start + step), device=q.device)
        digits = [number // n**power % n for power in reversed(range(len(keys) - 1))]
        key, value = _product(keys, digits), _product(values, digits)
        scores = ((q.unsqueeze(-2) * key.unsqueeze(-3)) @ keys[-1].unsqueeze(-3).transpose(-1, -2)) * scale
        if causal:
            latest = torch.stack([*digits, torch.zeros_like(number)]).amax(0)
            seen = torch.maximum(latest.unsqueeze(1), token) <= token[: q.shape[-2], None, None]
            scores = scores.masked_fill(~seen, -math.inf)
        if key_mask is not None:
            outer = torch.stack([key_mask[:, digit] for digit in digits] or [key_mask.new_ones(len(key_mask), 1)]).all(
                0
            )
            real = outer.unsqueeze(-1) & key_mask.unsqueeze(-2)
            scores = scores.masked_fill(~real[:, None, None], -math.inf)
        yield scores, value


def _product(tables: Sequence[Tensor], digits: Sequence[Tensor]) -> Tensor:
    """Rows of all tables but the last, multiplied: ``(…, tuples, d)``; a row of ones if there is only the last."""
    found = torch.ones_like(tables[-1][..., :1, :])
    for table, digit in zip(tables, digits):
        found = found * table[..., digit, :]
    return found

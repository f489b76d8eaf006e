"""Attention over tuples of tokens, exactly: all of them by an online softmax, or only the best of each query.

Tuples but for their last member are numbered and taken a chunk at a time; with the last one they make a matrix
product. Nothing of size ``n^{k−1}`` is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK = 1 << 20  # scores held at once


def column_kronecker(a: Tensor, b: Tensor) -> Tensor:
    """Product of all pairs of rows, column by column: ``(…, n, d), (…, m, d) → (…, n m, d)``.

    Row ``j m + l`` is ``a_j ⊙ b_l``: the Kronecker product of each column of a with that of b.
    """
    return (a.unsqueeze(-2) * b.unsqueeze(-3)).flatten(-3, -2)


def exact_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float, causal: bool, key_mask: Tensor | None
) -> Tensor:
    """Softmax over all tuples; time ``n^k d``, memory of a chunk, and for gradients of what each chunk sums to.

    The backward pass computes the scores of one chunk after another again, which costs as much as the forward pass.
    Shapes are those of :func:`~gossamer.attention.kronecker_attention.tensor_attention`.
    """
    parts = _chunks(q, keys)
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, *keys, *values))

    def summed(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _summed(q, keys, values, scale, causal, key_mask, part)

    total, norm, highest = None, None, None
    for part in parts:
        again = trained and len(parts) > 1
        found = checkpoint(summed, part, use_reentrant=False, preserve_rng_state=False) if again else summed(part)
        mixed, sums, peak = found
        if total is None or norm is None or highest is None:
            total, norm, highest = mixed, sums, peak
            continue
        new = torch.maximum(highest, peak)
        base = _finite(new)
        before, now = torch.exp(highest - base), torch.exp(peak - base)
        total = total * before.unsqueeze(-1) + mixed * now.unsqueeze(-1)
        norm, highest = norm * before + sums * now, new
    assert total is not None
    assert norm is not None
    # a query that sees nothing has a norm of 0, and the gradient of 0 / 0 is not a number
    return total / torch.where(norm > 0, norm, torch.ones_like(norm)).unsqueeze(-1)


def _summed(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    causal: bool,
    key_mask: Tensor | None,
    part: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some tuples: weighted values ``(…, queries, e)``, sums of weights, and the peak that both are relative to."""
    scores = _scores(q, keys, scale, causal, key_mask, part)
    outer = _product(values, _digits(part, keys))
    peak = scores.detach().amax((-1, -2))
    weights = torch.exp(scores - _finite(peak)[..., None, None])
    mixed = (weights @ values[-1].unsqueeze(-3)).mul(outer.unsqueeze(-3)).sum(-2)
    return mixed, weights.sum((-1, -2)), peak


def _finite(peak: Tensor) -> Tensor:
    """What may be subtracted: a query that has seen nothing but −∞ so far has no peak."""
    return peak.masked_fill(peak == -math.inf, 0)


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
    best, places = _best(q, keys, scale, causal, key_mask, count)
    n = keys[-1].shape[-2]
    scores = (q.unsqueeze(-2) * _tuples(keys, places, n)).sum(-1) * scale
    seen = best > -math.inf
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
    return (weights.unsqueeze(-1) * _tuples(values, places, n)).sum(-2)


@torch.no_grad()
def _best(
    q: Tensor, keys: Sequence[Tensor], scale: float, causal: bool, key_mask: Tensor | None, count: int
) -> tuple[Tensor, Tensor]:
    """The highest scores of each query and the numbers of their tuples, ``(…, queries, count)``."""
    best: Tensor | None = None
    places: Tensor | None = None
    n = keys[-1].shape[-2]
    for part in _chunks(q, keys):
        flat = _scores(q, keys, scale, causal, key_mask, part).flatten(-2)
        first = int(part[0]) * n
        numbers = torch.arange(first, first + flat.shape[-1], device=q.device).expand_as(flat)
        if best is not None and places is not None:
            flat, numbers = torch.cat([best, flat], -1), torch.cat([places, numbers], -1)
        best, chosen = flat.topk(min(count, flat.shape[-1]), -1)
        places = numbers.gather(-1, chosen)
    assert best is not None
    assert places is not None
    return best, places


def _tuples(tables: Sequence[Tensor], places: Tensor, n: int) -> Tensor:
    """Products of the rows of tuples by number, ``(…, queries, count)`` → ``(…, queries, count, width)``."""
    product = torch.ones((), dtype=tables[-1].dtype, device=places.device)
    for table in reversed(tables):
        product = product * _rows(table, places % n)
        places = places // n
    return product


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """``(…, n, e)`` at places ``(…, q, c)`` → ``(…, q, c, e)``."""
    flat = places.flatten(-2)
    found = table.gather(-2, flat.unsqueeze(-1).expand(*flat.shape, table.shape[-1]))
    return found.view(*places.shape, -1)


def _chunks(q: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Numbers of tuples without their last member, so many at once as memory allows."""
    n = keys[-1].shape[-2]
    step = max(1, _CHUNK // max(1, q[..., 0].numel() * n))
    return torch.arange(n ** (len(keys) - 1), device=q.device).split(step)


def _digits(part: Tensor, keys: Sequence[Tensor]) -> list[Tensor]:
    """Members of tuples by number, but for the last."""
    n = keys[-1].shape[-2]
    return [part // n**power % n for power in reversed(range(len(keys) - 1))]


def _scores(
    q: Tensor, keys: Sequence[Tensor], scale: float, causal: bool, key_mask: Tensor | None, part: Tensor
) -> Tensor:
    """Scores ``(…, queries, tuples, n)`` of tuples without their last member, with every last member."""
    digits = _digits(part, keys)
    key = _product(keys, digits)
    scores = ((q.unsqueeze(-2) * key.unsqueeze(-3)) @ keys[-1].unsqueeze(-3).transpose(-1, -2)) * scale
    if causal:
        token = torch.arange(keys[-1].shape[-2], device=q.device)
        latest = torch.stack([*digits, torch.zeros_like(part)]).amax(0)
        seen = torch.maximum(latest.unsqueeze(1), token) <= token[: q.shape[-2], None, None]
        scores = scores.masked_fill(~seen, -math.inf)
    if key_mask is not None:
        members = [key_mask[:, digit] for digit in digits] or [key_mask.new_ones(len(key_mask), 1)]
        real = torch.stack(members).all(0).unsqueeze(-1) & key_mask.unsqueeze(-2)
        scores = scores.masked_fill(~real[:, None, None], -math.inf)
    return scores


def _product(tables: Sequence[Tensor], digits: Sequence[Tensor]) -> Tensor:
    """Rows of all tables but the last, multiplied: ``(…, tuples, d)``; a row of ones if there is only the last."""
    found = torch.ones_like(tables[-1][..., :1, :])
    for table, digit in zip(tables, digits):
        found = found * table[..., digit, :]
    return found

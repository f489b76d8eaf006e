"""Exact selection: drop precisely k of n scores, ties broken by position.

A threshold test (``score <= t``) removes every weight on the plateau at ``t``. Weights that come from a quantised
checkpoint lie on a coarse grid, so plateaus are everywhere and the achieved sparsity drifts by several percent.
Everything in gossamer that ranks scores therefore goes through this module, which behaves as a *stable ascending
sort* of which the first k are dropped, without sorting: one partial partition finds the k-th value, and only rows
whose plateau is cut in two pay for a cumulative count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import NonFiniteError, SparsityError, check_sparsity

Sparsity: TypeAlias = float | Fraction
"""A fraction of zeros in [0, 1). A :class:`~fractions.Fraction` states an exact count: ``Fraction(k, n)``."""

_CHUNK = 1 << 20  # elements handled at once: temporaries stay in the cache and small
_compiled: Callable[[Tensor, int], Tensor | None] | None = None
_COMPARED_AT_ONCE = 1 << 18  # fewer, longer calls: handing over the interpreter lock costs more than cache misses
_DIGIT_BITS = 16
_SAMPLED_PER_LAYER = 1 << 13


def dropped_count(size: int, sparsity: Sparsity) -> int:
    """Number of elements to drop from a group: floor(sparsity * size), in exact decimal arithmetic.

    ``0.29 * 100`` is 28.999… in binary floating point; a user who writes 0.29 of 100 means 29.
    """
    check_sparsity(sparsity)
    exact = sparsity if isinstance(sparsity, Fraction) else Fraction(repr(float(sparsity)))
    return int(exact * size)


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Return `scores` in a dtype that ranks exactly (float32 or float64).

    Infinity is allowed and protects (or condemns) an element; NaN cannot be ranked.

    Raises
    ------
    NonFiniteError
        If a score is NaN.
    """
    if scores.dtype not in (torch.float32, torch.float64):
        scores = scores.double() if scores.dtype in (torch.int32, torch.int64) else scores.float()
    # a sum is one fast pass; only if it is NaN (also from +inf − inf) is a second look needed
    if torch.isnan(scores.sum()) and torch.isnan(scores).any():
        count = int(torch.isnan(scores).sum())
        raise NonFiniteError(f"{name}: {count} of {scores.numel()} scores are NaN; look for NaN in weights or data")
    return scores


def keep_highest(scores: Tensor, dropped: int, name: str = "scores") -> Tensor:
    """Mask of what remains of each row after its `dropped` lowest scores are removed.

    Parameters
    ----------
    scores
        ``(rows, n)``, any real dtype.
    dropped
        How many to drop from every row, ``0 <= dropped <= n``.
    name
        What the error message calls the scores.

    Returns
    -------
    Tensor
        ``(rows, n)`` bool, True where kept; exactly ``n - dropped`` in each row. Among equal scores the one with
        the lower index goes first, as in ``argsort(stable=True)[:, :dropped]``.
    """
    rows, n = scores.shape
    if not 0 <= dropped <= n:
        raise SparsityError(f"{name}: cannot drop {dropped} of {n} elements")
    if torch.compiler.is_compiling():  # a graph cannot look at numbers; NaN sorts last, and is kept and seen
        lowest = scores.argsort(dim=1, stable=True)[:, :dropped]
        return torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)
    scores = check_scores(scores, name)
    if dropped == 0 or rows == 0:
        return torch.ones(rows, n, dtype=torch.bool, device=scores.device)
    if dropped == n:
        return torch.zeros(rows, n, dtype=torch.bool, device=scores.device)
    found = _compiled(scores, dropped) if _compiled is not None else None
    if found is not None:
        return found
    keep = torch.empty(rows, n, dtype=torch.bool, device=scores.device)
    step = max(1, _CHUNK // n)
    for start in range(0, rows, step):
        part = scores[start : start + step]
        threshold = _kth_lowest(part, dropped)
        _resolve_ties(part, threshold, dropped, out=keep[start : start + step])
    return keep


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """The k-th lowest score of each row, ``(rows, 1)``."""
    if scores.device.type != "cpu":
        return torch.kthvalue(scores, k, dim=1, keepdim=True).values
    partitioned = np.partition(scores.detach().numpy(), k - 1, axis=1)
    return torch.from_numpy(partitioned[:, k - 1 : k].copy())


def _resolve_ties(scores: Tensor, threshold: Tensor, dropped: int, out: Tensor) -> None:
    torch.gt(scores, threshold, out=out)
    surplus = scores.shape[1] - dropped - out.sum(dim=1)  # how many of the plateau each row keeps
    cut = surplus > 0
    if not cut.any():
        return
    tied = scores[cut] == threshold[cut]
    order = tied.cumsum(dim=1)
    first_kept = order[:, -1:] - surplus[cut].unsqueeze(1)
    out[cut] |= tied & (order > first_kept)


def use_compiled(function: Callable[[Tensor, int], Tensor | None]) -> None:
    """Let :func:`keep_highest` and :func:`keep_by_comparing` ask compiled code first.

    None from it means that it has nothing for such rows.
    """
    global _compiled
    _compiled = function


def keep_by_comparing(scores: Tensor, dropped: int) -> Tensor:
    """What :func:`keep_highest` returns, for many short rows, by counting for each element how many it beats.

    All comparisons at one distance are made at once on shifted views of the flat scores; those that cross a row are
    masked out. No sort, no index tensor and no transposition, and everything stays in the cache.

    Parameters
    ----------
    scores
        ``(rows, m)``, contiguous, without NaN, m at most 255.
    dropped
        How many to drop from every row.
    """
    rows, m = scores.shape
    found = _compiled(scores, dropped) if _compiled is not None else None
    if found is not None:
        return found
    if scores.device.type != "cpu":
        beaten = (scores.unsqueeze(2) >= scores.unsqueeze(1)).tril(-1).sum(2)  # earlier ones, also on a tie
        beaten += (scores.unsqueeze(2) > scores.unsqueeze(1)).triu(1).sum(2)
        return beaten >= dropped
    keep = torch.empty(rows, m, dtype=torch.bool)
    flat, out = scores.detach().reshape(-1).numpy(), keep.view(-1).numpy()
    step = max(1, _COMPARED_AT_ONCE // m) * m
    step = min(step, len(flat)) or m
    starts = range(0, len(flat), step)
    position = np.tile(np.arange(m, dtype=np.uint8), step // m)
    within = [(position < m - distance).view(np.uint8) for distance in range(m)]

    def count_beaten(share: range) -> None:
        beaten, later = np.empty(step, np.uint8), np.empty(step, np.uint8)
        for start in share:
            part = flat[start : start + step]
            size = len(part)
            np.subtract(m - 1, position[:size], out=beaten[:size])  # as if each beat all the later ones of its row
            for distance in range(1, m):
                wins = later[: size - distance]  # of the later element of each pair, also on a tie
                np.greater_equal(part[distance:], part[:-distance], out=wins.view(bool))
                wins &= within[distance][: size - distance]
                beaten[distance:size] += wins
                beaten[: size - distance] -= wins
            np.greater_equal(beaten[:size], dropped, out=out[start : start + size])

    workers = min(torch.get_num_threads(), max(1, len(starts) // 8))
    if workers == 1:
        count_beaten(starts)
        return keep
    with ThreadPoolExecutor(workers) as pool:  # numpy lets go of the interpreter lock
        list(pool.map(count_beaten, (starts[worker::workers] for worker in range(workers))))
    return keep


def keep_one(scores: Tensor) -> Tensor:
    """What :func:`keep_highest` returns where all but one are dropped: a comparison with the highest of each row.

    Parameters
    ----------
    scores
        ``(rows, m)``, without NaN.
    """
    keep = scores == scores.amax(dim=1, keepdim=True)
    if int(torch.count_nonzero(keep)) > len(scores):
        tied = keep.sum(1) > 1
        keep[tied] &= keep[tied].flip(1).cumsum(1).flip(1) == 1
    return keep


def keep_highest_jointly(scores: Mapping[str, Tensor], dropped: int) -> dict[str, Tensor]:
    """Drop the `dropped` lowest scores of many tensors together, without concatenating them.

    A sample of the scores brackets the threshold; one pass counts what lies below the bracket and collects what lies
    within, where the threshold is then found exactly (Floyd and Rivest 1975, "Expected time bounds for selection").
    If the bracket misses, or plateaus crowd it, a radix search over the bit patterns takes over. Extra memory is
    about a hundredth of the scores and a chunk.

    Parameters
    ----------
    scores
        Name → scores of any shape; all of one floating dtype. The mapping may compute its values on access: they are
        asked for once per pass, and never held together.
    dropped
        How many elements to drop in total.

    Returns
    -------
    dict of str to Tensor
        Masks of the same shapes, True where kept. Ties go by the order of the mapping, then by flat index.

    Raises
    ------
    SparsityError
        If `dropped` is negative or more than there are, or the scores differ in precision.
    NonFiniteError
        If a score is NaN.
    """
    names = list(scores)
    sample = _sample(scores, names)
    total = round(float(sample[1].sum()))
    if not 0 <= dropped <= total:
        raise SparsityError(f"cannot drop {dropped} of {total} elements")
    if dropped == 0:
        return {name: torch.ones(scores[name].shape, dtype=torch.bool) for name in names}
    found = _bracketed_search(scores, names, sample, total, dropped)
    threshold, ties_to_drop = found or _radix_search(scores, names, sample[0].dtype, dropped)
    masks = {}
    for name in names:
        values = check_scores(scores[name], name)
        mask, used = _keep_above(values.detach().flatten(), threshold, ties_to_drop)
        ties_to_drop -= used
        masks[name] = mask.view(values.shape)
    return masks


def _sample(scores: Mapping[str, Tensor], names: list[str]) -> tuple[Tensor, Tensor]:
    """Evenly spaced samples of each layer, sorted together, and how many scores each stands for."""
    values, weights = [torch.empty(0)], [torch.empty(0)]
    for name in names:
        layer = check_scores(scores[name], name).detach().flatten()
        # an odd step does not keep pace with the powers of two that shape layers
        picked = layer[:: max(1, len(layer) // _SAMPLED_PER_LAYER) | 1].cpu()
        values.append(picked)
        weights.append(torch.full((len(picked),), len(layer) / max(1, len(picked)), dtype=torch.float64))
    if len({part.dtype for part in values[1:]}) > 1:
        raise SparsityError("scores of different precision cannot share one threshold; convert them to one dtype")
    ordered, order = torch.cat(values).sort()
    return ordered, torch.cat(weights)[order]


def _bracketed_search(
    scores: Mapping[str, Tensor], names: list[str], sample: tuple[Tensor, Tensor], total: int, dropped: int
) -> tuple[float, int] | None:
    """The `dropped`-th lowest score and how many of the elements equal to it go; None if the bracket fails."""
    values, weights = sample
    rank = weights.cumsum(0)
    # six standard deviations of the rank of a score, were the sample random
    margin = 3 * float(weights.square().sum().sqrt()) + float(weights.max())
    low = float(values[torch.searchsorted(rank, dropped - margin)]) if dropped > margin else -torch.inf
    high = float(values[torch.searchsorted(rank, dropped + margin)]) if dropped + margin < total else torch.inf
    below, within, collected, room = 0, 0, [], max(_CHUNK, total // 8)
    for part in _chunks(scores, names):
        not_below = part >= low
        below += len(part) - int(torch.count_nonzero(not_below))
        inside = part[not_below.logical_and_(part <= high)]
        within += len(inside)
        if low < high:
            if within > room:
                return None
            collected.append(inside)
    if not below < dropped <= below + within:
        return None
    if low == high:
        return low, dropped - below
    candidates = torch.cat(collected)
    threshold = float(_kth_lowest(candidates[None], dropped - below))
    return threshold, dropped - below - int(torch.count_nonzero(candidates < threshold))


def _chunks(scores: Mapping[str, Tensor], names: list[str]) -> Iterator[Tensor]:
    for name in names:
        yield from check_scores(scores[name], name).detach().flatten().split(_CHUNK)


def _radix_search(
    scores: Mapping[str, Tensor], names: list[str], dtype: torch.dtype, dropped: int
) -> tuple[float, int]:
    """What :func:`_bracketed_search` looks for, by counting one 16-bit digit of the bit patterns in each pass."""
    base = 1 << _DIGIT_BITS
    digits = dtype.itemsize * 8 // _DIGIT_BITS
    prefix = 0
    remaining = dropped
    for position in range(digits):
        shift = _DIGIT_BITS * (digits - 1 - position)
        # the top digit carries the sign: move it to 0 … 2¹⁶−1
        offset = base // 2 if position == 0 else 0
        histogram = torch.zeros(base, dtype=torch.int64)
        for part in _chunks(scores, names):
            keys = _ordered_keys(part)
            if position:
                keys = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
            digit = (keys >> shift) + offset if position == 0 else (keys >> shift) & (base - 1)
            histogram += torch.bincount(digit, minlength=base).cpu()
        cumulative = histogram.cumsum(0)
        chosen = int(torch.searchsorted(cumulative, remaining))
        remaining -= int(cumulative[chosen - 1]) if chosen else 0
        prefix = prefix * base + chosen - offset
    key = torch.tensor([prefix], dtype=torch.int32 if digits == 2 else torch.int64)
    return float(_flip_negatives(key).view(dtype)), remaining


def _ordered_keys(scores: Tensor) -> Tensor:
    """Integers in the order of the floats; −0 counts as +0."""
    bits = (scores + 0.0).contiguous().view(torch.int32 if scores.dtype == torch.float32 else torch.int64)
    return _flip_negatives(bits)


def _flip_negatives(bits: Tensor) -> Tensor:
    """Flip the magnitude bits of negatives, which turns the order of bit patterns into that of floats, and back."""
    return bits ^ ((bits >> (bits.element_size() * 8 - 1)) & torch.iinfo(bits.dtype).max)


def _keep_above(scores: Tensor, threshold: float, ties_to_drop: int) -> tuple[Tensor, int]:
    keep = scores > threshold
    tied = (scores == threshold).nonzero().flatten()
    used = min(ties_to_drop, len(tied))
    keep[tied[used:]] = True
    return keep, used

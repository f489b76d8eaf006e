"""Tensors as groups of m along one dimension: counting, filling up, and finding the pattern they follow."""

from __future__ import annotations

from collections.abc import Iterator
from math import comb, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core.patterns import NM
from gossamer.errors import PatternError
from gossamer.storage.combinations import MAX_CHOICES, code_width, packed_length

Array = NDArray[Any]

#: groups beyond this would need large tables of choices, and no pattern in use has them
MAX_GROUP = 256
#: group sizes that are tried when a pattern has to be found
_TRIED_SIZES = (*range(2, 17), 32, 64)
_SAMPLE = 8192


class Groups:
    """How a shape falls into groups of m along one dimension.

    The dimension is moved last, its end is padded with zeros to a multiple of m, and the whole is read in C
    order: group after group.

    Parameters
    ----------
    shape
        Of the dense tensor.
    pattern
        Group size and dimension.

    Raises
    ------
    PatternError
        If the dimension does not exist, or a code of the pattern would need more than 16 bits.
    """

    def __init__(self, shape: tuple[int, ...], pattern: NM):
        n, m, dim = pattern.n, pattern.m, pattern.dim
        if dim >= len(shape):
            raise PatternError(
                f"{pattern} groups dimension {dim}, which a tensor of shape {tuple(shape)} does not have"
            )
        if m > MAX_GROUP or comb(m, n) > MAX_CHOICES:
            raise PatternError(
                f"{pattern} cannot be coded: groups of at most {MAX_GROUP} with at most {MAX_CHOICES} choices can; "
                f"use kind 'bitmask'"
            )
        self.pattern = pattern
        self.length = shape[dim]
        self.others = tuple(shape[:dim]) + tuple(shape[dim + 1 :])
        self.padding = -self.length % m
        self.per_line = (self.length + self.padding) // m
        self.count = prod(self.others) * self.per_line

    def arrange(self, array: Array) -> Array:
        """``(groups, m)``, padded; a view where that is possible."""
        moved = np.moveaxis(array, self.pattern.dim, -1)
        if self.padding:
            moved = np.pad(moved, [(0, 0)] * len(self.others) + [(0, self.padding)])
        return np.ascontiguousarray(moved).reshape(self.count, self.pattern.m)

    def restore(self, words: Array) -> Tensor:
        """Inverse of :meth:`arrange`, as a contiguous tensor."""
        moved = words.reshape(*self.others, self.per_line * self.pattern.m)[..., : self.length]
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(moved, -1, self.pattern.dim)))

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes."""
        return packed_length(self.count, code_width(self.pattern.n, self.pattern.m))

    def nbytes(self, itemsize: int) -> int:
        """Bytes of values and codes."""
        return self.count * self.pattern.n * itemsize + self.code_bytes


def largest_count(kept: Array) -> int:
    """Most non-zeros in any group of bool ``(groups, m)``."""
    return int(_counts(kept).max(initial=0))


def fill_up(kept: Array, n: int) -> Array:
    """Where a group keeps fewer than `n`, keep its lowest free positions too; a copy where any does."""
    missing = n - _counts(kept)
    (short,) = np.nonzero(missing)
    if not short.size:
        return kept
    groups, wanted = kept[short], missing[short]
    for position in range(kept.shape[1]):
        added = ~groups[:, position] & (wanted > 0)
        groups[:, position] |= added
        wanted -= added
    kept = kept.copy()
    kept[short] = groups
    return kept


def find_pattern(mask: Array, itemsize: int, below: int | None = None) -> NM | None:
    """The N:M pattern that stores a mask's tensor in the fewest bytes.

    Parameters
    ----------
    mask
        Bool, any shape: where the tensor is not zero.
    itemsize
        Bytes of one value.
    below
        Only patterns that need fewer bytes than this; ``None``: any.

    Returns
    -------
    NM or None
        ``None`` if no pattern that can be coded is small enough.
    """
    best, limit = None, below
    for dim, m in _candidates(mask.shape):
        # a sample bounds n, and so the size, from below: nearly all candidates end there, without a full count
        for part in (_sample(mask, dim), mask):
            found = _tightest(part, m, dim)
            size = None if found is None else Groups(mask.shape, found).nbytes(itemsize)
            if size is None or (limit is not None and size >= limit):
                break
        else:
            best, limit = found, size
    return best


def _tightest(mask: Array, m: int, dim: int) -> NM | None:
    """The smallest n such that the mask follows n:m, if it can be coded."""
    n = max(1, largest_count(Groups(mask.shape, NM(1, m, dim)).arrange(mask)))
    return NM(n, m, dim) if comb(m, n) <= MAX_CHOICES else None


def _candidates(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Pairs of dimension and group size, the usual input dimension first."""
    if 0 in shape:
        return
    for dim in sorted(range(len(shape)), key=lambda dim: dim != 1):
        yield from ((dim, m) for m in _TRIED_SIZES if m <= shape[dim])


def _sample(mask: Array, dim: int) -> Array:
    """Some whole lines along `dim`, about 8192 elements, spread over the largest other dimension."""
    others = [axis for axis in range(mask.ndim) if axis != dim]
    axis = max(others, key=lambda axis: mask.shape[axis], default=None)
    if axis is None or mask.size <= _SAMPLE:
        return mask
    step = max(1, min(mask.shape[axis], mask.size // _SAMPLE))
    return mask[(slice(None),) * axis + (slice(None, None, step),)]


def _counts(kept: Array) -> Array:
    """Non-zeros of every group, int16 ``(groups,)``."""
    # adding columns is several times faster than a reduction along an axis this short
    counts = np.zeros(len(kept), np.int16)
    for column in range(kept.shape[1]):
        counts += kept[:, column]
    return counts

"""Which n of m positions are kept, as one small number.

A group that keeps the positions p₁ < p₂ < … < pₙ has the rank C(p₁, 1) + C(p₂, 2) + … + C(pₙ, n) in the
combinatorial number system, a bijection between the C(m, n) choices and 0 … C(m, n) − 1. Ranks of a fixed
width are then laid one after the other into bytes, least significant bit first.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_CHOICES = 65536
Array = NDArray[Any]


def code_width(n: int, m: int) -> int:
    """Bits of one code: ⌈log₂ C(m, n)⌉."""
    return (comb(m, n) - 1).bit_length()


def rank_groups(mask: Array, n: int) -> Array:
    """Rank of the kept positions of every group.

    Parameters
    ----------
    mask
        Bool ``(groups, m)`` with exactly `n` True in every row.
    n
        Kept positions of a group, with C(m, n) ≤ 65536.

    Returns
    -------
    numpy.ndarray
        uint16 ``(groups,)``.
    """
    groups, m = mask.shape
    rank = np.zeros(groups, np.uint16)
    seen = np.zeros(groups, np.uint8)
    for position in range(m):
        kept = mask[:, position].view(np.uint8)
        # a kept position is the (seen + 1)-th and adds C(position, seen + 1); where nothing is kept the entry
        # is not used, so entries too large for a code may wrap
        row = np.array([comb(position, k + 1) & 0xFFFF for k in range(n + 1)], np.uint16)
        rank += row[seen] * kept
        seen += kept
    return rank


@lru_cache(maxsize=32)
def masks_by_rank(n: int, m: int) -> Array:
    """All choices of `n` of `m` positions in the order of their rank, bool ``(C(m, n), m)``."""
    table = np.zeros((comb(m, n), m), bool)
    for positions in itertools.combinations(range(m), n):
        table[sum(comb(p, k + 1) for k, p in enumerate(positions)), list(positions)] = True
    table.setflags(write=False)
    return table


def pack_codes(codes: Array, width: int) -> Array:
    """Lay codes of `width` bits into ⌈len·width/8⌉ bytes, least significant bit first."""
    octets = -(-codes.size // 8)
    padded = np.zeros((octets, 8), np.uint32)
    padded.reshape(-1)[: codes.size] = codes
    # eight codes of `width` bits fill exactly `width` bytes, so every row of eight is packed the same way
    packed = np.zeros((octets, width), np.uint8)
    for index, byte, shift in _overlaps(width):
        part = padded[:, index] << shift if shift >= 0 else padded[:, index] >> -shift
        packed[:, byte] |= (part & 0xFF).astype(np.uint8)
    return packed.reshape(-1)[: packed_length(codes.size, width)]


def unpack_codes(packed: Array, width: int, count: int) -> Array:
    """Read `count` codes of `width` bits, uint16 ``(count,)``; the inverse of :func:`pack_codes`."""
    octets = -(-count // 8)
    padded = np.zeros((octets, width), np.uint8)
    padded.reshape(-1)[: packed.size] = packed
    codes = np.zeros((octets, 8), np.uint32)
    for index, byte, shift in _overlaps(width):
        part = padded[:, byte].astype(np.uint32)
        codes[:, index] |= part >> shift if shift >= 0 else part << -shift
    codes &= (1 << width) - 1
    return codes.reshape(-1)[:count].astype(np.uint16)


def packed_length(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take."""
    return -(-count * width // 8)


def _overlaps(width: int) -> list[tuple[int, int, int]]:
    """``(code, byte, shift)`` for each byte that one of eight consecutive codes touches."""
    return [
        (index, byte, index * width - 8 * byte)
        for index in range(8)
        for byte in range(index * width // 8, -(-(index + 1) * width // 8))
    ]

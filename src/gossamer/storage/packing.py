"""One tensor, without its zeros.

Three encodings, all bit-exact in both directions:

===========  ==========================================================  ================================
kind         stored                                                      bits a weight (16-bit values)
===========  ==========================================================  ================================
``dense``    the tensor itself                                           16
``bitmask``  a bit per element, and the values of the kept ones          1 + 16·density
``nm``       n values of every m, and a small code per group of m        ⌈log₂ C(m,n)⌉/m + 16·n/m
===========  ==========================================================  ================================

An element is zero when **all its bits** are zero: −0.0 and every NaN are values and survive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb, prod
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core.masks import count_bits, pack_bits, unpack_bits
from gossamer.core.patterns import NM
from gossamer.errors import CheckpointError, ConfigurationError, PatternError
from gossamer.storage.combinations import code_width, masks_by_rank, pack_codes, rank_groups, unpack_codes
from gossamer.storage.groups import Groups, fill_up, find_pattern, largest_count

Array = NDArray[Any]
Kind = Literal["dense", "bitmask", "nm"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: what each kind stores
PARTS: dict[str, tuple[str, ...]] = {"dense": ("values",), "bitmask": ("bits", "values"), "nm": ("codes", "values")}

#: dtypes that can be stored, by their name in the index
DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "uint16": torch.uint16,
    "int16": torch.int16,
    "uint32": torch.uint32,
    "int32": torch.int32,
    "uint64": torch.uint64,
    "int64": torch.int64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class PackedTensor:
    """A tensor in one of the encodings.

    Parameters
    ----------
    kind
        ``"dense"``, ``"bitmask"`` or ``"nm"``.
    shape, dtype
        Of the dense tensor.
    nonzeros
        Elements that have a bit set.
    parts
        What is stored, on the CPU: ``values`` in the tensor's dtype (dense: in its shape; else flat), and
        ``bits`` (bitmask) or ``codes`` (nm), flat uint8.
    pattern
        Group of an ``nm`` tensor.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    nonzeros: int
    parts: Mapping[str, Tensor]
    pattern: NM | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def validate(self, name: str = "tensor") -> PackedTensor:
        """Check every count against every other; return self.

        Raises
        ------
        CheckpointError
            If lengths, popcounts, codes or the number of non-zeros contradict each other, so that decoding
            would read past an end or give another tensor than the one packed.
        """
        problem = _problem(self)
        if problem:
            raise CheckpointError(f"{name} ({self.kind}) is broken: {problem}; fetch or write the checkpoint again")
        return self

    def decode(self) -> Tensor:
        """The dense tensor, bit for bit, on the CPU.

        Raises
        ------
        CheckpointError
            If the parts contradict each other.
        """
        self.validate()
        values = self.parts["values"]
        if self.kind == "dense":
            # a copy: the values may lie in a file that is mapped into memory
            return values.clone()
        words = _words(values)
        if self.kind == "bitmask":
            mask = unpack_bits(self.parts["bits"], (prod(self.shape),)).numpy()
            dense = torch.from_numpy(_expand(mask, words))
        else:
            groups, ranks = _groups_of(self)
            chosen = masks_by_rank(groups.pattern.n, groups.pattern.m)
            dense = groups.restore(_expand(chosen[ranks].reshape(-1), words))
        return dense.view(self.dtype).reshape(self.shape)


def encode(tensor: Tensor, kind: Kind | None = None, pattern: NM | None = None) -> PackedTensor:
    """Pack a tensor; :meth:`PackedTensor.decode` gives it back bit for bit.

    Parameters
    ----------
    tensor
        Any shape, any dtype of :data:`DTYPES`, any device. Not changed.
    kind
        ``None`` takes the encoding with the fewest bytes, dense when none is smaller.
    pattern
        The N:M pattern of kind ``"nm"``, along any dimension; a last group shorter than m is allowed. ``None``
        finds the one with the fewest bytes.

    Raises
    ------
    ConfigurationError
        If the dtype or kind is unknown, or `pattern` is given with another kind.
    PatternError
        If the tensor does not follow the N:M pattern, or a code of it would need more than 16 bits.

    Examples
    --------
    >>> packed = encode(torch.tensor([0.0, 1.5, 0.0, 0.0, 2.5, 0.0, 0.0, 0.0]), kind="bitmask")
    >>> packed.parts["bits"].tolist(), packed.parts["values"].tolist()
    ([18], [1.5, 2.5])
    """
    tensor = _plain(tensor)
    if kind is not None and kind not in KINDS:
        raise ConfigurationError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}, or None for the smallest")
    if pattern is not None and kind != "nm":
        raise ConfigurationError(f"pattern {pattern} is given with kind {kind!r}; it belongs to kind 'nm'")
    words = _words(tensor)
    # without dimensions, numpy would compare to a bare bool
    mask, itemsize = np.asarray(words != 0), tensor.dtype.itemsize
    nonzeros = int(np.count_nonzero(mask))
    if kind is None:
        kind, pattern = _smallest(mask, nonzeros, itemsize)
    elif kind == "nm" and pattern is None:
        pattern = find_pattern(mask, itemsize)
    parts: dict[str, Tensor]
    if kind == "dense":
        # a copy, so that a packed tensor never changes with the weight it was made from
        parts = {"values": tensor.clone()}
    elif kind == "bitmask":
        values = torch.from_numpy(_compress(mask.reshape(-1), words.reshape(-1)))
        parts = {"bits": pack_bits(torch.from_numpy(mask)), "values": values.view(tensor.dtype)}
    else:
        codes, values = _encode_groups(mask, words, pattern)
        parts = {"codes": codes, "values": values.view(tensor.dtype)}
    return PackedTensor(kind, tuple(tensor.shape), tensor.dtype, nonzeros, parts, pattern)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in the index, such as ``"bfloat16"``.

    Raises
    ------
    ConfigurationError
        If tensors of this dtype cannot be stored.
    """
    if dtype not in _DTYPE_NAMES:
        raise ConfigurationError(f"dtype {dtype} cannot be stored; convert to one of {', '.join(DTYPES)}")
    return _DTYPE_NAMES[dtype]


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, on the CPU, without gradient or a conjugation that is only noted."""
    dtype_name(tensor.dtype)
    if tensor.layout != torch.strided or tensor.is_meta:
        what = "on the meta device" if tensor.is_meta else f"laid out as {tensor.layout}"
        raise ConfigurationError(f"a tensor {what} has no values to store; materialise it as a dense tensor first")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


# ------------------------------------------------------------------------------------------- kept values
def _compress(mask: Array, words: Array) -> Array:
    """Words at the True places of a flat mask, in order; in pieces, so that indices stay in the cache."""
    pieces = [
        words[start : start + _CHUNK][np.flatnonzero(mask[start : start + _CHUNK])]
        for start in range(0, mask.size, _CHUNK)
    ]
    return np.concatenate(pieces) if pieces else words[:0].copy()


def _expand(mask: Array, values: Array) -> Array:
    """Inverse of :func:`_compress`: values at the True places, zero elsewhere."""
    words = np.zeros(mask.size, values.dtype)
    taken = 0
    for start in range(0, mask.size, _CHUNK):
        places = np.flatnonzero(mask[start : start + _CHUNK])
        words[start : start + _CHUNK][places] = values[taken : taken + places.size]
        taken += places.size
    return words


def _encode_groups(mask: Array, words: Array, pattern: NM | None) -> tuple[Tensor, Tensor]:
    """Codes and values of the groups of a pattern."""
    if pattern is None:
        raise PatternError(f"a tensor of shape {mask.shape} follows no N:M pattern that can be coded; use 'bitmask'")
    groups = Groups(mask.shape, pattern)
    kept = groups.arrange(mask)
    if (most := largest_count(kept)) > pattern.n:
        raise PatternError(
            f"the tensor has {most} non-zeros in a group of {pattern.m} along dimension {pattern.dim}, more than "
            f"{pattern} allows; apply the pattern first or use kind 'bitmask'"
        )
    kept = fill_up(kept, pattern.n)
    values = _compress(kept.reshape(-1), groups.arrange(words).reshape(-1))
    codes = pack_codes(rank_groups(kept, pattern.n), code_width(pattern.n, pattern.m))
    return torch.from_numpy(codes), torch.from_numpy(values)


def _smallest(mask: Array, nonzeros: int, itemsize: int) -> tuple[Kind, NM | None]:
    dense, bitmask = mask.size * itemsize, -(-mask.size // 8) + nonzeros * itemsize
    pattern = find_pattern(mask, itemsize, below=min(dense, bitmask))
    if pattern is not None:
        return "nm", pattern
    return ("bitmask" if bitmask < dense else "dense"), None


def _words(tensor: Tensor) -> Array:
    """The bit patterns of a contiguous tensor, as integers of the same width."""
    return tensor.contiguous().view(_WORDS[tensor.dtype.itemsize]).numpy()


# ------------------------------------------------------------------------------------------- validation
def _groups_of(packed: PackedTensor) -> tuple[Groups, Array]:
    """Layout and the rank of every group."""
    if packed.pattern is None:
        raise CheckpointError("an nm tensor has no pattern; fetch or write the checkpoint again")
    groups = Groups(packed.shape, packed.pattern)
    width = code_width(packed.pattern.n, packed.pattern.m)
    return groups, unpack_codes(packed.parts["codes"].numpy(), width, groups.count)


def _problem(packed: PackedTensor) -> str | None:
    """What contradicts what in a packed tensor, or None."""
    expected = PARTS.get(packed.kind)
    if expected is None:
        return f"unknown kind {packed.kind!r}, known are {', '.join(KINDS)}"
    if sorted(packed.parts) != sorted(expected):
        return f"it has the parts {sorted(packed.parts)} instead of {sorted(expected)}"
    values = packed.parts["values"]
    if values.dtype != packed.dtype:
        return f"its values are {values.dtype} and not {packed.dtype}"
    if packed.kind != "dense":
        side = packed.parts["bits" if packed.kind == "bitmask" else "codes"]
        if side.dtype != torch.uint8 or side.ndim != 1 or values.ndim != 1:
            return "its masks or codes are not flat bytes, or its values not a flat list"
    check = {"dense": _dense_problem, "bitmask": _bitmask_problem, "nm": _nm_problem}[packed.kind]
    problem = check(packed, values)
    if problem is None:
        stored = int(np.count_nonzero(_words(values)))
        if stored != packed.nonzeros:
            problem = f"it says {packed.nonzeros} non-zeros and stores {stored}"
    return problem


def _dense_problem(packed: PackedTensor, values: Tensor) -> str | None:
    if tuple(values.shape) != packed.shape:
        return f"shape {tuple(values.shape)} is stored instead of {packed.shape}"
    return None


def _bitmask_problem(packed: PackedTensor, values: Tensor) -> str | None:
    bits, count = packed.parts["bits"], prod(packed.shape)
    if bits.numel() != -(-count // 8):
        return f"{bits.numel()} mask bytes for {count} elements instead of {-(-count // 8)}"
    if count % 8 and int(bits[-1]) >> (count % 8):
        return "mask bits beyond the last element are set"
    if count_bits(bits) != values.numel():
        return f"the mask keeps {count_bits(bits)} elements and {values.numel()} values are stored"
    return None


def _nm_problem(packed: PackedTensor, values: Tensor) -> str | None:
    if packed.pattern is None:
        return "it has no pattern"
    try:
        groups = Groups(packed.shape, packed.pattern)
    except PatternError as error:
        return str(error)
    n, m = packed.pattern.n, packed.pattern.m
    codes, used = packed.parts["codes"], groups.count * code_width(n, m) % 8
    if codes.numel() != groups.code_bytes:
        return f"{codes.numel()} code bytes for {groups.count} groups instead of {groups.code_bytes}"
    if values.numel() != groups.count * n:
        return f"{values.numel()} values for {groups.count} groups instead of {groups.count * n}"
    if used and int(codes[-1]) >> used:
        return "code bits beyond the last group are set"
    _, ranks = _groups_of(packed)
    if ranks.size and int(ranks.max()) >= comb(m, n):
        return f"code {int(ranks.max())} is out of range, {packed.pattern} has {comb(m, n)}"
    if groups.padding and _reaches_padding(groups, ranks, _words(values)):
        return "a value lies beyond the end of its dimension"
    return None


def _reaches_padding(groups: Groups, ranks: Array, words: Array) -> bool:
    """Whether a value other than zero lies in the padding, where decoding would lose it."""
    n, m = groups.pattern.n, groups.pattern.m
    last = slice(groups.per_line - 1, None, groups.per_line)
    positions = np.nonzero(masks_by_rank(n, m)[ranks[last]])[1].reshape(-1, n)
    return bool(np.any(words.reshape(groups.count, n)[last][positions >= m - groups.padding]))

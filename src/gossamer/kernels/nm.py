"""Matrices that keep N of every M adjacent weights of a row, as N:M sparsity leaves them.

How many weights a row keeps is known, so that nothing has to be counted, and a place within M columns takes log₂ M
bits: at 2:4 in bfloat16 a weight takes 9 bits instead of 16, at 1:16 1.25. Sixteen rows lie side by side. All of them
meet the same M inputs, which fit into a register or two, and each picks its own by one permutation. So a stored weight
costs the same at every M, and zeros cost nothing, however many vectors there are.

Mishra et al., 2021, arXiv 2104.08378, store 2:4 as values and indices of two bits in the same way; the arrangement by
panels of rows is our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.patterns import NM
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.matrix import Call, PackedMatrix, check_weight, quantize_steps
from gossamer.kernels.native import VALUE_CODES, native

FORMATS = ("float32", "bfloat16", "int8")
GROUPS = (2, 4, 8, 16, 32)
_PANEL = 16  # rows that lie side by side
_RUN = 64  # columns that share a scale come in multiples of this
_WORD = 32  # bits of a word
_LARGEST = 127
_WASTE = 0.1  # zeros that a pattern may hold, beside the weights that are not zero
_AT_ONCE = 1 << 22  # weights that are packed together


@dataclass(frozen=True, eq=False, repr=False)
class NMMatrix(PackedMatrix):
    """A matrix as N values of every M columns, and their places.

    Columns are filled up to a multiple of M, rows to a multiple of 16. A panel of 16 rows holds, for each run of
    columns that share a scale, N passes: the first kept weight of all groups of M, then the second, and so on.

    Attributes
    ----------
    shape
        ``(rows, columns)``.
    format
        What a value is: ``float32``, ``bfloat16`` or ``int8``.
    pattern
        ``(2,)`` int32: N and M, a power of two from 2 to 32.
    values
        ``(⌈rows / 16⌉, N · ⌈columns / M⌉, 16)``: kept weights. A group with fewer weights keeps zeros as well.
    places
        ``(⌈rows / 16⌉, words, 16)`` int32: ``⌊32 / log₂ M⌋`` places of adjacent groups to a word, the first in its
        lowest bits. The places of a group rise from pass to pass, and every pass begins with a word of its own.
    scales
        ``(⌈rows / 16⌉, ⌈columns / group⌉, 16)`` float32 for ``int8``: a weight is its value times its scale.
    group
        Columns that share a scale, a multiple of 64.
    """

    shape: tuple[int, int]
    format: str
    pattern: Tensor
    values: Tensor
    places: Tensor
    scales: Tensor | None = None
    group: int = 0

    #: never: up to 512 vectors, as many as were measured, nothing is gained by expanding rows for the dense unit
    many: ClassVar[int] = 1 << 30

    @classmethod
    def from_dense(
        cls, weight: Tensor, format: str | None = None, pattern: NM | None = None, group: int | None = None
    ) -> NMMatrix:
        """Pack a dense matrix.

        Parameters
        ----------
        weight
            ``(rows, columns)``, float32, bfloat16 or float16.
        format
            What values become; by default they stay what they are. ``int8`` rounds to the nearest of ±127 steps, the
            largest weight of a group of columns being the last step.
        pattern
            N:M along the input, M a power of two from 2 to 32; by default the one that stores the weight in the
            fewest bits. A last group shorter than M is allowed, and so are groups with fewer weights than N.
        group
            For ``int8``: columns that share a scale, a multiple of 64; by default a whole row.

        Raises
        ------
        ConfigurationError
            If shape, dtype, format or group do not fit, or a group keeps more than N weights.
        NonFiniteError
            If a weight is NaN or infinite and the format is ``int8``.
        """
        format = str(weight.dtype).removeprefix("torch.") if format is None else format
        check_weight(weight, format, FORMATS, whole=format == "int8")
        if group is not None and (format != "int8" or group < _RUN or group % _RUN):
            raise ConfigurationError(
                f"group is {group} for {format}; int8 takes a multiple of {_RUN}, the other formats none"
            )
        weight = weight.detach().cpu()
        pattern = _check_pattern(_smallest(weight, format) if pattern is None else pattern)
        rows, columns = weight.shape
        kept, scales, width = weight != 0, None, 0
        if format == "int8":
            width = max(1, -(-columns // _RUN)) * _RUN if group is None else group
            weight, scales = quantize_steps(weight.float(), _LARGEST, width)
            scales = _panels(scales)
        step, stored = _rows_at_once(columns), getattr(torch, format)
        parts = []
        for first in range(0, max(1, rows), step):
            values, places = _choose(weight[first : first + step], kept[first : first + step], pattern)
            parts.append(_arrange(values.to(stored), places, pattern.m, width))
        values, places = (torch.cat(pieces) for pieces in zip(*parts))
        return cls((rows, columns), format, _sizes(pattern), values, places, scales, width)

    @classmethod
    def from_groups(cls, values: Tensor, places: Tensor, m: int, columns: int) -> NMMatrix:
        """Pack what is kept group by group; the inverse of :meth:`groups`.

        Parameters
        ----------
        values
            ``(rows, ⌈columns / M⌉, N)``, float32 or bfloat16.
        places
            The same shape, any whole numbers: where the values belong within their groups, ascending.
        m
            Columns of a group, a power of two from 2 to 32.
        columns
            Of the matrix.

        Raises
        ------
        ConfigurationError
            If dtypes, shapes or places do not fit.
        """
        format = str(values.dtype).removeprefix("torch.")
        if format not in FORMATS[:2] or values.shape != places.shape or values.shape[1:2] != (-(-columns // m),):
            raise ConfigurationError(
                f"values are {tuple(values.shape)} {values.dtype}, places {tuple(places.shape)}; both must be "
                f"(rows, {-(-columns // m)}, N) for {columns} columns, and values float32 or bfloat16"
            )
        pattern = _check_pattern(NM(values.shape[2], m))
        parts = _arrange(values, places.to(torch.int32), m, 0)
        matrix = cls((len(values), columns), format, _sizes(pattern), *parts)
        problem = matrix._problem()
        if problem:
            raise ConfigurationError(f"these groups are no N:M matrix: {problem}")
        return matrix

    @property
    def n(self) -> int:
        """Weights that a group keeps."""
        return int(self.pattern[0])

    @property
    def m(self) -> int:
        """Columns of a group."""
        return int(self.pattern[1])

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"pattern": self.pattern, "values": self.values, "places": self.places}
        return found if self.scales is None else {**found, "scales": self.scales}

    def groups(self, first: int = 0, last: int | None = None) -> tuple[Tensor, Tensor]:
        """What is kept, group by group.

        Returns
        -------
        Tensor
            ``(last − first, ⌈columns / M⌉, N)`` in the dtype of the values: kept weights.
        Tensor
            The same shape, int64: their places within the group, ascending.
        """
        first, last = self.check_rows(first, last)
        panels = slice(first // _PANEL, -(-last // _PANEL))
        stored, words = self.values[panels], self.places[panels]
        within = slice(first - panels.start * _PANEL, last - panels.start * _PANEL)
        values, places = [], []
        value = word = 0
        for count in _runs(self.shape[1], self.m, self.group):
            steps, size = self.n * count, self.n * _words(count, self.m)
            values.append(stored[:, value : value + steps].unflatten(1, (self.n, count)))
            places.append(_unpack_places(words[:, word : word + size], self.n, self.m, count))
            value, word = value + steps, word + size
        empty = (len(stored), self.n, 0, _PANEL)
        found = torch.cat([stored.new_empty(empty), *values], 2), torch.cat([words.new_empty(empty), *places], 2)
        # panel, pass, group, lane → row, group, pass
        by_rows = [part.permute(0, 3, 2, 1).flatten(0, 1)[within] for part in found]
        return by_rows[0], by_rows[1].to(torch.int64)

    def mask(self) -> Tensor:
        """``(rows, columns)`` bool, True where a weight is stored, be it zero."""
        places = self.groups()[1]
        kept = torch.zeros(*places.shape[:2], self.m, dtype=torch.bool).scatter_(2, places, True)
        return kept.flatten(1)[:, : self.shape[1]]

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        problem = self._problem()
        if problem:
            raise CheckpointError(f"{name} ({self.format} N:M) is broken: {problem}; make or fetch it again")

    def _problem(self) -> str | None:
        rows, columns = self.shape
        if self.format not in FORMATS:
            return f"unknown format {self.format!r}, known are {', '.join(FORMATS)}"
        if self.pattern.shape != (2,) or self.pattern.dtype != torch.int32 or not self.pattern.is_contiguous():
            return f"its pattern is {tuple(self.pattern.shape)} {self.pattern.dtype} instead of (2,) int32"
        n, m = self.n, self.m
        if m not in GROUPS or not 1 <= n <= m:
            return f"its pattern is {n}:{m}; M must be one of {', '.join(map(str, GROUPS))} and N from 1 to M"
        if self.format == "int8" and (self.group < _RUN or self.group % _RUN):
            return f"its scales are for {self.group} columns, which is no multiple of {_RUN}"
        if self.format != "int8" and (self.scales is not None or self.group):
            return "it has scales, which its format does not"
        panels, runs = -(-rows // _PANEL), list(_runs(columns, m, self.group))
        expected = {
            "values": ((panels, n * sum(runs), _PANEL), getattr(torch, self.format)),
            "places": ((panels, n * sum(_words(count, m) for count in runs), _PANEL), torch.int32),
            "scales": ((panels, len(runs), _PANEL), torch.float32),
        }
        if self.format == "int8" and self.scales is None:
            return "its scales are missing"
        for part, (shape, dtype) in expected.items():
            tensor = self.tensors().get(part)
            if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous()):
                return f"its {part} are {tuple(tensor.shape)} {tensor.dtype} instead of {shape} {dtype}"
        if self.scales is not None and not bool(torch.isfinite(self.scales).all()):
            return "a scale is NaN or infinite"
        for first in range(0, rows, _rows_at_once(columns)):
            values, places = self.groups(first, min(first + _rows_at_once(columns), rows))
            if bool((places.diff(dim=2) <= 0).any()):
                return "the places of a group do not rise"
            if bool((values[:, -1:][places[:, -1:] >= m - -columns % m] != 0).any()):
                return "a value lies beyond the last column"
        return None

    def _matrix(self) -> tuple[int, ...]:
        return (
            *self.shape,
            self.pattern.data_ptr(),
            self.values.data_ptr(),
            VALUE_CODES[self.values.dtype],
            self.places.data_ptr(),
            0 if self.scales is None else self.scales.data_ptr(),
            self.group,
        )

    def _multiply(self, call: Call, threads: int) -> None:
        native().nm_linear(*self._matrix(), *call.arguments(threads))

    def _expand_into(self, tile: Tensor, first: int, last: int, threads: int) -> None:
        native().nm_expand(*self._matrix(), first, last, tile.data_ptr(), threads)

    def _reference(self, first: int, last: int) -> Tensor:
        """These rows, dense, with torch alone."""
        values, places = self.groups(first, last)
        dense = torch.zeros(*places.shape[:2], self.m).scatter_(2, places, values.float())
        tile = dense.flatten(1)[:, : self.shape[1]]
        if self.scales is None:
            return tile.contiguous()
        scales = self.scales.transpose(1, 2).flatten(0, 1)[first:last]
        return tile * scales.repeat_interleave(self.group, 1)[:, : self.shape[1]]


def find_pattern(weight: Tensor, format: str) -> NM | None:
    """Return the N:M along the input that a matrix follows, if it is one that can be stored and spares something.

    Parameters
    ----------
    weight
        ``(rows, columns)``.
    format
        What values shall be.

    Returns
    -------
    NM or None
        The pattern that takes the fewest bits; None if it would hold many more weights than are not zero (a tenth
        more at most), or all.
    """
    pattern = _smallest(weight, format)
    stored = len(weight) * pattern.n * -(-weight.shape[1] // pattern.m)
    few = (1 + _WASTE) * int(torch.count_nonzero(weight))
    return pattern if stored < weight.numel() and stored <= few else None


def _smallest(weight: Tensor, format: str) -> NM:
    """The pattern that stores a weight in the fewest bits."""
    counts = torch.nn.functional.pad((weight != 0).to(torch.int8), (0, -weight.shape[1] % GROUPS[-1]))
    found = []
    for m in GROUPS:  # counts of a group are those of its two halves
        counts = counts[:, 0::2] + counts[:, 1::2]
        n = max(1, int(counts.max())) if counts.numel() else 1
        bits = 8 * getattr(torch, format).itemsize + _WORD / (_WORD // _bits(m))
        found.append((bits * n * -(-weight.shape[1] // m), m, n))
    _, m, n = min(found)
    return NM(n, m)


def _check_pattern(pattern: NM) -> NM:
    if pattern.dim != 1 or pattern.m not in GROUPS:
        raise ConfigurationError(
            f"{pattern} cannot be packed; it must lie along the input, and M be one of {', '.join(map(str, GROUPS))}"
        )
    return pattern


def _rows_at_once(columns: int) -> int:
    return max(1, _AT_ONCE // max(1, columns) // _PANEL) * _PANEL


def _bits(m: int) -> int:
    """Bits of a place."""
    return (m - 1).bit_length()


def _words(count: int, m: int) -> int:
    """Words of the places of so many groups."""
    return -(-count // (_WORD // _bits(m)))


def _runs(columns: int, m: int, group: int) -> Iterator[int]:
    """How many groups each run of columns that share a scale has."""
    left, most = -(-columns // m), group // m
    while left:
        count = min(left, most) if most else left
        yield count
        left -= count


def _panels(rows: Tensor) -> Tensor:
    """``(rows, n, …)`` to ``(panels, n, …, 16)``, filled up with zeros."""
    missing = rows.new_zeros(-len(rows) % _PANEL, *rows.shape[1:])
    whole = torch.cat([rows, missing])
    return whole.view(len(whole) // _PANEL, _PANEL, *rows.shape[1:]).movedim(1, -1).contiguous()


def _sizes(pattern: NM) -> Tensor:
    return torch.tensor([pattern.n, pattern.m], dtype=torch.int32)


def _choose(weight: Tensor, kept: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """Values and places of some rows, each ``(rows, groups, n)``."""
    n, m = pattern.n, pattern.m
    rows, columns = weight.shape
    wide = -(-columns // m) * m
    groups = torch.nn.functional.pad(kept, (0, wide - columns)).view(rows, wide // m, m)
    counts = groups.sum(2, dtype=torch.int8)
    if counts.numel() and int(counts.max()) > n:
        raise ConfigurationError(
            f"a group of {m} weights keeps {int(counts.max())}, more than {pattern} allows; "
            f"apply the pattern first or pack the weight as a bitmask"
        )
    # where a group keeps fewer, its lowest free places are kept as well
    free = (~groups).cumsum(2, dtype=torch.int8)
    chosen = groups | (free <= (n - counts).unsqueeze(2))
    places = torch.arange(m, dtype=torch.int32).expand(chosen.shape)[chosen].view(rows, wide // m, n)
    padded = torch.nn.functional.pad(weight, (0, wide - columns)).view(chosen.shape)
    return padded[chosen].view(places.shape), places


def _arrange(values: Tensor, places: Tensor, m: int, group: int) -> tuple[Tensor, Tensor]:
    """Values and words of places as a matrix keeps them."""
    stored, within = (_panels(part).transpose(1, 2) for part in (values, places))
    empty = (len(stored), 0, _PANEL)
    parts, words, begin = [values.new_empty(empty)], [places.new_empty(empty)], 0
    for count in _runs(values.shape[1] * m, m, group):
        parts.append(stored[:, :, begin : begin + count].flatten(1, 2))
        words.append(_pack_places(within[:, :, begin : begin + count], m))
        begin += count
    return torch.cat(parts, 1), torch.cat(words, 1)


def _shifts(m: int) -> Tensor:
    """Where the places of a word begin."""
    return torch.arange(_WORD // _bits(m)) * _bits(m)


def _pack_places(places: Tensor, m: int) -> Tensor:
    """``(panels, n, groups, 16)`` to ``(panels, n · words, 16)`` int32."""
    shifts = _shifts(m)
    padded = torch.nn.functional.pad(places, (0, 0, 0, -places.shape[2] % len(shifts)))
    words = padded.unflatten(2, (-1, len(shifts))).to(torch.int64) << shifts[:, None]
    return words.sum(3).to(torch.int32).flatten(1, 2)


def _unpack_places(words: Tensor, n: int, m: int, count: int) -> Tensor:
    """``(panels, n · words, 16)`` to ``(panels, n, groups, 16)`` int32; the inverse of :func:`_pack_places`."""
    places = words.unsqueeze(2) >> _shifts(m).to(torch.int32)[:, None] & (m - 1)
    return places.flatten(1, 2).unflatten(1, (n, -1))[:, :, :count]

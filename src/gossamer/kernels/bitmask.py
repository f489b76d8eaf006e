"""Matrices of which only the non-zero weights are stored, with a bit for every weight that says where they belong.

A bit is the cheapest note there can be at moderate sparsity: at 50 % in bfloat16 a weight takes 9 bits instead of 16.
Decoding needs no branch and no index: the processor spreads the next values of a row over the places that the bits
name, and counts the bits to know where the following ones begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.masks import count_bits, pack_bits, unpack_bits
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.matrix import Call, PackedMatrix, check_weight, quantize_steps
from gossamer.kernels.native import INT4, VALUE_CODES, native

_WORD = 64  # columns whose bits are read at once
_SLACK = 64  # bytes behind the last value that a kernel may read
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
_STORED = {name: getattr(torch, name) for name in FORMATS[:4]} | {"int4": torch.uint8}
_LARGEST = {"int8": 127, "int4": 7}


@dataclass(frozen=True, eq=False, repr=False)
class BitmaskMatrix(PackedMatrix):
    """A matrix as bits, and the values of the weights that are kept.

    Attributes
    ----------
    shape
        ``(rows, columns)``.
    format
        What a value is: ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``int4``.
    bits
        ``(rows, ⌈columns / 64⌉)`` int64; bit i of a word is set where its i-th column is kept.
    values
        Kept values, row after row, and 64 more bytes that are never used; ``int4``: two to a byte, the first in its
        lower half, in two's complement, and every row begins with a byte of its own.
    starts
        ``(rows + 1,)`` int64: where the values of each row begin.
    scales
        ``(rows, ⌈columns / group⌉)`` float32 for the two integer formats: a weight is its value times its scale.
    group
        Columns that share a scale, a multiple of 64.
    """

    shape: tuple[int, int]
    format: str
    bits: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None = None
    group: int = 0

    @classmethod
    def from_dense(
        cls, weight: Tensor, format: str | None = None, mask: Tensor | None = None, group: int | None = None
    ) -> BitmaskMatrix:
        """Pack a dense matrix.

        Parameters
        ----------
        weight
            ``(rows, columns)``, float32, bfloat16 or float16.
        format
            What values become; by default they stay what they are. The integer formats round to the nearest of
            ±127 or ±7 steps, the largest weight of a group being the last step.
        mask
            Weights to store, even where they are zero; by default those that are not.
        group
            For integer formats: columns that share a scale, a multiple of 64; by default a whole row.

        Raises
        ------
        ConfigurationError
            If shape, dtype, format or group do not fit.
        NonFiniteError
            If a weight is NaN or infinite and the format is an integer.
        """
        format = str(weight.dtype).removeprefix("torch.") if format is None else format
        _check(weight, format, mask, group)
        rows, columns = weight.shape
        weight = weight.detach().cpu()
        kept = (weight != 0) if mask is None else mask.cpu()
        scales, width = None, 0
        if format in _LARGEST:
            width = -(-columns // _WORD) * _WORD if group is None else group
            weight, scales = quantize_steps(weight.float().masked_fill(~kept, 0), _LARGEST[format], width)
        counts = kept.sum(1)
        bits = _pack_rows(kept)
        if format == "int4":
            counts = counts + counts % 2
            values = _pack_nibbles(weight, kept, counts)
        else:
            values = weight[kept].to(_STORED[format])
        slack = values.new_zeros(_SLACK // values.element_size())
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return cls((rows, columns), format, bits, torch.cat([values, slack]), starts, scales, width)

    @property
    def kept(self) -> int:
        """Weights that are stored."""
        return count_bits(self.bits.view(torch.uint8).flatten())

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"bits": self.bits, "values": self.values, "starts": self.starts}
        return found if self.scales is None else {**found, "scales": self.scales}

    def mask(self) -> Tensor:
        """``(rows, columns)`` bool, True where a weight is stored."""
        rows, columns = self.shape
        width = self.bits.shape[1] * _WORD
        return unpack_bits(self.bits.view(torch.uint8).flatten(), (rows, width))[:, :columns]

    def _expand_into(self, tile: Tensor, first: int, last: int, threads: int) -> None:
        native().bitmask_expand(*self._matrix(), first, last, tile.data_ptr(), threads)

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        problem = self._problem()
        if problem:
            raise CheckpointError(f"{name} ({self.format} bitmask) is broken: {problem}; make or fetch it again")

    def _problem(self) -> str | None:
        rows, columns = self.shape
        words = -(-columns // _WORD)
        if self.format not in FORMATS:
            return f"unknown format {self.format!r}, known are {', '.join(FORMATS)}"
        if self.bits.shape != (rows, words) or self.bits.dtype != torch.int64 or not self.bits.is_contiguous():
            return f"its bits are {tuple(self.bits.shape)} {self.bits.dtype} instead of {(rows, words)} int64"
        if self.starts.shape != (rows + 1,) or self.starts.dtype != torch.int64:
            return f"its starts are {tuple(self.starts.shape)} {self.starts.dtype} instead of {(rows + 1,)} int64"
        padded = unpack_bits(self.bits.view(torch.uint8).flatten(), (rows, words * _WORD))
        if bool(padded[:, columns:].any()):
            return "bits beyond the last column are set"
        counts = padded.sum(1)
        if self.format == "int4":
            counts = counts + counts % 2
        expected = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        if not torch.equal(self.starts, expected):
            return "its starts disagree with the number of bits that are set"
        stored = _STORED[self.format]
        needed = (int(expected[-1]) // 2 if self.format == "int4" else int(expected[-1])) + _SLACK // stored.itemsize
        if self.values.dtype != stored or self.values.shape != (needed,) or not self.values.is_contiguous():
            return f"its values are {tuple(self.values.shape)} {self.values.dtype} instead of {(needed,)} {stored}"
        return self._quantization_problem()

    def _quantization_problem(self) -> str | None:
        if self.format not in _LARGEST:
            return "it has scales, which its format does not" if self.scales is not None else None
        if self.group < _WORD or self.group % _WORD:
            return f"its scales are for {self.group} columns, which is no multiple of {_WORD}"
        return self.scale_problem(self.scales, self.group)

    def _matrix(self) -> tuple[int, ...]:
        return (
            *self.shape,
            self.bits.data_ptr(),
            self.values.data_ptr(),
            INT4 if self.format == "int4" else VALUE_CODES[self.values.dtype],
            self.starts.data_ptr(),
            0 if self.scales is None else self.scales.data_ptr(),
            self.group,
        )

    def _multiply(self, call: Call, threads: int) -> None:
        native().bitmask_linear(*self._matrix(), *call.arguments(threads), True)

    def _reference(self, first: int, last: int) -> Tensor:
        """These rows, dense, with torch alone."""
        mask = self.mask()
        dense = torch.zeros(self.shape)
        if self.format == "int4":
            codes = torch.stack([self.values & 15, self.values >> 4], 1).flatten().to(torch.int8)
            codes = torch.where(codes > 7, codes - 16, codes)
            counts = mask.sum(1)
            there = torch.arange(int(self.starts[-1])) - self.starts[:-1].repeat_interleave(self.starts.diff())
            real = there < counts.repeat_interleave(self.starts.diff())
            dense[mask] = codes[: int(self.starts[-1])][real].float()
        else:
            dense[mask] = self.values[: int(self.starts[-1])].float()
        if self.scales is not None:
            dense *= self.scales.repeat_interleave(self.group, 1)[:, : self.shape[1]]
        return dense[first:last]


def _check(weight: Tensor, format: str, mask: Tensor | None, group: int | None) -> None:
    check_weight(weight, format, FORMATS, whole=format in _LARGEST)
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ConfigurationError(
            f"the mask is {tuple(mask.shape)} {mask.dtype}; it must be bool and of the shape {tuple(weight.shape)}"
        )
    if group is not None and (format not in _LARGEST or group < _WORD or group % _WORD):
        raise ConfigurationError(
            f"group is {group} for {format}; integer formats take a multiple of {_WORD}, the others none"
        )


def _pack_rows(kept: Tensor) -> Tensor:
    """One bit a weight, each row padded to whole words: ``(rows, words)`` int64."""
    rows, columns = kept.shape
    words = -(-columns // _WORD)
    padded = torch.nn.functional.pad(kept, (0, words * _WORD - columns))
    return pack_bits(padded).view(torch.int64).view(rows, words) if rows else torch.empty(0, words, dtype=torch.int64)


def _pack_nibbles(steps: Tensor, kept: Tensor, counts: Tensor) -> Tensor:
    """Kept whole numbers of −8 … 7, two to a byte, rows padded to whole bytes: flat uint8."""
    own = kept.sum(1)
    begins = counts.cumsum(0) - counts
    there = torch.arange(int(own.sum())) - (own.cumsum(0) - own).repeat_interleave(own)
    nibbles = torch.zeros(int(counts.sum()), dtype=torch.uint8)
    nibbles[begins.repeat_interleave(own) + there] = (steps[kept].to(torch.int8) & 15).view(torch.uint8)
    return nibbles[0::2] | nibbles[1::2] << 4

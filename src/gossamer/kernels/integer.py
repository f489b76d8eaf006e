"""Matrices of int8 weights whose inputs are rounded to int8 as well, so that their products are sums of whole numbers.

Each vector is rounded once for a product, in blocks of 32 columns with a scale of their own
(:func:`gossamer.kernels.matrix.rounded_codes`): the largest of a block becomes ±127, and no input changes by more than
a 254th of it. So a product changes by at most Σ |weight| · largest / 254. That is a choice, which whoever packs a
matrix makes: :class:`~gossamer.kernels.dense.DenseMatrix` and :class:`~gossamer.kernels.bitmask.BitmaskMatrix` multiply
the same weights by the inputs as they are.

The order of all sums is fixed. Four adjacent columns are one sum of whole numbers, which is exact, and sixteen such
sums, a word of 64 columns, are sixteen lanes in float32; ``lane += sum · scale of the inputs`` is rounded once. Words
of the columns that share a scale of the weights take turns with two sets of lanes, which are added in the end; the
lanes of a row grow by that times the scale of the weights, rounded once, and are added in halves: eight, four, two,
one. It is the same for all instruction sets and numbers of threads, so that results are equal bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.matrix import Call, PackedMatrix, round_inputs, rounded_codes, rounding
from gossamer.kernels.native import available, native

_WORD = 64  # columns of a word
_QUAD = 4  # columns whose products are one whole number
_LANES = _WORD // _QUAD


class _IntegerProducts(PackedMatrix):
    """Products with inputs in int8, for matrices that store int8."""

    activations: ClassVar[str] = "int8"

    def rounds(self, vectors: int) -> bool:
        return vectors < self.many

    def _fill(self, outputs: Tensor, inputs: Tensor, bias: Tensor | None, threads: int) -> None:
        if not available() and self.rounds(len(inputs)) and rounding():
            inputs = round_inputs(inputs)
        super()._fill(outputs, inputs, bias, threads)

    @abstractmethod
    def steps(self) -> Tensor:
        """Return the whole numbers that are stored, ``(rows, columns)`` int8."""


@dataclass(frozen=True, eq=False, repr=False)
class IntegerDenseMatrix(_IntegerProducts, DenseMatrix):
    """A :class:`~gossamer.kernels.dense.DenseMatrix` in int8 that rounds its inputs to int8."""

    many: ClassVar[int] = 64

    @classmethod
    def from_dense(cls, weight: Tensor, format: str | None = None, group: int | None = None) -> IntegerDenseMatrix:
        """Round a matrix to int8, as :meth:`DenseMatrix.from_dense` does; `format` can only be ``int8``."""
        found = DenseMatrix.from_dense(weight, _checked(format), group)
        return cls(found.shape, found.format, found.values, found.scales, found.group)

    def _problem(self) -> str | None:
        return _format_problem(self.format) or super()._problem()

    def steps(self) -> Tensor:  # noqa: D102
        rows, columns = self.shape
        return self.values[: rows * columns].view(rows, columns)

    def _multiply(self, call: Call, threads: int) -> None:
        scales = 0 if self.scales is None else self.scales.data_ptr()
        native().integer_dense_linear(*self.shape, self.values.data_ptr(), scales, self.group, *call.arguments(threads))


@dataclass(frozen=True, eq=False, repr=False)
class IntegerBitmaskMatrix(_IntegerProducts, BitmaskMatrix):
    """A :class:`~gossamer.kernels.bitmask.BitmaskMatrix` in int8 that rounds its inputs to int8."""

    many: ClassVar[int] = 64

    @classmethod
    def from_dense(
        cls, weight: Tensor, format: str | None = None, mask: Tensor | None = None, group: int | None = None
    ) -> IntegerBitmaskMatrix:
        """Round a matrix to int8, as :meth:`BitmaskMatrix.from_dense` does; `format` can only be ``int8``."""
        found = BitmaskMatrix.from_dense(weight, _checked(format), mask, group)
        return cls(found.shape, found.format, found.bits, found.values, found.starts, found.scales, found.group)

    def _problem(self) -> str | None:
        return _format_problem(self.format) or super()._problem()

    def steps(self) -> Tensor:  # noqa: D102
        mask = self.mask()
        steps = torch.zeros(self.shape, dtype=torch.int8)
        steps[mask] = self.values[: int(self.starts[-1])]
        return steps

    def _multiply(self, call: Call, threads: int) -> None:
        native().integer_bitmask_linear(
            *self.shape,
            self.bits.data_ptr(),
            self.values.data_ptr(),
            self.starts.data_ptr(),
            0 if self.scales is None else self.scales.data_ptr(),
            self.group,
            *call.arguments(threads),
        )


def _checked(format: str | None) -> str:
    if format not in (None, "int8"):
        raise ConfigurationError(f"format is {format!r}; inputs in int8 are multiplied by weights in int8")
    return "int8"


def _format_problem(format: str) -> str | None:
    return None if format == "int8" else f"its format is {format!r} instead of 'int8'"


def integer_product(x: Tensor, steps: Tensor, scales: Tensor | None, group: int) -> Tensor:
    """Multiply vectors, rounded to int8, by whole numbers, with torch alone and in the order of the compiled kernels.

    Parameters
    ----------
    x
        ``(vectors, columns)``, float32 or bfloat16.
    steps
        ``(rows, columns)`` int8.
    scales
        ``(rows, ⌈columns / group⌉)`` float32, or None.
    group
        Columns that share a scale.

    Returns
    -------
    Tensor
        ``(vectors, rows)`` float32.
    """
    (count, columns), rows = x.shape, len(steps)
    codes, blocks = rounded_codes(x)
    missing = codes.shape[1] - columns
    steps = torch.nn.functional.pad(steps, (0, missing))
    spread = blocks.repeat_interleave(codes.shape[1] // max(1, blocks.shape[1]), 1) if columns else codes.float()
    totals = torch.zeros(count, rows, _LANES)
    for number, (begin, end) in enumerate(_runs(columns, group if scales is not None else 0)):
        turns = [torch.zeros(count, rows, _LANES), torch.zeros(count, rows, _LANES)]
        for turn, first in enumerate(range(begin, end, _WORD)):
            last = min(first + _WORD, end + (missing if end == columns else 0))
            sums = _quads(codes[:, first:last], steps[:, first:last])
            scale = _padded(spread[:, first:last:_QUAD], _LANES).unsqueeze(1)
            turns[turn % 2] = _fused(sums, scale, turns[turn % 2])
        both = turns[0] + turns[1]
        totals = both if scales is None else _fused(both, scales[:, number, None], totals)
    for half in (8, 4, 2, 1):
        totals = totals[..., :half] + totals[..., half:]
    return totals.squeeze(2)


def _runs(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Columns that share a scale of the weights."""
    step = group or max(1, columns)
    return ((first, min(first + step, columns)) for first in range(0, columns, step))


def _quads(codes: Tensor, steps: Tensor) -> Tensor:
    """Whole numbers: sums of the products of four adjacent columns, ``(vectors, rows, lanes)`` float32."""
    left, right = _padded(codes, _WORD).long(), _padded(steps, _WORD).long()
    return (left.unsqueeze(1) * right).unflatten(2, (_LANES, _QUAD)).sum(3).float()


def _padded(numbers: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(numbers, (0, width - numbers.shape[1]))


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a · b + c``, rounded once: float64 holds the product exactly, and what its sum loses shows in the remainder."""
    product, wide = a.double() * b.double(), c.double()
    total = product + wide
    shifted = total - product
    rest = (product - (total - shifted)) + (wide - shifted)
    rounded = total.float()
    # rounding twice errs only where the sum lies in the middle of two numbers of float32, and then the rest decides
    middle = (total.view(torch.int64) & ((1 << 29) - 1)) == (1 << 28)
    nudged = torch.nextafter(total, torch.where(rest > 0, torch.inf, -torch.inf).double()).float()
    return torch.where(middle & (rest != 0), nudged, rounded)

"""Weights stored channel by channel, for products in which only some channels take part.

A token of a language model needs few of its inputs: those of a small size change the result little, and behind a ReLU
most are exactly zero. A product of one vector takes as long as its weights take to be read, and a weight that lies row
after row has to be read as a whole, whatever the inputs are. Stored one input channel after the other, only the live
channels are read: at half of the inputs in half of the time. The products are in
:mod:`gossamer.kernels.channel_products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.matrix import Call, PackedMatrix, check_weight, quantize_steps
from gossamer.kernels.native import INT4, VALUE_CODES, native
from gossamer.kernels.nibbles import grouped, without_offset

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
SLACK = 128  # values behind the last that a kernel may read
_BLOCK = 32  # four-bit weights of a line that lie in sixteen bytes
_AT_ONCE = 1 << 17  # weights whose scales are searched together
DEVICES = ("cpu", "cuda")  # with products of few channels
Lines = tuple[int, int, int, int, int, int]


@dataclass(frozen=True, eq=False, repr=False)
class ChannelMatrix(PackedMatrix):
    """A matrix of which the weights of one input channel lie side by side.

    Attributes
    ----------
    shape
        ``(rows, columns)``: outputs and inputs.
    format
        ``float32``, ``bfloat16``, ``float16``, ``int8`` or ``int4``.
    values
        ``columns × rows`` weights, channel after channel, and 128 more that are never used. In ``int4`` bytes: 32
        weights of a channel are 16 of them, weight i in the lower half of byte i, weight i + 16 in its upper half, both
        as 8 more than they stand for; the last ones of a channel are filled up.
    scales
        For ``int8`` ``(rows,)`` float32, one for each output; for ``int4`` ``(columns, ⌈rows / group⌉)`` float16.
    group
        For ``int4``: adjacent outputs that share a scale within a channel, a multiple of 32; else 0.
    """

    shape: tuple[int, int]
    format: str
    values: Tensor
    scales: Tensor | None = None
    group: int = 0

    #: products with more vectors go to the dense unit of torch
    many: ClassVar[int] = 33

    @classmethod
    def from_dense(cls, weight: Tensor, format: str | None = None, group: int | None = None) -> ChannelMatrix:
        """Store a matrix channel by channel.

        Parameters
        ----------
        weight
            ``(rows, columns)``, float32, bfloat16 or float16.
        format
            By default what the weights are; ``int8`` rounds to ±127 steps of each output, ``int4`` to −8 … 7 steps of
            each group.
        group
            For ``int4``: outputs that share a scale within a channel, a multiple of 32; by default 32.

        Raises
        ------
        ConfigurationError
            If shape, dtype, format or group do not fit.
        NonFiniteError
            If a weight is NaN or infinite and the format is of whole numbers.
        """
        format = str(weight.dtype).removeprefix("torch.") if format is None else format
        check_weight(weight, format, FORMATS, whole=format in ("int8", "int4"))
        width = _check_group(format, group)
        rows, columns = weight.shape
        weight = weight.detach().cpu()
        if format == "int4":
            return cls((rows, columns), format, *_four_bit_lines(weight.t(), width), width)
        scales = None
        if format == "int8":
            weight, scales = quantize_steps(weight.float(), 127, max(1, columns))
            scales = scales.flatten() if columns else torch.zeros(rows)
        values = torch.zeros(columns * rows + SLACK, dtype=getattr(torch, format))
        values[: columns * rows].view(columns, rows).copy_(weight.t())
        return cls((rows, columns), format, values, scales)

    @classmethod
    def of_view(cls, weight: Tensor, devices: Sequence[str] = ("cpu",)) -> ChannelMatrix | None:
        """Take a weight on one of `devices` without a copy, if :func:`lay_by_channels` has laid it; else None."""
        if weight.ndim != 2 or weight.device.type not in devices or weight.dtype not in VALUE_CODES:
            return None
        rows, columns = weight.shape
        begin, needed = weight.storage_offset(), columns * rows + SLACK
        held = weight.untyped_storage().nbytes() // weight.element_size()
        if weight.t().is_contiguous() and weight.is_floating_point() and begin + needed <= held:
            values = weight.detach().as_strided((needed,), (1,), begin)
            return cls((rows, columns), str(weight.dtype).removeprefix("torch."), values)
        return None

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"values": self.values} if self.scales is None else {"values": self.values, "scales": self.scales}

    def _reference(self, first: int, last: int) -> Tensor:
        """These rows in float32, as a view across the channels."""
        rows, columns = self.shape
        if self.format == "int4":
            assert self.scales is not None
            return _expand_lines(self.values, self.scales, rows, self.group)[:, first:last].t()
        tile = self.values[: columns * rows].view(columns, rows)[:, first:last].float()
        return (tile if self.scales is None else tile * self.scales[first:last]).t()

    def expand(self, first: int = 0, last: int | None = None, threads: int | None = None) -> Tensor:  # noqa: D102
        return self._reference(*self.check_rows(first, last))

    def _multiply(self, call: Call, threads: int) -> None:
        native().channel_input_sparse(self.lines(), 0, False, *call.arguments(threads))

    def lines(self) -> Lines:
        """Number, width, values, dtype, scales and group of its lines, as the kernels take them."""
        return _addresses(self, self.shape[1], self.shape[0])

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        rows, columns = self.shape
        problem = _problem(self, columns, rows, (rows,))
        if problem:
            raise CheckpointError(f"{name} (by channels, {self.format}) is broken: {problem}; make or fetch it again")


@dataclass(frozen=True, eq=False, repr=False)
class NibbleRowMatrix(PackedMatrix):
    """A matrix in four bits of which single rows can be read, for
    :func:`~gossamer.kernels.channel_products.masked_output`.

    A weight is ``scale · code`` for a code of −8 … 7. (:class:`~gossamer.kernels.nibbles.NibbleMatrix` keeps sixteen
    rows side by side, which is faster where all of them are wanted.)

    Attributes
    ----------
    shape
        ``(rows, columns)``.
    values
        Bytes, row after row, and 128 more: 32 weights are 16 of them, as in :class:`ChannelMatrix`.
    scales
        ``(rows, ⌈columns / group⌉)`` float16.
    group
        Adjacent columns that share a scale, a multiple of 32.
    """

    shape: tuple[int, int]
    values: Tensor
    scales: Tensor
    group: int = _BLOCK
    format: str = "int4"

    many: ClassVar[int] = 33

    @classmethod
    def from_dense(cls, weight: Tensor, group: int | None = None) -> NibbleRowMatrix:
        """Round a matrix ``(rows, columns)`` to four bits.

        Raises
        ------
        ConfigurationError
            If shape, dtype or group do not fit.
        NonFiniteError
            If a weight is NaN or infinite.
        """
        check_weight(weight, "int4", ("int4",), whole=True)
        width = _check_group("int4", group)
        return cls((weight.shape[0], weight.shape[1]), *_four_bit_lines(weight.detach().cpu(), width), width)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"values": self.values, "scales": self.scales}

    def _reference(self, first: int, last: int) -> Tensor:
        return _expand_lines(self.values, self.scales, self.shape[1], self.group)[first:last]

    def expand(self, first: int = 0, last: int | None = None, threads: int | None = None) -> Tensor:  # noqa: D102
        return self._reference(*self.check_rows(first, last))

    def _multiply(self, call: Call, threads: int) -> None:
        inputs, stride, count, value, bias, *rest = call.arguments(threads)
        every = torch.ones(count, self.shape[0])
        native().channel_masked_output(self.lines(), every.data_ptr(), inputs, stride, count, value, bias, *rest)

    def lines(self) -> Lines:
        """Number, width, values, dtype, scales and group of its lines, as the kernels take them."""
        return _addresses(self, *self.shape)

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        problem = _problem(self, *self.shape, ())
        if problem:
            raise CheckpointError(f"{name} (four-bit rows) is broken: {problem}; make or fetch it again")


def lay_by_channels(weight: Tensor) -> Tensor:
    """Return the same weight with the weights of one input channel side by side in memory.

    A layer whose parameter holds it computes as before, and :meth:`ChannelMatrix.of_view` takes it without a copy: so
    the weight is kept once, for dense products and for those of few channels.

    Parameters
    ----------
    weight
        ``(rows, columns)``, of any dtype and device.
    """
    rows, columns = weight.shape
    values = weight.new_zeros(columns * rows + SLACK)
    found = values[: columns * rows].view(columns, rows).t()
    return found.copy_(weight.detach())


def lines_of_rows(matrix: DenseMatrix | NibbleRowMatrix) -> Lines:
    """Sizes and addresses of a matrix whose rows lie one after the other."""
    return _addresses(matrix, *matrix.shape)


def _addresses(matrix: ChannelMatrix | DenseMatrix | NibbleRowMatrix, lines: int, width: int) -> Lines:
    value = INT4 if matrix.format == "int4" else VALUE_CODES[matrix.values.dtype]
    scales = 0 if matrix.scales is None else matrix.scales.data_ptr()
    return lines, width, matrix.values.data_ptr(), value, scales, matrix.group or max(1, width)


def _check_group(format: str, group: int | None) -> int:
    if group is not None and (format != "int4" or group < _BLOCK or group % _BLOCK):
        raise ConfigurationError(
            f"group is {group} for {format}; int4 takes a multiple of {_BLOCK}, other formats none"
        )
    return (_BLOCK if group is None else group) if format == "int4" else 0


def _four_bit_lines(lines: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Bytes and scales of lines ``(lines, width)``."""
    count, width = lines.shape
    runs, blocks = -(-width // group), -(-width // _BLOCK)
    values = torch.full((count * blocks * 16 + SLACK,), 0x88, dtype=torch.uint8)
    scales = torch.zeros(count, runs, dtype=torch.float16)
    step = max(1, _AT_ONCE // max(1, runs * group))
    packed = values[: count * blocks * 16].view(count, blocks, 16)
    for first in range(0, count if width else 0, step):
        found, _, codes = without_offset(grouped(lines[first : first + step].float(), group))
        if not torch.isfinite(found).all():
            raise NonFiniteError("a weight is too large for scales in float16 (65504); keep this matrix in bfloat16")
        scales[first : first + step] = found.half()
        part = codes.to(torch.uint8).view(len(codes), -1)[:, : blocks * _BLOCK].view(len(codes), blocks, 2, 16)
        packed[first : first + step] = part[:, :, 0] | part[:, :, 1] << 4
    return values, scales


def _expand_lines(values: Tensor, scales: Tensor, width: int, group: int) -> Tensor:
    """``(lines, width)`` float32."""
    count, blocks = len(scales), -(-width // _BLOCK)
    packed = values[: count * blocks * 16].view(count, blocks, 1, 16)
    codes = torch.cat([packed & 15, packed >> 4], 2).view(count, blocks * _BLOCK)[:, :width].float() - 8
    return codes * scales.float().repeat_interleave(group, 1)[:, :width]


def _problem(matrix: ChannelMatrix | NibbleRowMatrix, lines: int, width: int, scales: tuple[int, ...]) -> str | None:
    """Say what does not fit; `scales` is the shape of those of int8."""
    if matrix.format not in FORMATS:
        return f"unknown format {matrix.format!r}, known are {', '.join(FORMATS)}"
    four = matrix.format == "int4"
    if four and (matrix.group < _BLOCK or matrix.group % _BLOCK):
        return f"its scales are for {matrix.group} weights, which is no multiple of {_BLOCK}"
    dtype = torch.uint8 if four else getattr(torch, matrix.format)
    needed = (lines * (-(-width // _BLOCK) * 16 if four else width) + SLACK,)
    if matrix.values.shape != needed or matrix.values.dtype != dtype or not matrix.values.is_contiguous():
        return f"its values are {tuple(matrix.values.shape)} {matrix.values.dtype} instead of {needed} {dtype}"
    if matrix.format not in ("int8", "int4"):
        return "it has scales, which its format does not" if matrix.scales is not None else None
    expected = ((lines, -(-width // matrix.group)), torch.float16) if four else (scales, torch.float32)
    found = matrix.scales
    if found is None or (tuple(found.shape), found.dtype) != expected or not found.is_contiguous():
        about = None if found is None else (tuple(found.shape), found.dtype)
        return f"its scales are {about} instead of {expected}"
    return None if bool(torch.isfinite(found).all()) else "a scale is NaN or infinite"

"""What all packed matrices have in common: products with few vectors, products with many, and the way back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.kernels.native import VALUE_CODES, available

_INPUTS = (torch.float32, torch.bfloat16)
_ROUNDED = 32
_TILE = 1 << 18  # weights that are expanded at a time: a megabyte of float32, which stays in the cache


_rounding: ContextVar[bool] = ContextVar("rounding", default=True)


@contextmanager
def without_rounding() -> Iterator[None]:
    """Within this, products expand the weights rather than round inputs: slow, for comparisons."""
    token = _rounding.set(False)
    try:
        yield
    finally:
        _rounding.reset(token)


def rounding() -> bool:
    """Whether products may round inputs: not within :func:`without_rounding`."""
    return _rounding.get()


@dataclass(frozen=True)
class Call:
    """Addresses and sizes of one product, as the compiled kernels take them; keeps the tensors alive."""

    inputs: Tensor
    bias: Tensor | None
    outputs: Tensor

    def arguments(self, threads: int) -> tuple[Any, ...]:
        """Inputs, their stride, count and dtype; bias; outputs and their dtype; threads."""
        inputs, outputs = self.inputs, self.outputs
        return (
            inputs.data_ptr(),
            inputs.stride(0),
            len(inputs),
            VALUE_CODES[inputs.dtype],
            0 if self.bias is None else self.bias.data_ptr(),
            outputs.data_ptr(),
            VALUE_CODES[outputs.dtype],
            threads,
        )


class PackedMatrix(ABC):
    """A weight matrix ``(rows, columns)`` in a form of its own.

    Attributes
    ----------
    shape
        ``(rows, columns)``: outputs and inputs of the layer.
    format
        What a stored value is.
    """

    shape: tuple[int, int]
    format: str
    #: what few vectors are multiplied as: ``float``, or ``int8`` where whoever packed the matrix has chosen that
    activations: ClassVar[str] = "float"
    #: vectors from which on rows are expanded and multiplied by the dense unit
    many: ClassVar[int] = 24

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return everything that is stored, by name."""

    @abstractmethod
    def validate(self, name: str = "matrix") -> None:
        """Check every part against every other.

        Raises
        ------
        CheckpointError
            If counts, lengths or indices contradict each other, so that a kernel would read where nothing is.
        """

    def expand(self, first: int = 0, last: int | None = None, threads: int | None = None) -> Tensor:
        """Rows `first` to `last` as they are multiplied: ``(last − first, columns)`` float32, zeros included."""
        first, last = self.check_rows(first, last)
        if not available() or not self.shape[1]:
            return self._reference(first, last)
        tile = torch.empty(last - first, self.shape[1])
        if tile.numel():
            self._expand_into(tile, first, last, threads or torch.get_num_threads())
        return tile

    @abstractmethod
    def _reference(self, first: int, last: int) -> Tensor:
        """These rows, dense, with torch alone."""

    def _expand_into(self, tile: Tensor, first: int, last: int, threads: int) -> None:
        """Fill `tile` with these rows; kinds that have a compiled kernel for it use that."""
        tile.copy_(self._reference(first, last))

    @abstractmethod
    def _multiply(self, call: Call, threads: int) -> None:
        """Run the compiled kernel."""

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def rounds(self, vectors: int) -> bool:
        """Whether products with so many vectors round these to eight bits first: see :func:`round_inputs`."""
        return False

    def __repr__(self) -> str:
        rows, columns = self.shape
        bits = 8 * self.nbytes / max(1, rows * columns)
        return f"{type(self).__name__}({rows} × {columns}, {self.format}, {bits:.2f} bits a weight)"

    def check_rows(self, first: int, last: int | None) -> tuple[int, int]:
        """Return the range of rows that is asked for.

        Raises
        ------
        ConfigurationError
            If the matrix does not have them.
        """
        end = self.shape[0] if last is None else last
        if not 0 <= first <= end <= self.shape[0]:
            raise ConfigurationError(f"rows {first} to {end} are asked for; the matrix has {self.shape[0]} rows")
        return first, end

    def scale_problem(self, scales: Tensor | None, group: int) -> str | None:
        """Say what is wrong with scales for groups of columns, if anything is."""
        expected = (self.shape[0], -(-self.shape[1] // group))
        if scales is None or scales.shape != expected or scales.dtype != torch.float32 or not scales.is_contiguous():
            found = None if scales is None else (tuple(scales.shape), scales.dtype)
            return f"its scales are {found} instead of {expected} float32"
        return None if bool(torch.isfinite(scales).all()) else "a scale is NaN or infinite"

    def linear(self, x: Tensor, bias: Tensor | None = None, threads: int | None = None) -> Tensor:
        """``x @ matrix.T + bias``, as :func:`torch.nn.functional.linear` does it.

        Parameters
        ----------
        x
            ``(…, columns)``, float32 or bfloat16, on the CPU.
        bias
            ``(rows,)``, of any floating dtype.
        threads
            How many; by default as many as torch uses. The result does not depend on it.

        Returns
        -------
        Tensor
            ``(…, rows)`` in the dtype of `x`. Sums are formed in float32.

        Raises
        ------
        ConfigurationError
            If shape, dtype or device of `x` or `bias` do not fit.
        """
        rows, columns = self.shape
        if x.shape[-1:] != (columns,) or x.dtype not in _INPUTS or x.device.type != "cpu":
            raise ConfigurationError(
                f"x is {tuple(x.shape)} {x.dtype} on {x.device}; a matrix of {rows} × {columns} takes (…, {columns}) "
                f"in float32 or bfloat16 on the CPU"
            )
        if bias is not None and bias.shape != (rows,):
            raise ConfigurationError(f"bias is {tuple(bias.shape)}; a matrix of {rows} rows takes ({rows},)")
        flat = x.detach().reshape(math.prod(x.shape[:-1]), columns)
        if len(flat) and (flat.stride(1) != 1 or flat.stride(0) < columns) and columns > 1:
            flat = flat.contiguous()
        outputs = flat.new_empty(len(flat), rows)
        wide = None if bias is None else bias.detach().float().contiguous()
        if len(flat) and rows:
            self._fill(outputs, flat, wide, threads or torch.get_num_threads())
        return outputs.view(*x.shape[:-1], rows)

    def _fill(self, outputs: Tensor, inputs: Tensor, bias: Tensor | None, threads: int) -> None:
        exact = not _rounding.get() and self.rounds(len(inputs))
        rows, columns = self.shape
        # kernels divide their work by the length of a row
        if available() and columns and len(inputs) < self.many and not exact:
            self._multiply(Call(inputs, bias, outputs), threads)
            return
        step = max(1, _TILE // max(1, columns))
        wide = inputs.float()
        for first in range(0, rows, step):
            tile = self.expand(first, min(first + step, rows), threads)
            outputs[:, first : first + step] = torch.nn.functional.linear(
                wide, tile, None if bias is None else bias[first : first + step]
            )


def round_inputs(x: Tensor) -> Tensor:
    """Return vectors as kernels for four-bit weights multiply them: in eight bits, with a scale for each 32 columns.

    The largest of 32 becomes ±127 steps, and no number changes by more than half a step.

    Parameters
    ----------
    x
        ``(vectors, columns)``.

    Returns
    -------
    Tensor
        The same shape, float32.
    """
    codes, scales = rounded_codes(x)
    return (codes.float() * scales.repeat_interleave(_ROUNDED, 1))[:, : x.shape[1]]


def rounded_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round vectors to eight bits, with a scale for each 32 columns.

    Parameters
    ----------
    x
        ``(vectors, columns)``.

    Returns
    -------
    Tensor
        ``(vectors, columns up to a multiple of 32)`` int8, −127 … 127; zeros behind the last column.
    Tensor
        ``(vectors, ⌈columns / 32⌉)`` float32; NaN where one of the 32 is infinite or NaN.
    """
    count, columns = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % _ROUNDED)).view(count, -(-columns // _ROUNDED), _ROUNDED)
    most = blocks.abs().amax(2, keepdim=True) if blocks.numel() else blocks[:, :, :1]
    # a number over a tensor would be a product with the reciprocal, rounded twice
    codes = torch.round(blocks * torch.where(most > 1e-30, torch.full_like(most, 127.0) / most, 0.0))
    scales = torch.where(torch.isfinite(most), most / 127, torch.nan)
    return codes.nan_to_num_(0, 0, 0).to(torch.int8).flatten(1), scales.flatten(1)


def check_weight(weight: Tensor, format: str, formats: Sequence[str], whole: bool) -> None:
    """Check that a dense weight can be packed; `whole` says that values become whole numbers.

    Raises
    ------
    ConfigurationError
        If it is no matrix of a floating dtype that kernels know, or the format is unknown.
    NonFiniteError
        If a weight has no whole number.
    """
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigurationError(
            f"the weight is {tuple(weight.shape)} {weight.dtype}; give a matrix of float32, bfloat16 or float16"
        )
    if format not in formats:
        raise ConfigurationError(f"format is {format!r}; it must be one of {', '.join(formats)}")
    if whole and not torch.isfinite(weight).all():
        raise NonFiniteError(f"a weight is NaN or infinite and has no {format} value; look for it where it was made")


def quantize_steps(weight: Tensor, largest: int, group: int) -> tuple[Tensor, Tensor]:
    """Round to whole steps, the largest weight of a group being the last step.

    Parameters
    ----------
    weight
        ``(rows, columns)`` float32.
    largest
        The last step in either direction.
    group
        Columns that share a scale.

    Returns
    -------
    Tensor
        ``(rows, columns)`` float32, whole numbers of ±`largest`.
    Tensor
        ``(rows, ⌈columns / group⌉)`` float32: the size of a step.
    """
    rows, columns = weight.shape
    runs = -(-columns // group)
    padded = torch.nn.functional.pad(weight, (0, runs * group - columns)).view(rows, runs, group)
    scales = padded.abs().amax(2) / largest
    steps = torch.round(padded / torch.where(scales == 0, 1.0, scales).unsqueeze(2)).clamp_(-largest, largest)
    return steps.view(rows, runs * group)[:, :columns], scales

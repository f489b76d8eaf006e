"""Matrices with every weight stored: the dense twin of every sparse one, and what a vocabulary head is kept in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.matrix import Call, PackedMatrix, check_weight, quantize_steps
from gossamer.kernels.native import VALUE_CODES, native

FORMATS = ("float32", "bfloat16", "float16", "int8")
_SLACK = 64  # bytes behind the last value that a kernel may read
_GROUP = 16  # columns that share a scale come in multiples of this


@dataclass(frozen=True, eq=False, repr=False)
class DenseMatrix(PackedMatrix):
    """A matrix as it is, or rounded to eight bits.

    Attributes
    ----------
    shape
        ``(rows, columns)``.
    format
        ``float32``, ``bfloat16``, ``float16`` or ``int8``.
    values
        All weights, row after row, and 64 more bytes that are never used.
    scales
        ``(rows, ⌈columns / group⌉)`` float32 for ``int8``: a weight is its value times its scale.
    group
        Columns that share a scale, a multiple of 16.
    """

    shape: tuple[int, int]
    format: str
    values: Tensor
    scales: Tensor | None = None
    group: int = 0

    @classmethod
    def from_dense(cls, weight: Tensor, format: str | None = None, group: int | None = None) -> DenseMatrix:
        """Store a matrix.

        Parameters
        ----------
        weight
            ``(rows, columns)``, float32, bfloat16 or float16.
        format
            By default what the weights are; ``int8`` rounds to the nearest of ±127 steps.
        group
            For ``int8``: columns that share a scale, a multiple of 16; by default a whole row.

        Raises
        ------
        ConfigurationError
            If shape, dtype, format or group do not fit.
        NonFiniteError
            If a weight is NaN or infinite and the format is ``int8``.
        """
        format = str(weight.dtype).removeprefix("torch.") if format is None else format
        check_weight(weight, format, FORMATS, whole=format == "int8")
        if group is not None and (format != "int8" or group < _GROUP or group % _GROUP):
            raise ConfigurationError(
                f"group is {group} for {format}; int8 takes a multiple of {_GROUP}, other formats none"
            )
        rows, columns = weight.shape
        weight = weight.detach().cpu()
        scales, width = None, 0
        if format == "int8":
            width = max(1, -(-columns // _GROUP)) * _GROUP if group is None else group
            weight, scales = quantize_steps(weight.float(), 127, width)
        values = torch.zeros(rows * columns + _SLACK, dtype=getattr(torch, format))
        values[: rows * columns] = weight.flatten()
        return cls((rows, columns), format, values, scales, width)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"values": self.values} if self.scales is None else {"values": self.values, "scales": self.scales}

    def _reference(self, first: int, last: int) -> Tensor:
        """These rows in float32; torch copies them as fast as a kernel could."""
        columns = self.shape[1]
        tile = self.values[first * columns : last * columns].view(last - first, columns).float()
        if self.scales is not None:
            tile *= self.scales[first:last].repeat_interleave(self.group, 1)[:, :columns]
        return tile

    def expand(self, first: int = 0, last: int | None = None, threads: int | None = None) -> Tensor:  # noqa: D102
        return self._reference(*self.check_rows(first, last))

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        problem = self._problem()
        if problem:
            raise CheckpointError(f"{name} ({self.format}) is broken: {problem}; make or fetch it again")

    def _problem(self) -> str | None:
        rows, columns = self.shape
        if self.format not in FORMATS:
            return f"unknown format {self.format!r}, known are {', '.join(FORMATS)}"
        dtype = getattr(torch, self.format)
        needed = rows * columns + _SLACK
        if self.values.dtype != dtype or self.values.shape != (needed,) or not self.values.is_contiguous():
            return f"its values are {tuple(self.values.shape)} {self.values.dtype} instead of {(needed,)} {dtype}"
        if self.format != "int8":
            return "it has scales, which its format does not" if self.scales is not None else None
        if self.group < _GROUP or self.group % _GROUP:
            return f"its scales are for {self.group} columns, which is no multiple of {_GROUP}"
        return self.scale_problem(self.scales, self.group)

    def _multiply(self, call: Call, threads: int) -> None:
        native().dense_linear(
            *self.shape,
            self.values.data_ptr(),
            VALUE_CODES[self.values.dtype],
            0 if self.scales is None else self.scales.data_ptr(),
            self.group,
            *call.arguments(threads),
        )

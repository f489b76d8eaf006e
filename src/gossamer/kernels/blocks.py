"""Matrices of which blocks of one column are kept: a few weights under each other, or single ones.

Sixteen, eight or four adjacent rows that keep the same columns need one column number for all of their weights, and one
input for all of them as well, which a processor spreads over its lanes for nothing. So a block costs no more than its
values, and at any sparsity the product is as fast as reading them. Elsen et al., 2020, arXiv 1911.09723, section 3.2,
for blocks of four rows; SparseByteNN, 2023, arXiv 2310.19509, for sixteen.

With a height of one this is the common form of compressed sparse rows. A weight then takes the two bytes of its column
number besides its value, which pays above some 95 % of zeros: before, a bit for every weight is less.

Vectors of a larger batch lie side by side, sixteen in the lanes, and each stored weight meets all of them at once, but
for blocks of sixteen, which fill the lanes by themselves. Work for zeros is never done, so that no dense tile is
expanded however many vectors there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.kernels.matrix import Call, PackedMatrix, check_weight, quantize_steps
from gossamer.kernels.native import VALUE_CODES, native

FORMATS = ("float32", "bfloat16", "int8")
HEIGHTS = (1, 4, 8, 16)
_SLACK = 64  # bytes behind the last value that a kernel may read
_PLACES = 16  # column numbers behind the last that a kernel may read
_NARROW = 1 << 16  # columns whose numbers 16 bits hold
_LARGEST = 127
_WASTE = 0.1  # zeros that blocks may hold, beside the weights that are not zero
_Own = TypeVar("_Own", bound="BlockMatrix")


@dataclass(frozen=True, eq=False, repr=False)
class BlockMatrix(PackedMatrix):
    """A matrix as the blocks of ``height × 1`` weights that are kept; see the classes below for the heights.

    Attributes
    ----------
    shape
        ``(rows, columns)``. If the rows do not divide into bands of `height`, the last band is filled up with zeros.
    format
        What a value is: ``float32``, ``bfloat16`` or ``int8``.
    starts
        ``(⌈rows / height⌉ + 1,)`` int64: where the blocks of each band begin.
    places
        ``(n + 16,)`` uint16, or int32 for more than 65,536 columns: the column of each of n blocks, ascending in a
        band; behind the last zeros.
    values
        ``(n · height,)`` and 64 more bytes that are never used: the weights of each block, from its first row down.
    scales
        ``(rows,)`` float32 for ``int8``: a weight is its value times its row's scale.
    """

    shape: tuple[int, int]
    format: str
    starts: Tensor
    places: Tensor
    values: Tensor
    scales: Tensor | None = None

    height: ClassVar[int] = 1
    many: ClassVar[int] = 1 << 30
    #: vectors from which on they lie side by side; measured
    side_by_side: ClassVar[int] = 2

    @classmethod
    def from_dense(cls: type[_Own], weight: Tensor, format: str | None = None) -> _Own:
        """Pack a dense matrix: blocks that are wholly zero are left out.

        Parameters
        ----------
        weight
            ``(rows, columns)``, float32, bfloat16 or float16.
        format
            What values become; by default they stay what they are. ``int8`` rounds to the nearest of ±127 steps, the
            largest weight of a row being the last step.

        Raises
        ------
        ConfigurationError
            If shape, dtype or format do not fit.
        NonFiniteError
            If a weight is NaN or infinite and the format is ``int8``.
        """
        format = str(weight.dtype).removeprefix("torch.") if format is None else format
        check_weight(weight, format, FORMATS, whole=format == "int8")
        rows, columns = weight.shape
        weight, scales = weight.detach().cpu(), None
        if format == "int8":
            weight, scales = quantize_steps(weight.float(), _LARGEST, max(1, columns))
            scales = scales.flatten() if columns else torch.zeros(rows)
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % cls.height))
        bands = padded.view(len(padded) // cls.height, cls.height, columns)
        kept = (bands != 0).any(1)
        stored = getattr(torch, format)
        values = torch.cat(
            [bands.transpose(1, 2)[kept].flatten().to(stored), torch.zeros(_SLACK // stored.itemsize, dtype=stored)]
        )
        places = torch.nn.functional.pad(kept.nonzero()[:, 1], (0, _PLACES)).to(_place_dtype(columns))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        return cls((rows, columns), format, starts, places, values, scales)

    @property
    def kept(self) -> int:
        """Blocks that are stored."""
        return len(self.places) - _PLACES

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"starts": self.starts, "places": self.places, "values": self.values}
        return found if self.scales is None else {**found, "scales": self.scales}

    def mask(self) -> Tensor:
        """``(⌈rows / height⌉, columns)`` bool, True where a block is stored."""
        kept = torch.zeros(len(self.starts) - 1, self.shape[1], dtype=torch.bool)
        kept[self._bands(), self._places()] = True
        return kept

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        problem = self._problem()
        if problem:
            what = f"{self.format} blocks of {self.height} × 1"
            raise CheckpointError(f"{name} ({what}) is broken: {problem}; make or fetch it again")

    def _problem(self) -> str | None:
        rows, columns = self.shape
        if self.format not in FORMATS:
            return f"unknown format {self.format!r}, known are {', '.join(FORMATS)}"
        stored, slack = getattr(torch, self.format), _SLACK // getattr(torch, self.format).itemsize
        count = max(0, self.kept)
        expected = {
            "starts": ((-(-rows // self.height) + 1,), torch.int64),
            "places": ((count + _PLACES,), _place_dtype(columns)),
            "values": ((count * self.height + slack,), stored),
            "scales": ((rows,), torch.float32),
        }
        for part, tensor in self.tensors().items():
            if (tuple(tensor.shape), tensor.dtype) != expected[part] or not tensor.is_contiguous():
                shape, dtype = expected[part]
                return f"its {part} are {tuple(tensor.shape)} {tensor.dtype} instead of {shape} {dtype}"
        if (self.scales is not None) != (self.format == "int8"):
            return "it has scales, which its format does not" if self.format != "int8" else "its scales are missing"
        if int(self.starts[0]) or int(self.starts[-1]) != count or bool((self.starts.diff() < 0).any()):
            return f"its starts do not rise from 0 to the {count} blocks that are there"
        places = self.places.to(torch.int64)  # kernels look at those behind the last, too
        if count and not 0 <= int(places.min()) <= int(places.max()) < columns:
            return f"a place is outside the {columns} columns ({int(places.min())} … {int(places.max())})"
        if not bool(((places[:count].diff() > 0) | (self._bands().diff() > 0)).all()):
            return "the places of a band do not rise"
        if self.scales is not None and not bool(torch.isfinite(self.scales).all()):
            return "a scale is NaN or infinite"
        return None

    def _bands(self) -> Tensor:
        """The band of every block, ``(n,)``."""
        return torch.arange(len(self.starts) - 1).repeat_interleave(self.starts.diff())

    def _places(self) -> Tensor:
        """The column of every block, ``(n,)`` int64."""
        return self.places[: self.kept].to(torch.int64)

    def _matrix(self) -> tuple[int | bool, ...]:
        return (
            *self.shape,
            self.starts.data_ptr(),
            self.places.data_ptr(),
            self.places.dtype == torch.int32,
            self.values.data_ptr(),
            VALUE_CODES[self.values.dtype],
            0 if self.scales is None else self.scales.data_ptr(),
            self.height,
        )

    def _multiply(self, call: Call, threads: int) -> None:
        together = len(call.inputs) >= self.side_by_side
        native().block_linear(*self._matrix(), *call.arguments(threads), together)

    def _expand_into(self, tile: Tensor, first: int, last: int, threads: int) -> None:
        native().block_expand(*self._matrix(), first, last, tile.data_ptr(), threads)

    def _reference(self, first: int, last: int) -> Tensor:
        """These rows, dense, with torch alone."""
        begin, end = first // self.height, -(-last // self.height)
        blocks = slice(int(self.starts[begin]), int(self.starts[end]))
        dense = torch.zeros(end - begin, self.shape[1], self.height)
        stored = self.values[blocks.start * self.height : blocks.stop * self.height].float()
        dense[self._bands()[blocks] - begin, self._places()[blocks]] = stored.view(-1, self.height)
        tile = dense.transpose(1, 2).flatten(0, 1)[first - begin * self.height : last - begin * self.height]
        return tile.contiguous() if self.scales is None else tile * self.scales[first:last, None]


class CsrMatrix(BlockMatrix):
    """Single weights with their columns: compressed sparse rows."""


class FourRowMatrix(BlockMatrix):
    """Blocks of 4 × 1 weights."""

    height: ClassVar[int] = 4
    side_by_side: ClassVar[int] = 6


class EightRowMatrix(BlockMatrix):
    """Blocks of 8 × 1 weights."""

    height: ClassVar[int] = 8
    side_by_side: ClassVar[int] = 12


class SixteenRowMatrix(BlockMatrix):
    """Blocks of 16 × 1 weights, which fill the lanes by themselves."""

    height: ClassVar[int] = 16
    side_by_side: ClassVar[int] = 1 << 30


def block_height(weight: Tensor) -> int:
    """Return the height of the blocks that a matrix is made of: 1 where it is made of single weights.

    The greatest height whose blocks hold hardly more weights than those that are not zero (a tenth more at most).
    """
    kept = weight != 0
    few = (1 + _WASTE) * float(kept.sum())
    for height in reversed(HEIGHTS[1:]):
        padded = torch.nn.functional.pad(kept, (0, 0, 0, -len(kept) % height))
        blocks = padded.view(len(padded) // height, height, weight.shape[1]).any(1)
        if height * float(blocks.sum()) <= few:
            return height
    return 1


def _place_dtype(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= _NARROW else torch.int32

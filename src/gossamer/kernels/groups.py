"""Matrices of which whole groups of sixteen adjacent weights of a row are stored, in four bits each.

A group that is gone takes no space at all, and one that stays takes 12½ bytes: eight of codes, two of scale, half a
byte of zero, and two that say which group of its row it is. With half of the groups gone a weight takes 3.13 bits. Zeng
et al., 2025, arXiv 2412.17560, section 3 (block-sparse rows with 1×16 blocks).

Processors with AVX-512 multiply whole numbers: inputs, if they are finite, are rounded to eight bits with a scale for
every 32 of them (:func:`gossamer.kernels.matrix.round_inputs`), and four groups are one instruction.

The work is divided among threads by groups and not by rows (the task-centric scheme of that paper): every thread gets
the same number of groups, up to one row, which is never cut, so that the result does not depend on how many there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.quantization import Grid, Quantizer
from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.kernels.matrix import Call, PackedMatrix, check_weight
from gossamer.kernels.native import available, instruction_set, native

GROUP = 16  # weights of a group
MOST_GROUPS = 1 << 16  # of a row: places are 16-bit numbers
_LEVELS = 15
_WHOLE_NUMBERS = ("avx512", "avx512_bf16")  # instruction sets with sums of products of bytes
_MOST_ROUNDED = 16384  # columns; inputs of longer rows are not rounded
# weight i of a group is nibble i / 2 of the lower half of its word for even i, of the upper half for odd i
_SHIFTS = torch.tensor([4 * (i // 2) + 32 * (i % 2) for i in range(GROUP)])
# half the distance to the next number of a dtype, for numbers of ½ … 1; float32 products of scale and code are exact
_HALF_STEP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 0.0}


@dataclass(frozen=True, eq=False, repr=False)
class GroupMatrix(PackedMatrix):
    """A matrix as the groups that are kept: where they are, their codes, scales and zeros.

    A weight is ``scale · (code − zero)``. If the columns do not divide into groups, the last group of a row is filled
    up with zeros.

    Attributes
    ----------
    shape
        ``(rows, columns)``.
    starts
        ``(rows + 1,)`` int64: where the groups of each row begin.
    places
        ``(n rounded up to a multiple of 16,)`` uint16: which group of its row, ascending within a row; behind the last
        group zeros.
    words
        ``(n,)`` int64: sixteen codes; weight i is nibble i / 2 of the lower half for even i, of the upper half for odd.
    scales
        ``(n rounded up to a multiple of 16,)`` float16, positive.
    zeros
        ``(⌈n / 16⌉,)`` int64: the zeros of sixteen groups, in the order of the codes of a word.
    balanced
        Whether threads get equally many groups (True) or equally many rows. The result is the same.
    """

    shape: tuple[int, int]
    starts: Tensor
    places: Tensor
    words: Tensor
    scales: Tensor
    zeros: Tensor
    balanced: bool = True
    format: str = field(default="int4", init=False)

    many: ClassVar[int] = 96  # measured: decoding in registers stays ahead of a dense tile for this long

    @classmethod
    def from_codes(cls, codes: Tensor, kept: Tensor, scales: Tensor, zeros: Tensor) -> GroupMatrix:
        """Pack codes that have been chosen.

        Parameters
        ----------
        codes
            ``(rows, columns)``, whole numbers of 0 … 15, any dtype; those of groups that are not kept are ignored.
        kept
            ``(rows, ⌈columns / 16⌉)`` bool.
        scales
            Of the shape of `kept`; positive, and float16 values.
        zeros
            Of the shape of `kept`; whole numbers of 0 … 15.

        Raises
        ------
        ConfigurationError
            If shapes do not fit, a row has more than 65,536 groups, or a number is out of range.
        NonFiniteError
            If a scale is NaN or infinite.
        """
        rows, columns = _check_shapes(codes, kept, scales, zeros)
        kept = kept.cpu()
        chosen = _grouped(codes.detach().cpu())[kept].to(torch.int64)
        steps, middles = scales.detach().cpu()[kept], zeros.detach().cpu()[kept].to(torch.int64)
        if not torch.isfinite(steps).all():
            raise NonFiniteError("a scale is NaN or infinite; look for it where the weights were quantised")
        if not torch.equal(steps.half().to(steps.dtype), steps) or bool((steps <= 0).any()):
            raise ConfigurationError("a scale is not a positive float16 value; round the grid with Grid.storable first")
        for name, numbers in (("code", chosen), ("zero", middles)):
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) <= _LEVELS:
                raise ConfigurationError(
                    f"a {name} is outside 0 … {_LEVELS} ({int(numbers.min())} … {int(numbers.max())}); use four bits"
                )
        count = len(steps)
        slack = -count % GROUP
        return cls(
            (rows, columns),
            torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)]),
            torch.nn.functional.pad(kept.nonzero()[:, 1], (0, slack)).to(torch.uint16),
            _words(chosen),
            torch.nn.functional.pad(steps.half(), (0, slack)),
            _words(torch.nn.functional.pad(middles, (0, slack)).view(-1, GROUP)),
        )

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor | None = None) -> GroupMatrix:
        """Pack a dense matrix.

        Groups whose weights already lie on a grid of sixteen steps with a float16 scale, such as those that GQSA has
        made, are stored as they are: rounded to the dtype of the weight, what is stored is the weight bit for bit.
        Others are rounded to the nearest points of a grid between their extremes.

        Parameters
        ----------
        weight
            ``(rows, columns)``, float32, bfloat16 or float16.
        kept
            ``(rows, ⌈columns / 16⌉)`` bool: groups to store; by default those that are not wholly zero.

        Raises
        ------
        ConfigurationError
            If shapes do not fit, or a row has more than 65,536 groups.
        NonFiniteError
            If a weight is NaN or infinite.
        """
        check_weight(weight, "int4", ("int4",), whole=True)
        groups = _grouped(weight.detach().cpu().float())
        kept = (groups != 0).any(2) if kept is None else kept
        grid = _present_grid(groups, Quantizer(4).fit(groups).storable(), weight.dtype)
        codes = grid.codes(groups).flatten(1)[:, : weight.shape[1]]
        return cls.from_codes(codes, kept, grid.scale.squeeze(2), grid.zero.squeeze(2))

    @property
    def kept(self) -> int:
        """Groups that are stored."""
        return len(self.words)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        names = ("starts", "places", "words", "scales", "zeros")
        return {name: getattr(self, name) for name in names}

    def mask(self) -> Tensor:
        """``(rows, ⌈columns / 16⌉)`` bool, True where a group is stored."""
        rows, columns = self.shape
        kept = torch.zeros(rows, -(-columns // GROUP), dtype=torch.bool)
        kept[self._rows(), self._places()] = True
        return kept

    def rounds(self, vectors: int) -> bool:  # noqa: D102
        whole = instruction_set() in _WHOLE_NUMBERS
        return available() and whole and vectors < self.many and self.shape[1] <= _MOST_ROUNDED

    def _expand_into(self, tile: Tensor, first: int, last: int, threads: int) -> None:
        native().group_expand(*self._matrix(), first, last, tile.data_ptr(), threads)

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        problem = self._problem()
        if problem:
            raise CheckpointError(f"{name} (groups of {GROUP}) is broken: {problem}; make or fetch it again")

    def _problem(self) -> str | None:
        rows, columns = self.shape
        count, width = len(self.words), -(-columns // GROUP)
        if width > MOST_GROUPS:
            return f"a row of {columns} columns has {width} groups, and places are numbers below {MOST_GROUPS}"
        blocks = -(-count // GROUP)
        expected = {
            "starts": ((rows + 1,), torch.int64),
            "places": ((blocks * GROUP,), torch.uint16),
            "words": ((count,), torch.int64),
            "scales": ((blocks * GROUP,), torch.float16),
            "zeros": ((blocks,), torch.int64),
        }
        for part, tensor in self.tensors().items():
            if (tuple(tensor.shape), tensor.dtype) != expected[part] or not tensor.is_contiguous():
                shape, dtype = expected[part]
                return f"its {part} are {tuple(tensor.shape)} {tensor.dtype} instead of {shape} {dtype}"
        if int(self.starts[0]) or int(self.starts[-1]) != count or bool((self.starts.diff() < 0).any()):
            return f"its starts do not rise from 0 to the {count} groups that are there"
        furthest = int(self.places.to(torch.int64).max()) if count else 0  # kernels look at those behind the last, too
        if count and furthest >= width:
            return f"a place is {furthest} in rows of {width} groups"
        places = self._places()
        rising = (places.diff() > 0) | (self._rows().diff() > 0)
        if not bool(rising.all()):
            return "the places of a row do not rise"
        steps = self.scales[:count]
        if not bool(torch.isfinite(self.scales).all()) or bool((steps <= 0).any()):
            return "a scale is not finite and positive"
        return None

    def _rows(self) -> Tensor:
        """The row of every group, ``(n,)``."""
        return torch.arange(self.shape[0]).repeat_interleave(self.starts.diff())

    def _places(self) -> Tensor:
        """Which group of its row every group is, ``(n,)`` int64."""
        return self.places[: self.kept].to(torch.int64)

    def _matrix(self) -> tuple[int, ...]:
        return (*self.shape, *(tensor.data_ptr() for tensor in self.tensors().values()))

    def _multiply(self, call: Call, threads: int) -> None:
        native().group_linear(*self._matrix(), *call.arguments(threads), self.balanced)

    def _reference(self, first: int, last: int) -> Tensor:
        """These rows, dense, with torch alone."""
        columns = self.shape[1]
        begin, end = int(self.starts[first]), int(self.starts[last])
        codes = (self.words[begin:end, None] >> _SHIFTS) & _LEVELS
        zeros = ((self.zeros[:, None] >> _SHIFTS) & _LEVELS).flatten()[begin:end, None]
        values = self.scales[begin:end, None].float() * (codes - zeros).float()
        dense = torch.zeros(last - first, -(-columns // GROUP), GROUP)
        dense[self._rows()[begin:end] - first, self._places()[begin:end]] = values
        return dense.flatten(1)[:, :columns].contiguous()


def _check_shapes(codes: Tensor, kept: Tensor, scales: Tensor, zeros: Tensor) -> tuple[int, int]:
    if codes.ndim != 2:
        raise ConfigurationError(f"the codes are {tuple(codes.shape)}; give a matrix (rows, columns)")
    rows, columns = codes.shape
    width = -(-columns // GROUP)
    if width > MOST_GROUPS:
        raise ConfigurationError(
            f"a row has {columns} columns, which are {width} groups; at most {MOST_GROUPS} can be told apart"
        )
    if kept.dtype != torch.bool:
        raise ConfigurationError(f"kept is {kept.dtype}; give bool")
    for name, tensor in (("kept", kept), ("scales", scales), ("zeros", zeros)):
        if tensor.shape != (rows, width):
            raise ConfigurationError(
                f"{name} is {tuple(tensor.shape)}; {rows} × {columns} weights have {(rows, width)} groups of {GROUP}"
            )
    return rows, columns


def _grouped(matrix: Tensor) -> Tensor:
    """``(rows, columns)`` → ``(rows, ⌈columns / 16⌉, 16)``, zeros at the end."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % GROUP))
    return padded.view(len(matrix), padded.shape[1] // GROUP, GROUP)


def _words(codes: Tensor) -> Tensor:
    """``(n, 16)`` numbers of 0 … 15 → ``(n,)`` int64."""
    return (codes << _SHIFTS).sum(1)


def _present_grid(groups: Tensor, fitted: Grid, dtype: torch.dtype) -> Grid:
    """The grid on which the weights of each group lie already, where there is one; else the one that was fitted.

    The smallest weight is a step times 1 … 15: one of these fifteen quotients is near the step, if there is one. Each
    weight w = n · step, rounded to its dtype, then bounds the step, and the middle of what all bounds allow, rounded to
    float16, is a step that gives every weight again, if any float16 number is.
    """
    scale, zero = fitted.scale.clone().flatten(), fitted.zero.clone().flatten()
    left = (groups != 0).any(2).flatten().nonzero().flatten()
    for divisor in range(1, _LEVELS + 1):
        weights = groups.flatten(0, 1)[left]
        sizes = weights.abs()
        steps = torch.round(weights * (divisor / sizes.masked_fill(sizes == 0, torch.inf).amin(1, keepdim=True)))
        mantissa, exponent = torch.frexp(sizes)
        off = torch.ldexp(torch.full_like(sizes, _HALF_STEP[dtype]), exponent)
        below = off.where(mantissa != 0.5, off / 2)  # numbers are denser under a power of two
        least = torch.where(steps == 0, 0, (sizes - below) / steps.abs()).amax(1, keepdim=True)
        most = torch.where(steps == 0, torch.inf, (sizes + off) / steps.abs()).amin(1, keepdim=True)
        step = ((least + most) / 2).half().float()
        low, high = steps.amin(1).clamp_max(0), steps.amax(1).clamp_min(0)
        fits = ((steps * step).to(dtype).float() == weights).all(1) & (high - low <= _LEVELS)
        scale[left[fits]], zero[left[fits]] = step[fits, 0], -low[fits]
        left = left[~fits]
    return Grid(scale.view_as(fitted.scale), zero.view_as(fitted.zero), _LEVELS)

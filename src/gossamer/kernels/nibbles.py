"""Matrices with every weight stored in four bits, with a scale, and if wanted an offset, for each group of columns.

Sixteen rows lie side by side and are multiplied together, each in a lane of its own, by inputs that are rounded to
eight bits with a scale for every 32: then sums of products of codes are exact and take one instruction for 64 of them.
The rounding (:func:`gossamer.kernels.matrix.round_inputs`) changes a product by at most Σ |code · scale · step| / 2;
where there are many vectors, the weights are expanded instead and nothing is rounded.

The grid of a group is searched and not only taken from its extremes: the number of steps between the smallest and the
largest weight is whatever gives the least squared error. So weights that already lie on a grid of sixteen steps, such
as those of a four-bit GGUF file, come back as they were, up to the rounding of scale and offset to float16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.kernels.matrix import Call, PackedMatrix
from gossamer.kernels.native import available, native

_WORD = 8  # weights of a word
_PANEL = 16  # rows that lie side by side
_GROUP = 32  # columns that share a scale come in multiples of this
_AT_ONCE = 1 << 17  # weights whose grids are searched together
# column i of a word is the lower half of byte i for i < 4, the upper half of byte i − 4 for the others
_SHIFTS = torch.tensor([8 * (i % 4) + 4 * (i // 4) for i in range(_WORD)])
_SHRINK = (1.0, 0.95, 0.9, 0.85)


@dataclass(frozen=True, eq=False, repr=False)
class NibbleMatrix(PackedMatrix):
    """A dense matrix in four bits.

    With offsets a weight is ``scale · code + offset`` for a code of 0 … 15, without ``scale · code`` for −8 … 7.

    Attributes
    ----------
    shape
        ``(rows, columns)``.
    words
        ``(⌈rows / 16⌉, ⌈columns / group⌉ · group / 8, 16)`` int32: eight columns of each of sixteen rows. Column i is
        the lower half of byte i for i < 4, the upper half of byte i − 4 for the others.
    scales
        ``(⌈rows / 16⌉, ⌈columns / group⌉, 16)`` float16; 0 for rows that are not there.
    offsets
        The same, or None.
    group
        Columns that share a scale, a multiple of 32.
    """

    shape: tuple[int, int]
    words: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    group: int = _GROUP
    format: str = field(default="int4", init=False)

    many: ClassVar[int] = 24

    @classmethod
    def from_dense(cls, weight: Tensor, group: int = _GROUP, offsets: bool = True) -> NibbleMatrix:
        """Round a matrix to four bits.

        Parameters
        ----------
        weight
            ``(rows, columns)``, any floating dtype.
        group
            Columns that share a scale, a multiple of 32.
        offsets
            Whether a group has an offset as well: 5 instead of 4.5 bits a weight for groups of 32.

        Raises
        ------
        ConfigurationError
            If shape, dtype or group do not fit.
        NonFiniteError
            If a weight is NaN or infinite, or too large for scales in float16.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ConfigurationError(
                f"the weight is {tuple(weight.shape)} {weight.dtype}; give a floating-point matrix (rows, columns)"
            )
        if group < _GROUP or group % _GROUP:
            raise ConfigurationError(f"group is {group}; it must be a multiple of {_GROUP}")
        rows, columns = weight.shape
        runs = -(-columns // group)
        step = max(1, _AT_ONCE // max(1, runs * group))
        search = _with_offset if offsets else without_offset
        parts = []
        for first in range(0, rows, step):
            part = weight[first : first + step].detach().cpu().float()
            if not torch.isfinite(part).all():
                raise NonFiniteError("a weight is NaN or infinite and has no four-bit value; look where it was made")
            parts.append(search(grouped(part, group)))
        if not parts:
            parts.append(search(torch.zeros(0, runs, group)))
        scales, begins, codes = (torch.cat(pieces) for pieces in zip(*parts))
        if not (torch.isfinite(scales).all() and torch.isfinite(begins).all()):
            raise NonFiniteError("a weight is too large for scales in float16 (65504); keep this matrix in bfloat16")
        eights = codes.to(torch.int64).view(rows, runs * group // _WORD, _WORD)
        words = (_panels(eights) << _SHIFTS[:, None]).sum(2)
        grids = (_panels(scales.half()), _panels(begins.half()) if offsets else None)
        return cls((rows, columns), words.to(torch.int32), *grids, group)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        found = {"words": self.words, "scales": self.scales}
        return found if self.offsets is None else {**found, "offsets": self.offsets}

    def rounds(self, vectors: int) -> bool:  # noqa: D102
        return available() and vectors < self.many

    def _expand_into(self, tile: Tensor, first: int, last: int, threads: int) -> None:
        native().nibble_expand(*self._matrix(), first, last, tile.data_ptr(), threads)

    def validate(self, name: str = "matrix") -> None:  # noqa: D102
        problem = self._problem()
        if problem:
            raise CheckpointError(f"{name} (four-bit dense) is broken: {problem}; make or fetch it again")

    def _problem(self) -> str | None:
        rows, columns = self.shape
        if self.group < _GROUP or self.group % _GROUP:
            return f"its scales are for {self.group} columns, which is no multiple of {_GROUP}"
        panels, runs = -(-rows // _PANEL), -(-columns // self.group)
        expected = (panels, runs * self.group // _WORD, _PANEL)
        if self.words.shape != expected or self.words.dtype != torch.int32 or not self.words.is_contiguous():
            return f"its words are {tuple(self.words.shape)} {self.words.dtype} instead of {expected} int32"
        expected = (panels, runs, _PANEL)
        for name, numbers in (("scales", self.scales), ("offsets", self.offsets)):
            if numbers is None:
                continue
            if numbers.shape != expected or numbers.dtype != torch.float16 or not numbers.is_contiguous():
                return f"its {name} are {tuple(numbers.shape)} {numbers.dtype} instead of {expected} float16"
            if not torch.isfinite(numbers).all():
                return f"one of its {name} is NaN or infinite"
        return None

    def _matrix(self) -> tuple[int, ...]:
        return (
            *self.shape,
            self.words.data_ptr(),
            self.scales.data_ptr(),
            0 if self.offsets is None else self.offsets.data_ptr(),
            self.group,
        )

    def _multiply(self, call: Call, threads: int) -> None:
        native().nibble_linear(*self._matrix(), *call.arguments(threads))

    def _reference(self, first: int, last: int) -> Tensor:
        """Rows, dense, with torch alone."""
        panels = slice(first // _PANEL, -(-last // _PANEL))
        codes = _rows((self.words[panels].unsqueeze(2) >> _SHIFTS[:, None] & 15).flatten(1, 2)).float()
        scales = _rows(self.scales[panels]).float().repeat_interleave(self.group, 1)
        dense = (codes if self.offsets is not None else codes - 8) * scales
        if self.offsets is not None:
            dense = dense + _rows(self.offsets[panels]).float().repeat_interleave(self.group, 1)
        begin = panels.start * _PANEL
        return dense[first - begin : last - begin, : self.shape[1]].contiguous()


def _panels(lines: Tensor) -> Tensor:
    """``(rows, width, …)`` → ``(⌈rows / 16⌉, width, …, 16)``, zeros where there are no rows."""
    missing = -len(lines) % _PANEL
    lines = torch.cat([lines, lines.new_zeros(missing, *lines.shape[1:])]) if missing else lines
    return lines.view(len(lines) // _PANEL, _PANEL, *lines.shape[1:]).movedim(1, -1).contiguous()


def _rows(panels: Tensor) -> Tensor:
    """``(panels, width, 16)`` → ``(16 · panels, width)``."""
    return panels.movedim(-1, 1).flatten(0, 1)


def grouped(weight: Tensor, group: int) -> Tensor:
    """``(rows, groups, group)``; the last group is filled up with its last weight, which changes no grid."""
    rows, columns = weight.shape
    missing = -columns % group
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(rows, missing)], 1)
    return weight.reshape(rows, -1, group)


def _with_offset(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, offsets and codes: the number of steps from the least to the largest weight that fits best."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    begin = low.half().float()
    candidates = (((high - low) / steps).half().float() for steps in range(15, 0, -1))
    scale, codes = _best(groups, candidates, begin, 0, 15)
    return scale.squeeze(2), begin.squeeze(2), codes


def without_offset(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and codes on −8 … 7, the weight of largest magnitude at one of the ends or a little beyond it."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    candidates = ((factor * extreme / end).half().float() for end in (-8, 7) for factor in _SHRINK)
    scale, codes = _best(groups, candidates, torch.zeros_like(low), -8, 7)
    return scale.squeeze(2), torch.zeros_like(scale.squeeze(2)), codes + 8


def _best(groups: Tensor, candidates: object, begin: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """The scale of each group with the least squared error, and the codes."""
    found: tuple[Tensor, Tensor, Tensor] | None = None
    for scale in candidates:  # type: ignore[attr-defined]
        safe = torch.where(scale == 0, 1.0, scale)
        codes = torch.round((groups - begin) / safe).clamp_(least, most)
        error = (scale * codes + begin - groups).square_().sum(2, keepdim=True)
        if found is None:
            found = error, scale, codes
            continue
        better = error < found[0]
        found = (
            torch.where(better, error, found[0]),
            torch.where(better, scale, found[1]),
            torch.where(better, codes, found[2]),
        )
    assert found is not None
    return found[1], found[2]

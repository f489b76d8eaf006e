"""The shapes that zeros may take.

A pattern turns scores (higher = more worth keeping) into a mask (True = kept) with an exact count and stable ties:
among equal scores the lower index is dropped first. Scores have the shape of the weight, ``(out, in)`` or
``(out, in, kernel…)``; dimension 0 is "the row", dimension 1 the input dimension.

====================  =================================================  ==========================
text                  object                                             zeros
====================  =================================================  ==========================
``unstructured:row``  ``Unstructured("row")``                            ⌊s·n⌋ in every row
``unstructured``      ``Unstructured("layer")``                          ⌊s·n⌋ in the layer
``unstructured:model``  ``Unstructured("model")``                        ⌊s·n⌋ over all layers
``2:4``               ``NM(2, 4)``                                       2 of every 4 along the input
``2:4@0``             ``NM(2, 4, dim=0)``                                2 of every 4 along the output
``16x1``              ``Block((16, 1))``                                 whole blocks
``rows``              ``Channels(0)``                                    whole output channels
``columns``           ``Channels(1)``                                    whole input channels
``kernels:16``        ``KernelGroup(16)``                                kernels, for 16 outputs at once
``kernel-rows``       ``KernelRows()``                                   rows of kernels
====================  =================================================  ==========================
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.selection import (
    Sparsity,
    check_scores,
    dropped_count,
    keep_by_comparing,
    keep_highest,
    keep_highest_jointly,
    keep_one,
)
from gossamer.errors import PatternError, SparsityError, UnknownNameError

Scope = Literal["row", "layer", "model"]
_SCOPES = ("row", "layer", "model")


class Pattern(ABC):
    """A shape of zeros. Frozen, comparable, and readable from and printable as text."""

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes, or None where it is free."""
        return None

    @abstractmethod
    def __str__(self) -> str: ...

    def check_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:
        """Raise :class:`PatternError` if a weight of this shape cannot take the pattern."""
        if len(shape) < 2:
            raise PatternError(f"{name} has shape {tuple(shape)}; {self} needs at least two dimensions (out, in)")

    @abstractmethod
    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:
        """Mask of what is kept.

        Parameters
        ----------
        scores
            ``(out, in)`` or ``(out, in, kernel…)``; higher is more worth keeping.
        sparsity
            Fraction of zeros in [0, 1). May be omitted where the pattern fixes it.
        name
            What error messages call the weight.

        Returns
        -------
        Tensor
            Bool, the shape of `scores`, True where kept.

        Raises
        ------
        SparsityError
            If the sparsity is missing, outside [0, 1), or contradicts the pattern.
        PatternError
            If the pattern does not divide the shape.
        NonFiniteError
            If a score is NaN.
        """

    def select_jointly(self, scores: Mapping[str, Tensor], sparsity: Sparsity | None = None) -> dict[str, Tensor]:
        """Masks of several layers; they are independent unless the scope of the pattern is the model."""
        return {name: self.select(values, sparsity, name) for name, values in scores.items()}

    def resolve(self, sparsity: Sparsity | None) -> Sparsity:
        """The sparsity in force: the pattern's own, the given one, or an error where they contradict.

        Raises
        ------
        SparsityError
            If neither fixes a sparsity, or they differ.
        """
        own = self.sparsity
        if sparsity is None:
            if own is None:
                raise SparsityError(f"the pattern {self} leaves the sparsity open: give one in [0, 1)")
            return own
        if own is not None and not math.isclose(float(sparsity), own, abs_tol=1e-9):
            raise SparsityError(f"sparsity {float(sparsity):g} contradicts the pattern {self}, which fixes {own:g}")
        return sparsity

    def verify(self, mask: Tensor, sparsity: Sparsity | None = None, name: str = "mask") -> None:
        """Raise :class:`PatternError` unless `mask` has exactly the zeros that `select` would give it."""
        expected = self.select(mask.float(), sparsity, name)
        if not torch.equal(expected, mask):
            raise PatternError(
                f"{name} has {int((~mask).sum())} zeros of {mask.numel()} that do not follow {self}"
                + (f" at sparsity {float(sparsity):g}" if sparsity is not None else "")
            )

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """Read a pattern from its text form (see the table of this module).

        Raises
        ------
        UnknownNameError
            If the text is no known form.
        PatternError
            If its numbers are impossible, such as ``5:4``.
        """
        if isinstance(text, Pattern):
            return text
        text = text.strip().lower()
        if match := re.fullmatch(r"(\d+):(\d+)(?:@(\d+))?", text):
            return NM(int(match[1]), int(match[2]), dim=int(match[3] or 1))
        if match := re.fullmatch(r"(\d+)x(\d+)(?::(\w+))?", text):
            return Block((int(match[1]), int(match[2])), scope=_scope(match[3] or "layer"))
        if text in ("rows", "columns"):
            return Channels(0 if text == "rows" else 1)
        if match := re.fullmatch(r"kernels:(\d+)", text):
            from gossamer.core.kernel_groups import KernelGroup

            return KernelGroup(int(match[1]))
        if text == "kernel-rows":
            from gossamer.core.kernel_groups import KernelRows

            return KernelRows()
        kind, _, scope = text.partition(":")
        if kind == "unstructured":
            return Unstructured(_scope(scope or "layer"))
        known = [
            "unstructured",
            "unstructured:row",
            "unstructured:model",
            "2:4",
            "4:8",
            "16x1",
            "rows",
            "columns",
            "kernels:16",
            "kernel-rows",
        ]
        raise UnknownNameError("pattern", text, known)


def _scope(text: str) -> Scope:
    if text not in _SCOPES:
        raise UnknownNameError("scope", text, _SCOPES)
    return text  # type: ignore[return-value]


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Zeros anywhere; `scope` is the set inside which scores compete.

    Parameters
    ----------
    scope
        ``"row"``: every output row loses the same number; ``"layer"``: one ranking for the weight matrix;
        ``"model"``: one ranking over all layers (through :meth:`select_jointly`).
    """

    scope: Scope = "layer"

    def __post_init__(self) -> None:
        _scope(self.scope)

    def __str__(self) -> str:
        return "unstructured" if self.scope == "layer" else f"unstructured:{self.scope}"

    def check_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:  # noqa: D102
        if self.scope == "row":
            super().check_shape(shape, name)

    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:  # noqa: D102
        sparsity = self.resolve(sparsity)
        self.check_shape(scores.shape, name)
        flat = scores.flatten(1) if self.scope == "row" else scores.reshape(1, -1)
        return keep_highest(flat, dropped_count(flat.shape[1], sparsity), name).view(scores.shape)

    def select_jointly(self, scores: Mapping[str, Tensor], sparsity: Sparsity | None = None) -> dict[str, Tensor]:
        """Masks of several layers: one ranking over all of them where the scope is the model."""
        if self.scope != "model":
            return super().select_jointly(scores, sparsity)
        total = sum(values.numel() for values in scores.values())
        return keep_highest_jointly(scores, dropped_count(total, self.resolve(sparsity)))


@dataclass(frozen=True)
class NM(Pattern):
    """Exactly `n` kept of every `m` consecutive weights along one dimension.

    Parameters
    ----------
    n, m
        Kept and group size, ``1 <= n <= m``.
    dim
        1, the input dimension (what hardware expects), or any other.
    """

    n: int
    m: int
    dim: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m or self.dim < 0:
            raise PatternError(f"{self.n}:{self.m}@{self.dim} is impossible: 1 <= n <= m and dimension >= 0 are needed")

    @property
    def sparsity(self) -> float:
        """1 − n/m."""
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + (f"@{self.dim}" if self.dim != 1 else "")

    def check_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:  # noqa: D102
        super().check_shape(shape, name)
        if self.dim >= len(shape) or shape[self.dim] % self.m:
            raise PatternError(
                f"{name} has shape {tuple(shape)}: {self} needs dimension {self.dim} to be a multiple of {self.m}; "
                f"exclude this layer or choose another pattern"
            )

    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:  # noqa: D102
        self.resolve(sparsity)
        self.check_shape(scores.shape, name)
        scores = check_scores(scores, name).movedim(self.dim, -1)
        kept = self.keep(scores.reshape(-1, self.m))
        return kept.reshape(scores.shape).movedim(-1, self.dim).contiguous()

    def keep(self, groups: Tensor) -> Tensor:
        """Mask of scores ``(groups, m)`` without NaN, each row of which is a group."""
        if self.n == 1 and self.m > 16:
            return keep_one(groups)
        # counting comparisons grows with m, partitioning does not: they meet at about 32
        return keep_by_comparing(groups, self.m - self.n) if self.m <= 32 else keep_highest(groups, self.m - self.n)


@dataclass(frozen=True)
class Block(Pattern):
    """Whole rectangular blocks, ranked by their mean score.

    Parameters
    ----------
    size
        Rows × columns of a block, such as ``(16, 1)``; ``(1, g)`` is a group of g inputs.
    scope
        ``"layer"``: blocks of the whole matrix compete; ``"row"``: blocks of one row of blocks do.
    """

    size: tuple[int, int]
    scope: Scope = "layer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        if len(self.size) != 2 or min(self.size) < 1:
            raise PatternError(f"block size {self.size} is impossible: two positive numbers are needed, such as 16x1")
        if _scope(self.scope) == "model":
            raise PatternError("blocks compete within a row or a layer; for the whole model use an allocation")

    def __str__(self) -> str:
        return f"{self.size[0]}x{self.size[1]}" + ("" if self.scope == "layer" else f":{self.scope}")

    def check_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:  # noqa: D102
        super().check_shape(shape, name)
        if shape[0] % self.size[0] or shape[1] % self.size[1]:
            raise PatternError(
                f"{name} has shape {tuple(shape)}: blocks of {self} do not divide it; "
                f"exclude this layer or choose another block"
            )

    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:  # noqa: D102
        sparsity = self.resolve(sparsity)
        self.check_shape(scores.shape, name)
        blocks = self.reduce(check_scores(scores, name))
        competing = blocks.flatten(1) if self.scope == "row" else blocks.reshape(1, -1)
        kept = keep_highest(competing, dropped_count(competing.shape[1], sparsity), name).view(blocks.shape)
        return kept.repeat_interleave(self.size[0], 0).repeat_interleave(self.size[1], 1).contiguous()

    def reduce(self, scores: Tensor) -> Tensor:
        """Mean score of each block, ``(out / rows, in / columns, kernel…)``."""
        rows, columns = self.size
        return scores.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).mean(dim=(1, 3))


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole slices along one dimension: output channels (0) or input channels (1), ranked by their mean score."""

    dim: int = 0

    def __post_init__(self) -> None:
        if self.dim not in (0, 1):
            raise PatternError(f"channels along dimension {self.dim} are impossible: 0 (rows) or 1 (columns)")

    def __str__(self) -> str:
        return "rows" if self.dim == 0 else "columns"

    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:  # noqa: D102
        sparsity = self.resolve(sparsity)
        self.check_shape(scores.shape, name)
        per_channel = check_scores(scores, name).transpose(0, self.dim).flatten(1).mean(1)
        kept = keep_highest(per_channel.unsqueeze(0), dropped_count(len(per_channel), sparsity), name).flatten()
        shape = [1] * scores.dim()
        shape[self.dim] = -1
        return kept.view(shape).expand(scores.shape).contiguous()

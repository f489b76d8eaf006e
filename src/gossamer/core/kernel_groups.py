"""The patterns of SparseByteNN: whole kernels that go for a group of output channels at once, and rows of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.patterns import Pattern
from gossamer.core.selection import Sparsity, check_scores, dropped_count, keep_highest
from gossamer.errors import PatternError

GROUPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class KernelGroup(Pattern):
    """Kernels of one input channel are kept or dropped for a whole group of output channels.

    The unit is `size` adjacent output channels × one input channel × all positions of the kernel; units of a layer
    compete by the sum of their scores. If the output channels do not divide into groups, the last group is smaller;
    what is missing counts as zero. Xu et al., 2023, arXiv 2310.19509.

    Parameters
    ----------
    size
        Output channels of a group, those that a kernel of the runtime computes at once: 1, 2, 4, 8 or 16.
    """

    size: int = 16

    def __post_init__(self) -> None:
        if self.size not in GROUPS:
            raise PatternError(f"groups of {self.size} channels are impossible; use {', '.join(map(str, GROUPS))}")

    def __str__(self) -> str:
        return f"kernels:{self.size}"

    def reduce(self, scores: Tensor) -> Tensor:
        """Score of each unit, ``(⌈out / size⌉, in)``."""
        flat = scores.flatten(2).sum(2) if scores.dim() > 2 else scores
        missing = -flat.shape[0] % self.size
        return torch.nn.functional.pad(flat, (0, 0, 0, missing)).view(-1, self.size, flat.shape[1]).sum(1)

    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:  # noqa: D102
        sparsity = self.resolve(sparsity)
        self.check_shape(scores.shape, name)
        units = self.reduce(check_scores(scores, name))
        dropped = dropped_count(units.numel(), sparsity)
        kept = keep_highest(units.reshape(1, -1), dropped, name).view(units.shape)
        rows = kept.repeat_interleave(self.size, 0)[: scores.shape[0]]
        return rows.view(*rows.shape, *([1] * (scores.dim() - 2))).expand(scores.shape).contiguous()


@dataclass(frozen=True)
class KernelRows(Pattern):
    """Rows of the kernels of a depthwise convolution are kept or dropped as a whole.

    A kernel of a depthwise convolution belongs to one channel alone, so that there is no group to drop it for; what can
    go without the whole channel is a row of it, ``(output channel, input channel, row)``. All rows of a layer compete
    by the sum of their scores. Xu et al., 2023, arXiv 2310.19509; a reconstruction, since the abstract names no shapes.
    """

    def __str__(self) -> str:
        return "kernel-rows"

    def check_shape(self, shape: tuple[int, ...], name: str = "weight") -> None:
        """Refuse what has no kernels.

        Raises
        ------
        PatternError
            If it is not ``(out, in, height, width)``.
        """
        super().check_shape(shape, name)
        if len(shape) != 4:
            raise PatternError(f"{name} is {tuple(shape)}; rows of kernels need (out, in, height, width)")

    def select(self, scores: Tensor, sparsity: Sparsity | None = None, name: str = "scores") -> Tensor:  # noqa: D102
        sparsity = self.resolve(sparsity)
        self.check_shape(scores.shape, name)
        rows = check_scores(scores, name).sum(3)
        dropped = dropped_count(rows.numel(), sparsity)
        kept = keep_highest(rows.reshape(1, -1), dropped, name).view(rows.shape)
        return kept[..., None].expand(scores.shape).contiguous()

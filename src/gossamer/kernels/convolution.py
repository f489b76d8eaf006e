"""Convolutions with sparse weights, in the usual layout of images: (batch, channels, height, width).

A block of 1, 2, 4, 8 or 16 adjacent output channels shares the list of input channels that it keeps, and of a kept
one all k × k weights are stored. Blocks of one channel with 1 × 1 kernels are the unstructured convolution of Elsen,
Dukhan, Gale and Simonyan, 2020, arXiv 1911.09723, section 3; larger blocks are its 2 × 1 and 4 × 1, and, with k × k
kernels, the groups of kernels of Xu et al., 2023, arXiv 2310.19509.

Where their values lie side by side, sixteen positions of an image fit into one register. A strip of them stays there
while a block goes through the channels that it keeps: one load of inputs serves all output channels of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.images import (
    BLOCKS,
    STILL,
    UNBOUNDED,
    StoredKernels,
    Window,
    as_floats,
    check_block,
    check_images,
    convolve_densely,
    dense_kernels,
    moves,
    places_problem,
    starts_problem,
)
from gossamer.kernels.native import available, native

__all__ = ["BLOCKS", "STORED", "BlockedKernels", "Window", "strip_width"]

#: what stored weights may be; sums are formed in float32 with all of them
STORED = (torch.float32, torch.float16)
_CHUNK = 1 << 18  # floats of a padded input that are worked on at a time: they stay in the second cache
_STRIP = 1 << 17  # floats of a strip, over all input channels, that still do
_WIDTHS = (1, 2, 3, 4, 6, 8)  # vectors of a strip


@dataclass(frozen=True, eq=False, repr=False)
class BlockedKernels(StoredKernels):
    """The weight of a convolution, of which blocks of output channels keep some input channels.

    Attributes
    ----------
    shape
        ``(out, in, height, width)`` of the dense weight.
    block
        Output channels that share a list: 1, 2, 4, 8 or 16. If they do not divide `out`, the last block is filled up
        with zeros.
    starts
        ``(⌈out / block⌉ + 1,)`` int64: where the kept channels of each block begin.
    places
        ``(n,)`` int32: input channels that are kept, ascending within a block.
    values
        ``(n, height · width, block)`` float32 or float16.
    """

    shape: tuple[int, int, int, int]
    block: int
    starts: Tensor
    places: Tensor
    values: Tensor

    @classmethod
    def from_dense(
        cls, weight: Tensor, block: int = 1, kept: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> BlockedKernels:
        """Pack a dense weight.

        Parameters
        ----------
        weight
            ``(out, in, height, width)`` or, for 1 × 1 kernels, ``(out, in)``; any floating dtype.
        block
            Output channels that share a list.
        kept
            ``(⌈out / block⌉, in)`` bool: what to store; by default what is not wholly zero.
        dtype
            Of what is stored: float32, or float16 for half of the bytes.

        Raises
        ------
        ConfigurationError
            If shapes, block or dtype do not fit, a weight is not zero where nothing is kept, or is too large for
            float16.
        """
        if dtype not in STORED:
            raise ConfigurationError(f"dtype is {dtype}; weights are stored as {' or '.join(map(str, STORED))}")
        grouped, kept = group_channels(weight, block, kept)
        out, inputs, height, width = dense_kernels(weight).shape
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
        values = grouped[kept].to(dtype).contiguous()
        if dtype == torch.float16 and bool((values.isinf() & grouped[kept].isfinite()).any()):
            raise ConfigurationError("a weight is beyond ±65504, the largest of float16; store float32")
        return cls((out, inputs, height, width), block, starts, kept.nonzero()[:, 1].to(torch.int32), values)

    @property
    def kept(self) -> int:  # noqa: D102
        return len(self.places)

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"starts": self.starts, "places": self.places, "values": self.values}

    def mask(self) -> Tensor:  # noqa: D102
        kept = torch.zeros(self.blocks, self.shape[1], dtype=torch.bool)
        kept[self._block_of_each(), self.places.to(torch.int64)] = True
        return kept

    def expand(self) -> Tensor:  # noqa: D102
        _, inputs, height, width = self.shape
        dense = torch.zeros(self.blocks, inputs, height * width, self.block)
        dense[self._block_of_each(), self.places.to(torch.int64)] = self.values.float()
        return ungroup_channels(dense, self.shape)

    def _problem(self) -> str | None:
        _, inputs, height, width = self.shape
        count = len(self.places)
        expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "starts": ((self.blocks + 1,), (torch.int64,)),
            "places": ((count,), (torch.int32,)),
            "values": ((count, height * width, self.block), STORED),
        }
        problem = self._part_problem(expected) or starts_problem(self.starts, count)
        problem = problem or places_problem(self.places, inputs)
        if problem is None and not bool(((self.places.diff() > 0) | (self._block_of_each().diff() > 0)).all()):
            return "the places of a block do not rise"
        return problem

    def _block_of_each(self) -> Tensor:
        """The block of every kept channel, ``(n,)``."""
        return torch.arange(self.blocks).repeat_interleave(self.starts.diff())

    def convolve(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        window: Window | None = None,
        bounds: tuple[float, float] | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """Convolve images, as :func:`torch.nn.functional.conv2d` does it with the dense weight.

        Parameters
        ----------
        x
            ``(batch, in, height, width)``, float32, bfloat16 or float16, on the CPU. With kernels larger than 1 × 1,
            float32 images with the channels last are read as they are.
        bias
            ``(out,)``, of any floating dtype.
        window
            Stride, padding and dilation; by default none of them.
        bounds
            Smallest and largest result: ``(0, 6)`` is ReLU6, ``(0, inf)`` ReLU. NaN stays NaN.
        threads
            How many; by default as many as torch uses. The result does not depend on it.

        Returns
        -------
        Tensor
            ``(batch, out, height, width)`` in the dtype of `x`. Sums are formed in float32.

        Raises
        ------
        ConfigurationError
            If shape, dtype or device of `x` or `bias` do not fit, or the bounds are no interval.
        """
        window, bounds = window or STILL, bounds or UNBOUNDED
        out, inputs, *kernel = self.shape
        check_images(x, inputs, bias, out, bounds)
        batch, _, height, width = x.shape
        plan = moves(window, (height, width), (kernel[0], kernel[1]))
        if not available() or 0 in (batch, out, inputs):
            return convolve_densely(x, self.expand(), bias, window, bounds)
        # the first layer of a network may read its images with the channels last, since it copies them anyway
        last = not (plan.pointwise or x.is_contiguous()) and x.is_contiguous(memory_format=torch.channels_last)
        pixel = inputs if last and x.dtype == torch.float32 else 1
        wide, added = x if pixel > 1 else as_floats(x), self.padded_bias(bias)
        result = torch.empty((batch, out, *plan.output))
        source, target, moved = wide.data_ptr(), result.data_ptr(), plan.numbers
        weight = (*self._addresses, 0 if added is None else added.data_ptr(), *bounds)
        run, threads = native().convolution, threads or torch.get_num_threads()
        image, positions = 4 * inputs * height * width, plan.output[0] * plan.output[1]
        taken = batch if plan.pointwise else max(1, 4 * _CHUNK // image)
        for first in range(0, batch, taken):
            count = min(taken, batch - first)
            strip = strip_width(self.block, count * positions, inputs if plan.pointwise else 1)
            read, written = source + first * image, target + 4 * first * out * positions
            run(*weight, read, pixel, count, height, width, *plan.output, *moved, written, strip, threads)
        return result if x.dtype == torch.float32 else result.to(x.dtype)

    @cached_property
    def _addresses(self) -> tuple[int, ...]:
        """Sizes, and where the parts lie, as the compiled kernel takes them."""
        values, half = self.values.data_ptr(), self.values.dtype == torch.float16
        parts = (self.starts.data_ptr(), self.places.data_ptr(), 0 if half else values, values if half else 0)
        return (*self.shape[:2], self.block, *parts)


@lru_cache(maxsize=4096)  # layers ask for the same again and again
def strip_width(block: int, positions: int, inputs: int = 1) -> int:
    """How many vectors of sixteen positions are worked on at a time, so that the last strip is as full as the others.

    A strip is as wide as registers allow, next to the channels of a block, and no wider than its inputs fit into the
    second cache over all channels.
    """
    vectors = -(-positions // 16)
    most = 8 if block == 1 else 6 if block <= 4 else 3
    most = min(most, max(1, _STRIP // (16 * inputs)))
    needed = -(-vectors // -(-vectors // most))
    return next(width for width in _WIDTHS if width >= needed)


def group_channels(weight: Tensor, block: int, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Bring the output channels of a block side by side.

    Parameters
    ----------
    weight
        ``(out, in, height, width)`` or ``(out, in)``.
    block
        Output channels that share a list.
    kept
        ``(⌈out / block⌉, in)`` bool; by default what is not wholly zero.

    Returns
    -------
    Tensor
        ``(⌈out / block⌉, in, height · width, block)`` float32.
    Tensor
        `kept`.

    Raises
    ------
    ConfigurationError
        If they do not fit together.
    """
    weight = dense_kernels(weight)
    check_block(block)
    out, inputs, height, width = weight.shape
    blocks = -(-out // block)
    padded = torch.zeros(blocks * block, inputs, height * width)
    padded[:out] = weight.detach().cpu().flatten(2)
    grouped = padded.view(blocks, block, inputs, height * width).permute(0, 2, 3, 1)
    needed = (grouped != 0).flatten(2).any(2)
    kept = needed if kept is None else kept.cpu()
    if kept.shape != (blocks, inputs) or kept.dtype != torch.bool:
        raise ConfigurationError(f"kept is {tuple(kept.shape)} {kept.dtype}; give {(blocks, inputs)} bool")
    if bool((needed & ~kept).any()):
        raise ConfigurationError("a weight is not zero where nothing is kept; apply the mask to the weight first")
    return grouped, kept


def ungroup_channels(grouped: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The inverse of :func:`group_channels`: ``(out, in, height, width)``, without what filled up the last block."""
    out, inputs, height, width = shape
    blocks, block = len(grouped), grouped.shape[3]
    return grouped.permute(0, 3, 1, 2).reshape(blocks * block, inputs, height, width)[:out].contiguous()

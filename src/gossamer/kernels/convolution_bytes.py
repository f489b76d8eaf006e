"""Convolutions in whole numbers of eight bits: the same blocks of kept channels, with weights and inputs of one byte.

Of the channels that a block keeps, four at a time are taken together: sixteen positions × four channels are one
register, and the sum of four products is one instruction where the processor has it (VNNI). An engine such as that of
Xu et al., 2023, arXiv 2310.19509, needs this; the format is a reconstruction. Weights are rounded with a scale for each
output channel, inputs with a scale and a zero for each image, which are those of its own values unless they are given.
All sums are exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.convolution import group_channels, ungroup_channels
from gossamer.kernels.images import (
    STILL,
    UNBOUNDED,
    StoredKernels,
    Window,
    as_floats,
    check_images,
    dense_kernels,
    moves,
    places_problem,
    starts_problem,
)
from gossamer.kernels.native import available, native

FOUR = 4
_LARGEST = 127
_LEVELS = 255
_MOST_TERMS = (2**31 - 1) // (_LEVELS * _LARGEST)  # of a sum that fits into 32 bits


@dataclass(frozen=True, eq=False, repr=False)
class ByteKernels(StoredKernels):
    """The weight of a convolution in bytes, of which blocks of output channels keep some input channels.

    Attributes
    ----------
    shape
        ``(out, in, height, width)`` of the dense weight.
    block
        Output channels that share a list: 1, 2, 4, 8 or 16.
    starts
        ``(⌈out / block⌉ + 1,)`` int64: where the fours of each block begin.
    places
        ``(n, 4)`` int32: input channels that are kept, ascending within a block; the last four of a block is filled up
        with its last channel, at weight 0.
    values
        ``(n, height · width, block, 4)`` int8, from −127 to 127.
    scales
        ``(⌈out / block⌉ · block,)`` float32: what 1 stands for.
    """

    shape: tuple[int, int, int, int]
    block: int
    starts: Tensor
    places: Tensor
    values: Tensor
    scales: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, block: int = 16, kept: Tensor | None = None) -> ByteKernels:
        """Round a dense weight to 255 steps for each output channel, and pack it.

        Parameters
        ----------
        weight
            ``(out, in, height, width)`` or, for 1 × 1 kernels, ``(out, in)``; any floating dtype.
        block
            Output channels that share a list.
        kept
            ``(⌈out / block⌉, in)`` bool: what to store; by default what is not wholly zero.

        Raises
        ------
        ConfigurationError
            If shapes or block do not fit, a weight is not finite or not zero where nothing is kept, or a sum could
            exceed 32 bits.
        """
        if not bool(weight.isfinite().all()):
            raise ConfigurationError("a weight is NaN or infinite, which no whole number stands for")
        grouped, kept = group_channels(weight, block, kept)
        out, inputs, height, width = dense_kernels(weight).shape
        if inputs * height * width > _MOST_TERMS:
            raise ConfigurationError(
                f"a sum of {inputs * height * width} products does not fit into 32 bits; at most {_MOST_TERMS} do"
            )
        scales = grouped.abs().amax((1, 2)) / _LARGEST if inputs else torch.zeros(len(grouped), block)
        scales[scales == 0] = 1.0
        codes = (grouped / scales[:, None, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        places, values, counts = [], [], []
        for number, row in enumerate(kept):
            channels = row.nonzero()[:, 0]
            missing = -len(channels) % FOUR
            filled = torch.cat([channels, channels[-1:].expand(missing)])
            own = torch.cat([codes[number, channels], torch.zeros(missing, height * width, block, dtype=torch.int8)])
            places.append(filled.to(torch.int32).view(-1, FOUR))
            values.append(own.view(-1, FOUR, height * width, block).permute(0, 2, 3, 1))
            counts.append(len(filled) // FOUR)
        starts = torch.tensor([0, *counts]).cumsum(0)
        stacked = torch.cat([torch.zeros(0, height * width, block, FOUR, dtype=torch.int8), *values]).contiguous()
        listed = torch.cat([torch.zeros(0, FOUR, dtype=torch.int32), *places])
        return cls((out, inputs, height, width), block, starts, listed, stacked, scales.flatten().contiguous())

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {"starts": self.starts, "places": self.places, "values": self.values, "scales": self.scales}

    def mask(self) -> Tensor:  # noqa: D102
        kept = torch.zeros(self.blocks, self.shape[1], dtype=torch.bool)
        kept[self._block_of_each()[:, None], self.places.to(torch.int64)] = True
        return kept

    def codes(self) -> Tensor:
        """The whole numbers, ``(out, in, height, width)`` float32."""
        _, inputs, height, width = self.shape
        dense = torch.zeros(self.blocks, inputs, height * width, self.block)
        at = (self._block_of_each()[:, None].expand_as(self.places), self.places.to(torch.int64))
        # what fills up a four adds nothing to the channel that stands there
        dense.index_put_(at, self.values.permute(0, 3, 1, 2).float(), accumulate=True)
        return ungroup_channels(dense, self.shape)

    def expand(self) -> Tensor:  # noqa: D102
        return self.codes() * self.scales[: self.shape[0], None, None, None]

    def _problem(self) -> str | None:
        _, inputs, height, width = self.shape
        count = len(self.places)
        expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "starts": ((self.blocks + 1,), (torch.int64,)),
            "places": ((count, FOUR), (torch.int32,)),
            "values": ((count, height * width, self.block, FOUR), (torch.int8,)),
            "scales": ((self.blocks * self.block,), (torch.float32,)),
        }
        problem = self._part_problem(expected) or starts_problem(self.starts, count)
        problem = problem or places_problem(self.places, inputs)
        if problem is not None:
            return problem
        if inputs * height * width > _MOST_TERMS:
            return f"sums of {inputs * height * width} products do not fit into 32 bits"
        if not bool((self.scales.isfinite() & (self.scales > 0)).all()):
            return "a scale is not a positive number"
        return self._order_problem()

    def _order_problem(self) -> str | None:
        flat, blocks = self.places.flatten(), self._block_of_each().repeat_interleave(FOUR)
        rising, same = flat.diff() > 0, (flat.diff() == 0) & (blocks.diff() == 0)
        empty = (self.values == 0).all(2).all(1).flatten()[1:]
        if not bool((rising | (blocks.diff() > 0) | (same & empty)).all()):
            return "the places of a block do not rise"
        return None

    def _block_of_each(self) -> Tensor:
        """The block of every four, ``(n,)``."""
        return torch.arange(self.blocks).repeat_interleave(self.starts.diff())

    @cached_property
    def totals(self) -> Tensor:
        """Sum of the whole numbers of every channel, ``(⌈out / block⌉ · block,)`` int32."""
        sums = self.values.sum((1, 3), dtype=torch.int32)
        found = torch.zeros(self.blocks, self.block, dtype=torch.int32)
        return found.index_add_(0, self._block_of_each(), sums).flatten()

    def convolve(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        window: Window | None = None,
        bounds: tuple[float, float] | None = None,
        threads: int | None = None,
        values: tuple[float, float] | None = None,
    ) -> Tensor:
        """Convolve images that are rounded to bytes.

        Parameters
        ----------
        x, bias, window, bounds, threads
            As for :meth:`~gossamer.kernels.convolution.BlockedKernels.convolve`.
        values
            Least and largest input that is expected, such as ``(0, 6)`` behind a ReLU6; what lies beyond is rounded to
            them. By default those of each image, which have to be looked for first.

        Returns
        -------
        Tensor
            ``(batch, out, height, width)`` in the dtype of `x`. An image in which a value is infinite or NaN becomes
            NaN as a whole.

        Raises
        ------
        ConfigurationError
            If shape, dtype or device of `x` or `bias` do not fit, or the bounds or values are no interval.
        """
        window, bounds = window or STILL, bounds or UNBOUNDED
        out, inputs, *kernel = self.shape
        check_images(x, inputs, bias, out, bounds)
        if values is not None and not -math.inf < values[0] <= values[1] < math.inf:
            raise ConfigurationError(f"values are {values}; give the smaller one first, both finite")
        batch, _, height, width = x.shape
        plan = moves(window, (height, width), (kernel[0], kernel[1]))
        if not available() or 0 in (batch, out, inputs):
            return self.reference(x, bias, window, bounds, values)
        wide, added = as_floats(x), self.padded_bias(bias)
        result = torch.empty((batch, out, *plan.output))
        native().convolution_bytes(
            *(*self._addresses, 0 if added is None else added.data_ptr(), *bounds),
            *(wide.data_ptr(), batch, height, width),
            *(*plan.output, *plan.numbers, values is not None, *(values or (0.0, 0.0))),
            *(result.data_ptr(), threads or torch.get_num_threads()),
        )
        return result if x.dtype == torch.float32 else result.to(x.dtype)

    @cached_property
    def _addresses(self) -> tuple[int, ...]:
        """Sizes, and where the parts lie, as the compiled kernel takes them."""
        parts = (self.starts, self.places, self.values, self.scales, self.totals)
        return (*self.shape[:2], self.block, *(part.data_ptr() for part in parts))

    def reference(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        window: Window | None = None,
        bounds: tuple[float, float] = UNBOUNDED,
        values: tuple[float, float] | None = None,
    ) -> Tensor:
        """The same with torch alone: whole numbers, convolved in float64, which holds all of their sums."""
        window = window or STILL
        steps = (window.stride, window.padding, window.dilation)
        wide = x.detach().float()
        out = self.shape[0]
        if x.numel() == 0:
            low = high = torch.zeros(len(x))
        elif values is None:
            low, high = wide.flatten(1).amin(1), wide.flatten(1).amax(1)
        else:
            low, high = torch.tensor(values)[:, None].expand(2, len(x))
        low, high = low.clamp(max=0)[:, None, None, None], high.clamp(min=0)[:, None, None, None]
        scale = (high - low) / _LEVELS
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-low / scale).round()
        # padding stands for 0, as the byte `zero` does
        bytes_ = (wide * (1 / scale) + zero).round().clamp(0, _LEVELS) - zero
        sums = torch.nn.functional.conv2d(bytes_.double(), self.codes().double(), None, *steps)
        result = (sums * (scale * self.scales[:out, None, None]).double()).float()
        if bias is not None:
            result = result + bias.detach().float()[:, None, None]
        broken = ~wide.isfinite().flatten(1).all(1)
        result[broken] = math.nan
        return result.clamp(*bounds).to(x.dtype)

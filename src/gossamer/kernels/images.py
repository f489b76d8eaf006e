"""What all convolutions of images have in common: how kernels move, what is checked, and the dense reference."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError

INPUTS = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (1, 2, 4, 8, 16)
UNBOUNDED = (-math.inf, math.inf)


@dataclass(frozen=True)
class Window:
    """How kernels move over an image, in the words of :func:`torch.nn.functional.conv2d`.

    Attributes
    ----------
    stride, padding, dilation
        Along height and width.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if min(self.stride) < 1 or min(self.dilation) < 1 or min(self.padding) < 0:
            raise ConfigurationError(f"{self} is impossible; strides and dilations are at least 1, paddings at least 0")

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output; zero or less where an image is smaller than the kernel."""
        reach = [dilation * (width - 1) for dilation, width in zip(self.dilation, kernel, strict=True)]
        found = [(size[i] + 2 * self.padding[i] - reach[i] - 1) // self.stride[i] + 1 for i in (0, 1)]
        return found[0], found[1]


STILL = Window()


@dataclass(frozen=True)
class Moves:
    """A convolution over images of one size.

    Attributes
    ----------
    output
        Height and width of what comes out.
    numbers
        Kernel, stride, padding and dilation along height and width, as the compiled kernels take them.
    pointwise
        Whether every position is read once, and alone.
    """

    output: tuple[int, int]
    numbers: tuple[int, ...]
    pointwise: bool


@lru_cache(maxsize=4096)  # layers see the same sizes again and again
def moves(window: Window, size: tuple[int, int], kernel: tuple[int, int]) -> Moves:
    """Work out a convolution of images of a size.

    Raises
    ------
    ConfigurationError
        If they are smaller than the kernel.
    """
    output = window.output_size(size, kernel)
    if min(output) < 1:
        raise ConfigurationError(f"images of {tuple(size)} are smaller than kernels of {tuple(kernel)}")
    numbers = (*kernel, *window.stride, *window.padding, *window.dilation)
    return Moves(output, numbers, kernel == (1, 1) and window == STILL)


def check_images(x: Tensor, channels: int, bias: Tensor | None, outputs: int, bounds: tuple[float, float]) -> None:
    """Check what a convolution reads.

    Parameters
    ----------
    x
        Must be ``(batch, channels, height, width)`` of one of :data:`INPUTS` on the CPU.
    channels, outputs
        Of the weight.
    bias
        Must be ``(outputs,)`` or None.
    bounds
        Must be an interval.

    Raises
    ------
    ConfigurationError
        If one of them does not fit.
    """
    if x.ndim != 4 or x.shape[1] != channels or x.dtype not in INPUTS or x.device.type != "cpu":
        raise ConfigurationError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}; give (batch, {channels}, height, width) in float32, "
            f"bfloat16 or float16 on the CPU"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ConfigurationError(f"bias is {tuple(bias.shape)}; {outputs} output channels take ({outputs},)")
    if not bounds[0] <= bounds[1]:
        raise ConfigurationError(f"bounds are {bounds}; give the smaller one first")


def as_floats(tensor: Tensor) -> Tensor:
    """The same values in float32, contiguous, without a graph; the tensor itself if it is so already."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.device.type == "cpu":
        return tensor
    return tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()


def convolve_densely(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    window: Window | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
    groups: int = 1,
) -> Tensor:
    """Convolve with torch alone, in float32, then clamp; the result has the dtype of `x`."""
    window = STILL if window is None else window
    wide = None if bias is None else bias.detach().float()
    steps = (window.stride, window.padding, window.dilation)
    dense = torch.nn.functional.conv2d(x.detach().float(), weight.detach().float(), wide, *steps, groups)
    return dense.clamp(*bounds).to(x.dtype)


def dense_kernels(weight: Tensor) -> Tensor:
    """``(out, in, height, width)`` of a weight, which may be ``(out, in)`` for 1 × 1 kernels.

    Raises
    ------
    ConfigurationError
        If it is neither, or not of floating numbers.
    """
    if weight.ndim == 2:
        weight = weight[:, :, None, None]
    if weight.ndim != 4 or not weight.is_floating_point() or 0 in weight.shape[2:]:
        raise ConfigurationError(
            f"the weight is {tuple(weight.shape)} {weight.dtype}; give floating numbers (out, in, height, width)"
        )
    return weight


def check_block(block: int) -> None:
    """Refuse a block that has no kernel.

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    if block not in BLOCKS:
        raise ConfigurationError(f"block is {block!r}; it must be one of {', '.join(map(str, BLOCKS))}")


class StoredKernels(ABC):
    """A weight of a convolution of which blocks of adjacent output channels keep some input channels.

    Attributes
    ----------
    shape
        ``(out, in, height, width)`` of the dense weight.
    block
        Output channels that share a list: 1, 2, 4, 8 or 16. If they do not divide `out`, the last block is filled up
        with zeros.
    """

    shape: tuple[int, int, int, int]
    block: int

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""

    @abstractmethod
    def expand(self) -> Tensor:
        """The dense weight, ``(out, in, height, width)`` float32."""

    @abstractmethod
    def mask(self) -> Tensor:
        """``(⌈out / block⌉, in)`` bool, True where kernels are stored."""

    @abstractmethod
    def convolve(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        window: Window | None = None,
        bounds: tuple[float, float] | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """Convolve images; ``(batch, out, height', width')`` in the dtype of `x`."""

    @abstractmethod
    def _problem(self) -> str | None: ...

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.shape[0] // self.block)

    @property
    def kept(self) -> int:
        """Input channels that are stored, over all blocks."""
        return int(self.mask().sum())

    @property
    def density(self) -> float:
        """Share of the weights that is stored."""
        return self.kept / max(1, self.blocks * self.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    def __repr__(self) -> str:
        sizes = " × ".join(map(str, self.shape))
        return f"{type(self).__name__}({sizes}, blocks of {self.block}, {self.density:.1%} stored)"

    def validate(self, name: str = "convolution") -> None:
        """Check every part against every other.

        Raises
        ------
        CheckpointError
            If counts, lengths or indices contradict each other, so that a kernel would read where nothing is.
        """
        problem = self._size_problem() or self._problem()
        if problem:
            raise CheckpointError(f"{name} ({type(self).__name__}) is broken: {problem}; make or fetch it again")

    def padded_bias(self, bias: Tensor | None) -> Tensor | None:
        """A bias for the channels of every block."""
        if bias is None:
            return None
        if self.shape[0] % self.block == 0:
            return as_floats(bias)
        wide = torch.zeros(self.blocks * self.block)
        wide[: self.shape[0]] = bias.detach()
        return wide

    def _size_problem(self) -> str | None:
        if self.block not in BLOCKS:
            return f"its blocks have {self.block} channels, possible are {', '.join(map(str, BLOCKS))}"
        if len(self.shape) != 4 or min(self.shape[:2]) < 0 or min(self.shape[2:]) < 1:
            return f"its shape is {tuple(self.shape)}, which is no (out, in, height, width)"
        return None

    def _part_problem(self, expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]) -> str | None:
        for part, tensor in self.tensors().items():
            shape, dtypes = expected[part]
            if tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
                wanted = " or ".join(map(str, dtypes))
                return f"its {part} are {tuple(tensor.shape)} {tensor.dtype} instead of {shape} {wanted}"
        return None


def starts_problem(starts: Tensor, count: int) -> str | None:
    """What is wrong with where the entries of each block begin, of which there are `count` in all."""
    if int(starts[0]) or int(starts[-1]) != count or bool((starts.diff() < 0).any()):
        return f"its starts do not rise from 0 to the {count} entries that are kept"
    return None


def places_problem(places: Tensor, inputs: int) -> str | None:
    """What is wrong with a list of input channels."""
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < inputs:
        return f"a place is outside 0 … {inputs - 1} ({int(places.min())} … {int(places.max())})"
    return None

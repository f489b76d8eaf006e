"""Convolutions for inference that look like their dense twins: packed ones, and depthwise ones in the same layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.kernels.convolution import BlockedKernels
from gossamer.kernels.convolution_bytes import ByteKernels
from gossamer.kernels.convolution_operators import depthwise_convolution, moves_of, stored_convolution
from gossamer.kernels.depthwise import depthwise
from gossamer.kernels.images import BLOCKS, UNBOUNDED, StoredKernels, Window

FORMATS = ("float32", "float16", "int8")


class SparseConv2d(nn.Module):
    """A convolution with packed kernels and, if wanted, the clamp that follows it.

    What is stored appears in ``state_dict()`` under the names of its parts, and keeps its dtype whatever dtype a model
    around it is moved to.

    Parameters
    ----------
    kernels
        The weight.
    bias
        ``(out,)`` or None.
    window
        Stride, padding and dilation.
    bounds
        Smallest and largest result, such as ``(0, 6)``; by default none.
    inputs
        For weights in bytes: smallest and largest input that is expected; by default those of each image.

    Examples
    --------
    >>> layer = SparseConv2d.from_conv(torch.nn.Conv2d(16, 32, 1), block=4)
    >>> layer(torch.randn(1, 16, 8, 8)).shape
    torch.Size([1, 32, 8, 8])
    """

    def __init__(
        self,
        kernels: StoredKernels,
        bias: Tensor | None = None,
        window: Window | None = None,
        bounds: tuple[float, float] | None = None,
        inputs: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.kind, self.shape, self.block = type(kernels), kernels.shape, kernels.block
        self.window, self.bounds, self.inputs = Window() if window is None else window, bounds, inputs
        self.bias: nn.Parameter | None
        for name, tensor in kernels.tensors().items():
            self.register_buffer(name, tensor)
        self._ready: StoredKernels | None = None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        block: int | None = None,
        bounds: tuple[float, float] | None = None,
        format: str = "float32",
        inputs: tuple[float, float] | None = None,
    ) -> SparseConv2d:
        """Pack a convolution over all channels; by default in the largest blocks that store nothing in excess.

        Parameters
        ----------
        conv
            The convolution.
        block
            Output channels that share a list of kept inputs.
        bounds, inputs
            As for the class.
        format
            What weights become: ``"float32"``, ``"float16"`` or ``"int8"``; with the last, inputs are rounded too.

        Raises
        ------
        ConfigurationError
            If it has groups, pads with anything but zeros, or block or format are unknown.
        """
        if not packable(conv):
            raise ConfigurationError(f"{conv} cannot be packed; it needs one group and zeros as padding, in numbers")
        if format not in FORMATS:
            raise ConfigurationError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
        chosen = natural_block(conv.weight) if block is None else block
        kernels: StoredKernels
        if format == "int8":
            kernels = ByteKernels.from_dense(conv.weight, chosen)
        else:
            kernels = BlockedKernels.from_dense(conv.weight, chosen, dtype=getattr(torch, format))
        return cls(kernels, conv.bias, window_of(conv), bounds, inputs)

    @property
    def kernels(self) -> StoredKernels:
        """What is stored; it shares its memory with the module."""
        if self._ready is None:
            parts: dict[str, Any] = dict(self.named_buffers(recurse=False))
            self._ready = self.kind(self.shape, self.block, **parts)  # type: ignore[call-arg]
        return self._ready

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every call."""
        return self.kernels.expand()

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, in, height, width)`` to ``(batch, out, height', width')``; gradients go to `x` alone."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            parts = [tensor for _, tensor in self.named_buffers(recurse=False)]
            limits = [*(self.bounds or UNBOUNDED), *(self.inputs or ())]
            return stored_convolution(x, self.bias, parts, list(self.shape), self.block, moves_of(self.window), limits)
        if self.inputs is not None and self.kind is ByteKernels:
            bytes_ = cast("ByteKernels", self.kernels)
            return bytes_.convolve(x, self.bias, self.window, self.bounds, values=self.inputs)
        return self.kernels.convolve(x, self.bias, self.window, self.bounds)

    def to_conv(self) -> nn.Conv2d:
        """The dense twin, without the clamp."""
        out, inputs, *kernel = self.shape
        window = self.window
        moves = (window.stride, window.padding, window.dilation)
        conv = nn.Conv2d(inputs, out, tuple(kernel), *moves, bias=self.bias is not None)  # type: ignore[arg-type]
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseConv2d:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in before.items():  # kernels read what was stored, whatever the rest of a model becomes
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self._ready = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        names = [name for name, _ in self.named_buffers(recurse=False)]
        if all(prefix + name in state_dict for name in names):
            parts = {name: state_dict[prefix + name] for name in names}
            self.kind(self.shape, self.block, **parts).validate(prefix.rstrip(".") or "convolution")  # type: ignore[call-arg]
            for name, tensor in parts.items():  # another mask has other sizes
                setattr(self, name, torch.empty_like(tensor))
        self._ready = None
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Say sizes and what is stored."""
        out, inputs, height, width = self.shape
        clamp = "" if self.bounds is None else f", clamped to {self.bounds}"
        dtype = str(next(t for name, t in self.named_buffers(recurse=False) if name == "values").dtype)
        stored = f"{self.kernels.density:.1%} stored in {dtype.removeprefix('torch.')}"
        return f"{inputs}, {out}, {height} × {width}, blocks of {self.block}, {stored}{clamp}"


class DepthwiseConv2d(nn.Module):
    """A depthwise convolution and, if wanted, the clamp that follows it, in the layout of the sparse ones.

    Its ``state_dict()`` is that of the convolution it came from; weights that are zero are left out of the sums.

    Parameters
    ----------
    weight
        ``(channels, 1, height, width)``.
    bias
        ``(channels,)`` or None.
    window
        Stride, padding and dilation.
    bounds
        Smallest and largest result; by default none.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        window: Window | None = None,
        bounds: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.window, self.bounds = Window() if window is None else window, bounds
        self.weight = nn.Parameter(weight.detach().clone(), False)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, bounds: tuple[float, float] | None = None) -> DepthwiseConv2d:
        """Take over a convolution of one kernel for each channel.

        Raises
        ------
        ConfigurationError
            If it is not one, or pads with anything but zeros.
        """
        if not is_depthwise(conv):
            raise ConfigurationError(f"{conv} is not depthwise; it needs one kernel a channel and zeros as padding")
        return cls(conv.weight, conv.bias, window_of(conv), bounds)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, channels, height, width)`` to ``(batch, channels, height', width')``; gradients go to `x` alone."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            low, high = self.bounds or UNBOUNDED
            return depthwise_convolution(x, self.bias, self.weight, moves_of(self.window), low, high)
        return depthwise(x, self.weight, self.bias, self.window, self.bounds)

    def extra_repr(self) -> str:
        """Say sizes."""
        clamp = "" if self.bounds is None else f", clamped to {self.bounds}"
        return f"{len(self.weight)}, {self.weight.shape[2]} × {self.weight.shape[3]}{clamp}"


def natural_block(weight: Tensor) -> int:
    """The largest block that stores no more weights than single channels do."""
    mask = (weight.detach() != 0).flatten(2).any(2) if weight.dim() > 2 else weight.detach() != 0
    needed = int(mask.sum())
    for block in reversed(BLOCKS):
        missing = -len(mask) % block
        padded = torch.nn.functional.pad(mask, (0, 0, 0, missing)).view(-1, block, mask.shape[1])
        if int(padded.any(1).repeat_interleave(block, 0)[: len(mask)].sum()) == needed:
            return block
    return 1


def packable(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution over all channels that :class:`SparseConv2d` can stand for."""
    return _zero_padded(module) and module.groups == 1


def is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution that :class:`DepthwiseConv2d` can stand for."""
    return _zero_padded(module) and module.groups == module.in_channels == module.out_channels > 1


def _zero_padded(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def window_of(conv: nn.Conv2d) -> Window:
    """How a convolution moves."""
    return Window(_pair(conv.stride), _pair(conv.padding), _pair(conv.dilation))  # type: ignore[arg-type]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])

"""The convolutions as operators of torch, so that ``torch.compile`` and autograd see them.

Gradients go to inputs and biases; weights are for inference. Outside of both, the kernels are called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from gossamer.kernels.convolution import BlockedKernels
from gossamer.kernels.convolution_bytes import ByteKernels
from gossamer.kernels.depthwise import depthwise
from gossamer.kernels.images import StoredKernels, Window


def _window(moves: list[int]) -> Window:
    return Window((moves[0], moves[1]), (moves[2], moves[3]), (moves[4], moves[5]))


def moves_of(window: Window) -> list[int]:
    """A window as the operators take it: stride, padding and dilation."""
    return [*window.stride, *window.padding, *window.dilation]


@torch.library.custom_op("gossamer::stored_convolution", mutates_args=(), device_types="cpu")
def stored_convolution(
    x: Tensor,
    bias: Tensor | None,
    parts: list[Tensor],
    shape: list[int],
    block: int,
    moves: list[int],
    limits: list[float],
) -> Tensor:
    """Convolve with the parts of :class:`~.convolution.BlockedKernels` or :class:`~.convolution_bytes.ByteKernels`.

    The first two numbers of `limits` are the bounds of the results; two more are the inputs that bytes stand for.
    """
    kernels, window = _kernels(parts, shape, block), _window(moves)
    if isinstance(kernels, ByteKernels):
        values = (limits[2], limits[3]) if len(limits) > 2 else None
        return kernels.convolve(x, bias, window, (limits[0], limits[1]), values=values)
    return kernels.convolve(x, bias, window, (limits[0], limits[1]))


@stored_convolution.register_fake
def _(
    x: Tensor, bias: Tensor | None, parts: list[Tensor], shape: list[int], block: int, moves: list[int], *_: Any
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0], *_window(moves).output_size(x.shape[2:], shape[2:]))


@torch.library.custom_op("gossamer::depthwise_convolution", mutates_args=(), device_types="cpu")
def depthwise_convolution(
    x: Tensor, bias: Tensor | None, weight: Tensor, moves: list[int], low: float, high: float
) -> Tensor:
    """Convolve every channel with its own kernel, and clamp."""
    return depthwise(x, weight, bias, _window(moves), (low, high))


@depthwise_convolution.register_fake
def _(x: Tensor, bias: Tensor | None, weight: Tensor, moves: list[int], *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *_window(moves).output_size(x.shape[2:], weight.shape[2:]))


@torch.library.custom_op("gossamer::stored_convolution_backward", mutates_args=(), device_types="cpu")
def stored_convolution_backward(
    grad: Tensor, size: list[int], parts: list[Tensor], shape: list[int], block: int, moves: list[int]
) -> Tensor:
    """Gradient of :func:`stored_convolution` with respect to `x`, which has that `size`, without the clamp."""
    return _to_inputs(grad, size, _kernels(parts, shape, block).expand(), moves, 1)


@stored_convolution_backward.register_fake
def _(grad: Tensor, size: list[int], *_: Any) -> Tensor:
    return grad.new_empty(size)


def _kernels(parts: list[Tensor], shape: list[int], block: int) -> StoredKernels:
    out, inputs, height, width = shape
    kind: Callable[..., StoredKernels] = ByteKernels if len(parts) > 3 else BlockedKernels
    return kind((out, inputs, height, width), block, *parts)


def _to_inputs(grad: Tensor, size: list[int], weight: Tensor, moves: list[int], groups: int) -> Tensor:
    window = _window(moves)
    steps = (window.stride, window.padding, window.dilation)
    found = conv2d_input(size, weight.float(), grad.float(), *steps, groups)
    return found.to(grad.dtype)


def _setup(ctx: Any, x: Tensor, bias: Tensor | None, bounds: tuple[float, float]) -> None:
    ctx.size, ctx.bounds = list(x.shape), bounds
    ctx.bias = None if bias is None else bias.dtype


def _passed(ctx: Any, grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient where the clamp let the result pass, and that of the bias."""
    passed = grad * ((output > ctx.bounds[0]) & (output < ctx.bounds[1]))
    return passed, passed.sum((0, 2, 3)).to(ctx.bias) if ctx.needs_input_grad[1] else None


def _stored_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, parts, shape, block, moves, limits = inputs
    _setup(ctx, x, bias, (limits[0], limits[1]))
    ctx.about = (shape, block, moves)
    ctx.save_for_backward(output, *parts)


def _stored_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    output, *parts = ctx.saved_tensors
    passed, to_bias = _passed(ctx, grad, output)
    to_inputs = stored_convolution_backward(passed, ctx.size, parts, *ctx.about)
    return to_inputs, to_bias, [None] * len(parts), *[None] * 4


def _depthwise_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, weight, moves, low, high = inputs
    _setup(ctx, x, bias, (low, high))
    ctx.moves = moves
    ctx.save_for_backward(output, weight)


def _depthwise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    output, weight = ctx.saved_tensors
    passed, to_bias = _passed(ctx, grad, output)
    return _to_inputs(passed, ctx.size, weight, ctx.moves, len(weight)), to_bias, *[None] * 4


stored_convolution.register_autograd(_stored_backward, setup_context=_stored_setup)
depthwise_convolution.register_autograd(_depthwise_backward, setup_context=_depthwise_setup)

"""The products of few channels as operators of torch, so that ``torch.compile`` and fake tensors see them.

Outside of these, the functions of :mod:`gossamer.kernels.channel_products` are called directly. A matrix comes as the
list of its parts (``values``, and ``scales`` where it has them) with its format, sizes and group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels import channel_products, histogram
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.gated_feedforward import GatedFeedforward
from gossamer.kernels.kinds import rebuild


def _channels(parts: list[Tensor], format: str, rows: int, columns: int, group: int) -> ChannelMatrix:
    return ChannelMatrix((rows, columns), format, parts[0], parts[1] if len(parts) > 1 else None, group)


def _rows(parts: list[Tensor], kind: str, format: str, rows: int, columns: int, group: int) -> Any:
    about = {"kind": kind, "shape": (rows, columns), "format": format, "group": group}
    matrix = rebuild(kind, about, dict(zip(("values", "scales"), parts)))
    if not isinstance(matrix, DenseMatrix | NibbleRowMatrix):
        raise ConfigurationError(f"kind is {kind!r}; single rows can be read of dense and nibble_rows")
    return matrix


@torch.library.custom_op("gossamer::input_sparse", mutates_args=(), device_types="cpu")
def input_sparse(
    x: Tensor,
    parts: list[Tensor],
    thresholds: Tensor | None,
    bias: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    group: int,
) -> Tensor:
    """:func:`gossamer.kernels.channel_products.input_sparse` for the parts ``values`` and ``scales``."""
    return channel_products.input_sparse(_channels(parts, format, rows, columns, group), x, thresholds, bias)


@input_sparse.register_fake
def _(x: Tensor, parts: list[Tensor], thresholds: Tensor | None, bias: Tensor | None, *about: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], about[1])


@torch.library.custom_op("gossamer::input_sparse_backward", mutates_args=(), device_types="cpu")
def input_sparse_backward(
    grad: Tensor,
    x: Tensor,
    parts: list[Tensor],
    thresholds: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    group: int,
) -> Tensor:
    """Gradient of :func:`input_sparse` with respect to `x`: zero for silent inputs, as of a product with their mask."""
    matrix = _channels(parts, format, rows, columns, group)
    found = (grad.reshape(-1, rows).float() @ matrix.expand()).view(x.shape)
    silent = x == 0 if thresholds is None else x.float().abs() <= thresholds
    return torch.where(silent, 0.0, found).to(x.dtype)


@input_sparse_backward.register_fake
def _(grad: Tensor, x: Tensor, parts: list[Tensor], thresholds: Tensor | None, *about: Any) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, parts, thresholds, bias, *about = inputs
    ctx.about, ctx.bias = about, None if bias is None else bias.dtype
    ctx.save_for_backward(x, thresholds, *parts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, thresholds, *parts = ctx.saved_tensors
    to_inputs = input_sparse_backward(grad, x, parts, thresholds, *ctx.about)
    to_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias) if ctx.needs_input_grad[3] else None
    return to_inputs, [None] * len(parts), None, to_bias, *[None] * len(ctx.about)


input_sparse.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("gossamer::masked_output", mutates_args=(), device_types="cpu")
def masked_output(
    x: Tensor,
    gate: Tensor,
    parts: list[Tensor],
    bias: Tensor | None,
    kind: str,
    format: str,
    rows: int,
    columns: int,
    group: int,
) -> Tensor:
    """:func:`gossamer.kernels.channel_products.masked_output`; `kind` is ``dense`` or ``nibble_rows``."""
    return channel_products.masked_output(_rows(parts, kind, format, rows, columns, group), x, gate, bias)


@masked_output.register_fake
def _(x: Tensor, gate: Tensor, *_: Any) -> Tensor:
    return x.new_empty(gate.shape)


@torch.library.custom_op("gossamer::gated_feedforward", mutates_args=(), device_types="cpu")
def gated_feedforward(
    x: Tensor,
    wanted: Tensor | None,
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    thresholds: Tensor | None,
    kind: str,
    format: str,
    sizes: list[int],
    groups: list[int],
    activation: str,
    cut: float,
) -> Tensor:
    """A :class:`~gossamer.kernels.gated_feedforward.GatedFeedforward` of three matrices of one format.

    `kind` is that of ``gate`` and ``up``; `sizes` are inputs, neurons and outputs; `groups` those of ``gate``, ``up``
    and ``down``.
    """
    inputs, neurons, outputs = sizes
    block = GatedFeedforward(
        _rows(gate, kind, format, neurons, inputs, groups[0]),
        _rows(up, kind, format, neurons, inputs, groups[1]),
        _channels(down, format, outputs, neurons, groups[2]),
        activation,
        cut,
        thresholds,
    )
    return block(x, wanted)


@gated_feedforward.register_fake
def _(x: Tensor, *about: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], about[7][2])


@torch.library.custom_op("gossamer::delta_linear_", mutates_args=("state",), device_types="cpu")
def delta_linear_(
    delta: Tensor,
    state: Tensor,
    parts: list[Tensor],
    thresholds: Tensor | None,
    format: str,
    rows: int,
    columns: int,
    group: int,
) -> None:
    """:func:`gossamer.kernels.channel_products.delta_linear_`."""
    channel_products.delta_linear_(_channels(parts, format, rows, columns, group), delta, state, thresholds)


@delta_linear_.register_fake
def _(delta: Tensor, state: Tensor, *_: Any) -> None:
    return None


@torch.library.custom_op("gossamer::magnitude_histogram_", mutates_args=("counts",))
def magnitude_histogram_(x: Tensor, scale: Tensor | None, counts: Tensor) -> None:
    """:func:`gossamer.kernels.histogram.magnitude_histogram`."""
    histogram.magnitude_histogram(x, scale, counts)


@magnitude_histogram_.register_fake
def _(x: Tensor, scale: Tensor | None, counts: Tensor) -> None:
    return None

"""Attention over blocks as operators of torch, so that autograd, ``torch.compile`` and fake tensors see them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from gossamer.kernels import attention_passes as passes
from gossamer.kernels.attention_inputs import LabelChoice, check_indices
from gossamer.kernels.attention_reference import Visibility, wide


@torch.library.custom_op("gossamer::block_attention", mutates_args=())
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    key_mask: Tensor | None,
    block_size: list[int],
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """:func:`gossamer.kernels.attention_passes.forward`."""
    return passes.forward(q, k, v, _visible(blocks, key_mask, block_size, causal, window), scale)


@block_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@torch.library.custom_op("gossamer::block_attention_backward", mutates_args=())
def block_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    outputs: Tensor,
    lse: Tensor,
    blocks: Tensor | None,
    key_mask: Tensor | None,
    block_size: list[int],
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gossamer.kernels.attention_passes.backward`."""
    visible = _visible(blocks, key_mask, block_size, causal, window)
    return passes.backward((grad, grad_lse), (q, k, v, outputs, lse), visible, scale)


@block_attention_backward.register_fake
def _(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _visible(
    blocks: Tensor | None, key_mask: Tensor | None, block_size: list[int], causal: bool, window: int | None
) -> Visibility:
    return Visibility(causal, window, key_mask, blocks, (block_size[0], block_size[1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, key_mask, *about = inputs
    ctx.about = about
    ctx.save_for_backward(q, k, v, *output, blocks, key_mask)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, outputs, lse, blocks, key_mask = ctx.saved_tensors
    # where autocast is at work it would round what the kernel takes in float32
    with torch.autocast(q.device.type, enabled=False):
        found = block_attention_backward(grad, grad_lse, q, k, v, outputs, lse, blocks, key_mask, *ctx.about)
    return *found, None, None, *[None] * len(ctx.about)


block_attention.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("gossamer::block_mass", mutates_args=())
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    block_size: list[int],
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """:func:`gossamer.kernels.attention_passes.block_mass`."""
    visible = Visibility(causal, window, key_mask)
    return passes.block_mass(q, k, lse, (block_size[0], block_size[1]), visible, scale)


@block_mass.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, block_size: list[int], *_: Any) -> Tensor:
    return _grid(q, k, block_size[0], block_size[1])


@torch.library.custom_op("gossamer::antidiagonal_mass", mutates_args=())
def antidiagonal_mass(
    q: Tensor, k: Tensor, stride: int, block_size: int, causal: bool, scale: float, key_mask: Tensor | None
) -> Tensor:
    """:func:`gossamer.kernels.attention_passes.antidiagonal_mass`."""
    return passes.antidiagonal_mass(q, k, stride, block_size, causal, scale, key_mask)


@antidiagonal_mass.register_fake
def _(q: Tensor, k: Tensor, stride: int, block_size: int, *_: Any) -> Tensor:
    return _grid(q, k, block_size, block_size)


@torch.library.custom_op("gossamer::gather_attention", mutates_args=())
def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`gossamer.kernels.attention_passes.gather`, with indices checked."""
    check_indices(indices, counts, q, k)
    return cast(tuple[Tensor, Tensor], passes.gather(q, k, v, indices, counts, scale))


@gather_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@torch.library.custom_op("gossamer::label_topk", mutates_args=())
def label_topk(q: Tensor, k: Tensor, count: int, key_mask: Tensor | None, pooling: str | None) -> Tensor:
    """:func:`gossamer.kernels.attention_passes.label_topk`."""
    return passes.label_topk(q, k, count, key_mask, pooling)


@label_topk.register_fake
def _(q: Tensor, k: Tensor, count: int, key_mask: Tensor | None, pooling: str | None) -> Tensor:
    return k.new_empty(q.shape[0], q.shape[1] if pooling is None else k.shape[1], count, dtype=torch.int64)


@torch.library.custom_op("gossamer::label_attention", mutates_args=())
def label_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    channels: Tensor,
    k_labels: Tensor,
    count: int,
    newest: bool,
    key_mask: Tensor | None,
    pooling: str | None,
    scale: float,
) -> Tensor:
    """:func:`gossamer.kernels.attention_passes.label_attention`."""
    choice = LabelChoice(channels, k_labels, count, newest, key_mask, pooling)
    return passes.label_attention(q, k, v, choice, scale)


@label_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _grid(q: Tensor, k: Tensor, rows: int, columns: int) -> Tensor:
    """Room for a number of every block."""
    return q.new_empty(*q.shape[:2], -(-q.shape[2] // rows), -(-k.shape[2] // columns), dtype=torch.float32)

"""Passes of attention over the blocks of a mask: compiled where they can be, with torch alone everywhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels import attention_native as compiled
from gossamer.kernels import attention_reference as reference
from gossamer.kernels import attention_triton as graphics
from gossamer.kernels.attention_inputs import LabelChoice, check_channels, check_places, wants_gradients
from gossamer.kernels.attention_labels import Labels, of_values
from gossamer.kernels.attention_reference import Visibility


def forward(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps."""
    if compiled.suits("attention_forward", q, k, v):
        return compiled.forward(q, k, v, visible, scale)
    if graphics.suits(q, k, v):
        return graphics.forward(q, k, v, visible, scale)
    return reference.forward(q, k, v, visible, scale)


def backward(
    grads: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    visible: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    if compiled.suits("attention_backward", *saved[:3], grads[0]):
        return compiled.backward(grads, saved, visible, scale)
    return reference.backward(grads, saved, visible, scale)


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_size: tuple[int, int], visible: Visibility, scale: float
) -> Tensor:
    """Weights summed over blocks."""
    if compiled.suits("attention_block_mass", q, k):
        return compiled.block_mass(q, k, lse, block_size, visible, scale)
    return reference.block_mass(q, k, lse, block_size, visible, scale)


def antidiagonal_mass(
    q: Tensor, k: Tensor, stride: int, block_size: int, causal: bool, scale: float, key_mask: Tensor | None
) -> Tensor:
    """Estimated attention of blocks."""
    chosen = compiled if compiled.suits("attention_antidiagonal_mass", q, k) else reference
    return chosen.antidiagonal_mass(q, k, stride, block_size, causal, scale, key_mask)


def gather(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor | None, scale: float, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Outputs over listed keys, and log-sum-exps if they are wanted; with torch alone where gradients are.

    Raises
    ------
    ConfigurationError
        If a listed key does not exist.
    """
    differentiable = wants_gradients(q, k, v)
    if not differentiable and compiled.suits("attention_gather_listed", q, k, v):
        return compiled.gather(q, k, v, indices, counts, scale, with_lse)
    check_places(indices, k)
    chosen = graphics if not differentiable and graphics.suits(q, k, v) else reference
    return chosen.gather(q, k, v, indices, counts, scale)


def label_topk(q: Tensor, k: Tensor | Labels, count: int, key_mask: Tensor | None, pooling: str | None) -> Tensor:
    """The keys whose labels agree best with the queries'."""
    if count and compiled.suits("attention_label_topk", q, of_values(k)):
        return compiled.label_topk(q, k, count, key_mask, pooling)
    with torch.no_grad():
        return reference.label_topk(q, k, count, key_mask, pooling)


def label_attention(q: Tensor, k: Tensor, v: Tensor, choice: LabelChoice, scale: float) -> Tensor:
    """Outputs over the keys whose labels agree best with the queries', and over the newest.

    Raises
    ------
    ConfigurationError
        If there is no such channel.
    """
    channels, k_labels, count, newest, key_mask, pooling = choice
    one_pass = count and not wants_gradients(q, k, v)
    if one_pass and compiled.suits("attention_by_labels", q, k, v, of_values(k_labels)):
        return compiled.label_attention(q, k, v, choice, scale)
    check_channels(channels, q)
    if count:
        by_head = channels.repeat_interleave(q.shape[1] // len(channels), 0)
        labels = q.gather(-1, by_head[None, :, None].expand(len(q), -1, -1, -1)).to(of_values(k_labels).dtype)
        chosen = label_topk(labels, k_labels, count, key_mask, pooling)
    else:
        chosen = torch.empty(len(q), k_labels.shape[1], 0, dtype=torch.int64, device=q.device)
    if newest:
        chosen = torch.cat([chosen, chosen.new_full((*chosen.shape[:2], 1), k.shape[2] - 1)], -1)
    return gather(q, k, v, chosen, None, scale, with_lse=False)[0]

"""Attention by compiled code: what its functions take, from tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.attention_inputs import LabelChoice, check_channels, check_places
from gossamer.kernels.attention_labels import Labels
from gossamer.kernels.attention_reference import Visibility
from gossamer.kernels.native import VALUE_CODES, native, offers

_POOLINGS = {"sum": 0, "max": 1, None: 2}  # number by which the compiled code knows how heads choose together
_DTYPES = (torch.float32, torch.bfloat16)


def suits(name: str, *tensors: Tensor) -> bool:
    """Whether there is compiled code of this name for tensors of these devices and dtypes."""
    for x in tensors:
        if not x.is_cpu or x.dtype not in _DTYPES:
            return False
    return offers(name)


def forward(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`gossamer.kernels.attention_reference.forward`."""
    outputs = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    problem, kept = _problem(q, k, visible, scale)
    native().attention_forward(problem, _heads(q), _heads(k), _heads(v), _heads(outputs), lse.data_ptr())
    del kept
    return outputs, lse


def backward(
    grads: tuple[Tensor, Tensor | None],
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    visible: Visibility,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gossamer.kernels.attention_reference.backward`."""
    q, k, v, outputs, lse = saved
    grad, found = adjacent(grads[0]), tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    deltas = torch.linalg.vecdot(grad.float(), outputs.float())
    if grads[1] is not None:
        deltas -= grads[1]
    q, k, v, deltas, lse = adjacent(q), adjacent(k), adjacent(v), deltas.contiguous(), lse.contiguous()
    problem, kept = _problem(q, k, visible, scale)
    native().attention_backward(
        problem, *(_heads(x) for x in (q, k, v, grad)), lse.data_ptr(), deltas.data_ptr(), *(_heads(x) for x in found)
    )
    del kept
    return found[0], found[1], found[2]


def block_mass(
    q: Tensor, k: Tensor, lse: Tensor, block_size: tuple[int, int], visible: Visibility, scale: float
) -> Tensor:
    """:func:`gossamer.kernels.attention_reference.block_mass`."""
    rows, columns = (-(-x.shape[2] // size) for x, size in zip((q, k), block_size))
    found = torch.empty(*q.shape[:2], rows, columns)
    q, k, lse = adjacent(q), adjacent(k), lse.detach().float().contiguous()
    problem, kept = _problem(q, k, visible, scale)
    native().attention_block_mass(problem, _heads(q), _heads(k), lse.data_ptr(), *block_size, found.data_ptr())
    del kept
    return found


def antidiagonal_mass(
    q: Tensor, k: Tensor, stride: int, block_size: int, causal: bool, scale: float, key_mask: Tensor | None
) -> Tensor:
    """:func:`gossamer.kernels.attention_reference.antidiagonal_mass`."""
    rows, columns = (-(-x.shape[2] // block_size) for x in (q, k))
    found = torch.empty(*q.shape[:2], rows, columns)
    q, k = adjacent(q), adjacent(k)
    offset = -((q.shape[2] - k.shape[2]) // stride)
    problem, kept = _problem(q, k, Visibility(causal, key_mask=key_mask, offset=offset), scale)
    native().attention_antidiagonal_mass(problem, _heads(q), _heads(k), stride, block_size, found.data_ptr())
    del kept
    return found


def gather(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor | None, scale: float, with_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """:func:`gossamer.kernels.attention_reference.gather`, which looks at places before it reads there.

    A step of decoding takes so little time that a tensor less to make, log-sum-exps that nobody wants, can be felt.

    Raises
    ------
    ConfigurationError
        If a listed key does not exist.
    """
    outputs = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32) if with_lse else None
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    indices = indices if indices.is_contiguous() else indices.contiguous()
    counts = None if counts is None else counts.long().contiguous()
    inside = native().attention_gather_listed(
        *(q.shape[0], q.shape[1], k.shape[1], _heads(q), _heads(k), _heads(v)),
        *(indices.shape[1], indices.shape[2], indices.data_ptr(), indices.dtype == torch.int64),
        *(0 if counts is None else counts.data_ptr(), scale, torch.get_num_threads()),
        *(_heads(outputs), 0 if lse is None else lse.data_ptr()),
    )
    if not inside:
        check_places(indices, k)
    return outputs, lse


def label_topk(q: Tensor, k: Tensor | Labels, count: int, key_mask: Tensor | None, pooling: str | None) -> Tensor:
    """:func:`gossamer.kernels.attention_reference.label_topk`."""
    q, (held, of_k) = adjacent(q), _labels(k)
    mask = None if key_mask is None else key_mask.contiguous()
    found = torch.empty(q.shape[0], q.shape[1] if pooling is None else k.shape[1], count, dtype=torch.int64)
    address = 0 if mask is None else mask.data_ptr()
    native().attention_label_topk(
        *(q.shape[0], q.shape[1], k.shape[1], _heads(q), *of_k, _POOLINGS[pooling], address, count),
        *(found.data_ptr(), torch.get_num_threads()),
    )
    del held
    return found


def label_attention(q: Tensor, k: Tensor, v: Tensor, choice: LabelChoice, scale: float) -> Tensor:
    """:func:`gossamer.kernels.attention_passes.label_attention`, a thread choosing and reading head after head.

    Raises
    ------
    ConfigurationError
        If there is no such channel.
    """
    outputs = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    channels, k_labels, count, newest, mask, pooling = choice
    (q, of_q), (k, of_k), (v, of_v) = map(_laid_out, (q, k, v))
    held, of_labels = _labels(k_labels)
    channels = channels if channels.is_contiguous() else channels.contiguous()
    mask = None if mask is None else mask.contiguous()
    exist = native().attention_by_labels(
        *(q.shape[0], q.shape[1], k.shape[1], of_q, of_k, of_v, channels.data_ptr(), *of_labels),
        *(k_labels.shape[1], _POOLINGS[pooling], 0 if mask is None else mask.data_ptr(), count, newest, scale),
        *(torch.get_num_threads(), _heads(outputs)),
    )
    del held
    if not exist:
        check_channels(channels, q)
    return outputs


def adjacent(x: Tensor) -> Tensor:
    """`x` for compiled code, the numbers of a vector side by side."""
    return x if x.stride(-1) == 1 else x.detach().contiguous()


def _heads(x: Tensor) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3], *x.shape[2:], VALUE_CODES[x.dtype])


def _laid_out(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """:func:`adjacent` and how it lies, asked for once: after another kernel every question takes microseconds."""
    batch, head, vector, channel = x.stride()
    if channel != 1:
        x = adjacent(x)
        return x, _heads(x)
    return x, (x.data_ptr(), batch, head, vector, *x.shape[2:], VALUE_CODES[x.dtype])


def _labels(k: Tensor | Labels) -> tuple[Any, tuple[tuple[int, ...], tuple[Any, ...]]]:
    """Labels for compiled code: what they are and how they lie, and where their codes are if they are rounded."""
    if isinstance(k, Tensor):
        k, there = _laid_out(k)
        return k, (there, ())
    codes, low, step = k.parts()
    if codes.stride(3) != 1:
        codes = codes.contiguous()
    (low, of_low), (step, of_step) = _laid_out(low), _laid_out(step)
    rounded = (codes.data_ptr(), *codes.stride()[:3], k.bits, of_low, of_step)
    return (codes, low, step), ((0, 0, 0, 0, k.shape[2], k.channels, VALUE_CODES[step.dtype]), rounded)


def _problem(q: Tensor, k: Tensor, visible: Visibility, scale: float) -> tuple[tuple[float, ...], list[Tensor]]:
    """What the compiled code takes, and the tensors whose addresses that holds."""
    queries, keys = q.shape[2], k.shape[2]
    offset = keys - queries if visible.offset is None else visible.offset
    blocks, strides = visible.blocks, (0, 0)
    if blocks is not None:
        blocks = blocks.contiguous()
        strides = (blocks.stride(0) if blocks.shape[0] > 1 else 0, blocks.stride(1) if blocks.shape[1] > 1 else 0)
    mask = None if visible.key_mask is None else visible.key_mask.contiguous()
    problem = (
        *(q.shape[0], q.shape[1], k.shape[1], queries, keys, offset),
        *(int(visible.causal), visible.window or 0),
        *(0 if blocks is None else blocks.data_ptr(), *strides, *visible.block_size),
        *(0 if mask is None else mask.data_ptr(), scale, torch.get_num_threads()),
    )
    return problem, [x for x in (blocks, mask) if x is not None]

"""What attention takes: checks of shapes and dtypes that all its functions share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.attention_labels import Labels


class LabelChoice(NamedTuple):
    """Which keys are chosen by labels: what :func:`gossamer.kernels.attention.label_attention` says of it."""

    channels: Tensor
    k_labels: Tensor | Labels
    wanted: int  # keys
    newest: bool
    key_mask: Tensor | None
    pooling: str | None


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wants_gradients(*tensors: Tensor) -> bool:
    """Whether gradients of any of them are asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def check_heads(q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """Check queries ``(batch, heads, queries, size)`` against keys and values of as many or fewer heads.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or devices do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not None and (x.dim() != 4 or x.dtype not in _DTYPES):
            raise ConfigurationError(
                f"{name} is {tuple(x.shape)} {x.dtype}; it must be (batch, heads, tokens, head size) in float32, "
                f"bfloat16, float16 or float64"
            )
    (batch, heads, _, size), (key_batch, key_heads, _, key_size) = q.shape, k.shape
    if key_batch != batch or key_size != size or not size or key_heads < 1 or heads % key_heads:
        raise ConfigurationError(
            f"q is {tuple(q.shape)} and k {tuple(k.shape)}; batch and head size must be equal, the size at least "
            f"1, and the heads of q a multiple of those of k"
        )
    if v is not None and v.shape[:3] != k.shape[:3]:
        raise ConfigurationError(f"k is {tuple(k.shape)} and v {tuple(v.shape)}; all but the head size must be equal")
    for x in (k, v):
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ConfigurationError("q, k and v have different dtypes or devices; convert them to one")


def check_lengths(q: Tensor, k: Tensor, causal: bool) -> None:
    """Check that causal attention has a key for every query.

    Raises
    ------
    ConfigurationError
        If there are more queries than keys.
    """
    if causal and q.shape[2] > k.shape[2]:
        raise ConfigurationError(
            f"{q.shape[2]} queries but {k.shape[2]} keys; causal attention needs at least as many keys as queries"
        )


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    """Check ``(batch, keys)`` bool.

    Raises
    ------
    ConfigurationError
        If shape, dtype or device do not fit.
    """
    if key_mask is None:
        return
    wanted = (k.shape[0], k.shape[2])
    if tuple(key_mask.shape) != wanted or key_mask.dtype != torch.bool or key_mask.device != k.device:
        raise ConfigurationError(
            f"key_mask is {tuple(key_mask.shape)} {key_mask.dtype} on {key_mask.device}; keys {tuple(k.shape)} take "
            f"{wanted} bool on {k.device}, True for real keys"
        )


def check_window(window: int | None) -> None:
    """Check the number of keys a query sees at most.

    Raises
    ------
    ConfigurationError
        If it is below 1.
    """
    if window is not None and window < 1:
        raise ConfigurationError(f"window is {window}; a query must see at least 1 token, or all with None")


def scale_of(q: Tensor, scale: float | None) -> float:
    """`scale`, or by default 1 / √(head size).

    Raises
    ------
    ConfigurationError
        If it is not a finite number.
    """
    if scale is None:
        return float(q.shape[-1]) ** -0.5
    if not math.isfinite(scale):
        raise ConfigurationError(f"scale is {scale}; it must be a finite number, such as 1 / √(head size)")
    return float(scale)


def pair_of(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Queries and keys of a block.

    Raises
    ------
    ConfigurationError
        If one of them is below 1.
    """
    size = (block_size, block_size) if isinstance(block_size, int) else (block_size[0], block_size[1])
    if min(size) < 1:
        raise ConfigurationError(f"block_size is {block_size}; it must be 1 or more, such as 64")
    return size


def check_indices(indices: Tensor, counts: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Check lists of keys ``(batch, heads or key heads, tokens)`` and their lengths.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or lengths do not fit.
    """
    heads = (q.shape[1], k.shape[1])
    fits = indices.dim() == 3 and indices.shape[0] == q.shape[0] and indices.shape[1] in heads
    if not fits or indices.dtype not in (torch.int32, torch.int64):
        raise ConfigurationError(
            f"indices is {tuple(indices.shape)} {indices.dtype}; q {tuple(q.shape)} and k {tuple(k.shape)} take "
            f"({q.shape[0]}, {heads[0]} or {heads[1]}, tokens) int32 or int64"
        )
    if counts is not None and (counts.shape != indices.shape[:2] or counts.dtype not in (torch.int32, torch.int64)):
        raise ConfigurationError(
            f"counts is {tuple(counts.shape)} {counts.dtype}; indices {tuple(indices.shape)} take "
            f"{tuple(indices.shape[:2])} int32 or int64"
        )
    if counts is not None and counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= indices.shape[2]:
        raise ConfigurationError(
            f"counts go from {int(counts.min())} to {int(counts.max())}; they must lie in 0 … {indices.shape[2]}"
        )


def check_places(indices: Tensor, k: Tensor) -> None:
    """Check that all listed keys exist.

    Raises
    ------
    ConfigurationError
        If one lies outside the keys.
    """
    if indices.numel():
        low, high = (int(x) for x in torch.aminmax(indices))
        if low < 0 or high >= k.shape[2]:
            raise ConfigurationError(f"indices go from {low} to {high}; there are keys 0 … {k.shape[2] - 1}")


def check_channels(channels: Tensor, q: Tensor) -> None:
    """Check that all of some channels exist.

    Raises
    ------
    ConfigurationError
        If one lies outside the head size.
    """
    if channels.numel():
        low, high = (int(x) for x in torch.aminmax(channels))
        if low < 0 or high >= q.shape[3]:
            raise ConfigurationError(f"channels go from {low} to {high}; a head has channels 0 … {q.shape[3] - 1}")

"""Streaming histograms of magnitudes: what thresholds of activations are read from.

A magnitude falls into the bin that the upper sixteen bits of its float32 pattern name. So there are 128 bins between
every two powers of two, no range has to be known before, and the histograms of two pieces of text are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.magnitude_histogram import use_compiled
from gossamer.errors import ConfigurationError
from gossamer.kernels.native import VALUE_CODES, available, native, offers

BINS = 1 << 16
_DTYPES = (torch.float32, torch.bfloat16)


def magnitude_histogram(x: Tensor, scale: Tensor | None, counts: Tensor) -> Tensor:
    """Add to `counts` how often each magnitude ``|x| · scale`` occurs, in place.

    Parameters
    ----------
    x
        ``(rows, n)``, any floating dtype. The product is formed in float32.
    scale
        ``(n,)`` float32, one factor for each column, or None.
    counts
        ``(65536,)`` int64, contiguous, on the device of `x`. Bin ``b`` holds the magnitudes whose float32 pattern
        begins with the sixteen bits ``b``; those from 32768 on stay 0, for a magnitude has no sign.

    Returns
    -------
    Tensor
        `counts`.

    Raises
    ------
    ConfigurationError
        If a shape, dtype or device does not fit.
    """
    _check(x, scale, counts)
    if not x.numel():
        return counts
    x = x.detach()
    if _usable(x):
        rows = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        _count(rows, rows.stride(0), scale, counts)
        torch.autograd.graph.increment_version(counts)
        return counts
    wide = x.float() if scale is None else x.float() * scale
    bins = wide.contiguous().view(torch.int32) >> 16 & 0x7FFF
    counts += torch.bincount(bins.flatten(), minlength=BINS)
    return counts


def _check(x: Tensor, scale: Tensor | None, counts: Tensor) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ConfigurationError(f"x is {tuple(x.shape)} {x.dtype}; give floating-point numbers (rows, n)")
    if scale is not None and (
        scale.shape != x.shape[1:]
        or scale.dtype != torch.float32
        or not scale.is_contiguous()
        or scale.device != x.device
    ):
        raise ConfigurationError(
            f"scale is {tuple(scale.shape)} {scale.dtype} on {scale.device}; x of {x.shape[1]} columns takes "
            f"({x.shape[1]},) float32 there, contiguous"
        )
    if (
        counts.shape != (BINS,)
        or counts.dtype != torch.int64
        or not counts.is_contiguous()
        or counts.device != x.device
    ):
        raise ConfigurationError(
            f"counts are {tuple(counts.shape)} {counts.dtype} on {counts.device}; they must be ({BINS},) int64 on "
            f"{x.device}, contiguous"
        )


def _usable(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in _DTYPES and available() and offers("magnitude_histogram")


def _count(x: Tensor, stride: int, scale: Tensor | None, counts: Tensor) -> None:
    """Count rows ``(…, n)`` that lie `stride` numbers apart, the numbers of a row side by side."""
    columns = x.shape[-1]
    native().magnitude_histogram(
        *(x.numel() // columns, columns, x.data_ptr(), VALUE_CODES[x.dtype], stride),
        *(0 if scale is None else scale.data_ptr(), counts.data_ptr(), torch.get_num_threads()),
    )


def _count_natively(x: Tensor, scale: Tensor | None, counts: Tensor) -> bool:
    """Count ``(…, n)`` for :class:`~gossamer.core.magnitude_histogram.MagnitudeHistogram`; False where no kernel can.

    It comes from there with every call of a layer, so that a check, or a tensor more to make, would be felt.
    """
    if not _usable(x):
        return False
    if x.numel():
        # not the stride that the tensor says: of a dimension of size 1 that may be any
        _count(x if x.is_contiguous() else x.detach().contiguous(), x.shape[-1], scale, counts)
    return True


use_compiled(_count_natively)

"""Masks of one bit a weight by compiled code: what is removed becomes zero in place, at the speed of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.masks import mask_, use_compiled_masks
from gossamer.kernels.native import available, native

__all__ = ["mask_", "mask_natively"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mask_natively(tensor: Tensor, bits: Tensor) -> bool:
    """Zero in place the elements whose bit is 0, with all threads of torch.

    Cache lines in which nothing has to change are read and not written.

    Parameters
    ----------
    tensor
        Of any shape.
    bits
        ``ceil(numel / 8)`` bytes as of :func:`gossamer.core.masks.pack_bits`.

    Returns
    -------
    bool
        False if there is no compiled code for this device, dtype or layout, and nothing was done.
    """
    on_cpu = tensor.device.type == "cpu" and bits.device.type == "cpu"
    if not available() or not on_cpu or tensor.dtype not in _DTYPES:
        return False
    if not tensor.is_contiguous() or not bits.is_contiguous() or bits.dtype != torch.uint8:
        return False
    if bits.numel() != (tensor.numel() + 7) // 8:
        return False
    native().mask_values(
        tensor.data_ptr(), tensor.element_size(), bits.data_ptr(), tensor.numel(), torch.get_num_threads()
    )
    torch.autograd.graph.increment_version(tensor)  # so that autograd notices, as it does for operations of torch
    return True


use_compiled_masks(mask_natively)

"""Depthwise convolutions in the same layout as the sparse ones next to them.

Torch's own rearranges images to blocks of channels and back, which costs more than the convolution. Here every channel
is copied once with zeros around it, and then each tap is the same row of positions at another offset; taps that were
pruned are left out. Elsen et al., 2020, arXiv 1911.09723, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.images import STILL, UNBOUNDED, Window, as_floats, check_images, convolve_densely, moves
from gossamer.kernels.native import available, native


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    window: Window | None = None,
    bounds: tuple[float, float] | None = None,
    threads: int | None = None,
) -> Tensor:
    """Convolve every channel with its own kernel.

    Parameters
    ----------
    x, bias, window, bounds, threads
        As for :meth:`~gossamer.kernels.convolution.BlockedKernels.convolve`; as many channels go in as come out.
    weight
        ``(channels, 1, height, width)``, of any floating dtype. Where all inputs of a channel are finite, weights of
        zero are left out of the sums.

    Returns
    -------
    Tensor
        ``(batch, channels, height', width')`` in the dtype of `x`. Sums are formed in float32.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or devices do not fit, or the bounds are no interval.
    """
    window, bounds = window or STILL, bounds or UNBOUNDED
    if weight.ndim != 4 or weight.shape[1] != 1 or 0 in weight.shape or not weight.is_floating_point():
        raise ConfigurationError(
            f"the weight is {tuple(weight.shape)} {weight.dtype}; give floating numbers (channels, 1, height, width)"
        )
    channels, _, *kernel = weight.shape
    check_images(x, channels, bias, channels, bounds)
    batch, _, height, width = x.shape
    plan = moves(window, (height, width), (kernel[0], kernel[1]))
    if not available() or x.numel() == 0:
        return convolve_densely(x, weight, bias, window, bounds, channels)
    wide, kernels = as_floats(x), as_floats(weight)
    added = None if bias is None else as_floats(bias)
    result = torch.empty((batch, channels, *plan.output))
    native().depthwise(
        *(channels, kernels.data_ptr(), 0 if added is None else added.data_ptr(), *bounds),
        *(wide.data_ptr(), batch, height, width, *plan.output, *plan.numbers),
        *(result.data_ptr(), threads or torch.get_num_threads()),
    )
    return result if x.dtype == torch.float32 else result.to(x.dtype)

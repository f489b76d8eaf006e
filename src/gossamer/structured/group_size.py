"""How many output channels should share their zeros: as few as this machine lets pay.

Small groups keep more of a network, large ones load an input for more products. Which size the kernels need is a matter
of the processor, and so it is measured: the smallest size whose time over the layers of a network is near the best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import torch

from gossamer.core.kernel_groups import KernelGroup
from gossamer.errors import ConfigurationError
from gossamer.kernels.convolution import BlockedKernels
from gossamer.kernels.images import Window
from gossamer.kernels.native import available
from gossamer.measure import interleave

SIZES = (4, 8, 16)
#: without compiled kernels nothing can be measured, and this many are one register of the largest kind
UNMEASURED = 16
_SIDE = 14  # height and width of the images in the middle of a network
_REPEATS = 5


def choose_group_size(
    shapes: Iterable[tuple[int, ...]],
    sparsity: float,
    *,
    slack: float = 0.1,
    side: int = _SIDE,
    measure: Callable[[dict[str, Callable[[], object]]], dict[str, float]] | None = None,
) -> int:
    """Return the smallest size of groups that is nearly as fast as the fastest.

    Parameters
    ----------
    shapes
        Of the weights that will be pruned, ``(out, in)`` or ``(out, in, height, width)``.
    sparsity
        Share of the units of each that will be zero; which ones does not matter for the time.
    slack
        How much longer than the fastest a size may take.
    side
        Height and width of the images that layers read.
    measure
        Replaces the measurement, ``{size: run} -> {size: seconds}``, for one layer.

    Raises
    ------
    ConfigurationError
        If the slack is negative.
    """
    if not slack >= 0:
        raise ConfigurationError(f"slack is {slack}; a share of the best time that may be lost, from 0")
    if not available():
        return UNMEASURED
    timer = _interleaved if measure is None else measure
    generator = torch.Generator().manual_seed(0)
    seconds = dict.fromkeys(SIZES, 0.0)
    with torch.no_grad():
        for shape, count in Counter(tuple(shape) for shape in shapes).items():
            weight = torch.randn(shape, generator=generator)
            kernel = tuple(shape[2:]) or (1, 1)
            window = Window(padding=(kernel[0] // 2, kernel[-1] // 2))
            x = torch.randn(1, shape[1], side, side, generator=generator)
            runs: dict[str, Callable[[], object]] = {}
            for size in SIZES:
                kept = KernelGroup(size).select(torch.rand(shape, generator=generator), sparsity)
                runs[str(size)] = partial(BlockedKernels.from_dense(weight * kept, size).convolve, x, window=window)
            for name, value in timer(runs).items():
                seconds[int(name)] += count * value
    return min(size for size in SIZES if seconds[size] <= (1 + slack) * min(seconds.values()))


def _interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    return {name: timing.median for name, timing in interleave(runs, repeats=_REPEATS).items()}

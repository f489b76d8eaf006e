"""Widths that suit the hardware: from a share for each layer to a number of channels."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gossamer.core.selection import dropped_count
from gossamer.errors import ConfigurationError


def aligned_widths(
    sparsities: Mapping[str, float], widths: Mapping[str, int], sparsity: float, align: int | None = None
) -> dict[str, int]:
    """Turn shares into widths that the hardware likes, without drifting from the total.

    Every width is first rounded to the nearest allowed one: a multiple of `align`, at least one of them, or the whole
    layer. Then, while the total can come closer to ``(1 − sparsity)`` of all channels, the layer that was closest to
    being rounded the other way moves by one step. With ``align=1`` exactly ``⌊sparsity · total⌋`` channels go;
    otherwise the total misses by half a step at most, unless every layer is at its limit.

    Parameters
    ----------
    sparsities
        Layer → share of its channels that should go.
    widths
        Layer → channels it has.
    sparsity
        Of all the channels together.
    align
        Multiple. By default 128 for a layer of 1024 channels or more, and 1 for a narrower one.

    Returns
    -------
    dict of str to int
        Layer → channels that remain.

    Raises
    ------
    ConfigurationError
        If no layer is wider than `align`, so that nothing could go.
    """
    steps = {name: align or (128 if width >= 1024 else 1) for name, width in widths.items()}
    if sparsity > 0 and all(width <= steps[name] for name, width in widths.items()):
        raise ConfigurationError(
            f"align is {align}, but the widest feed-forward layer has {max(widths.values())} channels; "
            f"choose a smaller align, such as {max(1, max(widths.values()) // 8)}, or None"
        )
    allowed = {n: [*range(steps[n], widths[n], steps[n]), widths[n]] for n in widths}
    ideal = {name: (1 - sparsities[name]) * width for name, width in widths.items()}
    place = {
        name: min((abs(size - ideal[name]), index) for index, size in enumerate(sizes))[1]
        for name, sizes in allowed.items()
    }
    total = sum(widths.values())
    missing = total - dropped_count(total, sparsity) - sum(allowed[n][place[n]] for n in widths)
    while missing:
        direction = 1 if missing > 0 else -1
        best, least = None, math.inf
        for name, sizes in allowed.items():
            now, then = place[name], place[name] + direction
            if 0 <= then < len(sizes) and abs(missing - (sizes[then] - sizes[now])) < abs(missing):
                cost = abs(sizes[then] - ideal[name]) - abs(sizes[now] - ideal[name])
                if cost < least:
                    best, least = name, cost
        if best is None:
            break
        missing += allowed[best][place[best]] - allowed[best][place[best] + direction]
        place[best] += direction
    return {name: sizes[place[name]] for name, sizes in allowed.items()}

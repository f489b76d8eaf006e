"""Images that are worse than those of training: noise, blur and loss of contrast, each at three severities.

After Hendrycks & Dietterich, 2019, arXiv 1903.12261, with strengths of our own for small grey images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError

Corruption = Literal["noise", "blur", "contrast"]
SEVERITIES = (1, 2, 3)
_STRENGTH: dict[str, tuple[float, float, float]] = {
    "noise": (0.15, 0.3, 0.45),  # standard deviation
    "blur": (0.8, 1.3, 1.8),  # standard deviation in pixels
    "contrast": (0.5, 0.3, 0.15),  # of which this share is left
}


def corrupt(images: Tensor, corruption: Corruption, severity: int, seed: int = 0) -> Tensor:
    """Images after a corruption.

    Parameters
    ----------
    images
        ``(n, channels, height, width)`` in [0, 1].
    corruption
        ``"noise"`` (Gaussian), ``"blur"`` (Gaussian, edges repeated) or ``"contrast"`` (towards the mean of each
        image).
    severity
        1, 2 or 3.
    seed
        Of the noise.

    Returns
    -------
    Tensor
        Of the same shape and dtype, in [0, 1].

    Raises
    ------
    ConfigurationError
        If there is no such corruption or severity.
    """
    if corruption not in get_args(Corruption) or severity not in SEVERITIES:
        raise ConfigurationError(
            f"no corruption {corruption!r} of severity {severity!r}; use {', '.join(get_args(Corruption))} of 1, 2 or 3"
        )
    return _CORRUPTIONS[corruption](images, _STRENGTH[corruption][severity - 1], seed).clamp(0, 1)


def corruptions(images: Tensor, seed: int = 0) -> Iterator[tuple[str, int, Tensor]]:
    """Every corruption at every severity: its name, the severity, and the images."""
    for name in get_args(Corruption):
        for severity in SEVERITIES:
            yield name, severity, corrupt(images, name, severity, seed)


def _noise(images: Tensor, strength: float, seed: int) -> Tensor:
    drawn = torch.randn(images.shape, generator=generator_for("corrupted images", seed))
    return images + strength * drawn.to(images.device, images.dtype)


def _blur(images: Tensor, strength: float, seed: int) -> Tensor:
    reach = math.ceil(3 * strength)
    places = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    window = torch.exp(-(places**2) / (2 * strength**2))
    window /= window.sum()
    channels = images.shape[1]
    padded = nn.functional.pad(images, (reach,) * 4, mode="replicate")
    rows = nn.functional.conv2d(padded, window.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return nn.functional.conv2d(rows, window.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def _contrast(images: Tensor, strength: float, seed: int) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + strength * (images - mean)


_CORRUPTIONS: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
}

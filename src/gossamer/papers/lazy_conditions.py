"""What perceptrons learn while their neurons are watched: digits, wrong ones, noise, and noise that never repeats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.papers.digits import SIDE, Digits
from gossamer.papers.lazy_networks import DEVIATION, MEAN

Condition = Literal["labels", "random labels", "random images", "fresh noise"]
CONDITIONS: tuple[Condition, ...] = ("labels", "random labels", "random images", "fresh noise")
CLASSES = 10


def images_of(condition: Condition, training: Digits, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a condition that has a set of them."""
    generator = generator_for("lazy labels", seed)
    images = random_images(len(training), seed) if condition == "random images" else training.images
    real = condition != "random labels"
    labels = training.labels if real else torch.randint(CLASSES, (len(training),), generator=generator)
    return images, labels


def random_images(count: int, seed: int) -> Tensor:
    """Noise with the mean and the deviation of the digits' pixels, ``(count, 1, 28, 28)``."""
    return MEAN + DEVIATION * torch.randn(count, 1, SIDE, SIDE, generator=generator_for("random images", seed))


def batches_of(
    condition: Condition, training: Digits, steps: int, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each step; noise that never repeats has the labels of a random linear teacher."""
    generator = generator_for("lazy batches", seed)
    if condition == "fresh noise":
        teacher = torch.randn(SIDE * SIDE, CLASSES, generator=generator)
        for _ in range(steps):
            noise = torch.randn(batch, 1, SIDE, SIDE, generator=generator)
            yield MEAN + DEVIATION * noise, (noise.flatten(1) @ teacher).argmax(1)
        return
    yield from drawn(Digits(*images_of(condition, training, seed)), steps, batch, generator)


def drawn(data: Digits, steps: int, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels of each step, drawn with repetition."""
    for rows in torch.randint(len(data), (steps, batch), generator=generator):
        yield data.images[rows], data.labels[rows]


def by_heart(training: Digits, count: int, seed: int) -> Digits:
    """So many of the images, drawn at random, with random labels: what is learned is learned by heart."""
    images, labels = images_of("random labels", training, seed)
    rows = torch.randperm(len(labels), generator=generator_for("images learned by heart", seed))[:count]
    return Digits(images[rows], labels[rows])

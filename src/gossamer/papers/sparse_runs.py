"""Training runs on images that a sparse method accompanies: for every method the same steps, batches and rates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.randomness import generator_for
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.measure.training_cost import TrainingCost
from gossamer.measure.training_ledger import TrainingLedger
from gossamer.papers.digits import SIDE, Digits


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov's momentum, the rate warmed up and then lowered along a cosine.

    Attributes
    ----------
    steps, batch
        Updates, and images of each.
    learning_rate
        Its highest value, after a twentieth of the steps.
    momentum, weight_decay
        Of SGD.
    """

    steps: int
    batch: int
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimiser for all the weights."""
        return torch.optim.SGD(
            model.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
            fused=True,
        )

    def rate(self, step: int) -> float:
        """Share of the highest learning rate at a step, counted from 0."""
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2


def fully_connected(*widths: int, normalized: bool = False) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them, on flattened images.

    With batch norm before every ReLU, the scale of the weights makes no difference, as in the convolutional networks
    of most papers: without it, a network that is sparse from the start has too small ones and learns late.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), *([nn.BatchNorm1d(after)] if normalized else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def convolutional(*channels: int, classes: int = 10) -> nn.Sequential:
    """Blocks of convolution, batch norm and ReLU at a half, a quarter, … of the resolution, and a linear layer."""
    layers: list[nn.Module] = []
    for before, after in zip((1, *channels), channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    side = SIDE
    for _ in channels:
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.AvgPool2d(side), nn.Flatten(), nn.Linear(channels[-1], classes))


def batches(data: Digits, recipe: Recipe, seed: int, first: int = 0, last: int | None = None) -> Iterator[Digits]:
    """The batches of the steps from `first` to before `last`, which depend on nothing but the seed."""
    order = torch.randint(len(data), (recipe.steps, recipe.batch), generator=generator_for("batches", seed))
    for rows in order[first:last]:
        yield Digits(data.images[rows], data.labels[rows])


def train_images(
    model: nn.Module,
    data: Digits,
    recipe: Recipe,
    seed: int,
    method: Sparsifier | None = None,
    each: Callable[[int, torch.optim.Optimizer], None] = lambda step, optimizer: None,
) -> MaskSet | None:
    """Train in place, under a method if there is one.

    Parameters
    ----------
    model
        From images to logits.
    data
        Float images and their labels.
    recipe
        How.
    seed
        Of the batches.
    method
        Attached for the length of the training.
    each
        Called before every step with its number and the optimiser.

    Returns
    -------
    MaskSet or None
        What the method leaves.
    """
    optimizer = recipe.optimizer(model)
    run = _attach(method, model, optimizer)
    model.train()
    for step, batch in enumerate(batches(data, recipe, seed)):
        each(step, optimizer)
        optimize(model, optimizer, batch, recipe.learning_rate * recipe.rate(step))
    model.eval()
    return None if run is None else run.finalize()


def train_measured(
    model: nn.Module, data: Digits, recipe: Recipe, seed: int, method: Sparsifier | None = None
) -> tuple[MaskSet | None, TrainingCost]:
    """Train as :func:`train_images` does, and count what it costs.

    Returns
    -------
    MaskSet or None
        What the method leaves.
    TrainingCost
        Of all steps.
    """
    optimizer = recipe.optimizer(model)
    run = _attach(method, model, optimizer)
    with TrainingLedger(model, optimizer, data.images[: recipe.batch], run) as ledger:
        model.train()
        for step, batch in enumerate(batches(data, recipe, seed)):
            optimize(model, optimizer, batch, recipe.learning_rate * recipe.rate(step))
        model.eval()
    return None if run is None else run.finalize(), ledger.cost


def _attach(method: Sparsifier | None, model: nn.Module, optimizer: torch.optim.Optimizer) -> SparseTraining | None:
    with warnings.catch_warnings():
        # under an Erdős–Rényi start small layers stay dense; told once for every method it would bury the bars
        warnings.filterwarnings("ignore", message=".*(stays dense|have no input left)")
        return None if method is None else method.attach(model, optimizer)


def optimize(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Digits, learning_rate: float) -> None:
    """One step of the optimiser at a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
    optimizer.step()


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs of a model in evaluation mode, ``(n, classes)``; its mode is restored."""
    training = model.training
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(part) for part in images.split(500)])
    model.train(training)
    return found


def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the images that the model gets right."""
    return float((logits_of(model, data.images).argmax(1) == data.labels).double().mean())


def cross_entropy(model: nn.Module, data: Digits) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return float(nn.functional.cross_entropy(logits_of(model, data.images).double(), data.labels))

"""What experiments on averaged networks share: digits, two small networks, and how they and their branches train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.retraining_rates import retraining_rates
from gossamer.core.sparsifier import Sparsifier
from gossamer.measure.soups import quality
from gossamer.papers.digits import Digits, digits
from gossamer.papers.sparse_runs import fully_connected
from gossamer.pruning.soup_branches import Branch, batches_of

SIDE = 14
"""Of the images: half of what they have, which a small network learns as well from in a fraction of the time."""


def normalised_convolutions(channels: tuple[int, ...] = (8, 16, 32), classes: int = 10) -> nn.Sequential:
    """Three strided convolutions with batch norm, ``(n, 1, 14, 14)`` → logits."""
    layers: list[nn.Module] = []
    for before, after in zip((1, *channels), channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutional": normalised_convolutions,
    "perceptron": lambda: fully_connected(SIDE * SIDE, 128, 128, 10),
}
"""The convolutional one has batch norm, the perceptron none."""


@dataclass(frozen=True)
class SoupTask:
    """Images for everything: to learn from, to choose by, and to be judged by.

    Attributes
    ----------
    training, validation, held_out
        Three parts of the digits, none of which shares an image with another.
    batch
        Images of a step.
    """

    training: Digits
    validation: Digits
    held_out: Digits
    batch: int

    @classmethod
    def drawn(cls, training: int, validation: int, batch: int, seed: int) -> SoupTask:
        """Draw so many images of each class; all others are held out."""
        found = digits()
        small = Digits(nn.functional.avg_pool2d(found.images, found.images.shape[-1] // SIDE), found.labels)
        seen, held_out = small.split(training + validation, seed)
        learned, chosen_by = seen.split(training, seed)
        return cls(learned, chosen_by, held_out, batch)

    def batches(self) -> list[Tensor]:
        """Unshuffled training images, for batch norm."""
        return list(self.training.images.split(256))

    def score(self, model: nn.Module) -> float:
        """Validation accuracy."""
        return quality(model, self.validation.images, self.validation.labels).accuracy

    def pretrain(self, network: str, steps: int, rate: float, seed: int) -> tuple[nn.Module, list[float]]:
        """Train a dense network, the rate going down straight to zero; also the rates it had."""
        torch.manual_seed(seed)
        model = NETWORKS[network]()
        rates = retraining_rates("llr", [rate], steps)
        Retraining(self.training, self.batch)(model, MaskSet(), Branch(0, 0, seed, 1e-4, tuple(rates)))
        return model, rates


@dataclass(frozen=True)
class Retraining:
    """Train as a branch says, with SGD whose momentum starts anew.

    Attributes
    ----------
    data, batch
        To learn from.
    momentum
        Of SGD, after Nesterov.
    averaged
        Whether the weights end as their mean over the second half of the steps (SWA).
    """

    data: Digits
    batch: int
    momentum: float = 0.9
    averaged: bool = False

    def __call__(self, model: nn.Module, masks: MaskSet, branch: Branch) -> None:
        """Train in place."""
        mean = None
        optimizer = self.optimizer(model, branch.weight_decay)
        for step in range(len(branch.rates)):
            self.steps(model, optimizer, branch, step, step + 1)
            if self.averaged and step + 1 >= len(branch.rates) // 2:
                mean = mean or torch.optim.swa_utils.AveragedModel(model)
                mean.update_parameters(model)
        if mean is not None:
            with torch.no_grad():
                for own, averaged in zip(model.parameters(), mean.module.parameters()):
                    own.copy_(averaged)

    def optimizer(self, model: nn.Module, weight_decay: float) -> torch.optim.SGD:
        """A fresh one."""
        return torch.optim.SGD(
            model.parameters(), lr=0.0, momentum=self.momentum, weight_decay=weight_decay, nesterov=True, fused=True
        )

    def steps(self, model: nn.Module, optimizer: torch.optim.Optimizer, branch: Branch, first: int, last: int) -> None:
        """Some of a branch's steps."""
        model.train()
        for step, rows in enumerate(_rows(branch, len(self.data), self.batch)[first:last], first):
            for group in optimizer.param_groups:
                group["lr"] = branch.rates[step]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(self.data.images[rows]), self.data.labels[rows]).backward()
            optimizer.step()
        model.eval()


_REMEMBERED: dict[Any, list[Tensor]] = {}


def _rows(branch: Branch, examples: int, batch: int) -> list[Tensor]:
    """All batches of a branch; those of the last branch asked for are remembered."""
    key = (branch.seed, len(branch.rates), examples, batch)
    if key not in _REMEMBERED:
        _REMEMBERED.clear()
        _REMEMBERED[key] = list(batches_of(branch, examples, batch))
    return _REMEMBERED[key]


def prune_while_training(
    retraining: Retraining, model: nn.Module, method: Sparsifier, branch: Branch
) -> tuple[nn.Module, MaskSet]:
    """A copy of a model, trained as a branch says under a method that prunes, and the mask it ends with."""
    trained = copy.deepcopy(model)
    optimizer = retraining.optimizer(trained, branch.weight_decay)
    run = method.attach(trained, optimizer)
    retraining.steps(trained, optimizer, branch, 0, len(branch.rates))
    return trained, run.finalize()

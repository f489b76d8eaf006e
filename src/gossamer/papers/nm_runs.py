"""Training runs of N:M methods on images that can be looked at after every step, and a transformer of patches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.nm_sparsifier import as_nm
from gossamer.core.patterns import NM
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.papers.byte_language import ByteGPT, evaluate, pretrain
from gossamer.papers.digits import SIDE, Digits
from gossamer.papers.python_source import python_source
from gossamer.papers.sparse_runs import Recipe, batches, optimize

_MEAN, _DEVIATION = 0.13, 0.31  # of the pixels of handwritten digits


@dataclass(frozen=True)
class AdamRecipe(Recipe):
    """As :class:`Recipe`, with AdamW, as transformers are trained."""

    learning_rate: float = 3e-3
    weight_decay: float = 0.01

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimiser for all the weights."""
        decay = self.weight_decay
        return torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=decay, fused=True)


def train_watched(
    model: nn.Module,
    data: Digits,
    recipe: Recipe,
    seed: int,
    method: Sparsifier | None = None,
    each: Callable[[int, SparseTraining], None] = lambda step, run: None,
) -> SparseTraining | None:
    """Train in place, and let somebody see the run of a method after every step.

    Parameters
    ----------
    model, data, recipe, seed, method
        As for :func:`gossamer.papers.sparse_runs.train_images`.
    each
        Called with the number of steps made, from 0, and the run.

    Returns
    -------
    SparseTraining or None
        The run, finalized.
    """
    optimizer = recipe.optimizer(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stays dense")
        run = None if method is None else method.attach(model, optimizer)
    model.train()
    for step, batch in enumerate(batches(data, recipe, seed)):
        if run is not None:
            each(step, run)
        optimize(model, optimizer, batch, recipe.learning_rate * recipe.rate(step))
    model.eval()
    if run is not None:
        each(recipe.steps, run)
        run.finalize()
    return run


def small_convolutional(classes: int = 10) -> nn.Sequential:
    """Three strided convolutions with batch norm at half resolution, and a hidden layer: widths are multiples of 16."""
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 2 * 2, 64), nn.ReLU(), nn.Linear(64, classes))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class PatchTransformer(nn.Module):
    """A vision transformer on 28 × 28 images [Dosovitskiy et al., 2021, arXiv 2010.11929], without a class token.

    Parameters
    ----------
    layers, width, heads
        Of the transformer.
    patch
        Side of a patch, which divides 28.
    classes
        Of the images.
    """

    def __init__(self, layers: int, width: int, heads: int, patch: int = 7, classes: int = 10):
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, width)
        self.places = nn.Parameter(0.02 * torch.randn((SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of images ``(n, 1, 28, 28)``."""
        patches = functional.unfold((images - _MEAN) / _DEVIATION, self.patch, stride=self.patch).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.embedding(patches) + self.places)).mean(1))


def quality(model: nn.Module, data: Digits) -> tuple[float, float]:
    """Accuracy in percent, and mean negative log-likelihood in nats, of images that were held out."""
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in data.images.split(500)]).double()
    right = (logits.argmax(1) == data.labels).double().mean()
    return 100 * float(right), float(functional.cross_entropy(logits, data.labels))


def byte_losses(own: dict[str, Any], seed: int, cases: Iterable[tuple[str, Sparsifier | None]]) -> dict[str, float]:
    """Held-out loss of byte-level models of Python source, each trained by a method from the same start.

    Parameters
    ----------
    own
        Sizes of text, model and training, as the budgets of the experiments hold them.
    seed
        Of the text, the weights and the batches.
    cases
        Names and methods; None trains dense.
    """
    source = python_source(own["size"], 8, 8, own["length"], 2, seed)
    cut = own["held_out"] * own["length"]
    held_out, text = source.text[-cut:].view(-1, own["length"]), source.text[:-cut]
    found = {}
    for name, method in cases:
        torch.manual_seed(seed)
        model = ByteGPT(own["layers"], own["width"], own["heads"], own["length"])
        done = pretrain(model, text, held_out, own["steps"], own["batch"], own["learning_rate"], method, seed)
        if done.training is not None:
            done.training.finalize()
        found[name] = evaluate(model, held_out)
    return found


def accuracy_curves(
    images: dict[str, dict[str, float]], place: Callable[[str, NM], float]
) -> dict[str, dict[str, list[float]]]:
    """A curve of accuracies for each method, from what is labelled ``"method at N:M"``.

    Parameters
    ----------
    images
        Label → what was measured; without a pattern in its label it is in no curve.
    place
        Where a method's pattern stands on the horizontal axis.
    """
    curves: dict[str, dict[str, list[float]]] = {}
    for label, value in images.items():
        name, _, pattern = label.rpartition(" at ")
        if name:
            curve = curves.setdefault(name, {"x": [], "y": []})
            curve["x"].append(place(name, as_nm(pattern)))
            curve["y"].append(value["accuracy"])
    return curves

"""BDWP's claim: weights pruned to N:M in the backward pass too, by a mask of their own, cost almost no quality.

A convolutional network learns handwritten digits and a byte-level transformer Python's source: dense, with weights
pruned for the forward pass only, for both passes by two masks, by one mask that serves both, and with pruned gradients
in the place of pruned weights. How far the gradient that flows back still points where it should is measured on the
trained network. What the accelerator makes of the saved operations is a matter of its simulator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.targets import find_targets
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.nm_runs import accuracy_curves, byte_losses, quality, small_convolutional, train_watched
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import Recipe
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.training.bdwp import BDWP, Variant
from gossamer.training.bdwp_measures import backward_agreement, relative_operations, training_operations

CLOSE = 1.0  # points of accuracy, or percent of the dense loss, that may be lost at 2:8
ALIGNED = 0.7  # cosine of dX through both weights of a trained network at 2:8
MAIN = "2:8"
OURS: Variant = "bidirectional"
RIVALS: tuple[Variant, ...] = ("transposable", "gradients")

QUICK: dict[str, Any] = {
    "digits": {
        "images": 350,
        "steps": 300,
        "batch": 64,
        "learning_rate": 0.1,
        "patterns": ["2:4", "2:8", "1:8"],
    },
    "bytes": {
        "size": 1_000_000,
        "held_out": 200,
        "length": 128,
        "layers": 2,
        "width": 64,
        "heads": 2,
        "steps": 200,
        "batch": 8,
        "learning_rate": 1e-2,
        "patterns": ["2:8"],
    },
}
FULL: dict[str, Any] = {
    "digits": {**QUICK["digits"], "steps": 4000},
    "bytes": {
        **QUICK["bytes"],
        "size": 8_000_000,
        "layers": 4,
        "width": 128,
        "heads": 4,
        "batch": 32,
        "steps": 5000,
        "learning_rate": 3e-3,
        "patterns": ["2:4", "2:8", "1:8"],
    },
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Qualities of both tasks, cosines of what flows back, and operations."""
    images, cosines, operations = _images(settings["digits"], seed, progress)
    text = _bytes(settings["bytes"], seed, progress)
    curves = _curves(images)
    return {"digits": images, "bytes": text, "cosines": cosines, "operations": operations, "curves": curves}


def _cases(patterns: list[str]) -> list[tuple[str, BDWP | None]]:
    variants: tuple[Variant, ...] = (OURS, "forward", *RIVALS)
    methods = [(f"{v} at {p}", BDWP(pattern=p, variant=v)) for p in patterns for v in variants]
    return [("dense", None), *methods]


def _images(own: dict[str, Any], seed: int, progress: Track) -> tuple[dict, dict, dict]:
    training, held_out = digits().split(own["images"], seed)
    recipe = Recipe(own["steps"], own["batch"], own["learning_rate"])
    found, cosines, operations = {}, {}, {}
    for name, method in progress(_cases(own["patterns"]), "digits: training"):
        torch.manual_seed(seed)
        model = small_convolutional()
        if method is not None:
            rows = training_operations(model, training.images[:1], method)
            operations[name] = sum(row.total for row in rows) / sum(
                row.dense * (2 + (place > 0)) for place, row in enumerate(rows)
            )
        dense = _Dense()
        train_watched(model, training, recipe, seed, method, dense)
        accuracy, loss = quality(model, held_out)
        found[name] = {"accuracy": accuracy, "loss": loss}
        if method is not None and method.variant == OURS:
            cosines[str(method.pattern)] = _cosines(model, dense.weights, held_out, str(method.pattern))
    return found, cosines, operations


class _Dense:
    """Remembers the dense weights with which a run ended."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def __call__(self, step: int, current: Any) -> None:
        self.weights = {name: current.dense(name) for name in current.targets}


def _cosines(model: nn.Module, dense: dict[str, Tensor], data: Digits, pattern: str) -> dict[str, float]:
    """Cosines of dX through W_B with dX through the dense weight and through W_F, mean over linear layers."""
    flowing: dict[str, Tensor] = {}
    hooks = []
    for target in find_targets(model):
        if target.name in dense and isinstance(target.module, nn.Linear):

            def keep(layer: nn.Module, before: Any, after: Any, name: str = target.name) -> None:
                flowing[name] = after[0]

            hooks.append(target.module.register_full_backward_hook(keep))
    functional.cross_entropy(model(data.images[:200]), data.labels[:200]).backward()
    for hook in hooks:
        hook.remove()
    found = [backward_agreement(dense[name], gradient, pattern) for name, gradient in flowing.items()]
    return {kind: sum(each[kind] for each in found) / len(found) for kind in ("dense", "forward")}


def _bytes(own: dict[str, Any], seed: int, progress: Track) -> dict[str, float]:
    return byte_losses(own, seed, progress(_cases(own["patterns"]), "bytes: training"))


def _curves(images: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Accuracy on digits against operations of a step in a layer with three products, beside dense."""
    return accuracy_curves(images, lambda name, nm: relative_operations(nm.n, nm.m, name))


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Paired by seed, at 2:8; rivals in the mean over all patterns and both tasks."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {
        f"{task}, {OURS} − {rival} + {CLOSE:g} at {MAIN}, %": _beside(observations, task, rival)
        for task in ("digits", "bytes")
        for rival in ("dense", f"forward at {MAIN}")
    }
    needed[f"cosine of dX with that of the dense weight at {MAIN} − {ALIGNED}"] = mean_interval(
        [row["cosines"][MAIN]["dense"] - ALIGNED for row in observations]
    )
    rivals = {f"{OURS} − {rival}, %": _rival(observations, rival) for rival in RIVALS}
    numbers: dict[str, Interval | float] = {**needed, **rivals, **_told(observations)}
    wrong = [name for name, value in (needed | rivals).items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "the second mask costs no quality at 2:8, and no rival of equal cost is better", numbers)


def _score(row: Observation, task: str, label: str) -> float:
    """Points of accuracy; for bytes, hundredths of the dense loss below it."""
    if task == "digits":
        return row["digits"][label]["accuracy"]
    return -100 * row["bytes"][label] / row["bytes"]["dense"]


def _beside(observations: list[Observation], task: str, rival: str) -> Interval:
    ours = f"{OURS} at {MAIN}"
    return mean_interval([_score(row, task, ours) - _score(row, task, rival) + CLOSE for row in observations])


def _rival(observations: list[Observation], rival: str) -> Interval:
    found = []
    for row in observations:
        gaps = [
            _score(row, task, label) - _score(row, task, label.replace(OURS, rival))
            for task in ("digits", "bytes")
            for label in row[task]
            if label.startswith(OURS)
        ]
        found.append(sum(gaps) / len(gaps))
    return mean_interval(found)


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    """Every quality, cosines and operations."""
    numbers: dict[str, Interval | float] = {}
    count = len(observations)
    for task in ("digits", "bytes"):
        for label in observations[0][task]:
            values = [row[task][label] for row in observations]
            plain = [value["accuracy"] if task == "digits" else value for value in values]
            numbers[f"{task}, {'accuracy' if task == 'digits' else 'loss'}, {label}"] = sum(plain) / count
    for pattern, first in observations[0]["cosines"].items():
        for kind in first:
            values = [row["cosines"][pattern][kind] for row in observations]
            numbers[f"cosine of dX with that of the {kind} weight at {pattern}"] = sum(values) / count
    for label, value in observations[0]["operations"].items():
        numbers[f"operations of the whole network beside dense, {label}"] = value
    return numbers


experiment = Experiment(
    slug="bdwp",
    claim=(
        "N:M pruning of the same dense weights with one mask for the forward and another for the backward pass makes "
        "two of three products of training sparse, at a quality close to dense training's."
    ),
    rule=(
        "holds if, at 95 % over seeds, two masks at 2:8 lose less than a point of accuracy on digits and less than a "
        "percent of the dense loss on bytes, beside dense training and beside pruning for the forward pass only, and "
        "the cosine between what flows back through W_B and through the dense weight exceeds 0.7; does not hold if one "
        "of these is wholly reversed, or a transposable mask or pruned gradients are wholly better in the mean over "
        "patterns and tasks"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=5,
    x_label="operations of a training step beside dense",
    y_label="accuracy on digits, %",
)

"""Random pruning's claims: the wider the network, the less is lost by drawing its zeros; densities matter, not places.

Perceptrons of growing width learn handwritten digits, dense and under a random mask that is drawn before training;
small dense ones of equally many weights stand beside them. On clothes a convolutional network compares rules for the
densities of its layers with SNIP itself and with gradual magnitude pruning. For one width, calibration, the detection
of clothes among digits, and a simple attack are measured as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.core.sparsifier import Sparsifier
from gossamer.measure.robustness import Robustness, robustness
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.fashion import fashion
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import Recipe, accuracy, batches, convolutional, fully_connected, train_images
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.random_pruning import RandomPruning

CLOSING = -0.8  # rank correlation of width and gap, at most
VIEWS = ("calibration_error", "nll", "auroc", "attacked_accuracy")

QUICK: dict[str, Any] = {
    "digits": {
        "widths": [32, 64, 128, 256, 512, 1024],
        "sparsity": 0.9,
        "sparsities": [0.5, 0.8, 0.95],
        "sweep_width": 256,
        "small_for": [256, 1024],
        "robust_width": 512,
        "images": 400,
        "steps": 400,
        "batch": 64,
    },
    "clothes": {"sparsities": [0.9], "images": 500, "judged": 300, "steps": 400, "batch": 64, "channels": [16, 32, 64]},
    "learning_rate": 0.1,
    "epsilon": 0.05,
}
FULL: dict[str, Any] = {
    **QUICK,
    "digits": {**QUICK["digits"], "steps": 2500, "small_for": [64, 128, 256, 512, 1024]},
    "clothes": {
        **QUICK["clothes"],
        "sparsities": [0.5, 0.8, 0.9, 0.95],
        "images": 5000,
        "judged": 1000,
        "steps": 5000,
    },
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Both tasks."""
    found, views = _digits(settings, seed, progress)
    return {
        "digits": found,
        "robustness": views,
        "clothes": _clothes(settings, seed, progress),
        "curves": _curves(found),
    }


def _digits(
    settings: dict[str, Any], seed: int, progress: Track
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Accuracies in per cent by what was trained, and the other views of two networks."""
    own = settings["digits"]
    training, held_out = digits().split(own["images"], seed)
    recipe = Recipe(own["steps"], own["batch"], settings["learning_rate"])
    accuracies: dict[str, float] = {}
    views: dict[str, dict[str, float]] = {}

    def train(label: str, width: int, sparsity: float = 0.0) -> None:
        torch.manual_seed(seed)
        model = fully_connected(784, width, width, 10, normalized=True)
        train_images(model, training, recipe, seed, RandomPruning(sparsity=sparsity, seed=seed) if sparsity else None)
        accuracies[label] = 100 * accuracy(model, held_out)
        if width == own["robust_width"] and sparsity in (0.0, own["sparsity"]):
            views["random" if sparsity else "dense"] = _views(model, held_out, settings["epsilon"], seed)

    cases = [(f"{kind} {width}", width, share) for width in own["widths"] for kind, share in _kinds(own)]
    cases += [(f"random {own['sweep_width']} at {s}", own["sweep_width"], s) for s in own["sparsities"]]
    cases += [(f"small for {width}", _width_of(width, own["sparsity"]), 0.0) for width in own["small_for"]]
    for label, width, sparsity in progress(cases, "digits: training"):
        train(label, width, sparsity)
    return accuracies, views


def _kinds(own: dict[str, Any]) -> tuple[tuple[str, float], tuple[str, float]]:
    return ("dense", 0.0), ("random", own["sparsity"])


def _width_of(width: int, sparsity: float) -> int:
    """The smallest width at which a dense perceptron has as many weights as a sparse one of another width."""

    def weights(w: int) -> int:
        return 784 * w + w * w + 10 * w

    return next(small for small in range(1, width + 1) if weights(small) >= (1 - sparsity) * weights(width))


def _views(model: nn.Module, held_out: Digits, epsilon: float, seed: int) -> dict[str, float]:
    """How robust a network is; clothes are what it does not know."""
    strange, _ = fashion().split(len(held_out) // 10, seed)
    inside = zip(held_out.images.split(500), held_out.labels.split(500))
    found: Robustness = robustness(model, inside, [strange.images.float() / 255], epsilon=epsilon)
    return {view: getattr(found, view) for view in VIEWS}


def _clothes(settings: dict[str, Any], seed: int, progress: Track) -> dict[str, float]:
    """Accuracies in per cent of the convolutional network, by rule and sparsity."""
    own = settings["clothes"]
    training, rest = fashion().split(own["images"], seed)
    training, held_out = (_floats(part) for part in (training, rest.split(own["judged"], seed)[0]))
    recipe = Recipe(own["steps"], own["batch"], settings["learning_rate"])
    first = next(batches(training, recipe, seed))
    cases: list[tuple[str, Sparsifier | None]] = [("dense", None)]
    for sparsity in own["sparsities"]:
        methods = contestants(sparsity, own["steps"], (first.images, first.labels), seed)
        cases += [(f"{name} at {sparsity}", method) for name, method in methods.items()]
    found = {}
    for label, method in progress(cases, "clothes: training"):
        torch.manual_seed(seed)
        model = convolutional(*own["channels"])
        train_images(model, training, recipe, seed, method)
        found[label] = 100 * accuracy(model, held_out)
    return found


def contestants(
    sparsity: float, steps: int, batch: tuple[torch.Tensor, torch.Tensor], seed: int
) -> dict[str, Sparsifier]:
    """Rules for densities, and what they are compared with, by name."""

    def drawn(allocation: str, **options: Any) -> RandomPruning:
        return RandomPruning(sparsity=sparsity, allocation=allocation, seed=seed, **options)

    return {
        "uniform": drawn("uniform"),
        "ER": drawn("erdos-renyi"),
        "ERK": drawn("erdos-renyi-kernel"),
        "ERK+": drawn("erdos-renyi-kernel-plus"),
        "SNIP ratios": drawn("snip", batch=batch),
        "SNIP": drawn("snip", batch=batch, redraw=False),
        "gradual magnitude": GradualMagnitudePruning(
            sparsity=sparsity,
            begin=steps // 8,
            end=steps * 5 // 8,
            every=max(1, steps // 40),
            scope="model",
            heads=True,
            seed=seed,
        ),
    }


def _floats(data: Digits) -> Digits:
    return Digits(data.images.float().sub_(127.5).div_(64), data.labels)


def _curves(found: dict[str, float]) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for label, value in found.items():
        kind, _, width = label.partition(" ")
        if kind in ("dense", "random") and width.isdigit():
            curve = curves.setdefault(kind, {"x": [], "y": []})
            curve["x"].append(math.log2(float(width)))
            curve["y"].append(value)
    return curves


def decide(observations: list[Observation]) -> Verdict:
    """The gap over widths, averaged over seeds; differences, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    gaps = _gaps(observations)
    widths = sorted(gaps)
    closing = rank_correlation(widths, [gaps[width].mean for width in widths])
    small = _difference(observations, "digits", f"random {widths[-1]}", f"small for {widths[-1]}")
    rules = _rules(observations)
    spared = {name: value for name, value in rules.items() if name.startswith("clothes, ERK − uniform")}
    numbers: dict[str, Interval | float] = {"rank correlation of width and gap": closing}
    numbers |= {f"gap at width {width}": gaps[width] for width in widths}
    numbers |= {f"random − small dense at width {widths[-1]}": small, **rules, **_told(observations)}
    wrong = [name for name, value in spared.items() if value.below_zero]
    if closing > 0:
        wrong.append("rank correlation of width and gap")
    if small.below_zero:
        wrong.append("random − small dense")
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if closing > CLOSING:
        return Verdict("inconclusive", f"the gap closes unevenly: rank correlation {closing:.2f}", numbers)
    if not small.above_zero:
        return Verdict("inconclusive", "the interval reaches across zero: random − small dense", numbers)
    return Verdict("holds", "the gap to dense closes with width, and random beats small and dense", numbers)


def rank_correlation(x: list[int], y: list[float]) -> float:
    """Spearman's ρ; equal values share their mean rank, and 0 stands for the constant."""

    def ranks(values: list[Any]) -> np.ndarray:
        array = np.asarray(values, dtype=np.float64)
        return np.array([(array < one).sum() + ((array == one).sum() - 1) / 2 for one in array])

    a, b = ranks(x), ranks(y)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _gaps(observations: list[Observation]) -> dict[int, Interval]:
    """Dense minus random by width."""
    labels = observations[0]["digits"]
    widths = [int(label.removeprefix("dense ")) for label in labels if label.startswith("dense ")]
    return {width: _difference(observations, "digits", f"dense {width}", f"random {width}") for width in widths}


def _difference(observations: list[Observation], task: str, one: str, other: str) -> Interval:
    return mean_interval([o[task][one] - o[task][other] for o in observations])


def _rules(observations: list[Observation]) -> dict[str, Interval]:
    """What separates the rules on clothes, at every sparsity."""
    pairs = [("ERK", "uniform"), ("SNIP ratios", "SNIP"), ("ERK+", "ERK"), ("gradual magnitude", "ERK")]
    shares = sorted({label.rpartition(" at ")[2] for label in observations[0]["clothes"] if " at " in label})
    return {
        f"clothes, {one} − {other} at {share}": _difference(
            observations, "clothes", f"{one} at {share}", f"{other} at {share}"
        )
        for one, other in pairs
        for share in shares
    }


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    numbers: dict[str, Interval | float] = {}
    for view in VIEWS:
        values = [o["robustness"]["random"][view] - o["robustness"]["dense"][view] for o in observations]
        numbers[f"{view.replace('_', ' ')}, random − dense"] = mean_interval(values)
    for task in ("digits", "clothes"):
        for label in observations[0][task]:
            numbers[f"accuracy, {task}, {label}"] = float(np.mean([o[task][label] for o in observations]))
    return numbers


experiment = Experiment(
    slug="random-pruning",
    claim=(
        "The wider a network, the smaller the loss of training it under a random mask instead of dense, and a wide "
        "random one beats a small dense one of as many weights."
    ),
    rule=(
        "holds if, on digits at 90 % zeros, the rank correlation of width and accuracy lost is −0.8 or less and the "
        "widest random perceptron is, at 95 % over seeds, more accurate than the dense one of as many weights; does "
        "not hold if the correlation is positive, the second is wholly reversed, or uniform densities are wholly "
        "better than ERK for the convolutional network on clothes"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="width, powers of 2",
    y_label="accuracy on digits, %",
)

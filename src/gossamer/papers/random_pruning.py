"""Random pruning's claims: the wider the network, the less is lost by drawing its zeros; densities matter, not places.

Perceptrons of growing width learn handwritten digits, dense and under a random mask that is drawn before training;
small dense ones of equally many weights stand beside them. On clothes a convolutional network compares rules for the
densities of its layers with SNIP itself and with gradual magnitude pruning. For one width, calibration, the detection
of clothes among digits, and a simple attack are measured as well. The full budget does all of it for residual networks
on crops of photographs too, of growing depth and of growing width; photographs of other things are what they do not
know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.sparsifier import Sparsifier
from gossamer.measure.mode_connectivity import rank_correlation
from gossamer.measure.robustness import Robustness, robustness
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.fashion import fashion
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import Recipe, accuracy, batches, convolutional, fully_connected, train_images
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.papers.textures import residual, textures
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
    "textures": {
        "blocks": [1, 2, 3, 5, 7],
        "depth_width": 8,
        "widths": [4, 8, 16, 32],
        "width_blocks": 1,
        "sparsity": 0.9,
        "sparsities": [0.5, 0.8],
        "images": 500,
        "judged": 300,
        "steps": 3000,
        "batch": 64,
    },
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """All tasks that the settings name."""
    found, views = _digits(settings, seed, progress)
    observed = {
        "digits": found,
        "robustness": views,
        "clothes": _clothes(settings, seed, progress),
        "curves": _curves(found),
    }
    if "textures" in settings:
        observed["textures"], observed["robustness on textures"] = _textures(settings, seed, progress)
    return observed


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
            clothes, _ = fashion().split(len(held_out) // 10, seed)
            strange = [clothes.images.float() / 255]
            views["random" if sparsity else "dense"] = _views(model, held_out, strange, settings["epsilon"])

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


def _views(
    model: nn.Module,
    held_out: Digits,
    strange: Iterable[Tensor],
    epsilon: float,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> dict[str, float]:
    """How robust a network is, with batches of what it does not know."""
    inside = zip(held_out.images.split(500), held_out.labels.split(500))
    found: Robustness = robustness(model, inside, strange, epsilon=epsilon, bounds=bounds)
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


def _textures(
    settings: dict[str, Any], seed: int, progress: Track
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Accuracies in per cent of residual networks on crops, by size; and the other views of the widest two."""
    own = settings["textures"]
    training, held_out = textures().split(own["images"], own["judged"], seed)
    recipe = Recipe(own["steps"], own["batch"], settings["learning_rate"])
    sizes = [(f"depth {6 * blocks + 2}", own["depth_width"], blocks) for blocks in own["blocks"]]
    sizes += [(f"width {width}", width, own["width_blocks"]) for width in own["widths"]]
    cases = [(kind, size, share) for size in sizes for kind, share in _kinds(own)]
    cases += [(f"random at {share}", sizes[-1], share) for share in own["sparsities"]]
    found: dict[str, float] = {}
    views: dict[str, dict[str, float]] = {}
    for kind, (size, width, blocks), share in progress(cases, "textures: training"):
        torch.manual_seed(seed)
        model = residual(width, blocks)
        method = RandomPruning(sparsity=share, allocation="erdos-renyi-kernel", seed=seed) if share else None
        train_images(model, training, recipe, seed, method)
        found[f"{kind} {size}"] = 100 * accuracy(model, held_out)
        if size == sizes[-1][0] and kind in ("dense", "random"):
            strange = textures().strange.split(500)
            views[kind] = _views(model, held_out, strange, settings["epsilon"], bounds=None)
    return found, views


def contestants(sparsity: float, steps: int, batch: tuple[Tensor, Tensor], seed: int) -> dict[str, Sparsifier]:
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
    numbers |= _on_textures(observations)
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
    for task in (task for task in ("digits", "clothes", "textures") if task in observations[0]):
        for label in observations[0][task]:
            numbers[f"accuracy, {task}, {label}"] = float(np.mean([o[task][label] for o in observations]))
    return numbers


def _on_textures(observations: list[Observation]) -> dict[str, Interval | float]:
    """How the gap closes with depth and with width, and whether the widest network is better random than dense."""
    if "textures" not in observations[0]:
        return {}
    labels = observations[0]["textures"]
    numbers: dict[str, Interval | float] = {}
    for side in ("depth", "width"):
        sizes = [int(label.removeprefix(f"dense {side} ")) for label in labels if label.startswith(f"dense {side} ")]
        pairs = {size: (f"dense {side} {size}", f"random {side} {size}") for size in sizes}
        gaps = {size: _difference(observations, "textures", *pair) for size, pair in pairs.items()}
        closing = rank_correlation(sizes, [gaps[size].mean for size in sizes])
        numbers[f"textures, rank correlation of {side} and gap"] = closing
        numbers |= {f"textures, gap at {side} {size}": gap for size, gap in gaps.items()}
    widest = f" width {max(sizes)}"
    for label in labels:
        kind = label.removesuffix(widest)
        if label.endswith(widest) and kind != "dense":
            beaten = _difference(observations, "textures", label, f"dense{widest}")
            numbers[f"textures, wide beats dense: {kind} − dense at{widest}"] = beaten
    views = [o["robustness on textures"] for o in observations]
    for view in VIEWS:
        values = [row["random"][view] - row["dense"][view] for row in views]
        numbers[f"textures, {view.replace('_', ' ')}, random − dense"] = mean_interval(values)
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

"""Magnitude pruning as the baseline: where it is weak, and where nothing beats it.

It is weak on a pretrained language model that is not tuned afterwards: better than chance there, but worse than every
score that has seen data. That is measured as perplexity of held-out text, over sparsities, scopes and controls. And it
is strong on a small network trained from nothing and tuned for a moment after pruning: there the scores that look at
inputs, gradients or curvature gain next to nothing over it. That is measured as accuracy on handwritten digits.

The full budget takes the other packaged model, every sparsity from 10 to 70 %, both N:M patterns, and SparseGPT.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.masking import static_masks
from gossamer.core.masks import MaskSet
from gossamer.core.targets import find_targets
from gossamer.methods import create, method
from gossamer.papers.digits import DigitTask, digits, perceptron
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest, case, gap, mean, perplexity_curves
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.pruning.one_shot import one_shot_masks

DATA_DRIVEN = ("wanda", "ria", "sparsegpt", "taylor", "fisher")
NEAR = 0.003  # accuracy
LOWEST = 0.4  # sparsity from which on the order of the methods must hold

_CASES = [
    case("random", 0.5),
    case("magnitude", 0.3),
    case("magnitude", 0.5),
    case("magnitude", 0.7),
    case("magnitude", 0.5, pattern="unstructured:row"),
    case("magnitude", 0.5, pattern="unstructured:model"),
    case("magnitude", 0.5, largest=True),
    case("wanda", 0.5),
]
_MORE = [
    case(name, sparsity)
    for name in ("random", "magnitude", "wanda", "sparsegpt")
    for sparsity in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, "2:4", "4:8")
]
QUICK: dict[str, Any] = {
    "model": "demo",
    "calibration": "state-of-the-union",
    "held_out": "moby-dick",
    "sequences": 4,
    "length": 256,
    "tokens": 1024,
    "window": 512,
    "cases": _CASES,
    "networks": 4,
    "training_images": 300,
    "calibration_images": 1024,
    "training_steps": 300,
    "tuning_steps": 150,
    "batch": 64,
    "learning_rate": 3e-3,
    "digit_sparsity": 0.9,
}
FULL: dict[str, Any] = {
    **QUICK,
    "model": "gemma",
    "calibration": "moby-dick",
    "held_out": "state-of-the-union",
    "sequences": 32,
    "length": 512,
    "tokens": 16_384,
    "window": 1024,
    "cases": [*_CASES, *(more for more in _MORE if more not in _CASES)],
    "networks": 10,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Both settings."""
    language = _language(settings, seed, progress)
    return {**language, "digits": _digits(settings, seed, progress)}


def _language(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Perplexity of held-out text under every case."""
    contest = Contest.of(settings, seed)
    windows = contest.windows(settings["sequences"])
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll()}}
    for label, name, options in progress(settings["cases"], "pruning and measuring"):
        points[label] = contest.enter(create(name, **options), windows)
    return {"points": points, "curves": perplexity_curves(points, settings["cases"])}


def _digits(settings: dict[str, Any], seed: int, progress: Track) -> dict[str, list[dict[str, float]]]:
    """Accuracy of several networks, pruned by each score, before and after a short tuning under static masks."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in progress(range(settings["networks"]), "digits"):
        own = seed * settings["networks"] + number
        training, held_out = digits().split(settings["training_images"], own)
        task = DigitTask(training, held_out, settings["training_steps"], settings["batch"], settings["learning_rate"])
        tuning = DigitTask(training, held_out, settings["tuning_steps"], settings["batch"], settings["learning_rate"])
        torch.manual_seed(own)
        network = perceptron()
        task.finetune(network)
        order = torch.randperm(len(training))[: settings["calibration_images"]]
        found.setdefault("dense", []).append({"before": task.accuracy(network)})
        images, labels = training.images[order], training.labels[order]
        gradients = _gradients(network, images, labels)
        for name in ("random", "magnitude", *DATA_DRIVEN):
            pruned = copy.deepcopy(network)
            masks = _prune(pruned, name, settings["digit_sparsity"], images, gradients)
            before = task.accuracy(pruned)
            torch.manual_seed(own)
            with static_masks(pruned, masks):
                tuning.finetune(pruned)
            found.setdefault(name, []).append({"before": before, "after": task.accuracy(pruned)})
    return found


def _prune(
    network: nn.Module, name: str, sparsity: float, images: Tensor, gradients: dict[str, dict[str, Tensor]]
) -> MaskSet:
    """Prune in place with a registered method, or within each layer by a score made of gradients."""
    if name not in gradients:
        data = [images] if method(name).needs_data else None
        return create(name, sparsity=sparsity).prune(network, data, progress=False).masks
    score, own = getattr(scores, name), gradients[name]
    masks = one_shot_masks(
        network, sparsity, score=lambda target: score(target.matrix(), own[target.name]), scope="layer"
    )
    masks.apply_(network)
    return masks


def _gradients(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, dict[str, Tensor]]:
    """What two scores need: mean absolute and mean squared gradient of the loss of single images."""
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(values: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(network, values, (image.unsqueeze(0),))
        return nn.functional.cross_entropy(logits, label.unsqueeze(0))

    each: Callable[..., dict[str, Tensor]] = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    names = [target.name for target in find_targets(network)]
    found = {score: {name: torch.zeros_like(parameters[name]) for name in names} for score in ("taylor", "fisher")}
    for some, of in zip(images.split(64), labels.split(64)):
        gradients = each(parameters, some, of)
        for name in names:
            found["taylor"][name] += gradients[name].abs().sum(0) / len(images)
            found["fisher"][name] += gradients[name].square().sum(0) / len(images)
    return found


def decide(observations: list[Observation]) -> Verdict:
    """Order of log perplexities, paired by seed; gaps in accuracy, paired by network."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    order, steps, gaps = _order(observations), _steps(observations), _gaps(observations)
    numbers: dict[str, Interval | float] = {**order, **steps, **gaps}
    numbers |= {f"perplexity, {label}": math.exp(mean(observations, label)) for label in observations[0]["points"]}
    numbers |= {f"accuracy, {name}": value for name, value in _accuracies(observations).items()}
    wrong = [name for name, value in (order | steps).items() if value.below_zero]
    wrong += [name for name, value in gaps.items() if value.low > NEAR]
    open_ = [name for name, value in order.items() if not value.above_zero]
    open_ += [name for name, value in gaps.items() if not value.high < NEAR]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across its bound: {', '.join(open_)}", numbers)
    reason = (
        "on the language model chance and the largest are worse, data are better and more zeros cost more; on digits "
        "no score that sees data gains 0.3 points after tuning"
    )
    return Verdict("holds", reason, numbers)


def _order(observations: Sequence[Observation]) -> dict[str, Interval]:
    """What must lie above zero: worse minus better, at every sparsity from 40 % on at which both were measured."""
    measured = observations[0]["points"]
    pairs = [("random", "magnitude"), ("magnitude", "wanda"), ("wanda", "sparsegpt")]
    order = {
        f"{worse} − {better} at {sparsity}": gap(observations, f"{worse} at {sparsity}", f"{better} at {sparsity}")
        for worse, better in pairs
        for sparsity in (0.4, 0.5, 0.6, 0.7, "2:4", "4:8")
        if {f"{worse} at {sparsity}", f"{better} at {sparsity}"} <= measured.keys()
    }
    largest = next(label for label in measured if "largest" in label)
    order["largest − magnitude at 0.5"] = gap(observations, largest, "magnitude at 0.5")
    return order


def _steps(observations: Sequence[Observation]) -> dict[str, Interval]:
    """What must not lie below zero: each step of the magnitude curve."""
    shares = [label.removeprefix("magnitude at ") for label in observations[0]["points"] if label != "dense"]
    rising = sorted((share for share in shares if share.replace(".", "", 1).isdigit()), key=float)
    labels = ["dense", *(f"magnitude at {share}" for share in rising)]
    return {f"{worse} − {better}": gap(observations, worse, better) for better, worse in pairwise(labels)}


def _gaps(observations: Sequence[Observation]) -> dict[str, Interval]:
    """What must stay below 0.3 points: how much a score that sees data gains on digits after tuning."""
    gaps = {}
    for name in DATA_DRIVEN:
        rows = [zip(o["digits"][name], o["digits"]["magnitude"]) for o in observations]
        gaps[f"digits, {name} − magnitude"] = mean_interval(
            [theirs["after"] - ours["after"] for row in rows for theirs, ours in row]
        )
    return gaps


def _accuracies(observations: Sequence[Observation]) -> dict[str, float]:
    found = {}
    for name in observations[0]["digits"]:
        rows = [row for o in observations for row in o["digits"][name]]
        for when in rows[0]:
            label = name if name == "dense" else f"{name} {when} tuning"
            found[label] = sum(row[when] for row in rows) / len(rows)
    return found


experiment = Experiment(
    slug="magnitude",
    claim=(
        "One-shot magnitude pruning of a language model beats chance by far but loses to scores that have seen data; "
        "on a small network that is tuned after pruning no such score is better."
    ),
    rule=(
        "holds if, at 95 %, paired over seeds, log perplexity at every measured sparsity from 40 % on is higher for "
        "random pruning than for magnitude, for magnitude than for Wanda, and (full budget) for Wanda than for "
        "SparseGPT, and higher when the largest weights are dropped; no step of the magnitude curve lies wholly below "
        "zero; and, paired over networks on digits at 90 %, no score of Wanda, RIA, SparseGPT, Taylor and Fisher gains "
        "0.3 points of accuracy over magnitude after tuning (upper end of the interval); does not hold if any of these "
        "is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="sparsity",
    y_label="perplexity",
    logarithmic=True,
)

"""Soft shrinkage for super-resolution: does a gentle pull find a better sparse network than zeroing at once?

Small networks that make photographs twice as large are trained from random weights with 95 % zeros (and 90 and 99 % in
the full budget): by soft shrinkage with several factors, by hard thresholding, under growing penalties, along a cubic
ramp, with RigL, under a static mask, and by pruning a dense network half-way; all with the same patches, steps and
rates. They are judged by the peak signal-to-noise ratio of whole pictures that none has seen. In the full budget the
pictures also become three and four times as large, and two methods that take whole filters out of residual networks for
super-resolution stand beside, with as few weights.
"""

from __future__ import annotations

from typing import Any

import torch

from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval, paired_difference
from gossamer.papers.super_resolution import NETWORKS, SuperResolution, larger, photographs
from gossamer.training.aligned_filters import AlignedFilters
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.iss_p import IterativeSoftShrinkage
from gossamer.training.rigl import RigL
from gossamer.training.static import Static
from gossamer.training.trainability import Trainability, watch

SHRINK = 0.95
EXCLUDE = ("*tail*",)
FILTERS = {"ASSL": "learned", "SRP": "random"}  # how their shared filters are chosen; for residual networks
QUICK: dict[str, Any] = {
    "networks": {"residual": {"width": 16, "blocks": 3}},
    "scales": [2],
    "sparsities": [0.95],
    "methods": ["dense", "soft shrinkage", "hard thresholding", "penalty", "gmp", "rigl", "one shot", "static"],
    "factors": [0.99, 0.997],
    "patch": 16,
    "batch": 4,
    "steps": 500,
    "rate": 2e-3,
    "look": 10,
}
FULL: dict[str, Any] = {
    **QUICK,
    "networks": {"residual": {"width": 32, "blocks": 6}, "window": {"width": 32, "blocks": 2}},
    "scales": [2, 3, 4],
    "sparsities": [0.9, 0.95, 0.99],
    "methods": [*QUICK["methods"], "one shot at the start", "fixed penalty", *FILTERS],
    "factors": [0.5, 0.8, 0.9, 0.99, 0.995, 0.999],
    "patch": 32,
    "batch": 8,
    "steps": 20_000,
    "rate": 1e-3,
    "look": 100,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Marks of every method, and how steady its gradients were while the structure was found."""
    observed: Observation = {"psnr": {}, "ssim": {}, "unsteadiness": {}, "flips": {}, "residual mass": {}}
    for scale in settings["scales"]:
        task = SuperResolution(
            photographs(), scale, settings["patch"], settings["batch"], settings["steps"], settings["rate"]
        )
        _mark(observed, f"bicubic, ×{scale}", task.judge(lambda pictures, scale=scale: larger(pictures, scale)))
        for name in settings["networks"]:
            cases = [case for case in _cases(settings) if name == "residual" or case[0] not in FILTERS]
            for method, sparsity in progress(cases, f"{name} ×{scale}"):
                label = f"{method}, {name}, ×{scale}" + (f", {sparsity}" if sparsity else "")
                _try(observed, label, task, name, method, sparsity, settings, seed)
    return {**observed, "curves": _curves(observed, settings)}


def _cases(settings: dict[str, Any]) -> list[tuple[str, float]]:
    """Methods and sparsities; other factors of the shrinkage only at the sparsity that decides."""
    cases = [(m, s) for m in settings["methods"] for s in (settings["sparsities"] if m != "dense" else [0.0])]
    return cases + [(f"factor {factor}", _deciding(settings)) for factor in settings["factors"]]


def _deciding(settings: dict[str, Any]) -> float:
    return 0.95 if 0.95 in settings["sparsities"] else settings["sparsities"][-1]


def _try(
    observed: Observation,
    label: str,
    task: SuperResolution,
    network: str,
    method: str,
    sparsity: float,
    settings: dict[str, Any],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    model = NETWORKS[network](task.scale, **settings["networks"][network])
    looks: list[Trainability] = []

    def look(training: SparseTraining) -> None:
        kept = training.method.kept if isinstance(training.method, IterativeSoftShrinkage) else None
        looks.append(watch(training, settings["look"], kept))

    training = task.train(model, _sparsifier(method, sparsity, task.steps, seed), seed, look)
    _mark(observed, label, task.judge(model.eval()))
    if training is None:
        return
    half = task.steps // 2
    looks[0].close()
    looks[0].gradients = [row for row in looks[0].gradients if settings["look"] < row.step <= half]
    observed["unsteadiness"][label] = looks[0].unsteadiness()
    shares = [share for flips in looks[0].flips.values() for step, share in flips if half // 2 < step < half]
    observed["flips"][label] = sum(shares) / len(shares)
    if "residual mass" in training.extra:
        observed["residual mass"][label] = training.extra["residual mass"]


def _mark(observed: Observation, label: str, marks: tuple[float, float]) -> None:
    observed["psnr"][label], observed["ssim"][label] = marks


def _sparsifier(method: str, sparsity: float, steps: int, seed: int) -> Sparsifier | None:
    """A method whose structure is found in the first half of the steps (RigL: in three quarters, as usual)."""
    half, common = steps // 2, {"sparsity": sparsity, "exclude": EXCLUDE, "seed": seed}
    # the penalty reaches its limit when half of the time before the cut is over
    penalty = {"penalty_every": 5, "penalty_step": 0.5 * 5 / (half / 2), "end": half}
    every = max(1, steps // 100)
    # after training dense for a quarter of the steps, as there they start from a trained network
    filters = {"begin": half // 2, "agreed": half // 2 + half // 8, "end": half, "penalty_every": 5}
    filters["penalty_step"] = 0.5 * 5 / (half / 4)
    made: dict[str, Any] = {
        "soft shrinkage": lambda: IterativeSoftShrinkage(shrink=SHRINK, end=half, **common),
        "hard thresholding": lambda: IterativeSoftShrinkage(shrink=0.0, end=half, **common),
        "penalty": lambda: IterativeSoftShrinkage(pull="penalty", **penalty, **common),
        "fixed penalty": lambda: IterativeSoftShrinkage(pull="fixed penalty", **penalty, **common),
        "gmp": lambda: GradualMagnitudePruning(end=half, every=every, **common),
        "one shot": lambda: GradualMagnitudePruning(begin=half - 1, end=half, every=1, **common),
        "one shot at the start": lambda: GradualMagnitudePruning(begin=0, end=0, every=1, **common),
        "rigl": lambda: RigL(end=3 * steps // 4, every=2 * every, allocation="uniform", **common),
        "static": lambda: Static(allocation="uniform", **common),
    }
    if method == "dense":
        return None
    if method in FILTERS:
        return AlignedFilters(align=FILTERS[method], **filters, **common)  # type: ignore[arg-type]
    if method.startswith("factor "):
        return IterativeSoftShrinkage(shrink=float(method.removeprefix("factor ")), end=half, **common)  # type: ignore[arg-type]
    return made[method]()


def _curves(observed: Observation, settings: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Quality over sparsity of every method on the first network and scale; what has no sparsity is a straight line."""
    place = f"{next(iter(settings['networks']))}, ×{settings['scales'][0]}"
    sparsities = settings["sparsities"]
    curves = {}
    for method in settings["methods"]:
        if method == "dense":
            values = [observed["psnr"][f"dense, {place}"]] * len(sparsities)
        else:
            values = [observed["psnr"][f"{method}, {place}, {sparsity}"] for sparsity in sparsities]
        curves[method] = {"x": sparsities, "y": values}
    bicubic = observed["psnr"][f"bicubic, ×{settings['scales'][0]}"]
    return {**curves, "bicubic": {"x": sparsities, "y": [bicubic] * len(sparsities)}}


def decide(observations: list[Observation]) -> Verdict:
    """Differences in decibels, paired by seed, averaged over networks, scales and sparsities from 95 % on."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    deciding: dict[str, Interval] = {
        f"psnr, soft shrinkage − {rival}": mean_interval([_difference(o["psnr"], rival) for o in observations])
        for rival in ("hard thresholding", "one shot", "bicubic")
    }
    steady = [_mean(o["unsteadiness"], "soft shrinkage") for o in observations]
    deciding["unsteadiness of gradients, hard thresholding − soft shrinkage"] = paired_difference(
        [_mean(o["unsteadiness"], "hard thresholding") for o in observations], steady
    )
    numbers: dict[str, Interval | float] = dict(deciding)
    methods = sorted({label.split(", ")[0] for label in observations[0]["psnr"]})
    for method in methods:
        if method not in ("soft shrinkage", "hard thresholding", "one shot", "bicubic"):
            values = [_difference(o["psnr"], method) for o in observations]
            numbers[f"psnr, soft shrinkage − {method}"] = mean_interval(values)
    for method in sorted({label.split(", ")[0] for label in observations[0]["residual mass"]}):
        numbers[f"residual mass, {method}"] = sum(_mean(o["residual mass"], method) for o in observations) / len(
            observations
        )
    wrong = [name for name, value in deciding.items() if value.below_zero]
    if wrong:
        return Verdict("does not hold", "reversed: " + "; ".join(wrong), numbers)
    unclear = [name for name, value in deciding.items() if not value.above_zero]
    if unclear:
        return Verdict("inconclusive", "an interval reaches across zero: " + "; ".join(unclear), numbers)
    return Verdict("holds", "soft shrinkage gives better pictures and steadier gradients", numbers)


def _difference(psnr: dict[str, float], rival: str) -> float:
    """Mean advantage over a rival at the same network, scale and sparsity."""
    found = []
    for label, value in psnr.items():
        method, *place = label.split(", ")
        if method != "soft shrinkage" or float(place[2]) < 0.95:
            continue
        other = [", ".join([rival, *place]), ", ".join([rival, *place[:2]]), f"{rival}, {place[1]}"]
        beside = next((psnr[name] for name in other if name in psnr), None)
        if beside is not None:
            found.append(value - beside)
    return sum(found) / len(found)


def _mean(values: dict[str, float], method: str) -> float:
    own = [value for label, value in values.items() if label.startswith(f"{method}, ")]
    return sum(own) / len(own)


experiment = Experiment(
    slug="iss-p",
    claim=(
        "Super-resolution networks that are trained sparse from random weights by iterative soft shrinkage are better "
        "than by hard thresholding or one-shot magnitude pruning, because their gradients are steadier."
    ),
    rule=(
        "holds if, at 95 % over seeds and with at least 95 % zeros, soft shrinkage with a factor of 0.95 has a higher "
        "PSNR of Y on held-out photographs than hard thresholding, than pruning a dense network half-way, and than "
        "bicubic interpolation, and the norms of its layers' gradients vary less over time than under hard "
        "thresholding; does not hold if one of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="sparsity",
    y_label="PSNR of Y, dB",
)

"""Progressive gradient flow's claim: at 1:16 and beyond, what N:M removes should leave slowly.

A small vision transformer learns handwritten digits and a byte-level one Python's source, their feed-forward layers
with patterns from 2:4 to 1:32, by every recipe for as many steps: straight-through, SR-STE, a mask that fades along an
exponential or a line, patterns that become sparser by steps or shrink, and pruning at once half-way. Squared gradients
of what is removed are watched, since the paper says that they are why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gossamer.core.nm_sparsifier import NMSparsifier, as_nm
from gossamer.core.sparse_training import SparseTraining
from gossamer.measure.training_flops import TrainingFlops
from gossamer.papers.digits import digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.nm_runs import AdamRecipe, PatchTransformer, accuracy_curves, byte_losses, quality, train_watched
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.training.progressive_gradient_flow import (
    FEED_FORWARD,
    MaskDecay,
    StructureDecay,
    gradient_noise,
    training_flops,
)
from gossamer.training.sr_ste import ASP, SRSTE, STE

HIGH = ("1:16", "1:32")
CLOSE = 1.0  # points of accuracy, or percent of the loss, within which recipes count as equal at 2:4
SLOW = ("fading", "by steps")
FAST = ("straight-through", "SR-STE")

QUICK: dict[str, Any] = {
    "digits": {
        "images": 400,
        "patterns": ["2:4", "1:8", "1:16", "1:32"],
        "layers": 2,
        "width": 64,
        "heads": 4,
        "patch": 14,
        "steps": 500,
        "batch": 32,
        "learning_rate": 5e-3,
        "recipes": ["straight-through", "SR-STE", "fading", "by steps", "pruned half-way"],
        "thorough": ["1:16"],
    },
    "bytes": {
        "size": 1_000_000,
        "held_out": 200,
        "length": 128,
        "patterns": ["2:4", "1:32"],
        "layers": 2,
        "width": 64,
        "heads": 2,
        "steps": 200,
        "batch": 8,
        "learning_rate": 1e-2,
        "recipes": ["straight-through", "SR-STE", "fading", "by steps"],
        "thorough": [],
    },
    # at the end of the way; the rate follows, because it depends on the number of steps
    "final_value": 0.02,
    "decay": 2e-4,
}
FULL: dict[str, Any] = {
    **QUICK,
    "digits": {
        **QUICK["digits"],
        "layers": 4,
        "patch": 4,
        "steps": 4000,
        "batch": 64,
        "learning_rate": 1e-3,
        "thorough": ["2:4", "1:8", "1:16", "1:32"],
    },
    "bytes": {
        **QUICK["bytes"],
        "size": 8_000_000,
        "patterns": ["2:4", "1:8", "1:16", "1:32"],
        "layers": 4,
        "width": 128,
        "heads": 4,
        "batch": 32,
        "steps": 5000,
        "learning_rate": 3e-3,
        "thorough": ["1:16", "1:32"],
    },
}


def recipes(settings: dict[str, Any], pattern: str, steps: int, width: int) -> dict[str, NMSparsifier]:
    """All recipes for a pattern, by name; they sparsify feed-forward layers, in groups no longer than the width."""
    shared: dict[str, Any] = {"pattern": pattern, "include": FEED_FORWARD}
    phased = {**shared, "total": steps}
    fading = {**phased, "final_value": settings["final_value"]}
    frames = min(4, int(math.log2(width // as_nm(pattern).m)) + 1)
    return {
        "straight-through": STE(**shared),
        "SR-STE": SRSTE(**shared, decay=settings["decay"]),
        "fading": MaskDecay(**fading),
        "fading, straight-through": MaskDecay(**fading, flow="ste"),
        "fading along a line": MaskDecay(**fading, decay="linear"),
        "by steps": StructureDecay(**phased),
        "shrinking groups": StructureDecay(**phased, kind="geometric", frames=frames),
        "pruned half-way": ASP(**shared, begin=steps // 2),
    }


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Qualities of both tasks, and what was watched on digits."""
    images, watched, flops = _images(settings, seed, progress)
    text = _bytes(settings, seed, progress)
    return {"digits": images, "bytes": text, "watched": watched, "operations": flops, "curves": _curves(images)}


def _cases(settings: dict[str, Any], own: dict[str, Any]) -> list[tuple[str, NMSparsifier | None]]:
    cases: list[tuple[str, NMSparsifier | None]] = [("dense", None)]
    for pattern in own["patterns"]:
        for name, method in recipes(settings, pattern, own["steps"], own["width"]).items():
            if name in own["recipes"] or pattern in own["thorough"]:
                cases.append((f"{name} at {pattern}", method))
    return cases


def _images(settings: dict[str, Any], seed: int, progress: Track) -> tuple[dict, dict, dict]:
    own = settings["digits"]
    training, held_out = digits().split(own["images"], seed)
    recipe = AdamRecipe(own["steps"], own["batch"], own["learning_rate"])
    found, watched, flops = {}, {}, {}
    for name, method in progress(_cases(settings, own), "digits: training"):
        torch.manual_seed(seed)
        model = PatchTransformer(own["layers"], own["width"], own["heads"], own["patch"])
        look = _Look(lambda model=model: quality(model, held_out)[1], recipe.steps, method)  # type: ignore[misc]
        train_watched(model, training, recipe, seed, method, look)
        accuracy, loss = quality(model, held_out)
        found[name] = {"accuracy": accuracy, "loss": loss}
        if method is not None:
            watched[name] = look.seen
            flops[name] = _operations(model, method, recipe.steps)
    return found, watched, flops


class _Look:
    """What is noted along a run: squared gradients late in it, and the jump of the loss where the mask turns binary."""

    def __init__(self, loss: Callable[[], float], steps: int, method: NMSparsifier | None):
        self.loss, self.late = loss, steps * 4 // 5
        self.seen: dict[str, float] = {}
        self.switch = method.finetune_from if isinstance(method, MaskDecay) else None

    def __call__(self, step: int, current: SparseTraining) -> None:
        if step == self.late and not isinstance(current.method, ASP):
            noise = gradient_noise(current)
            self.seen |= {"chosen": noise.chosen, "removed": noise.removed}
        if step == self.switch and isinstance(current.method, MaskDecay):
            model = current.model.eval()
            after = self.loss()
            with _faded(current, current.method.fade_at(step - 1)):
                self.seen["jump"] = after - self.loss()
            model.train()


class _faded:
    """For a moment, let removed weights count as they did before the switch."""

    def __init__(self, current: SparseTraining, fade: float):
        self.current, self.fade = current, fade
        self.held = {name: site.parameter.detach().clone() for name, site in current.projected().items()}

    @torch.no_grad()
    def __enter__(self) -> None:
        for site in self.current.projected().values():
            if site.aside is not None:
                site.parameter.add_(site.aside, alpha=self.fade)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, site in self.current.projected().items():
            site.parameter.copy_(self.held[name])


def _operations(model: nn.Module, method: NMSparsifier, steps: int) -> float:
    """Operations of a run beside a dense one, of the feed-forward layers."""
    flops = TrainingFlops(2.0 * sum(target.shape.numel() for target in method.targets(model)), 0.0, 0.0)
    return training_flops(method, flops, 1, steps) / (steps * flops.pretrain(1))


def _bytes(settings: dict[str, Any], seed: int, progress: Track) -> dict[str, float]:
    own = settings["bytes"]
    return byte_losses(own, seed, progress(_cases(settings, own), "bytes: training"))


def _curves(images: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Accuracy on digits against how many times fewer weights remain, on a logarithmic scale."""
    return accuracy_curves(images, lambda name, nm: math.log2(nm.m / nm.n))


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Means over both tasks and both slow recipes at high sparsity, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {f"slow − {rival} at 1:16 and 1:32, %": _gap(observations, rival, HIGH) for rival in FAST}
    equal = {f"closeness of slow and {rival} at 2:4, %": _closeness(observations, rival) for rival in FAST}
    numbers: dict[str, Interval | float] = {**needed, **equal, **_told(observations)}
    wrong = [name for name, value in (needed | equal).items() if value.below_zero]
    open_ = [name for name, value in (needed | equal).items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "what leaves slowly beats both at high sparsity, and is their equal at 2:4", numbers)


def _score(row: Observation, task: str, label: str) -> float:
    """Points of accuracy; for bytes, hundredths of the dense loss below it."""
    if task == "digits":
        return row["digits"][label]["accuracy"]
    return -100 * row["bytes"][label] / row["bytes"]["dense"]


def _labels(row: Observation, name: str, patterns: tuple[str, ...]) -> list[tuple[str, str]]:
    found = [(task, f"{name} at {pattern}") for task in ("digits", "bytes") for pattern in patterns]
    return [(task, label) for task, label in found if label in row[task]]


def _gaps(row: Observation, rival: str, patterns: tuple[str, ...]) -> list[float]:
    gaps = []
    for task, label in _labels(row, rival, patterns):
        pattern = label.rpartition(" at ")[2]
        slow = _mean([_score(row, task, f"{name} at {pattern}") for name in SLOW])
        gaps.append(slow - _score(row, task, label))
    return gaps


def _gap(observations: list[Observation], rival: str, patterns: tuple[str, ...]) -> Interval:
    return mean_interval([_mean(_gaps(row, rival, patterns)) for row in observations])


def _closeness(observations: list[Observation], rival: str) -> Interval:
    """How far inside what counts as equal the gap at 2:4 lies."""
    return mean_interval([CLOSE - abs(_mean(_gaps(row, rival, ("2:4",)))) for row in observations])


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    """Every quality, gaps for each pattern and recipe, what was watched, and operations."""
    numbers: dict[str, Interval | float] = {}
    for task in ("digits", "bytes"):
        for label in observations[0][task]:
            name, _, pattern = label.rpartition(" at ")
            numbers[f"{task}, {label}"] = _mean([_plain(row, task, label) for row in observations])
            if name and name not in FAST:
                other = [_score(row, task, f"SR-STE at {pattern}") for row in observations]
                ours = [_score(row, task, label) for row in observations]
                gaps = [one - two for one, two in zip(ours, other, strict=True)]
                numbers[f"{task}, {name} − SR-STE at {pattern}, %"] = mean_interval(gaps)
    for label, first in observations[0]["watched"].items():
        if "removed" in first:
            ratios = [row["watched"][label]["removed"] / row["watched"][label]["chosen"] for row in observations]
            numbers[f"squared gradients late, removed / chosen, {label}"] = _mean(ratios)
            late = [row["watched"][label]["removed"] for row in observations]
            numbers[f"squared gradients late, removed, {label}"] = _mean(late)
        if "jump" in first:
            jumps = [row["watched"][label]["jump"] for row in observations]
            numbers[f"jump of the loss at the switch, {label}"] = _mean(jumps)
        numbers[f"operations beside dense, {label}"] = observations[0]["operations"][label]
    return numbers


def _plain(row: Observation, task: str, label: str) -> float:
    return row["digits"][label]["accuracy"] if task == "digits" else row["bytes"][label]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="progressive-gradient-flow",
    claim=(
        "At high N:M sparsity transformers train better if removed weights fade out, or the pattern tightens by steps, "
        "than with straight-through gradients from the start, whose removed weights are fed with noise."
    ),
    rule=(
        "holds if, at 95 % over seeds, the mean of fading (exponential, by the chain rule) and tightening by steps "
        "beats both straight-through and SR-STE at 1:16 and 1:32, in the mean over both tasks (points of accuracy, "
        "percent of the dense loss), and lies within one point of each at 2:4; does not hold if one of these is wholly "
        "reversed. Other recipes, gradients, the jump at the switch and operations are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="log₂ M/N: 1 is 2:4, 3 is 1:8, 4 is 1:16, 5 is 1:32",
    y_label="accuracy on digits, %",
)

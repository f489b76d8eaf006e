"""What the experiments have in common that set training-free sparse activations side by side on a language model.

Every contender is calibrated on the same windows of one text and judged by the perplexity of another one, with the
same tokens left dense. What is compared is equal in the weights that a token reads, counted as they were read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.activations.base import ActivationSparsifier, install
from gossamer.activations.rules import ActivationRules
from gossamer.core.channel_rules import ChannelRule, Selection, TopK
from gossamer.core.randomness import generator_for
from gossamer.core.selection import dropped_count
from gossamer.models.activation_sites import find_input_sites
from gossamer.papers.experiment import Observation
from gossamer.papers.one_shot_comparison import Contest
from gossamer.papers.statistics import Interval, paired_difference

SPARSITIES = (0.25, 0.4, 0.5, 0.65)
DENSE_PREFILL = 0.01
QUICK: dict[str, Any] = {
    "model": "demo",
    "calibration": "state-of-the-union",
    "held_out": "moby-dick",
    "sequences": 4,
    "length": 512,
    "tokens": 1024,
    "window": 512,
    "sparsities": list(SPARSITIES),
}
FULL: dict[str, Any] = {**QUICK, "sequences": 10, "length": 2048, "tokens": 16_384, "window": 1024}


@dataclass(frozen=True)
class RandomChannels(Selection):
    """A random share of channels, drawn anew for every token: what any score must beat."""

    dropped: float
    generator: torch.Generator

    def live(self, scores: Tensor) -> Tensor:  # noqa: D102
        width = scores.shape[-1]
        noise = torch.rand(scores.shape, generator=self.generator)
        return TopK(width - dropped_count(width, self.dropped)).live(noise)


def judged(contest: Contest, rules: ActivationRules) -> dict[str, float]:
    """Log perplexity under rules, with what they really dropped.

    Returns
    -------
    dict
        ``nll``; ``share``, the weights that a token of the treated tokens read, over all of the model's; ``realised``
        and ``requested``, the mean sparsity of the sites.
    """
    with install(contest.model, rules, DENSE_PREFILL) as installed:
        nll = contest.nll()
        realised = installed.realised
        return {
            "nll": nll,
            "share": installed.weights_read.share,
            "realised": sum(realised.values()) / len(realised),
            "requested": sum(rules.requested.values()) / max(1, len(rules.requested)),
        }


def sweep(
    contest: Contest, method: ActivationSparsifier, windows: Sequence[Tensor], sparsities: Sequence[float], label: str
) -> dict[str, dict[str, float]]:
    """Points of one method at several sparsities, from one calibration: label → what :func:`judged` says."""
    method.calibrate(contest.model, windows, progress=False)
    return {f"{label} at {sparsity}": judged(contest, method.at(sparsity)) for sparsity in sparsities}


def random_rules(contest: Contest, sparsity: float, seed: int) -> ActivationRules:
    """A random share of every layer's input channels dropped."""
    generator = generator_for("random input channels", seed)
    rules = {site.name: ChannelRule(RandomChannels(sparsity, generator)) for site in find_input_sites(contest.model)}
    return ActivationRules(rules, requested=dict.fromkeys(rules, sparsity))


def matched(
    contest: Contest, share: float, rules_at: Callable[[float], ActivationRules], rounds: int = 3
) -> dict[str, float]:
    """The point of a method at which a token reads a given share of the weights, by secant steps on its sparsity."""
    low, high = 0.0, 0.95
    found: dict[str, float] = {}
    at = min(high, max(low, 2 * (1 - share)))
    for _ in range(rounds):
        found = judged(contest, rules_at(at))
        if abs(found["share"] - share) < 0.003 or found["share"] >= 1:
            break
        at = min(high, max(low, at * (1 - share) / (1 - found["share"])))
    return {**found, "setting": at}


def activation_curves(points: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Method → perplexity over the sparsity that was asked for, dense model included."""
    curves: dict[str, dict[str, list[float]]] = {}
    for label, point in points.items():
        method, _, at = label.partition(" at ")
        if at:
            curve = curves.setdefault(method, {"x": [0.0], "y": [math.exp(points["dense"]["nll"])]})
            curve["x"].append(float(at))
            curve["y"].append(math.exp(point["nll"]))
    return curves


def nll_gap(observations: Sequence[Observation], worse: str, better: str) -> Interval:
    """How much higher the log perplexity of the first case is than that of the second, paired by seed."""
    first, second = ([o["points"][label]["nll"] for o in observations] for label in (worse, better))
    return paired_difference(first, second)


def reported(observations: Sequence[Observation]) -> dict[str, Any]:
    """Mean perplexity, and realised beside requested sparsity, of every case."""
    numbers: dict[str, Any] = {}
    count = len(observations)
    for label in observations[0]["points"]:
        points = [o["points"][label] for o in observations]
        numbers[f"perplexity, {label}"] = math.exp(sum(p["nll"] for p in points) / count)
        if "share" in points[0]:
            numbers[f"weights read, {label}"] = sum(p["share"] for p in points) / count
            numbers[f"realised sparsity, {label}"] = sum(p["realised"] for p in points) / count
    return numbers

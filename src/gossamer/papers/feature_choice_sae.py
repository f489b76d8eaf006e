"""Mutual and feature choice: features spent where they are needed explain more, and none of them dies.

On planted activations that need few features mostly and many now and then, and as a control on ones that all need the
same, a budget of matches is spent by token, by pair, and by feature; and again on the activations of a language model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.features.activation_rules import FeatureChoice
from gossamer.features.dictionary_metrics import highest_cosines
from gossamer.features.planted_dictionaries import HeavyTailed
from gossamer.features.sae import SAE
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.feature_contest import (
    BATCH_TOPK,
    FEATURE,
    MUTUAL,
    TOPK,
    Contender,
    compared,
    contender,
    judged,
    trained,
)
from gossamer.papers.language_features import Source, language_features
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

MARGIN = 0.1  # of TopK's unexplained variance
SPENT = 0.5  # rank correlation of the features that a token gets with those it has
UNIFORM = "feature choice, equal budgets"
CONTROL = "constant"

QUICK: dict[str, Any] = {
    "planted": {"d": 64, "features": 256, "mean": 6.0, "most": 32},
    "planted_training": {
        "features": 256,
        "steps": 400,
        "batch_size": 512,
        "learning_rate": 3e-3,
        "dead_after": 50_000,
    },
    "held_out": 4096,
    "source": {"documents": 256, "held_out": 24},
    "ks": [16, 64],
    "real_training": {
        "features": 1024,
        "steps": 150,
        "batch_size": 256,
        "learning_rate": 2e-3,
        "dead_after": 20_000,
        "documents": 2,
    },
}
FULL: dict[str, Any] = {
    **QUICK,
    "planted": {"d": 128, "features": 1024, "mean": 16.0, "most": 64},
    "planted_training": {
        "features": 1024,
        "steps": 3000,
        "batch_size": 1024,
        "learning_rate": 1e-3,
        "dead_after": 300_000,
    },
    "held_out": 30_000,
    "source": {"documents": 800, "held_out": 64},
    "ks": [16, 32, 64],
    "real_training": {
        "features": 8192,
        "steps": 5000,
        "batch_size": 4096,
        "learning_rate": 3e-4,
        "dead_after": 1_000_000,
        "documents": 64,
    },
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Planted activations, their control, and those of a model."""
    found: dict[str, Any] = {}
    for name, spread in progress([("heavy-tailed", 0.8), (CONTROL, 0.0)], "planted"):
        found[name] = _planted(HeavyTailed(**settings["planted"], spread=spread, seed=seed), settings, seed)
    features = language_features(Source(**settings["source"]))
    plan = settings["real_training"]
    entries = {
        f"{rule}, k={k}": contender(rule, k, plan["steps"], plan["features"])
        for k in settings["ks"]
        for rule in (TOPK, BATCH_TOPK, MUTUAL, FEATURE)
    }
    _, found["real"] = compared(features, entries, plan, seed)
    curves = {
        rule: {
            "x": [found["real"][f"{rule}, k={k}"]["active"] for k in settings["ks"]],
            "y": [found["real"][f"{rule}, k={k}"]["unexplained"] for k in settings["ks"]],
        }
        for rule in (TOPK, BATCH_TOPK, MUTUAL, FEATURE)
    }
    return {**found, "curves": curves}


def _planted(law: HeavyTailed, settings: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    plan, k = settings["planted_training"], int(law.mean)

    def batches(begin: int) -> Any:
        while True:
            yield law.sample(plan["batch_size"], generator_for("planted training", seed * 1_000_003 + begin))[0]
            begin += 1

    entries = {
        rule: contender(rule, k, plan["steps"], plan["features"]) for rule in (TOPK, BATCH_TOPK, MUTUAL, FEATURE)
    }
    entries[UNIFORM] = Contender(lambda d, f, s: SAE(d, f, FeatureChoice(k, None), s), {"auxiliary": "zipf"})
    learners = trained(entries, batches, law.d, plan, seed)
    x, values = law.sample(settings["held_out"], generator_for("planted held out", seed))
    marks = {}
    for name, learner in learners.items():
        nearest = highest_cosines(learner.sae.decoder, law.directions())
        rare = slice(3 * law.features // 4, None)  # the quarter that is least common
        marks[name] = {
            **judged(learner.sae, x),
            "recovered": float(nearest.mean()),
            "rare recovered": float(nearest[rare].mean()),
            "spent where needed": _spent(learner.sae, x, values),
        }
    return marks


@torch.no_grad()
def _spent(sae: SAE, x: Tensor, values: Tensor) -> float:
    """Rank correlation of the features that tokens get with those that they have; 0 where all have the same."""
    given, needed = sae.encode(x).counts.numpy(), (values > 0).sum(1).numpy()
    if np.ptp(given) == 0 or np.ptp(needed) == 0:
        return 0.0
    return float(spearmanr(given, needed).statistic)


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Ratios to TopK by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed: dict[str, Interval] = {}
    for rule in (MUTUAL, FEATURE):
        needed[f"planted: {1 - MARGIN} − unexplained by {rule} / TopK"] = mean_interval(
            [1 - MARGIN - _ratio(row["heavy-tailed"], rule) for row in observations]
        )
        needed[f"control: {rule} / TopK closer to 1 by"] = mean_interval(
            [_ratio(row[CONTROL], rule) - _ratio(row["heavy-tailed"], rule) for row in observations]
        )
    needed[f"planted: spent where needed − {SPENT}"] = mean_interval(
        [row["heavy-tailed"][MUTUAL]["spent where needed"] - SPENT for row in observations]
    )
    needed["real: dead with TopK − with feature choice"] = mean_interval([_dead(row) for row in observations])
    needed["real: 1 − unexplained by mutual choice / TopK"] = mean_interval(
        [_real(row, MUTUAL) for row in observations]
    )
    numbers: dict[str, Interval | float] = {**needed}
    for part in ("heavy-tailed", CONTROL, "real"):
        for name in observations[0][part]:
            for mark in observations[0][part][name]:
                values = [row[part][name][mark] for row in observations]
                numbers[f"{part}, {name}: {mark}"] = sum(values) / len(values)
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict(
        "holds", "both choices explain more where tokens differ, only there, and fewer features die", numbers
    )


def _ratio(marks: dict[str, dict[str, float]], rule: str) -> float:
    return marks[rule]["unexplained"] / marks[TOPK]["unexplained"]


def _pairs(row: Observation, rule: str) -> list[tuple[dict[str, float], dict[str, float]]]:
    real = row["real"]
    return [(marks, real[name.replace(rule, TOPK)]) for name, marks in real.items() if name.startswith(f"{rule},")]


def _dead(row: Observation) -> float:
    return float(np.mean([other["dead"] - marks["dead"] for marks, other in _pairs(row, FEATURE)]))


def _real(row: Observation, rule: str) -> float:
    return float(np.mean([1 - marks["unexplained"] / other["unexplained"] for marks, other in _pairs(row, rule)]))


experiment = Experiment(
    slug="feature-choice-sae",
    claim=(
        "Where tokens need different numbers of features, spending a budget of matches over all pairs, or by "
        "feature, leaves less unexplained than the same number for every token; and fewer features are dead."
    ),
    rule=(
        "holds if, at 95 % over seeds, mutual and feature choice leave at least 10 % less of the variance of "
        "planted heavy-tailed activations unexplained than TopK, and gain less where all tokens need the same; "
        "mutual choice gives features to tokens in the order of what they have (rank correlation above 0.5); and on "
        "a language model, in the mean over k, fewer features are dead with feature choice than with TopK, and "
        "mutual choice leaves less unexplained; does not hold if one of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="active features of a token",
    y_label="unexplained variance",
)

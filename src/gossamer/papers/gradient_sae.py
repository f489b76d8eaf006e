"""Gradient TopK: features chosen by what they do to the model's loss keep the model's behaviour better.

Planted first, where large features are idle and small ones are all that matters, with gradients of other tokens as a
control; then on a language model, spliced in with and without gradients at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.features.activation_rules import GradientTopK, ReLU, TopK
from gossamer.features.dictionary_metrics import recovery
from gossamer.features.losses import unexplained_variance
from gossamer.features.planted_dictionaries import CausalFeatures
from gossamer.features.sae import SAE
from gossamer.features.splicing import evaluate_splices
from gossamer.features.steering_effect import steering_effect
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.feature_contest import GRADIENT, MUTUAL, TOPK, Contender, compared, contender, trained
from gossamer.papers.language_features import LanguageFeatures, Source, language_features
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

SHUFFLED = "gradients of other tokens"
ATTRIBUTION = "ReLU + L1 on attribution"
FOUND = 0.8  # share of the causal features that are to be kept
LITTLE = 0.1  # of the median length of a gradient that counts as none

QUICK: dict[str, Any] = {
    "planted": {"idle": 96, "causal": 96, "active": 8},
    "k": 8,
    "betas": [0.3, 1.0, 3.0, 10.0],
    "planted_training": {
        "features": 256,
        "steps": 400,
        "batch_size": 512,
        "learning_rate": 3e-3,
        "dead_after": 50_000,
    },
    "held_out": 2048,
    "source": {"documents": 256, "held_out": 24},
    "ks": [8, 32],
    "beta": 1.0,
    "penalties": [0.001, 0.003, 0.01],
    "real_training": {
        "features": 1024,
        "steps": 150,
        "batch_size": 256,
        "learning_rate": 2e-3,
        "dead_after": 20_000,
        "documents": 4,
    },
    "steered": 16,
    "prompt": 24,
}
FULL: dict[str, Any] = {
    **QUICK,
    "planted": {"idle": 256, "causal": 256, "active": 16},
    "k": 16,
    "planted_training": {
        "features": 512,
        "steps": 3000,
        "batch_size": 1024,
        "learning_rate": 1e-3,
        "dead_after": 300_000,
    },
    "held_out": 20_000,
    "source": {"documents": 1600, "held_out": 64},
    "ks": [8, 16, 32],
    "real_training": {
        "features": 8192,
        "steps": 5000,
        "batch_size": 4096,
        "learning_rate": 3e-4,
        "dead_after": 1_000_000,
        "documents": 64,
    },
    "steered": 512,
    "prompt": 64,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Planted activations, and those of a model."""
    planted = _planted(settings, seed)
    features = language_features(Source(**settings["source"]))
    plan, ks = settings["real_training"], settings["ks"]
    entries = {f"{TOPK}, k={k}": contender(TOPK, k, plan["steps"], plan["features"]) for k in ks}
    beta = settings["beta"]
    for k in ks:
        entries[f"{GRADIENT}, k={k}"] = Contender(
            lambda d, f, s, k=k: SAE(d, f, GradientTopK(k, beta), s)  # type: ignore[misc]
        )
        entries[f"{MUTUAL}, k={k}"] = contender(MUTUAL, k, plan["steps"], plan["features"])
    for penalty in settings["penalties"]:
        entries[f"{ATTRIBUTION}, {penalty}"] = Contender(
            lambda d, f, s: SAE(d, f, ReLU(), s), {"sparsity": penalty, "attribution": True}
        )
    learners, marks = compared(features, entries, plan, seed, gradients=True)
    told = {name: learner.sae for name, learner in learners.items() if name.startswith(GRADIENT)}
    texts, skip = features.held_out_documents[: plan["documents"]], features.training.facts.skipped
    for name, report in evaluate_splices(
        features.model, features.site, told, texts, skip, progress=False, with_gradients=True
    ).items():
        marks[f"{name}, told the gradient"] = {"loss added": report.spliced - report.dense, "active": report.active}
    lengths = features.training.gradients(slice(None)).norm(dim=1)
    middle = ks[len(ks) // 2]
    steered = {rule: _steered(features, learners[f"{rule}, k={middle}"].sae, settings) for rule in (TOPK, GRADIENT)}
    curves = {
        rule: {"x": ks, "y": [marks[f"{rule}, k={k}"]["loss added"] for k in ks]} for rule in (TOPK, GRADIENT, MUTUAL)
    }
    return {
        "planted": planted,
        "real": marks,
        "steered": steered,
        "tokens without a gradient": float((lengths < LITTLE * lengths.median()).float().mean()),
        "curves": curves,
    }


def _planted(settings: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    law, plan, k = CausalFeatures(**settings["planted"], seed=seed), settings["planted_training"], settings["k"]

    def batches(shuffled: bool) -> Any:
        def draw(begin: int) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                generator = generator_for("planted training", seed * 1_000_003 + begin)
                x, gradient, _ = law.sample(plan["batch_size"], generator)
                yield x, gradient[torch.randperm(len(x), generator=generator)] if shuffled else gradient
                begin += 1

        return draw

    def gradient_topk(beta: float) -> Contender:
        return Contender(lambda d, f, s: SAE(d, f, GradientTopK(k, beta), s))

    entries = {TOPK: Contender(lambda d, f, s: SAE(d, f, TopK(k), s))}
    entries |= {f"β = {beta}": gradient_topk(beta) for beta in settings["betas"]}
    size = law.idle + law.causal
    learners = trained(entries, batches(False), size, plan, seed)
    learners |= trained({SHUFFLED: gradient_topk(settings["beta"])}, batches(True), size, plan, seed)
    generator = generator_for("planted held out", seed)
    x, gradient, values = law.sample(settings["held_out"], generator)
    other = gradient[torch.randperm(len(x), generator=generator)]
    marks = {}
    for name, learner in learners.items():
        told = other if name == SHUFFLED else gradient
        marks[name] = _planted_marks(law, learner.sae, x, told, values)
        marks[name] |= {
            f"{key}, plain": value for key, value in _planted_marks(law, learner.sae, x, None, values).items()
        }
    return marks


@torch.no_grad()
def _planted_marks(
    law: CausalFeatures, sae: SAE, x: Tensor, gradient: Tensor | None, values: Tensor
) -> dict[str, float]:
    explained = sae.eval()(x, gradient)
    error = (law.downstream(explained.output) - law.downstream(x)).square().sum()
    partner = recovery(sae.decoder, law.directions()).partner[law.idle :]
    active = values[:, law.idle :] > 0
    kept = explained.codes.to_dense()[:, partner] > 0
    return {
        "downstream error": float(error / law.downstream(x).square().sum()),
        "kept": float((kept & active).sum() / active.sum()),
        "unexplained": float(unexplained_variance(explained.output, x)),
    }


def _steered(features: LanguageFeatures, sae: SAE, settings: dict[str, Any]) -> dict[str, float]:
    """Effects of features that are active on held-out text, those of every so many ranks."""
    x = features.held_out[:]
    counted = torch.bincount(sae.encode(x).indices.long(), minlength=sae.n_features)
    order = counted.argsort(descending=True)[: int((counted > 0).sum())]
    chosen = order[torch.linspace(0, len(order) - 1, settings["steered"]).long()]
    prompts = [text[:, : settings["prompt"]] for text in features.held_out_documents[-2:]]
    skip = features.training.facts.skipped
    effect = steering_effect(
        features.model, features.site, sae.decoder[chosen], prompts, skip_first=skip, progress=False
    )
    return {
        "logit change": float(effect.logit_change.mean()),
        "divergence": float(effect.divergence.mean()),
        "above a tenth of a nat": effect.share_above(0.1),
    }


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Differences paired by seed, in the mean over k."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {
        "planted: downstream error of TopK / gradient TopK − 2": mean_interval(
            [row["planted"][TOPK]["downstream error"] / _best(row)["downstream error"] - 2 for row in observations]
        ),
        f"planted: causal features kept − {FOUND}": mean_interval([_best(row)["kept"] - FOUND for row in observations]),
        "planted: downstream error with gradients of other tokens / own − 2": mean_interval(
            [row["planted"][SHUFFLED]["downstream error"] / _best(row)["downstream error"] - 2 for row in observations]
        ),
        "real: 1 − loss added by gradient TopK / TopK": mean_interval([_added(row) for row in observations]),
        "real: divergence by steering, gradient TopK / TopK − 1": mean_interval(
            [row["steered"][GRADIENT]["divergence"] / row["steered"][TOPK]["divergence"] - 1 for row in observations]
        ),
    }
    numbers: dict[str, Interval | float] = {**needed}
    numbers["real: dead with TopK − with gradient TopK"] = mean_interval([_dead(row) for row in observations])
    numbers["real: loss added, gradient TopK told the gradient / TopK"] = mean_interval(
        [1 - _added(row, ", told the gradient") for row in observations]
    )
    numbers["tokens without a gradient"] = observations[0]["tokens without a gradient"]
    for part in ("planted", "real", "steered"):
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
    return Verdict("holds", "what matters downstream is kept, in the planted and in the real model", numbers)


def _best(row: Observation) -> dict[str, float]:
    """With the β that is used on the model."""
    return row["planted"]["β = 1.0"]


def _pairs(row: Observation, suffix: str = "") -> list[tuple[dict[str, float], dict[str, float]]]:
    real = row["real"]
    ks = [name.removeprefix(TOPK) for name in real if name.startswith(f"{TOPK},")]
    return [(real[f"{GRADIENT}{k}{suffix}"], real[f"{TOPK}{k}"]) for k in ks]


def _added(row: Observation, suffix: str = "") -> float:
    ratios = [own["loss added"] / other["loss added"] for own, other in _pairs(row, suffix)]
    return 1 - sum(ratios) / len(ratios)


def _dead(row: Observation) -> float:
    return sum(other["dead"] - own["dead"] for own, other in _pairs(row)) / len(_pairs(row))


experiment = Experiment(
    slug="gradient-sae",
    claim=(
        "Choosing the features of a token by their values and by how much the model's loss changes along them "
        "keeps, at the same number, what the model makes of the token better than choosing by values alone, and "
        "finds features that steer the model more."
    ),
    rule=(
        "holds if, at 95 % over seeds, with β = 1: on planted activations the downstream error is less than half of "
        "TopK's and of that with gradients of other tokens, and more than 80 % of the causal features are kept; and "
        "on a language model, in the mean over k and without a gradient at hand, the loss added by splicing is less "
        "than TopK's, and features move predictions further when added; does not hold if one of these is wholly "
        "reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="active features of a token",
    y_label="loss added, nats",
)

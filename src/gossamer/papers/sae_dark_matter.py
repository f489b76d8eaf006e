"""The dark matter of sparse autoencoders: half of the error is linear in the activation, and what is left stays.

Autoencoders of three widths are trained on what the middle block of a language model puts out. On documents that they
have not seen their errors are split, compared from width to width and from token to token, spliced into the model, and
made smaller by pursuit and by what the block before says. The same split of planted activations is known exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.features.activation_rules import TopK
from gossamer.features.error_decomposition import (
    ErrorReport,
    error_decomposition,
    norm_predictability,
    reconstruct,
    split_rows,
)
from gossamer.features.error_scaling import scaling_report
from gossamer.features.gradient_pursuit import pursue
from gossamer.features.nonlinear_error import (
    downstream_split,
    learnability,
    map_from_earlier,
    missing_features,
    share_in_features,
)
from gossamer.features.planted_activations import PlantedActivations, planted_in
from gossamer.features.sae import SAE
from gossamer.features.store import ActivationStore, capture
from gossamer.features.training import TrainingSettings, train
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.language_features import LanguageFeatures, Source, language_features, locked
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

PLANTED, NOISE, ALIKE, FLAT, SHARE = 0.03, 0.01, 0.8, 0.5, 0.25

QUICK: dict[str, Any] = {
    "source": {},
    "trained": 176,
    "widths": [576, 2304, 9216],
    "k": 32,
    "steps": 200,
    "batch": 512,
    "rate": 3e-3,
    "auxiliary": "none",
    "parts steps": 80,
    "pursued": 8192,
    "spliced": 6,
    "planted": 20_000,
    "before": ["model.layers.14"],
}
FULL: dict[str, Any] = {
    **QUICK,
    "source": {"documents": 1200, "held_out": 64, "length": 512, "gradients": False},
    "trained": 600,
    "widths": [2304, 9216, 36864],
    "steps": 20_000,
    "batch": 4096,
    "rate": 3e-4,
    "auxiliary": "dead",
    "parts steps": 10_000,
    "spliced": 64,
    "planted": 300_000,
    "before": ["model.layers.14", "model.layers.15.mlp", "model.layers.15.self_attn"],
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Train, take apart, and test every part."""
    features = language_features(Source(**settings["source"]))
    known = features.training.documents < settings["trained"]
    fresh = torch.from_numpy(np.flatnonzero(~known))
    x, documents = features.training[fresh], torch.from_numpy(features.training.documents[fresh.numpy()]).long()
    seen = features.training[torch.from_numpy(np.flatnonzero(known))]
    saes = {width: SAE(x.shape[1], width, TopK(settings["k"]), seed) for width in settings["widths"]}
    for width, sae in progress(saes.items(), "training dictionaries"):
        train({str(width): sae}, _batches(seen, settings, seed), _training(settings, seed), progress=False)
    scaling = scaling_report(saes, x, documents=documents, seed=seed)
    middle, largest = settings["widths"][len(saes) // 2], settings["widths"][-1]
    report = scaling.reports[scaling.widths.index(middle)]
    sae = saes[middle]
    x_hat = reconstruct(sae, x)
    split = downstream_split(
        features.model, features.site, sae, report, features.held_out_documents[: settings["spliced"]], seed=seed
    )
    order = torch.randperm(len(x), generator=generator_for("other tokens", seed))
    nothing = error_decomposition(x[order], x[order] - (x - x_hat), documents=documents, seed=seed)
    told = scaling.to_dict()
    found: dict[str, Any] = {
        "scaling": told,
        "laws": {
            name: [law.floor, law.amount, law.exponent]
            for name, law in (("total", scaling.total), ("nonlinear", scaling.nonlinear))
            if law is not None
        },
        "downstream": split.to_dict(),
        "other tokens": {"r2_vec": nothing.r2_vec, "r2_norm": nothing.r2_norm},
        "length from": _lengths(features, fresh, x, x_hat, sae, documents, seed),
        "parts": _parts(report, x, x_hat, documents, saes[largest], sae, settings, seed),
        "pursuit": _pursued(sae, x[: settings["pursued"]], documents[: settings["pursued"]], seed),
        "before": _before(features, settings, x, x_hat, report, documents, seed),
        "planted": _planted(settings, sae, x, seed),
    }
    curves = {
        name: {"x": told["widths"], "y": [each[key] for each in told["reports"]]}
        for name, key in (("all of the error", "fvu"), ("nonlinear", "fvu_nonlinear"), ("linear", "fvu_linear"))
    }
    return {**found, "curves": curves}


def _training(settings: dict[str, Any], seed: int, part: str = "steps") -> TrainingSettings:
    return TrainingSettings(
        steps=settings[part],
        batch_size=settings["batch"],
        learning_rate=settings["rate"],
        auxiliary=settings["auxiliary"],
        seed=seed,
    )


def _batches(x: Tensor, settings: dict[str, Any], seed: int) -> Any:
    size = settings["batch"]

    def batches(begin: int) -> Any:
        generator = generator_for("order of activations", seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            for first in range(0, len(x) - size + 1, size):
                yield x[order[first : first + size]]

    return batches


def _lengths(
    features: LanguageFeatures, rows: Tensor, x: Tensor, x_hat: Tensor, sae: SAE, documents: Tensor, seed: int
) -> dict[str, float]:
    """What predicts the length of the error: the activation, and simpler things."""
    tokens = torch.from_numpy(features.training.tokens[rows.numpy()]).long()
    predictors = {"activation": x, "its length": x.double().norm(dim=1), "token": tokens}
    return norm_predictability(x - x_hat, predictors, documents=documents, seed=seed)


def _parts(
    report: ErrorReport,
    x: Tensor,
    x_hat: Tensor,
    documents: Tensor,
    large: SAE,
    small: SAE,
    settings: dict[str, Any],
    seed: int,
) -> dict[str, dict[str, float]]:
    """Tests in which the nonlinear part should differ from the linear one."""
    linear, rest = report.parts(x, x_hat)
    parts = {"linear": linear, "nonlinear": rest}
    some = slice(0, 4096)
    lacking = missing_features(small.decoder, large.decoder)
    codes = large.encode(x[some])
    fitted, scored = split_rows(len(x), documents, 0.5, seed)
    fresh = {"activation": x, **parts}
    learned = learnability(
        {name: part[fitted] for name, part in fresh.items()},
        {name: part[scored] for name, part in fresh.items()},
        settings["widths"][0],
        settings["k"],
        _training(settings, seed, "parts steps"),
    )
    found = {name: {"learned, unexplained": fvu} for name, (fvu, _) in learned.items()}
    for name, part in parts.items():
        found[name] |= {
            "in features to come": share_in_features(part[some], codes, large.decoder, lacking),
            "length from the activation": norm_predictability(part, {"x": x}, documents=documents, seed=seed)["x"],
        }
    return found


def _pursued(sae: SAE, x: Tensor, documents: Tensor, seed: int) -> dict[str, float]:
    """Variance left by the encoder, and by pursuit with as many features for every token."""
    pursued = error_decomposition(x, sae.decode(pursue(sae, x)).detach(), documents=documents, seed=seed)
    encoded = error_decomposition(x, reconstruct(sae, x), documents=documents, seed=seed)
    return {
        "encoder": encoded.fvu,
        "pursuit": pursued.fvu,
        "encoder, nonlinear": encoded.fvu_nonlinear,
        "pursuit, nonlinear": pursued.fvu_nonlinear,
    }


def _before(
    features: LanguageFeatures,
    settings: dict[str, Any],
    x: Tensor,
    x_hat: Tensor,
    report: ErrorReport,
    documents: Tensor,
    seed: int,
) -> dict[str, float]:
    """Share of the error, and of its nonlinear part, that reconstructions from before explain."""
    fitted, _ = split_rows(len(x), documents, 0.5, seed)
    earlier = {}
    for site in settings["before"]:
        store = _captured(features, site, settings["trained"])
        sae = SAE(store.facts.size, settings["widths"][0], TopK(settings["k"]), seed)
        train({site: sae}, _batches(store[fitted], settings, seed), _training(settings, seed), progress=False)
        earlier[site] = reconstruct(sae, store[:])
    error = x - x_hat
    wanted = {"error": error, "nonlinear": report.parts(x, x_hat)[1]}
    return {
        name: map_from_earlier(part, earlier, documents=documents, seed=seed).explained for name, part in wanted.items()
    }


def _captured(features: LanguageFeatures, site: str, first: int) -> ActivationStore:
    """Another place, for the documents that autoencoders have not seen."""
    folder = features.folder / f"{site}-from-{first}"
    with locked(folder):
        return capture(features.model, features.training_documents[first:], site, folder, progress=False)


def _planted(settings: dict[str, Any], sae: SAE, x: Tensor, seed: int) -> dict[str, float]:
    """How far the split of planted errors is off; and which planted error ends up in which part."""
    law = PlantedActivations(seed=seed)
    drawn = law.draw(settings["planted"], seed)
    found = {"off": abs(error_decomposition(drawn.x, drawn.x_hat, seed=seed).r2_vec_pooled - law.linear_share())}
    some = x[:8192]
    for name, noise in (("absent", (0.0, 0.0)), ("dense", (0.5, 0.0)), ("introduced", (0.0, 0.5))):
        planted = planted_in(sae, some, 0.3, *noise, seed=seed)
        found[f"nonlinear, {name}"] = error_decomposition(planted.x, planted.x_hat, seed=seed).fvu_nonlinear
    return found


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: Sequence[Observation]) -> Verdict:
    """Every part of the claim over seeds."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {
        "R² of the length − R² of the vector": [_mean(o, "r2_norm") - _mean(o, "r2_vec") for o in observations],
        f"{FLAT} − change of the nonlinear part with width / change of all": [
            FLAT - _range(o, "fvu_nonlinear") / _range(o, "fvu") for o in observations
        ],
        f"correlation of errors between widths − {ALIKE}": [o["scaling"]["correlation"] - ALIKE for o in observations],
        "variance left: encoder − pursuit": [o["pursuit"]["encoder"] - o["pursuit"]["pursuit"] for o in observations],
        "share of the nonlinear part that goes: earlier block − pursuit": [
            o["before"]["nonlinear"] - (1 - o["pursuit"]["pursuit, nonlinear"] / o["pursuit"]["encoder, nonlinear"])
            for o in observations
        ],
        f"{SHARE} − |share of the loss − share of the length| of the nonlinear part": [
            SHARE - abs(o["downstream"]["nonlinear_share"] - o["downstream"]["nonlinear_length"]) for o in observations
        ],
        f"{PLANTED} − how far a planted split is off": [PLANTED - o["planted"]["off"] for o in observations],
        f"{NOISE} − R² of other tokens' errors": [
            NOISE - max(o["other tokens"]["r2_vec"], o["other tokens"]["r2_norm"]) for o in observations
        ],
    }
    intervals: dict[str, Interval] = {name: mean_interval(values) for name, values in needed.items()}
    numbers: dict[str, Interval | float] = {**intervals, **_told(observations)}
    wrong = [name for name, value in intervals.items() if value.below_zero]
    open_ = [name for name, value in intervals.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict("holds", "errors split as described, and the nonlinear part stays with width", numbers)


def _mean(observation: Observation, key: str) -> float:
    reports = observation["scaling"]["reports"]
    return sum(report[key] for report in reports) / len(reports)


def _range(observation: Observation, key: str) -> float:
    values = [report[key] for report in observation["scaling"]["reports"]]
    return max(values) - min(values)


def _told(observations: Sequence[Observation]) -> dict[str, float]:
    """Means over seeds of everything that was measured."""
    count = len(observations)
    told = {
        f"width {width}: {name}": sum(o["scaling"]["reports"][i][name] for o in observations) / count
        for i, width in enumerate(observations[0]["scaling"]["widths"])
        for name in observations[0]["scaling"]["reports"][i]
    }
    for group in ("downstream", "length from", "pursuit", "before", "planted"):
        for name in observations[0][group]:
            told[f"{group}: {name}"] = sum(o[group][name] for o in observations) / count
    for part, values in observations[0]["parts"].items():
        for name in values:
            told[f"{part} part: {name}"] = sum(o["parts"][part][name] for o in observations) / count
    for name in ("predicted", "with nonlinear", "with linear"):
        told[f"length at a larger width, R²: {name}"] = sum(o["scaling"][name] for o in observations) / count
    return told


experiment = Experiment(
    slug="sae-dark-matter",
    claim=(
        "A large part of the error of sparse autoencoders, and nearly all of its length, is linear in the activation; "
        "wider ones fail on the same tokens, and the nonlinear part hardly shrinks with width. Pursuit with the same "
        "dictionary makes the error smaller, earlier layers make the nonlinear part smaller by more, and that part "
        "costs the model its share."
    ),
    rule=(
        "holds if, at 95 % over seeds, the length's R² exceeds the vector's; the nonlinear variance changes by less "
        "than half as much as all of it from width to width; lengths correlate by more than 0.8 between widths; "
        "pursuit leaves less variance than the encoder; reconstructions of earlier layers take more away from the "
        "nonlinear part than pursuit does; that part's share of the increase in loss is within 0.25 of its share of "
        "the squared length; a planted split is found within 0.03 of R²; and errors of other tokens are explained by "
        "no more than 0.01. Does not hold if one is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=2,
    x_label="features of the dictionary",
    y_label="fraction of variance unexplained",
)

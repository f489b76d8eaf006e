"""Automatic interpretation's claims: cheap scores know true explanations, and latents are clearer than neurons.

On a real language model. Explanations are made by counting tokens, so that they can be carried out and judged without
any language model, and for some latents by the demo model itself, which is small for that. Every score is set against
the same score of another latent's explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CalibrationError
from gossamer.features.autointerp.activity import Activity, CachedActivity, CodedActivity
from gossamer.features.autointerp.clients import ReplayClient
from gossamer.features.autointerp.contrast import TopKNeurons, random_directions
from gossamer.features.autointerp.embedding import MeanPooledEncoder
from gossamer.features.autointerp.examples import ExampleBuilder, ExampleSettings, LatentRecord
from gossamer.features.autointerp.explainers import Explainer, PromptedExplainer, TokenExplainer
from gossamer.features.autointerp.intervention import InterventionScorer, OutputExplainer
from gossamer.features.autointerp.judges import OfflineJudge, PromptedJudge
from gossamer.features.autointerp.local_client import LocalClient
from gossamer.features.autointerp.score import auc, paired_p_value
from gossamer.features.autointerp.scorers import (
    DetectionScorer,
    EmbeddingScorer,
    FuzzingScorer,
    Scorer,
    SimulationScorer,
    SurprisalScorer,
)
from gossamer.features.latent_capture import cache_latents
from gossamer.features.sae import SAE
from gossamer.models import load
from gossamer.papers.encoder_text import encoder, encoder_tokenizer
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.language_features import LanguageFeatures, language_features, locked
from gossamer.papers.planted_latents import NARROW, PLANTED, SPECIFIC, TOPIC, TOPICAL, UNEVEN, planted
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, bootstrap_interval, mean_interval

SEPARATED = 0.9  # area under the curve of true over others' explanations that planted latents must reach
CERTAIN = 0.01  # p-value of a one-sided test by flipping signs
SAES, NEURONS, RANDOM = "SAE latents", "top-k neurons", "random directions"
NEEDED = ("detection", "fuzzing", "simulation", "embedding", "surprisal")
_NOTHING = "nothing"  # the explanation of a latent that promotes no word
_ROWS = 4096  # encoded at a time
_LEAST_PLANTED = 10  # windows of a planted latent: what it means is known, however rare
BY_MODEL = ("detection by the model", "fuzzing by the model", "surprisal of the model's explanations")

QUICK: dict[str, Any] = {
    "documents": 160,
    "features": 2048,
    "k": 16,
    "steps": 600,
    "batch": 512,
    "latents": 24,
    "asked": 12,
    "judged": 3,
    "steered": 6,
    "contexts": 6,
    "candidates": 2,
    "examples": {"n_train": 40, "n_test": 20, "n_negatives": 20, "n_contrast": 20, "quantiles": 5, "least": 80},
    "asked_windows": 8,
}
FULL: dict[str, Any] = {
    **QUICK,
    "documents": 256,
    "features": 4096,
    "k": 32,
    "steps": 2000,
    "batch": 1024,
    "latents": 100,
    "asked": 50,
    "judged": 50,
    "steered": 50,
    "contexts": 40,
    "candidates": 5,
    "examples": {"n_train": 40, "n_test": 50, "n_negatives": 50, "n_contrast": 20, "quantiles": 10, "least": 100},
    "asked_windows": 50,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Explain and score latents, neurons and random directions of one model, and planted latents."""
    features = language_features()
    sae = features.reference_sae(settings["features"], settings["k"], settings["steps"], settings["batch"], seed).eval()
    drawn = random_directions(sae, settings["k"], seed)
    small = load("demo", dtype="bfloat16")
    activities = {
        SAES: _of_store(features, sae, settings),
        NEURONS: _of_neurons(features, small.model, settings),
        RANDOM: _of_store(features, drawn, settings),
    }
    records = {name: _records(part, features, settings, seed) for name, part in activities.items()}
    explained = {name: _explained(TokenExplainer(), part) for name, part in progress(records.items(), "explaining")}
    fuzzing = FuzzingScorer(OfflineJudge(), seed=seed)
    marks = {name: [fuzzing.score(r, said) for r, said in part] for name, part in explained.items()}
    pairs = explained[SAES]
    own: dict[str, Any] = {}
    for scorer in progress((*_offline(seed), EmbeddingScorer(_embed())), "scores without a model"):
        own[scorer.name] = _against_others(scorer, pairs)
    asked = [(_shorter(record, settings["asked_windows"]), said) for record, said in pairs[: settings["asked"]]]
    own["surprisal"] = _against_others(SurprisalScorer(small.model, small.tokenizer), asked)
    own |= _by_the_model(features, small, asked[: settings["judged"]], seed)
    return {
        "planted": _planted(features, settings, seed),
        "scores": own,
        "fuzzing": {name: [mark.value for mark in part if mark.value is not None] for name, part in marks.items()},
        "abstained": {name: sum(mark.abstained for mark in part) for name, part in marks.items()},
        "intervention": _interventions(features, small, sae, drawn, records[SAES], settings, seed),
        "explanations": [[record.latent, said] for record, said in pairs[:8]],
        "curves": {name: _curve(part) for name, part in marks.items()},
    }


# ---------------------------------------------------------------------------------------------------- what is explained


def _of_store(features: LanguageFeatures, sae: SAE, settings: dict[str, Any]) -> Activity:
    texts = features.training_documents[: settings["documents"]]
    rows = int(np.searchsorted(features.training.documents, len(texts)))
    with torch.no_grad():
        parts = [sae.encode(features.training[slice(i, min(i + _ROWS, rows))]) for i in range(0, rows, _ROWS)]
    return CodedActivity(texts, SparseCodes.cat(parts), features.training.facts.skipped)


def _of_neurons(features: LanguageFeatures, model: Any, settings: dict[str, Any]) -> Activity:
    """The neurons that write into the place of the autoencoder; the model is run once and then read from the cache."""
    texts = features.training_documents[: settings["documents"]]
    block = model.get_submodule(features.site)
    folder = features.folder / f"neurons-{settings['k']}-{len(texts)}"
    with locked(folder):
        site = f"{features.site}.post_attention_layernorm"
        neurons, skipped = TopKNeurons(block.mlp, settings["k"]), features.training.facts.skipped
        cache = cache_latents(model, texts, site, neurons, folder, skip_first=skipped, progress=False)
    return CachedActivity(cache)


def _records(activity: Activity, features: LanguageFeatures, settings: dict[str, Any], seed: int) -> list[LatentRecord]:
    """Records of latents drawn by lot among those with enough windows."""
    builder = ExampleBuilder(activity, features.tokenizer, ExampleSettings(**settings["examples"], seed=seed))
    found: list[LatentRecord] = []
    for latent in np.random.default_rng((seed, 5)).permutation(activity.latents).tolist():
        if activity.counts[latent] >= settings["examples"]["least"] and len(found) < settings["latents"]:
            try:
                found.append(builder.build(latent))
            except CalibrationError:
                continue  # too few windows with, or without, an activation
    return found


def _explained(explainer: Explainer, records: Sequence[LatentRecord]) -> list[tuple[LatentRecord, str]]:
    return [(record, said) for record in records if (said := explainer.explain(record))]


def _shorter(record: LatentRecord, count: int) -> LatentRecord:
    """With fewer windows to test on, evenly over their strengths."""
    places = np.linspace(0, len(record.test) - 1, min(count, len(record.test))).round().astype(int)
    return replace(record, test=[record.test[i] for i in places], negatives=record.negatives[:count])


# ---------------------------------------------------------------------------------------------------- scores


def _offline(seed: int) -> list[Scorer]:
    judge = OfflineJudge()
    return [DetectionScorer(judge), FuzzingScorer(judge, seed=seed), SimulationScorer(judge)]


def _embed() -> MeanPooledEncoder:
    return MeanPooledEncoder(encoder().to(torch.bfloat16), encoder_tokenizer())


def _against_others(scorer: Scorer, pairs: Sequence[tuple[LatentRecord, str]]) -> dict[str, Any]:
    """Scores of each latent by its own explanation and by that of the next one."""
    true, other, abstained = [], [], 0
    for place, (record, said) in enumerate(pairs):
        different = [text for _, text in (*pairs[place + 1 :], *pairs[:place]) if text != said]
        if different:
            scores = scorer.score(record, said), scorer.score(record, different[0])
            abstained += scores[0].abstained + scores[1].abstained
            if scores[0].value is not None and scores[1].value is not None:
                true.append(scores[0].value)
                other.append(scores[1].value)
    return {"true": true, "other": other, "abstained": abstained}


def _by_the_model(features: LanguageFeatures, small: Any, asked: Any, seed: int) -> dict[str, Any]:
    """The demo model explains, and judges its own explanations and others'."""
    local = LocalClient(small.model, small.tokenizer, "smollm2 bfloat16")
    client = ReplayClient(local, features.folder / f"autointerp-answers-{seed}.jsonl")
    explainer = PromptedExplainer(client, windows=8, max_tokens=40)
    pairs = _explained(explainer, [record for record, _ in asked])
    judge = PromptedJudge(client)
    surprisal = SurprisalScorer(small.model, small.tokenizer)
    scorers = (DetectionScorer(judge), FuzzingScorer(judge, seed=seed), surprisal)
    found: dict[str, Any] = {name: _against_others(scorer, pairs) for name, scorer in zip(BY_MODEL, scorers)}
    found["explanations of the model"] = [[record.latent, said] for record, said in pairs]
    return found


def _curve(marks: Sequence[Any]) -> dict[str, list[float]]:
    quantiles = sorted({quantile for mark in marks for quantile in mark.per_quantile})
    means = [[mark.per_quantile[q] for mark in marks if q in mark.per_quantile] for q in quantiles]
    return {"x": [float(q) for q in quantiles], "y": [float(np.mean(values)) for values in means]}


def _interventions(
    features: LanguageFeatures,
    small: Any,
    sae: SAE,
    drawn: SAE,
    records: Sequence[LatentRecord],
    settings: dict[str, Any],
    seed: int,
) -> dict[str, list[float]]:
    """Best scores of the latents that act most on single words, and of random directions on the same texts."""
    unembedding = features.model.get_output_embeddings().weight.detach().float()
    effects = sae.decoder.detach()[[record.latent for record in records]] @ unembedding.T
    peaks = (effects.amax(1) - effects.mean(1)) / effects.std(1)
    chosen = [records[i] for i in peaks.argsort(descending=True)[: settings["steered"]].tolist()]
    found: dict[str, list[float]] = {}
    for name, coder in ((SAES, sae), (RANDOM, drawn)):
        scorer = InterventionScorer(
            small.model, small.tokenizer, features.site, coder, contexts=settings["contexts"], seed=seed
        )
        explainer = OutputExplainer(scorer, candidates=settings["candidates"], contexts=settings["contexts"])
        best = [scorer.best(record, explainer.explanations(record) or [_NOTHING])[1] for record in chosen]
        found[name] = [float(score.value or 0.0) for score in best]
        found[f"divergence of {name}"] = [score.facts["divergence"] for score in best]
    return found


def _planted(features: LanguageFeatures, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Scores of planted latents by their own and by others' sentences, by a too wide and by a too narrow one."""
    activity, names = planted(features.training_documents[: settings["documents"]], features.tokenizer, seed)
    wanted = ExampleSettings(**{**settings["examples"], "least": _LEAST_PLANTED}, seed=seed)

    def record(name: str, **changes: Any) -> LatentRecord:
        return ExampleBuilder(activity, features.tokenizer, replace(wanted, **changes)).build(names.index(name))

    pairs = []
    for name, sentence in PLANTED.items():
        try:
            pairs.append((record(name), sentence))
        except CalibrationError:
            continue  # the text has too few of them
    separation = {}
    for scorer in _offline(seed):
        marks = _against_others(scorer, pairs)
        separation[scorer.name] = auc(marks["true"], marks["other"])
    fuzzing, detection = FuzzingScorer(OfflineJudge(), seed=seed), DetectionScorer(OfflineJudge())

    def value(scorer: Scorer, judged: LatentRecord, sentence: str) -> float | None:
        return scorer.score(judged, sentence).value

    return {
        "separation": separation,
        "latents": len(pairs),
        "wide, random negatives": value(fuzzing, record(SPECIFIC), TOPICAL[TOPIC]),
        "wide, neighbours": value(fuzzing, record(SPECIFIC, negatives=("neighbour",)), TOPICAL[TOPIC]),
        "narrow, all strengths": value(detection, record(UNEVEN), NARROW),
        "narrow, strongest": value(detection, record(UNEVEN, test_sampler="top"), NARROW),
    }


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Intervals over seeds for what is one number a seed; tests over the latents of all seeds for what is many."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})

    def over_seeds(value: Callable[[Observation], float]) -> Interval:
        return mean_interval([value(o) for o in observations])

    intervals = {
        f"planted: area of true over others − {SEPARATED}": over_seeds(
            lambda o: min(o["planted"]["separation"].values()) - SEPARATED
        ),
        "planted: too wide, random negatives − neighbours": over_seeds(
            lambda o: o["planted"]["wide, random negatives"] - o["planted"]["wide, neighbours"]
        ),
        "planted: too narrow, strongest − all strengths": over_seeds(
            lambda o: o["planted"]["narrow, strongest"] - o["planted"]["narrow, all strengths"]
        ),
        "fuzzing: SAE latents − top-k neurons": over_seeds(lambda o: _fuzz(o, SAES) - _fuzz(o, NEURONS)),
        "fuzzing: SAE latents − random directions": over_seeds(lambda o: _fuzz(o, SAES) - _fuzz(o, RANDOM)),
    }
    steered = (_pooled(observations, "intervention", SAES), _pooled(observations, "intervention", RANDOM))
    tests = {
        **{f"{name}: true − other": _differences(observations, name) for name in NEEDED},
        "intervention: SAE latents − random directions, nats": np.subtract(*steered),
    }
    numbers: dict[str, Interval | float] = {**intervals}
    for name, differences in tests.items():
        numbers |= {name: bootstrap_interval(differences), f"{name}, p": paired_p_value(differences)}
        numbers[f"{name}, latents"] = len(differences)
    numbers |= _means(observations)
    wrong = [name for name, value in intervals.items() if value.below_zero]
    wrong += [name for name, differences in tests.items() if paired_p_value(-differences) < CERTAIN]
    open_ = [name for name, value in intervals.items() if not value.above_zero]
    open_ += [name for name, differences in tests.items() if paired_p_value(differences) >= CERTAIN]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"not certain: {'; '.join(open_)}", numbers)
    return Verdict(
        "holds", "all scores know true explanations, and latents are clearer than what they replace", numbers
    )


def _pooled(observations: list[Observation], *path: str) -> np.ndarray:
    """Values of the latents of all seeds."""
    found: list[float] = []
    for part in observations:
        for key in path:
            part = part[key]
        found += part
    return np.array(found)


def _differences(observations: list[Observation], name: str) -> np.ndarray:
    """Score of the true explanation − score of another's, of every latent of all seeds."""
    return _pooled(observations, "scores", name, "true") - _pooled(observations, "scores", name, "other")


def _means(observations: list[Observation]) -> dict[str, float]:
    """Over the latents of all seeds; what the demo model says decides nothing and has its p-values here."""
    found: dict[str, float] = {}
    for name in (*NEEDED, *BY_MODEL):
        for part in ("true", "other"):
            values = _pooled(observations, "scores", name, part)
            if len(values):
                found[f"{name}, {part} explanations"] = float(values.mean())
        if name in BY_MODEL and len(values):
            found[f"{name}: true − other, p"] = paired_p_value(_differences(observations, name))
    for kind in ("fuzzing", "intervention"):
        for name in observations[0][kind]:
            found[f"{kind}: {name}"] = float(_pooled(observations, kind, name).mean())
    return found


def _fuzz(observation: Observation, name: str) -> float:
    return float(np.mean(observation["fuzzing"][name]))


experiment = Experiment(
    slug="autointerp",
    claim=(
        "Scores that ask for no activation at every token (detection, fuzzing, surprisal, embedding, intervention) "
        "tell a latent's true explanation from another's, as simulation does, and by them latents of a sparse "
        "autoencoder are clearer than neurons, even neurons of which only the strongest count."
    ),
    rule=(
        "holds if (1) on planted latents every scorer sets true above other explanations with an area above 0.9, "
        "neighbours as negatives lower the score of a too wide explanation, and the strongest windows alone overrate a "
        "too narrow one, in 95 % intervals over seeds; (2) on latents of a real model detection, fuzzing and "
        "simulation without a language model, embedding and surprisal score true explanations above those of other "
        "latents, p < 0.01 over the latents of all seeds; (3) fuzzing scores SAE latents above top-k neurons and above "
        "random directions, in 95 % intervals over seeds; (4) interventions score SAE latents above random directions "
        "of the same divergence, p < 0.01. Does not hold if one of these is as surely reversed. What the 135M demo "
        "model says as explainer and judge is reported beside it and decides nothing"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="quantile of activation, 1 is weakest",
    y_label="fuzzing, area under the curve",
)

"""Looking at a model's features: train or load a dictionary, measure it, explain and steer it, and show a page."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.progress import track
from gossamer.errors import CheckpointError, ConfigurationError, ModelError
from gossamer.features.autointerp.activity import CachedActivity
from gossamer.features.autointerp.examples import ExampleBuilder, ExampleSettings
from gossamer.features.autointerp.explainers import TokenExplainer
from gossamer.features.autointerp.judges import OfflineJudge
from gossamer.features.autointerp.pipeline import Interpretation, interpret, read_interpretations
from gossamer.features.autointerp.scorers import DetectionScorer, FuzzingScorer
from gossamer.features.exploration import Exploration, ExplorationSettings, explore, token_texts
from gossamer.features.prepared import DictionarySettings, Prepared, prepare
from gossamer.features.saelens_format import save_saelens
from gossamer.features.splicing import SpliceReport, evaluate_splice
from gossamer.features.steering import PROMPTS, Steered, steer
from gossamer.measure import describe_machine
from gossamer.report.features_page import FeaturesPage, write_features_page
from gossamer.report.main_job import short_name
from gossamer.storage import atomic_directory, write_json

_EXAMPLES = ExampleSettings(n_train=20, n_test=20, n_negatives=20, n_contrast=10, least=40)
_EXPLAINER = "the token statistics of gossamer, judged offline"


@dataclass(kw_only=True)
class FeaturesJob:
    """Everything the job needs to know.

    Attributes
    ----------
    dictionary
        Which model, place, text and autoencoder.
    output
        Directory for the page, the autoencoder, explanations and a record.
    exploration
        How much is shown of every feature.
    explanations
        File that :func:`~gossamer.features.autointerp.pipeline.interpret` has written; None explains offline.
    explain
        Features to explain, spread evenly from the most to the least active; 0 explains none.
    steer
        Features to steer; None chooses some that say much about the next token.
    strengths, prompts
        By how much, in units of the strongest activation, and what is continued.
    overwrite
        Whether an output directory that is in use may be replaced.
    command, more
        How to repeat the job, and how to steer a ``{feature}`` as well; for the page.
    """

    dictionary: DictionarySettings
    output: Path
    exploration: ExplorationSettings = field(default_factory=ExplorationSettings)
    explanations: Path | None = None
    explain: int = 100
    steer: Sequence[int] | None = None
    strengths: Sequence[float] = (1.0, 2.0)
    prompts: Sequence[str] = PROMPTS
    overwrite: bool = False
    command: str = ""
    more: str = ""
    say: Callable[[str], None] = print
    progress: bool = True

    def run(self) -> dict[str, Any]:
        """Do the job and return its record; the output directory appears only when all of it is done.

        Raises
        ------
        UnknownNameError
            If there is no such model, layer or text; names the nearest.
        ConfigurationError
            If k is above the width, or a feature to steer does not exist.
        ModelError, CheckpointError
            If a file is of another model or autoencoder, damaged, or of a newer version.
        OutputError
            If the output directory is in use, or a file.
        """
        if self.explain < 0:
            raise ConfigurationError(f"explain is {self.explain}; it must be 0 or more")
        if not self.strengths or not all(map(math.isfinite, self.strengths)):
            raise ConfigurationError(f"strengths are {list(self.strengths)}; give finite numbers, such as 1 and 2")
        with atomic_directory(self.output, overwrite=self.overwrite) as directory:
            ready = prepare(self.dictionary, self.progress, self.say)
            given = None if self.explanations is None else _given(self.explanations, ready)
            if self.steer is not None:
                _check_features(self.steer, ready.sae.n_features)
            self.say(str(ready.cache))
            found = explore(ready.cache, ready.sae, ready.model, ready.tokenizer, self.exploration, self.progress)
            quality = evaluate_splice(ready.model, ready.site, ready.sae, ready.held_out, progress=self.progress)
            said = self._explained(ready, found, _kept(ready)) if given is None else given
            chosen = speaking_features(found) if self.steer is None else list(self.steer)
            steered = self._steered(ready, found, chosen)
            record = self._record(ready, found, quality, said, list(steered))
            texts = token_texts(ready.tokenizer, _listed(found))
            page = FeaturesPage(record, found, ready.cache, texts, said, steered, self.strengths)
            write_features_page(page, directory / "features.html", self.progress)
            save_saelens(ready.sae, directory / "sae", {"model_name": self.dictionary.model, "hook_name": ready.site})
            kept = self.explanations or _kept(ready)
            if kept.is_file():
                shutil.copyfile(kept, directory / "explanations.jsonl")
            write_json(directory / "record.json", record)
        return record

    def _explained(self, ready: Prepared, found: Exploration, file: Path) -> dict[int, Interpretation]:
        """Explanations of features; those with too little text have none."""
        builder = ExampleBuilder(CachedActivity(ready.cache), ready.tokenizer, _EXAMPLES)
        judge = OfflineJudge()
        order = spread_features(found.statistics.counts, self.explain)
        scorers = DetectionScorer(judge), FuzzingScorer(judge)
        study = _study(ready)
        said = interpret(builder, order, TokenExplainer(), scorers, file, study, self.progress)
        return {each.latent: each for each in said}

    def _steered(self, ready: Prepared, found: Exploration, chosen: Sequence[int]) -> dict[int, list[Steered]]:
        if not chosen or not hasattr(ready.model, "generate"):
            return {}
        heights = [float(found.statistics.maximum[feature]) for feature in chosen]
        texts = steer(
            ready.model,
            ready.tokenizer,
            ready.site,
            ready.sae,
            chosen,
            heights,
            self.strengths,
            self.prompts,
            seed=self.dictionary.seed,
        )
        return dict(zip(chosen, track(texts, "steering", len(chosen), enabled=self.progress)))

    def _record(
        self,
        ready: Prepared,
        found: Exploration,
        quality: SpliceReport,
        explanations: dict[int, Interpretation],
        steered: list[int],
    ) -> dict[str, Any]:
        name, cache = short_name(self.dictionary.model), ready.cache
        rule = ready.sae.activation.settings()
        return {
            "title": f"Features of {ready.site} of {name}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": self.command,
            "more": self.more,
            "model": {"name": name, "source": self.dictionary.model, "licence": ready.licence},
            "site": ready.site,
            "tokens": len(cache),
            "quality": quality.to_dict(),
            "dictionary": {
                "features": ready.sae.n_features,
                "activation": f"{ready.sae.d_in} numbers",
                **{key: str(value) for key, value in rule.items()},
                "from": self.dictionary.sae or "trained here",
                "never active": int((found.statistics.counts == 0).sum()),
                "cache": f"{cache.nbytes:,} bytes, a {cache.dense_bytes / max(cache.nbytes, 1):.0f}th of dense ones",
            },
            "settings": {
                key: str(value) for key, value in dataclasses.asdict(self.dictionary).items() if value is not None
            },
            "explained": sum(bool(said.explanation) for said in explanations.values()),
            "explainer": _EXPLAINER if self.explanations is None else str(self.explanations),
            "steered": steered,
            "machine": describe_machine(),
        }


def _study(ready: Prepared) -> dict[str, str]:
    """What explanations depend on besides how they are made."""
    return {"encoder": ready.cache.facts.encoder, "text": ready.cache.facts.text}


def _kept(ready: Prepared) -> Path:
    """Where explanations of this dictionary are kept between runs."""
    made = hashlib.sha256(json.dumps([dataclasses.asdict(_EXAMPLES), _study(ready)]).encode()).hexdigest()[:12]
    return ready.cache.directory.with_name(f"explanations-{made}.jsonl")


def _given(file: Path, ready: Prepared) -> dict[int, Interpretation]:
    """Explanations of a file, which must be of this autoencoder if they say of which they are."""
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist; give a file of explanations, such as one that an earlier run wrote"
        )
    given = {said.latent: said for said in read_interpretations(file)}
    with file.open(encoding="utf-8") as lines:
        study = json.loads(next(lines)).get("study") or {}
    if study.get("encoder", ready.cache.facts.encoder) != ready.cache.facts.encoder:
        raise ModelError(f"{file} explains the features of another autoencoder; give explanations of this one")
    _check_features(list(given), ready.sae.n_features)
    return given


def spread_features(counts: np.ndarray, count: int, least: int = 100) -> list[int]:
    """Features from the most to the least active in even steps; those that hardly ever are cannot be judged."""
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] >= least]
    if not len(order):
        return []
    return [int(order[at]) for at in np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]


def speaking_features(found: Exploration, count: int = 8) -> list[int]:
    """Features worth steering: seldom active, and with much to say about the next token.

    Those that are active on more than a hundredth of the text are mostly punctuation and frequent words, and of those
    that are hardly ever active little is known.
    """
    if found.effects is None:
        return []
    counts = found.statistics.counts
    tokens = max(len(found.pieces), 1)
    usable = (counts >= 20) & (counts <= max(tokens / 100, 20))
    strength = np.where(usable, found.effects.rise.mean(1).numpy(), -np.inf)
    order = np.argsort(-strength, kind="stable")[:count]
    return sorted(int(feature) for feature in order if usable[feature])


def _listed(found: Exploration) -> list[int]:
    """Every token id that lists of features name."""
    ids = {token for tokens in found.tokens for token, _ in tokens}
    if found.effects is not None:
        ids |= set(found.effects.promoted.flatten().tolist()) | set(found.effects.suppressed.flatten().tolist())
    return sorted(ids)


def _check_features(features: Sequence[int], there: int) -> None:
    bad = next((feature for feature in features if not 0 <= feature < there), None)
    if bad is not None:
        raise ConfigurationError(f"feature {bad} does not exist; there are features from 0 to {there - 1}")

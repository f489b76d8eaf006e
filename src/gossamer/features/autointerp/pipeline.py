"""From latents to explanations with scores: one line of a file for each latent, going on where it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core.progress import track
from gossamer.core.rank_correlation import rank_correlation
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError, ModelError, OutputError
from gossamer.features.autointerp.examples import ExampleBuilder
from gossamer.features.autointerp.explainers import Explainer
from gossamer.features.autointerp.score import Score, mean_interval
from gossamer.features.autointerp.scorers import Scorer

VERSION = 1
_FORMAT = "gossamer interpretations"


@dataclass(frozen=True)
class Interpretation:
    """What was found out about a latent.

    Attributes
    ----------
    latent
        Its number.
    explanation
        In words; None if there is none.
    scores
        By the name of the scorer.
    skipped
        Why there is no explanation; empty if there is one.
    """

    latent: int
    explanation: str | None
    scores: Mapping[str, Score]
    skipped: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        scores = {name: score.to_dict() for name, score in self.scores.items()}
        return {"latent": self.latent, "explanation": self.explanation, "scores": scores, "skipped": self.skipped}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Interpretation:
        """What :meth:`to_dict` has written."""
        scores = {name: Score.from_dict(score) for name, score in plain["scores"].items()}
        return cls(int(plain["latent"]), plain["explanation"], scores, plain["skipped"])


def interpret(
    builder: ExampleBuilder,
    latents: Iterable[int],
    explainer: Explainer,
    scorers: Sequence[Scorer],
    path: Path | str,
    study: Mapping[str, Any] | None = None,
    progress: bool = True,
    workers: int = 1,
) -> list[Interpretation]:
    """Explain latents and score the explanations.

    Latents that have too few windows, or no explanation, are kept with the reason. What the file holds already is
    not done again; wrap language models into a :class:`~gossamer.features.autointerp.clients.ReplayClient` to keep
    every single answer as well.

    Parameters
    ----------
    builder
        Of the records.
    latents
        Their numbers.
    explainer
        Who explains.
    scorers
        Who judges; names must differ.
    path
        A file of JSON lines; is created.
    study
        Plain values that say what else the results depend on, such as the names of models. A file of another study, or
        of other examples or scorers, is refused.
    progress
        Whether to show a progress bar.
    workers
        Latents at a time. More than one is for language models behind a server; one in this process works alone.

    Returns
    -------
    list of Interpretation
        In the order of `latents`.

    Raises
    ------
    CheckpointError, OutputError
        If the file is damaged, or cannot be written.
    ModelError
        If it is of another study.
    """
    names = [scorer.name for scorer in scorers]
    about = {
        "examples": asdict(builder.settings),
        "explainer": type(explainer).__name__,
        "scorers": names,
        "study": dict(study or {}),
    }
    if workers < 1:
        raise ConfigurationError(f"workers is {workers}; it must be at least 1")
    if len(set(names)) < len(names):
        raise ConfigurationError(f"scorers are called {', '.join(names)}; give each a name of its own")
    file = Path(path)
    known = _begin(file, json.loads(json.dumps(about)))
    wanted = list(latents)
    missing = [latent for latent in dict.fromkeys(wanted) if latent not in known]

    def work(latent: int) -> Interpretation:
        return _interpreted(builder, latent, explainer, scorers)

    for done in track(_done(work, missing, workers), "interpreting latents", len(missing), enabled=progress):
        known[done.latent] = done
        _append(file, done.to_dict())
    return [known[latent] for latent in wanted]


def _done(work: Callable[[int], Interpretation], latents: Sequence[int], workers: int) -> Iterator[Interpretation]:
    """Interpretations as they are finished."""
    if workers == 1:
        yield from map(work, latents)
        return
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(work, latent) for latent in latents]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            for job in jobs:
                job.cancel()


def _interpreted(
    builder: ExampleBuilder, latent: int, explainer: Explainer, scorers: Sequence[Scorer]
) -> Interpretation:
    try:
        record = builder.build(latent)
    except CalibrationError as error:
        return Interpretation(latent, None, {}, str(error))
    explanation = explainer.explain(record)
    if not explanation:
        return Interpretation(latent, None, {}, "there was no explanation")
    return Interpretation(latent, explanation, {scorer.name: scorer.score(record, explanation) for scorer in scorers})


def read_interpretations(path: Path | str) -> list[Interpretation]:
    """What :func:`interpret` has written, by latent.

    Raises
    ------
    CheckpointError
        If there is none, or it is damaged.
    """
    found = _read(Path(path))
    if found is None:
        raise CheckpointError(f"{path} holds no interpretations; make them first")
    return sorted(found[1].values(), key=lambda interpretation: interpretation.latent)


def _begin(file: Path, about: dict[str, Any]) -> dict[int, Interpretation]:
    found = _read(file)
    if found is None:
        _append(file, {"format": _FORMAT, "version": VERSION, **about})
        return {}
    earlier, known = found
    for key, value in about.items():
        if earlier.get(key) != value:
            raise ModelError(
                f"{file} holds interpretations with other {key} ({earlier.get(key)}, not {value}); choose another file"
            )
    return known


def _read(file: Path) -> tuple[dict[str, Any], dict[int, Interpretation]] | None:
    """What a file says of itself, and its interpretations; an unfinished last line is cut off."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError(f"{file} cannot be read ({error.strerror}); choose another file") from None
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    if not whole:
        return None
    try:
        about, *lines = (json.loads(line) for line in whole.splitlines())
        if about.pop("format") != _FORMAT:
            raise ValueError("another format")
        version = about.pop("version")
        known = [Interpretation.from_dict(line) for line in lines] if version == VERSION else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} holds no interpretations, or is damaged ({error}); choose another file"
        ) from None
    if version != VERSION:
        raise CheckpointError(f"{file} is of version {version}, this gossamer reads {VERSION}; update gossamer")
    return about, {interpretation.latent: interpretation for interpretation in known}


def _append(file: Path, said: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(said, ensure_ascii=False) + "\n")
    except OSError as error:
        raise OutputError(f"{file} cannot be written ({error.strerror}); choose another file") from None


@dataclass(frozen=True)
class Summary:
    """Scores of many latents together.

    Attributes
    ----------
    means
        Mean score by each scorer.
    intervals
        Its 95% bootstrap interval over latents, where there are two or more.
    correlations
        Rank correlation of each two scorers over the latents that both have scored, three or more.
    explained, skipped
        Latents with and without explanation.
    abstained
        Share of all judgements by each scorer that were abstentions.
    """

    means: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    correlations: dict[tuple[str, str], float]
    explained: int
    skipped: int
    abstained: dict[str, float]


def summarise(interpretations: Sequence[Interpretation]) -> Summary:
    """Put the scores of many latents together."""
    explained = [found for found in interpretations if found.explanation]
    names = sorted({name for found in explained for name in found.scores})
    scores = {name: [found.scores[name] for found in explained if name in found.scores] for name in names}
    values = {name: [s.value for s in own if s.value is not None] for name, own in scores.items()}
    correlations = {}
    for place, a in enumerate(names):
        for b in names[place + 1 :]:
            both = [(f.scores[a].value, f.scores[b].value) for f in explained if a in f.scores and b in f.scores]
            both = [(x, y) for x, y in both if x is not None and y is not None]
            if len(both) > 2 and (found := _rank_correlation(*map(np.array, zip(*both)))) is not None:
                correlations[a, b] = found
    return Summary(
        {name: float(np.mean(own)) for name, own in values.items() if own},
        {name: interval for name, own in values.items() if (interval := mean_interval(own)) is not None},
        correlations,
        len(explained),
        len(interpretations) - len(explained),
        {
            n: sum(s.abstained for s in own) / max(sum(s.count + s.abstained for s in own), 1)
            for n, own in scores.items()
        },
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's; None if one does not vary."""
    return rank_correlation(a, b) if a.std() > 0 and b.std() > 0 else None

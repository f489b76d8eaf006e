"""Scores of an explanation by what it says of text: detection, fuzzing, surprisal, embedding, simulation, intruder.

None of them but simulation asks for a number at every token [Paulo et al., 2024, arXiv 2410.13928, section 3.3].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.features.autointerp import prompts
from gossamer.features.autointerp.clients import Client
from gossamer.features.autointerp.embedding import Embed
from gossamer.features.autointerp.examples import LatentRecord
from gossamer.features.autointerp.judges import Judge, OfflineJudge
from gossamer.features.autointerp.language_model import EndingReader
from gossamer.features.autointerp.score import Judged, Score, mean_interval, ranking_score
from gossamer.features.autointerp.windows import Window


class Scorer(Protocol):
    """Says how good an explanation is."""

    name: str

    def score(self, record: LatentRecord, explanation: str) -> Score:
        """Of one explanation, by the windows of the record that were kept for tests."""
        ...


class DetectionScorer:
    """Does the judge know from the explanation in which windows the latent is active?

    Parameters
    ----------
    judge
        Who decides.
    """

    name = "detection"

    def __init__(self, judge: Judge):
        self.judge = judge

    def score(self, record: LatentRecord, explanation: str) -> Score:
        """Area under the curve of active against inactive windows."""
        windows = [*record.test, *record.negatives]
        answers = self.judge.active(explanation, windows)
        return ranking_score(self.name, [Judged(w, w.active, a) for w, a in zip(windows, answers)], True)


class FuzzingScorer:
    """Does the judge know from the explanation whether the right tokens are marked?

    Right marks are those of active windows. Wrong ones are as many as there are right ones on average, rounded up: at
    random in inactive windows, or where the neighbour is active for whose sake a window was chosen; or at random among
    the silent tokens of active windows, so that only the marks tell and not what else the window is about.

    Parameters
    ----------
    judge
        Who decides.
    wrong
        In ``inactive`` or in ``active`` windows.
    threshold
        Tokens with more than this share of their window's strongest activation are rightly marked.
    seed
        Of the random marks.
    """

    name = "fuzzing"

    def __init__(
        self, judge: Judge, wrong: Literal["inactive", "active"] = "inactive", threshold: float = 0.3, seed: int = 0
    ):
        if wrong not in ("inactive", "active"):
            raise ConfigurationError(f"wrong is {wrong!r}; wrong marks are in inactive or in active windows")
        self.judge, self.wrong, self.threshold, self.seed = judge, wrong, threshold, seed

    def score(self, record: LatentRecord, explanation: str) -> Score:
        """Area under the curve of rightly against wrongly marked windows."""
        shown, marks, right = self.marked(record)
        answers = self.judge.rightly_marked(explanation, shown, marks)
        return ranking_score(self.name, [Judged(*judged) for judged in zip(shown, right, answers)], True)

    def marked(self, record: LatentRecord) -> tuple[list[Window], list[np.ndarray], list[bool]]:
        """Windows, their marks, and whether these are right."""
        draw = np.random.default_rng((self.seed, record.latent))
        right = [window.marks(self.threshold) for window in record.test]
        count = math.ceil(float(np.mean([marks.sum() for marks in right]))) if right else 0
        others = record.negatives if self.wrong == "inactive" else record.test
        wrong = [self._wrong(window, count, draw) for window in others]
        kept = [place for place, marks in enumerate(wrong) if marks.any()]
        return (
            [*record.test, *(others[place] for place in kept)],
            [*right, *(wrong[place] for place in kept)],
            [True] * len(right) + [False] * len(kept),
        )

    def _wrong(self, window: Window, count: int, draw: np.random.Generator) -> np.ndarray:
        if window.decoy is not None and (window.decoy > 0).any():
            return window.decoy >= max(self.threshold * float(window.decoy.max()), np.finfo(np.float32).tiny)
        silent = np.flatnonzero(window.values <= 0)
        marks = np.zeros(len(window), bool)
        marks[draw.permutation(silent)[:count]] = True
        return marks


class SurprisalScorer:
    """Does a language model expect a window more once it has read the explanation?

    The loss of a window behind the explanation is compared with that behind "various unrelated sentences".

    Parameters
    ----------
    model, tokenizer
        A causal language model; it need not follow instructions.
    batch
        Windows at a time.
    """

    name = "surprisal"

    def __init__(self, model: nn.Module, tokenizer: Any, batch: int = 16):
        self.tokenizer = tokenizer
        self._reader = EndingReader(model, batch)
        self._plain: dict[tuple[int, ...], float] = {}

    def score(self, record: LatentRecord, explanation: str) -> Score:
        """Area under the curve of the drop in mean loss, of active against inactive windows."""
        windows = [window for window in (*record.test, *record.negatives) if self._ids(window.text)]
        texts = [tuple(self._ids(window.text)) for window in windows]
        missing = [text for text in dict.fromkeys(texts) if text not in self._plain]
        self._plain.update(zip(missing, self._losses(prompts.UNRELATED, missing)))
        told = self._losses(explanation, texts)
        drops = [self._plain[text] - loss for text, loss in zip(texts, told)]
        judged = [Judged(window, window.active, drop) for window, drop in zip(windows, drops)]
        gain = float(np.mean([j.answer for j in judged if j.positive])) if any(j.positive for j in judged) else None
        return ranking_score(self.name, judged, False, drop_of_active=gain)

    def _losses(self, description: str, texts: Sequence[Sequence[int]]) -> list[float]:
        """Mean loss of a token of each text, in nats."""
        beginning = self._ids(prompts.SURPRISAL.format(description=prompts.one_line(description)), special=True)
        return [float(loss.mean()) for loss in self._reader.losses(beginning, texts)]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]]


class EmbeddingScorer:
    """Does a search for the explanation find active windows before inactive ones?

    Parameters
    ----------
    embed
        Texts to unit vectors.
    query
        What is put around the explanation; encoders that were trained with an instruction want theirs.
    """

    name = "embedding"

    def __init__(self, embed: Embed, query: str = "{explanation}"):
        if "{explanation}" not in query:
            raise ConfigurationError(f"query is {query!r}; it must have {{explanation}} in it")
        self.embed, self.query = embed, query
        self._vectors: dict[str, np.ndarray] = {}

    def score(self, record: LatentRecord, explanation: str) -> Score:
        """Area under the curve of cosines, of active against inactive windows."""
        windows = [*record.test, *record.negatives]
        missing = [text for text in dict.fromkeys(window.text for window in windows) if text not in self._vectors]
        if missing:
            self._vectors.update(zip(missing, self.embed(missing)))
        wanted = self.embed([self.query.format(explanation=explanation)])[0]
        closeness = [float(self._vectors[window.text] @ wanted) for window in windows]
        return ranking_score(self.name, [Judged(w, w.active, c) for w, c in zip(windows, closeness)], False)


class SimulationScorer:
    """Does the judge know from the explanation how active the latent is at every token?

    The measure that the others are cheaper than [Bills et al., 2023].

    Parameters
    ----------
    judge
        Who decides.
    """

    name = "simulation"

    def __init__(self, judge: Judge):
        self.judge = judge

    def score(self, record: LatentRecord, explanation: str) -> Score:
        """Pearson correlation of expected with true activations over all tokens."""
        windows = [*record.test, *record.negatives]
        expected = self.judge.strengths(explanation, windows)
        pairs = [(window, found) for window, found in zip(windows, expected) if found is not None]
        quantiles = sorted({window.quantile for window, _ in pairs} - {0})
        silent = [pair for pair in pairs if not pair[0].active]
        parts = {q: correlation([*(p for p in pairs if p[0].quantile == q), *silent]) for q in quantiles}
        low, high = _correlation_interval(pairs) or (None, None)
        return Score(
            self.name,
            "correlation",
            correlation(pairs),
            low,
            high,
            per_quantile={quantile: found for quantile, found in parts.items() if found is not None},
            count=len(pairs),
            abstained=len(windows) - len(pairs),
        )


def correlation(pairs: Sequence[tuple[Window, np.ndarray]]) -> float | None:
    """Pearson correlation of activations and expectations over all tokens; 0 if the expectations do not vary."""
    true = np.concatenate([window.values for window, _ in pairs]).astype(np.float64) if pairs else np.zeros(0)
    if not len(true) or true.std() == 0:
        return None
    expected = np.concatenate([np.asarray(found, np.float64) for _, found in pairs])
    return float(np.corrcoef(true, expected)[0, 1]) if expected.std() > 0 else 0.0


def _correlation_interval(
    pairs: Sequence[tuple[Window, np.ndarray]], resamples: int = 200
) -> tuple[float, float] | None:
    """95% interval from drawing whole windows, since tokens of a window are not independent."""
    if len(pairs) < 2:
        return None
    draw = np.random.default_rng(0)
    drawn = (correlation([pairs[i] for i in draw.integers(len(pairs), size=len(pairs))]) for _ in range(resamples))
    found = [value for value in drawn if value is not None]
    return (float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))) if len(found) > 1 else None


class IntruderScorer:
    """Does the client see, without any explanation, which window does not belong? A measure of the latent itself.

    Parameters
    ----------
    client
        Who is asked.
    shown
        Windows in one question, one of which is the intruder.
    threshold
        Tokens with more than this share of their window's strongest activation are marked.
    seed
        Of the places of the intruders.
    """

    name = "intruder"

    def __init__(self, client: Client, shown: int = 5, threshold: float = 0.3, seed: int = 0):
        if not 3 <= shown <= 9:
            raise ConfigurationError(f"shown is {shown}; it must be from 3 to 9")
        self.client, self.shown, self.threshold, self.seed = client, shown, threshold, seed

    def score(self, record: LatentRecord, explanation: str = "") -> Score:
        """Share of the intruders that were found; guessing finds one in `shown`."""
        draw = np.random.default_rng((self.seed, record.latent, 3))
        marked = FuzzingScorer(OfflineJudge(), threshold=self.threshold, seed=self.seed).marked(record)
        texts = [(window, window.highlighted(marks), right) for window, marks, right in zip(*marked)]
        belonging = [(window.quantile, text) for window, text, right in texts if right]
        intruders = [text for _, text, right in texts if not right]
        questions, places = [], []
        quantiles = sorted({quantile for quantile, _ in belonging})
        for number, text in enumerate(intruders):
            # windows of one strength, so that strength does not give the intruder away
            same = [t for q, t in belonging if q == quantiles[number % len(quantiles)]]
            rest = [t for q, t in belonging if q != quantiles[number % len(quantiles)]]
            pool = [same[i] for i in draw.permutation(len(same))] + [rest[i] for i in draw.permutation(len(rest))]
            place = int(draw.integers(self.shown))
            chosen = pool[: self.shown - 1]
            questions.append(prompts.intruder([*chosen[:place], text, *chosen[place:]]))
            places.append(place)
        answers = self.client.choose(questions, [str(number + 1) for number in range(self.shown)])
        right = [float(np.argmax(answer) == place) for answer, place in zip(answers, places) if answer is not None]
        low, high = mean_interval(right) or (None, None)
        value = float(np.mean(right)) if right else None
        facts = {"by_guessing": 1 / self.shown}
        return Score(
            self.name, "accuracy", value, low, high, count=len(right), abstained=len(answers) - len(right), facts=facts
        )

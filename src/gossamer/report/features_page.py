"""The features of a dictionary on one page that is searched, not scrolled.

A page of 16,000 features holds megabytes of contexts, and a reader looks at a few dozen. So what the list needs is one
compressed block, and everything else of the features lies in compressed blocks of 64 which the page unpacks when one of
them is opened. It is a single file without network, fonts or libraries, as :mod:`gossamer.report.page` is.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError
from gossamer.features.autointerp.pipeline import Interpretation
from gossamer.features.exploration import Exploration
from gossamer.features.latent_cache import Context, LatentCache
from gossamer.features.steering import Steered
from gossamer.report.page import environment
from gossamer.storage.atomic import write_text

VERSION = 1
BLOCK = 64
_LEVELS = 255  # of highlighting; the strongest activation is the last
REQUIRED = ("title", "model", "site", "quality", "tokens")


@dataclass(frozen=True, eq=False)
class FeaturesPage:
    """What a page shows.

    Attributes
    ----------
    record
        Plain values about the run: ``title``, ``model`` (a mapping with ``name``), ``site``, ``tokens``, ``quality``
        (what :meth:`SpliceReport.to_dict <gossamer.features.splicing.SpliceReport.to_dict>` gives), and optionally
        ``date``, ``command``, ``more`` (a command with ``{feature}`` that adds steering of a feature), ``explainer``,
        ``dictionary`` and ``settings``.
    exploration
        All features.
    cache
        Where they are active: its text is the page's text.
    token_texts
        Token id → how it reads, of all tokens in lists of the exploration.
    explanations
        Feature → what it is said to be, and how well that does.
    steered, strengths
        Feature → texts with and without it; and by how much it was raised, in units of its strongest activation.
    """

    record: Mapping[str, Any]
    exploration: Exploration
    cache: LatentCache
    token_texts: Mapping[int, str]
    explanations: Mapping[int, Interpretation] = field(default_factory=dict)
    steered: Mapping[int, Sequence[Steered]] = field(default_factory=dict)
    strengths: Sequence[float] = ()

    def __post_init__(self) -> None:
        missing = [key for key in REQUIRED if key not in self.record]
        if missing:
            raise ConfigurationError(f"the record lacks {', '.join(missing)}; a page needs {', '.join(REQUIRED)}")
        features = len(self.exploration.statistics.counts)
        for name, given in (("explanations", self.explanations), ("steered", self.steered)):
            bad = next((feature for feature in given if not 0 <= feature < features), None)
            if bad is not None:
                raise ConfigurationError(f"{name} name feature {bad}; there are features from 0 to {features - 1}")


def write_features_page(page: FeaturesPage, path: str | os.PathLike[str], progress: bool = True) -> Path:
    """Put the page at `path`, complete or not at all.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    write_text(path, render_features_page(page, progress))
    return Path(path)


def render_features_page(page: FeaturesPage, progress: bool = True) -> str:
    """The page as text; the same values always give the same text."""
    words = _Words()
    text = _Text(page)
    blocks = [
        packed(block)
        for block in track(_blocks(page, words, text), "packing features", _block_count(page), enabled=progress)
    ]
    data = {
        "index": packed(_index(page, words)),
        "explanations": packed(_explanations(page)),
        "steering": packed(_steering(page)),
        "text": packed(text.to_dict(words)),
    }
    data["words"] = packed(words.known)  # last, when all are known
    statistics = page.exploration.statistics
    facts = {
        "version": VERSION,
        "features": len(statistics.counts),
        "block": BLOCK,
        "levels": _LEVELS,
        "tokens": len(page.cache),
        "more": page.record.get("more", ""),
        "explainer": page.record.get("explainer", ""),
        "strengths": list(page.strengths),
    }
    return (
        environment()
        .get_template("features_page.html.jinja")
        .render(
            record=page.record,
            facts=json.dumps(facts).replace("<", "\\u003c"),
            data=data,
            blocks=blocks,
            features=len(statistics.counts),
            dead=int((statistics.counts == 0).sum()),
            explained=len(_explained(page)),
            steered=len(page.steered),
            logits=page.exploration.effects is not None,
        )
    )


def packed(value: Any) -> str:
    """A JSON value, compressed and written in base64: what the page's ``unpack`` reads."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode("utf-8", "replace"), 9)).decode()


class _Words:
    """Numbers the distinct strings of a page."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self._numbers: dict[str, int] = {}

    def __getitem__(self, word: str) -> int:
        number = self._numbers.setdefault(word, len(self.known))
        if number == len(self.known):
            self.known.append(word)
        return number


class _Text:
    """Those stretches of the text that any context shows, one after the other."""

    def __init__(self, page: FeaturesPage):
        self._pieces = page.exploration.pieces
        self._offsets = page.cache.offsets
        shown = np.zeros(len(self._pieces) + 1, np.int64)
        for contexts in (*page.exploration.strongest, *page.exploration.weaker):
            for context in contexts:
                first = self._first(context)
                shown[first] += 1
                shown[first + len(context.tokens)] -= 1
        self._shown = np.cumsum(shown[:-1]) > 0
        self._place = np.cumsum(self._shown) - 1

    def _first(self, context: Context) -> int:
        return int(self._offsets[context.document]) + context.begin

    def place(self, context: Context) -> int:
        """Where a context begins."""
        return int(self._place[self._first(context)])

    def to_dict(self, words: _Words) -> list[int]:
        return [words[self._pieces[at]] for at in np.flatnonzero(self._shown)]


def _block_count(page: FeaturesPage) -> int:
    return -(-len(page.exploration.statistics.counts) // BLOCK)


def _blocks(page: FeaturesPage, words: _Words, text: _Text) -> Iterator[list[dict[str, Any]]]:
    features = len(page.exploration.statistics.counts)
    for first in range(0, features, BLOCK):
        yield [_feature(page, feature, words, text) for feature in range(first, min(first + BLOCK, features))]


def _feature(page: FeaturesPage, feature: int, words: _Words, text: _Text) -> dict[str, Any]:
    found, read = page.exploration, page.token_texts
    most = float(found.statistics.maximum[feature])
    said: dict[str, Any] = {
        "histogram": found.statistics.histogram[feature].tolist(),
        "mean": _short(float(found.statistics.mean[feature])),
        "strongest": [_context(context, most, text) for context in found.strongest[feature]],
        "weaker": [_context(context, most, text) for context in found.weaker[feature]],
    }
    if found.effects is not None:
        for name, ids, by in (
            ("promoted", found.effects.promoted, found.effects.rise),
            ("suppressed", found.effects.suppressed, found.effects.fall),
        ):
            said[name] = [[words[read[token]], _short(value)] for token, value in _pairs(ids[feature], by[feature])]
    for name, near in (("direction", found.by_direction), ("together", found.by_coactivation)):
        if near is not None:
            said[name] = [[other, _short(value)] for other, value in _pairs(near[0][feature], near[1][feature])]
    return said


def _pairs(numbers: Tensor, values: Tensor) -> list[tuple[int, float]]:
    return list(zip(numbers.tolist(), values.tolist()))


def _context(context: Context, most: float, text: _Text) -> list[Any]:
    """Place in the text, length, centre, document, position, and each active token with its level."""
    places = (context.values > 0).nonzero()[0]
    # so that rounding does not lift a level above its own
    levels = np.minimum(np.ceil(context.values[places] * (_LEVELS / (most or 1)) - 1e-3), _LEVELS)
    active = np.stack([places, levels], 1).astype(int).ravel().tolist()
    position = context.begin + context.centre
    return [text.place(context), len(context.tokens), context.centre, context.document, position, active]


def _index(page: FeaturesPage, words: _Words) -> dict[str, Any]:
    """What the list shows and what is searched: a column for each thing."""
    statistics, read = page.exploration.statistics, page.token_texts
    return {
        "count": statistics.counts.tolist(),
        "maximum": [_short(value) for value in statistics.maximum.tolist()],
        "tokens": [
            [number for token, share in tokens for number in (words[read[token]], round(100 * share))]
            for tokens in page.exploration.tokens
        ],
        "explained": {str(feature): said.explanation for feature, said in _explained(page)},
        "score": {str(feature): mean for feature, said in _explained(page) if (mean := _mean_area(said)) is not None},
        "steered": sorted(page.steered),
    }


def _explained(page: FeaturesPage) -> list[tuple[int, Interpretation]]:
    return sorted((feature, said) for feature, said in page.explanations.items() if said.explanation)


def _mean_area(said: Interpretation) -> float | None:
    """Mean of the areas under curves, by which explanations are ordered."""
    areas = [score.value for score in said.scores.values() if score.metric == "auc" and score.value is not None]
    return _short(sum(areas) / len(areas)) if areas else None


def _explanations(page: FeaturesPage) -> dict[str, Any]:
    """What is said, and the scores as far as the page shows them."""
    return {
        str(feature): {
            "text": said.explanation,
            "scores": [
                {key: getattr(score, key) for key in ("scorer", "metric", "value", "low", "high", "count", "abstained")}
                for score in said.scores.values()
            ],
        }
        for feature, said in _explained(page)
    }


def _steering(page: FeaturesPage) -> dict[str, Any]:
    return {
        str(feature): [[each.prompt, each.plain, *each.steered] for each in texts]
        for feature, texts in sorted(page.steered.items())
    }


def _short(value: float) -> float:
    """Four digits, which is more than a page shows."""
    return float(f"{value:.4g}")

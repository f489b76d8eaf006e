"""Windows to explain a latent by, and others to test the explanation on.

The two come from different documents, so that an explanation is never tested on text that its author has seen. The
windows it is tested on come from all strengths of activation: a judge who sees only the strongest overrates
explanations that are too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.autointerp.activity import Activity, Firings
from gossamer.features.autointerp.embedding import Embed
from gossamer.features.autointerp.neighbours import Neighbours, neighbours_by_coactivation
from gossamer.features.autointerp.windows import Kind, Window, token_pieces

Sampler = Literal["quantiles", "top", "random", "mix"]
_LEAD = 0.75  # of a window lies before its strongest token: a causal model has not read what follows
_TOP_SHARE = 0.2  # of a mixture
_POOL = 2000  # inactive windows among which similar ones are looked for


@dataclass(frozen=True, eq=False)
class LatentRecord:
    """All that is needed to explain one latent and to judge the explanation.

    Attributes
    ----------
    latent
        Its number.
    train, contrast
        Active and inactive windows for whoever explains.
    test, negatives
        Active and inactive windows for whoever judges, from other documents.
    maximum
        The strongest activation in the corpus.
    frequency
        Share of the corpus' tokens at which the latent is active.
    windows
        Active windows that were found.
    """

    latent: int
    train: list[Window]
    contrast: list[Window]
    test: list[Window]
    negatives: list[Window]
    maximum: float
    frequency: float
    windows: int

    def __post_init__(self) -> None:
        seen = {window.document for window in (*self.train, *self.contrast)}
        both = seen & {window.document for window in (*self.test, *self.negatives)}
        if both:
            raise ConfigurationError(
                f"latent {self.latent}: document {min(both)} is used to explain and to test; split the documents first"
            )


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """How windows are chosen [arXiv 2410.13928, section 3 and released defaults].

    Parameters
    ----------
    length
        Tokens of a window.
    n_train, n_test
        Active windows to explain by and to test on.
    quantiles
        Parts of equal size, by strength, from which equally many windows are drawn.
    train_sampler
        ``quantiles``, the strongest (``top``), ``random``, or a ``mix`` of one fifth strongest and quantiles.
    test_sampler
        The same for the windows to test on; anything but ``quantiles`` is for studies of sampling.
    negatives
        Where inactive windows come from, in equal parts: ``random``, ``neighbour``, ``similar``.
    n_negatives, n_contrast
        Inactive windows to test on, and to show to whoever explains.
    least
        Active windows without which a latent is not explained.
    most
        Active windows that are looked at, the strongest first.
    seed
        Of the split and of all draws.
    """

    length: int = 32
    n_train: int = 40
    n_test: int = 50
    quantiles: int = 10
    train_sampler: Sampler = "quantiles"
    test_sampler: Sampler = "quantiles"
    negatives: Sequence[Kind] = ("random",)
    n_negatives: int = 50
    n_contrast: int = 20
    least: int = 200
    most: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "n_train", "n_test", "quantiles", "n_negatives", "least", "most"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 1")
        unknown = [kind for kind in self.negatives if kind not in ("random", "neighbour", "similar")]
        if unknown or not self.negatives:
            raise ConfigurationError(
                f"negatives are {list(self.negatives)}; name one or more of random, neighbour and similar"
            )


@dataclass(frozen=True, eq=False)
class ExampleBuilder:
    """Makes the record of any latent of a corpus.

    Parameters
    ----------
    activity
        The corpus and where its latents are active.
    tokenizer
        Of the model, to write tokens as text.
    settings
        See :class:`ExampleSettings`.
    neighbours
        Latents whose windows are hard negatives of each latent, as :func:`neighbours_by_direction` finds them.
        Default: by coactivation.
    embed
        Texts to unit vectors; needed for ``similar`` negatives.
    """

    activity: Activity
    tokenizer: Any
    settings: ExampleSettings = field(default_factory=ExampleSettings)
    neighbours: dict[int, Neighbours] = field(default_factory=dict)
    embed: Embed | None = None

    def __post_init__(self) -> None:
        if len(self.activity.lengths) < 2:
            raise CalibrationError("there is one document; cut the text into several, to explain and to test apart")
        if "similar" in self.settings.negatives and self.embed is None:
            raise ConfigurationError("similar negatives need an encoder of texts; give embed, or choose others")

    @cached_property
    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents to explain by and to test on: half each, the same for all latents."""
        order = np.random.default_rng((self.settings.seed, 1)).permutation(len(self.activity.lengths))
        half = len(order) // 2
        return np.sort(order[:half]), np.sort(order[half:])

    def build(self, latent: int) -> LatentRecord:
        """The record of a latent.

        Raises
        ------
        CalibrationError
            If it has too few windows.
        UnknownNameError
            If there is no such latent.
        """
        wanted = self.settings
        firings = self.activity.firings(latent)
        spans = [_spans(firings.inside(part), self.activity.lengths, wanted.length, wanted.most) for part in self.split]
        found, fewest = sum(map(len, spans)), min(map(len, spans))
        if found < wanted.least or not fewest:
            raise CalibrationError(
                f"latent {latent} is active in {found} windows, {fewest} of them in one half of the documents; "
                f"{wanted.least} are needed, and some in each half: encode more text, ask for fewer with `least`, or "
                "leave it out"
            )
        draw = np.random.default_rng((wanted.seed, latent, 2))
        train = self._sampled(firings, spans[0], wanted.n_train, wanted.train_sampler, draw)
        test = self._sampled(firings, spans[1], wanted.n_test, wanted.test_sampler, draw)
        return LatentRecord(
            latent,
            train,
            self._random(firings, self.split[0], wanted.n_contrast, draw),
            test,
            self._negatives(latent, firings, test, draw),
            float(firings.values.max()),
            len(firings) / max(self.activity.rows, 1),
            found,
        )

    def _window(self, firings: Firings, document: int, start: int, **facts: Any) -> Window:
        tokens = self.activity.tokens(document, start, self.settings.length)
        values = firings.window(document, start, len(tokens))
        return Window(tokens, token_pieces(self.tokenizer, tokens), values, document, start, **facts)

    def _sampled(
        self, firings: Firings, spans: list[tuple[int, int]], count: int, sampler: Sampler, draw: np.random.Generator
    ) -> list[Window]:
        """Active windows; `spans` are those there are, the strongest first."""
        quantile = _quantiles(len(spans), self.settings.quantiles)
        chosen = _chosen(quantile, count, sampler, draw)
        return [self._window(firings, *spans[place], quantile=int(quantile[place])) for place in chosen]

    def _negatives(self, latent: int, firings: Firings, test: list[Window], draw: np.random.Generator) -> list[Window]:
        kinds, windows = self.settings.negatives, []
        for place, kind in enumerate(kinds):
            count = len(range(place, self.settings.n_negatives, len(kinds)))
            if kind == "random":
                windows += self._random(firings, self.split[1], count, draw)
            elif kind == "neighbour":
                windows += self._of_neighbours(latent, firings, count, draw)
            else:
                windows += self._similar(firings, test, count, draw)
        if not windows:
            raise CalibrationError(f"latent {latent} has no inactive windows to test on; leave it out")
        return windows

    def _random(self, firings: Firings, part: np.ndarray, count: int, draw: np.random.Generator) -> list[Window]:
        """Windows in which the latent is silent."""
        free = self._silent(firings, part)
        chosen = draw.permutation(len(free))[:count]
        return [self._window(firings, *free[place], kind="random") for place in chosen]

    def _silent(self, firings: Firings, part: np.ndarray) -> list[tuple[int, int]]:
        length = self.settings.length
        used = set(zip(firings.documents.tolist(), (firings.positions // length).tolist()))
        whole = (
            (document, number)
            for document in part.tolist()
            for number in range(self.activity.lengths[document] // length)
        )
        return [(document, number * length) for document, number in whole if (document, number) not in used]

    def _of_neighbours(self, latent: int, firings: Firings, count: int, draw: np.random.Generator) -> list[Window]:
        """Windows around activations of neighbours in which the latent itself is silent, from each in turn."""
        near = self.neighbours.get(latent) or neighbours_by_coactivation(self.activity, latent)
        offers = []
        for number, closeness in near:
            theirs = self.activity.firings(number)
            spans = _spans(
                theirs.inside(self.split[1]), self.activity.lengths, self.settings.length, self.settings.most
            )
            silent = [s for s in spans if not firings.window(*s, self.settings.length).any()]
            offers.append((theirs, closeness, [silent[i] for i in draw.permutation(len(silent))[:count]]))
        found: list[Window] = []
        taken: set[tuple[int, int]] = set()
        while len(found) < count and any(spans for *_, spans in offers):
            for theirs, closeness, spans in offers:
                if spans and len(found) < count and (span := spans.pop()) not in taken:
                    taken.add(span)
                    window = self._window(firings, *span, kind="neighbour", distance=closeness)
                    found.append(replace(window, decoy=theirs.window(*span, len(window))))
        return found

    def _similar(self, firings: Firings, test: list[Window], count: int, draw: np.random.Generator) -> list[Window]:
        """Silent windows whose text is nearest to that of active ones, from each of these in turn."""
        assert self.embed is not None
        pool = self._random(firings, self.split[1], _POOL, draw)
        if not pool:
            return []
        closeness = self._embedded(test) @ self._embedded(pool).T
        order = np.argsort(-closeness, axis=1)
        found: dict[int, float] = {}
        for rank in range(len(pool)):
            for row in range(len(test)):
                place = int(order[row, rank])
                if len(found) < count and place not in found:
                    found[place] = float(closeness[row, place])
            if len(found) >= count:
                break
        return [replace(pool[place], kind="similar", distance=near) for place, near in found.items()]

    def _embedded(self, windows: list[Window]) -> np.ndarray:
        """Unit vectors of windows; each is computed once, since pools of different latents are much the same."""
        assert self.embed is not None
        known = self._vectors
        missing = [
            w for w in {(w.document, w.start): w for w in windows}.values() if (w.document, w.start) not in known
        ]
        if missing:
            for window, vector in zip(missing, self.embed([w.text for w in missing])):
                known[window.document, window.start] = np.asarray(vector)
        return np.stack([known[w.document, w.start] for w in windows])

    @cached_property
    def _vectors(self) -> dict[tuple[int, int], np.ndarray]:
        return {}


def _spans(firings: Firings, lengths: np.ndarray, length: int, most: int) -> list[tuple[int, int]]:
    """Documents and starts of windows around activations, the strongest first; no two overlap."""
    spans: list[tuple[int, int]] = []
    taken: dict[int, list[int]] = {}
    for place in np.argsort(-firings.values, kind="stable").tolist():
        document, position = int(firings.documents[place]), int(firings.positions[place])
        start = max(0, min(position - int(_LEAD * length), int(lengths[document]) - length))
        starts = taken.setdefault(document, [])
        if all(abs(start - other) >= length for other in starts):
            starts.append(start)
            spans.append((document, start))
            if len(spans) == most:
                break
    return spans


def _quantiles(count: int, quantiles: int) -> np.ndarray:
    """Quantile of each of so many windows in descending order of strength; 1 is weakest."""
    return quantiles - np.arange(count) * quantiles // max(count, 1)


def _chosen(quantile: np.ndarray, count: int, sampler: Sampler, draw: np.random.Generator) -> np.ndarray:
    """Places of the windows to take, ascending."""
    count = min(count, len(quantile))
    if sampler == "top":
        return np.arange(count)
    if sampler == "random":
        return np.sort(draw.permutation(len(quantile))[:count])
    if sampler not in ("quantiles", "mix"):
        raise ConfigurationError(f"sampler is {sampler!r}; it must be quantiles, top, random or mix")
    top = int(_TOP_SHARE * count) if sampler == "mix" else 0
    rest = np.arange(top, len(quantile))
    # one window of every quantile in turn, so that a quantile which runs out is made up for by the others
    shuffled = rest[draw.permutation(len(rest))]
    turn = np.zeros(len(shuffled), np.int64)
    for number in np.unique(quantile):
        own = quantile[shuffled] == number
        turn[own] = np.arange(own.sum())
    order = shuffled[np.argsort(turn, kind="stable")]
    return np.sort(np.r_[np.arange(top), _even(order, quantile, count - top)])


def _even(order: np.ndarray, quantile: np.ndarray, count: int) -> np.ndarray:
    """The first `count`, of which the last incomplete turn is spread over the quantiles."""
    kinds = len(np.unique(quantile[order])) if len(order) else 1
    full = count // kinds * kinds
    last = order[full : full + kinds]
    spread = last[np.argsort(quantile[last], kind="stable")]
    step = np.linspace(0, max(len(spread) - 1, 0), count - full).round().astype(int)
    return np.r_[order[:full], spread[step]] if len(spread) else order[:count]

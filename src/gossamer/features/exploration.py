"""Everything that one wants to see of every feature of a dictionary, computed in one go.

Where it fires, on which tokens, how strongly; what it does to the logits; which other features are near it. Texts in
which a feature is strongest flatter it, so others from the rest of its range are taken beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError
from gossamer.features.autointerp.windows import token_pieces
from gossamer.features.feature_neighbours import Nearest, nearest_by_coactivation, nearest_by_direction
from gossamer.features.latent_cache import Context, FeatureStatistics, LatentCache, Occurrences
from gossamer.features.logit_effects import LogitEffects, logit_effects
from gossamer.features.sae import SAE

_UNFINISHED = "�"


@dataclass(frozen=True, kw_only=True)
class ExplorationSettings:
    """How much is shown of every feature.

    Parameters
    ----------
    contexts, weaker
        Texts in which it is strongest, and texts from the rest of its range.
    before, after
        Tokens on either side of the occurrence.
    bins
        Of the histogram of its activations.
    tokens
        On which it is most active, by their share of all of its activation.
    logits
        Tokens that it promotes most, and that it suppresses most.
    neighbours
        Of each kind.
    seed
        Of the choice of weaker texts.
    """

    contexts: int = 8
    weaker: int = 4
    before: int = 20
    after: int = 8
    bins: int = 24
    tokens: int = 6
    logits: int = 10
    neighbours: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("contexts", "bins", "tokens", "logits", "neighbours"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if min(self.weaker, self.before, self.after) < 0:
            raise ConfigurationError(
                f"weaker is {self.weaker}, before {self.before}, after {self.after}; all must be 0 or more"
            )


@dataclass(frozen=True, eq=False)
class Exploration:
    """What is known of all features; what is listed for each is in the order of their numbers.

    Attributes
    ----------
    statistics
        Counts, extremes, histograms.
    tokens
        Ids on which a feature is most active, and their share of its activation.
    strongest, weaker
        Texts in which a feature is strongest, and texts from the rest of its range, the stronger first.
    effects
        What its direction does to the logits at its strongest; None where the site does not write to the stream.
    by_direction, by_coactivation
        Its nearest other features; None if there are too few.
    pieces
        What every token of the text adds to it, document after document.
    """

    statistics: FeatureStatistics
    tokens: list[list[tuple[int, float]]]
    strongest: list[list[Context]]
    weaker: list[list[Context]]
    effects: LogitEffects | None
    by_direction: Nearest | None
    by_coactivation: Nearest | None
    pieces: list[str]


def explore(
    cache: LatentCache,
    sae: SAE,
    model: nn.Module,
    tokenizer: Any,
    settings: ExplorationSettings | None = None,
    progress: bool = True,
) -> Exploration:
    """Look at all features of an autoencoder.

    Parameters
    ----------
    cache
        Where they are active.
    sae
        The autoencoder.
    model, tokenizer
        What the cache was made with.
    settings
        How much is shown.
    progress
        Whether to show progress bars.

    Raises
    ------
    ConfigurationError
        If cache and autoencoder have different numbers of features.
    """
    wanted = settings or ExplorationSettings()
    if cache.width != sae.n_features:
        raise ConfigurationError(f"the cache has {cache.width} features and the autoencoder {sae.n_features}")
    statistics = cache.statistics(wanted.bins)
    tokens, strongest, weaker = [], [], []
    draw = np.random.default_rng(wanted.seed)
    for feature in track(range(cache.width), "contexts of features", enabled=progress):
        found = cache.occurrences(feature)
        tokens.append(_tokens(cache, found, wanted.tokens))
        strongest.append(cache.top(feature, wanted.contexts, wanted.before, wanted.after))
        weaker.append(_weaker(cache, found, strongest[-1], wanted, draw))
    directions = (sae.decoder / sae.scale).detach()
    count = min(wanted.neighbours, sae.n_features - 1)
    near = (
        (
            nearest_by_direction(directions, count, progress=progress),
            nearest_by_coactivation(cache, count, progress=progress),
        )
        if count
        else (None, None)
    )
    effects = _effects(model, directions, statistics, cache, wanted.logits, progress)
    return Exploration(statistics, tokens, strongest, weaker, effects, *near, document_pieces(cache, tokenizer))


def _effects(
    model: nn.Module, directions: Tensor, statistics: FeatureStatistics, cache: LatentCache, count: int, progress: bool
) -> LogitEffects | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is None or weight.shape[1] != directions.shape[1]:
        return None
    text = cache.document(int(np.argmax(np.diff(cache.offsets))))[None]
    # a feature that never fired is shown at an activation of one
    heights = torch.from_numpy(np.where(statistics.maximum > 0, statistics.maximum, 1))
    scaled = directions * heights.to(directions)[:, None]
    return logit_effects(model, scaled, text, min(count, len(weight)), progress=progress)


def _tokens(cache: LatentCache, found: Occurrences, count: int) -> list[tuple[int, float]]:
    """Token ids by their share of a feature's activation, the largest first."""
    positive = np.maximum(found.values, 0)
    total = float(positive.sum())
    if not total:
        return []
    ids, inverse = np.unique(cache.tokens[cache.token_places(found.rows)], return_inverse=True)
    mass = np.bincount(inverse, weights=positive)
    best = np.argsort(-mass, kind="stable")[:count]
    return [(int(ids[at]), float(mass[at]) / total) for at in best]


def _weaker(
    cache: LatentCache,
    found: Occurrences,
    strongest: Sequence[Context],
    wanted: ExplorationSettings,
    draw: np.random.Generator,
) -> list[Context]:
    """One text from each of equally large parts of a feature's range, the strongest texts left out."""
    shown = {(context.document, context.begin + context.centre) for context in strongest}
    order = np.argsort(-found.values, kind="stable")
    chosen: list[Context] = []
    for part in np.array_split(order, wanted.weaker) if wanted.weaker else ():
        for at in draw.permutation(part)[:4]:
            context = cache.context(int(found.rows[at]), found, wanted.before, wanted.after)
            if (place := (context.document, context.begin + context.centre)) not in shown:
                shown.add(place)
                chosen.append(context)
                break
    return chosen


def token_texts(tokenizer: Any, ids: Sequence[int]) -> dict[int, str]:
    """How tokens read in the middle of a text, with the space in front where they have one."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    read = tokenizer.batch_decode(
        [[*anchor, int(token)] for token in ids], clean_up_tokenization_spaces=False, skip_special_tokens=False
    )
    return {int(token): text[len(before) :] for token, text in zip(ids, read)}


def document_pieces(cache: LatentCache, tokenizer: Any) -> list[str]:
    """What every token of a cache adds to the text; characters that are spread over tokens belong to their last."""
    ids = np.asarray(cache.tokens)
    texts = token_texts(tokenizer, np.unique(ids).tolist())
    pieces = [texts[int(token)] for token in ids]
    partial = np.array([_UNFINISHED in piece for piece in pieces])
    ends = set(cache.offsets.tolist())
    first = None
    for at in range(len(pieces) + 1):
        inside = at < len(pieces) and partial[at]
        if first is not None and (not inside or at in ends):
            pieces[first:at] = token_pieces(tokenizer, ids[first:at])
            first = None
        if inside and first is None:
            first = at
    return pieces

"""Which latents of two autoencoders say the same: by their explanations, or by the tokens they are active on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError, MissingDependencyError
from gossamer.features.autointerp.embedding import Embed


@dataclass(frozen=True, eq=False)
class Matching:
    """Latents of two autoencoders, one to one.

    Attributes
    ----------
    first, second
        Their numbers, ``(pairs,)`` int64.
    similarity
        Of each pair, ``(pairs,)``.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray

    @property
    def mean(self) -> float:
        """Mean similarity of the pairs."""
        return float(self.similarity.mean())


def match(similarity: np.ndarray) -> Matching:
    """The one-to-one assignment of the highest total similarity, by the Hungarian method.

    Parameters
    ----------
    similarity
        Of the latents of two autoencoders, ``(first, second)``.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependencyError("scipy", "graphs", "matching the latents of two autoencoders") from None
    if similarity.ndim != 2 or not similarity.size or not np.isfinite(similarity).all():
        raise ConfigurationError(
            f"similarity has shape {similarity.shape}; give a matrix (first, second) of finite numbers"
        )
    first, second = linear_sum_assignment(similarity, maximize=True)
    return Matching(first, second, similarity[first, second])


def explanation_similarity(embed: Embed, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """Cosines between the explanations of two autoencoders, ``(first, second)``."""
    found: np.ndarray = np.asarray(embed(list(first))) @ np.asarray(embed(list(second))).T
    return found


def coactivation_similarity(first: SparseCodes, second: SparseCodes) -> np.ndarray:
    """Jaccard indices |A ∩ B| / |A ∪ B| of the tokens that latents of two autoencoders are active on.

    Parameters
    ----------
    first, second
        Codes of the same tokens.
    """
    if len(first) != len(second):
        raise ConfigurationError(f"codes are of {len(first)} and {len(second)} tokens; give codes of the same")
    ones = [SparseCodes(c.indices, torch.ones(len(c.indices)), c.starts, c.width) for c in (first, second)]
    both = torch.sparse.mm(ones[0].transposed().to_csr(), ones[1].to_csr()).to_dense().double().numpy()
    either = first.activity().double().numpy()[:, None] + second.activity().double().numpy()[None] - both
    found: np.ndarray = np.divide(both, either, out=np.zeros_like(both), where=either > 0)
    return found


def similarity_by_distance(explanations: Mapping[int, Sequence[str]], embed: Embed) -> dict[int, float]:
    """Mean similarity of matched latents of autoencoders at different layers, by the distance between the layers.

    Parameters
    ----------
    explanations
        Of the latents of an autoencoder at each layer.
    embed
        Texts to unit vectors.
    """
    vectors = {layer: np.asarray(embed(list(texts))) for layer, texts in explanations.items()}
    found: dict[int, list[float]] = {}
    for a in vectors:
        for b in vectors:
            if a < b:
                found.setdefault(b - a, []).append(match(vectors[a] @ vectors[b].T).mean)
    return {distance: float(np.mean(values)) for distance, values in sorted(found.items())}

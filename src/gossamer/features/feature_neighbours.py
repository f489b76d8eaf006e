"""For all features of a dictionary at once: which others point the same way, and which fire on the same tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gossamer.core.progress import track
from gossamer.errors import ConfigurationError
from gossamer.features.latent_cache import LatentCache

Nearest = tuple[Tensor, Tensor]
"""Numbers of the nearest features, ``(features, count)`` int64, and how near they are, float32; the nearest first."""


@torch.no_grad()
def nearest_by_direction(directions: Tensor, count: int = 8, chunk: int = 512, progress: bool = True) -> Nearest:
    """Features whose directions ``(features, size)`` have the largest cosine with each, itself left out.

    Raises
    ------
    ConfigurationError
        If fewer than `count` other features exist.
    """
    _check(count, len(directions))
    unit = torch.nn.functional.normalize(directions.detach().float(), dim=1)
    found = []
    for first in track(range(0, len(unit), chunk), "nearest directions", enabled=progress):
        cosines = unit[first : first + chunk] @ unit.t()
        rows = torch.arange(len(cosines))
        cosines[rows, rows + first] = -torch.inf
        nearest = cosines.topk(count)
        found.append((nearest.indices.cpu(), nearest.values.cpu()))
    return torch.cat([indices for indices, _ in found]), torch.cat([values for _, values in found])


def nearest_by_coactivation(cache: LatentCache, count: int = 8, most: int = 200_000, progress: bool = True) -> Nearest:
    """Features that are active on the same tokens as each, by the Jaccard index |A ∩ B| / |A ∪ B|.

    Parameters
    ----------
    cache
        Where features are active.
    count
        Of the nearest.
    most
        Tokens that are looked at, from the beginning of the text.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ConfigurationError
        If fewer than `count` other features exist.
    """
    _check(count, cache.width)
    codes = cache.codes(0, min(most, len(cache)))
    by_feature = codes.transposed()
    rows, row_starts = by_feature.indices.numpy(), by_feature.starts.numpy()
    features, starts = codes.indices.numpy(), codes.starts.numpy()
    active = np.diff(row_starts)
    indices, values = np.zeros((cache.width, count), np.int64), np.zeros((cache.width, count), np.float32)
    for feature in track(range(cache.width), "features that fire together", enabled=progress):
        here = rows[row_starts[feature] : row_starts[feature + 1]]
        shared = np.bincount(_gathered(features, starts, here), minlength=cache.width)
        near = shared / np.maximum(active[feature] + active - shared, 1)
        near[feature] = -1
        best = np.argpartition(-near, count - 1)[:count]
        best = best[np.argsort(-near[best], kind="stable")]
        indices[feature], values[feature] = best, near[best]
    return torch.from_numpy(indices), torch.from_numpy(values)


def _gathered(features: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Features of some rows of codes, one row after the other."""
    lengths = starts[rows + 1] - starts[rows]
    ends = np.cumsum(lengths)
    places = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts[rows] - (ends - lengths), lengths)
    return features[places]


def _check(count: int, features: int) -> None:
    if not 1 <= count < features:
        raise ConfigurationError(f"count is {count}; it must be from 1 to the {features - 1} other features there are")

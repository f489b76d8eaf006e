"""Which latents are close to which: by what they are active on, or by their directions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.features.autointerp.activity import Activity

Neighbours = list[tuple[int, float]]
"""Latents and how close each is, the closest first."""


def neighbours_by_coactivation(activity: Activity, latent: int, count: int = 10) -> Neighbours:
    """Latents that are active on the same tokens, by the Jaccard index |A ∩ B| / |A ∪ B|."""
    shared = activity.shared(latent).astype(np.float64)
    either = activity.counts[latent] + activity.counts - shared
    index = np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)
    return _closest(torch.from_numpy(index), latent, count)


def neighbours_by_direction(directions: Tensor, latent: int, count: int = 10) -> Neighbours:
    """Latents whose rows of a decoder or an encoder ``(latents, size)`` have the largest cosine."""
    if not 0 <= latent < len(directions):
        raise ConfigurationError(f"latent is {latent}; there are directions of 0 to {len(directions) - 1}")
    unit = torch.nn.functional.normalize(directions.detach().float(), dim=1)
    return _closest(unit @ unit[latent], latent, count)


def _closest(closeness: Tensor, latent: int, count: int) -> Neighbours:
    closeness = closeness.clone()
    closeness[latent] = -torch.inf
    found = closeness.topk(min(count, len(closeness)))
    return [(int(i), float(v)) for v, i in zip(found.values, found.indices) if v > 0]

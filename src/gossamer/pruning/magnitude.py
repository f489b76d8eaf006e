"""Magnitude and random pruning: the baselines that every method must beat, and the control that it must beat by far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core import scores
from gossamer.core.calibration import Statistics
from gossamer.core.patterns import Channels
from gossamer.core.registry import register
from gossamer.core.targets import Target
from gossamer.pruning.base import LayerwisePruner


@register("magnitude", paper="magnitude", when="after training", needs_data=False, criterion=("magnitude",))
@dataclass
class Magnitude(LayerwisePruner):
    """Prune the weights of smallest absolute value; no data, no update.

    Han, Pool, Tran & Dally, 2015, "Learning both Weights and Connections for Efficient Neural Networks",
    arXiv 1506.02626.

    Whole rows or columns (``pattern="rows"``, ``"columns"``) are ranked by their Euclidean norm, blocks by their mean
    absolute value. To take out feed-forward channels see :class:`gossamer.pruning.channels.MagnitudeChannels`, to
    silence attention heads :class:`gossamer.pruning.magnitude_heads.MagnitudeHeads`. A mask that survives further
    training is held by :func:`gossamer.core.masking.static_masks`.

    Parameters
    ----------
    largest
        Drop the largest instead: a sanity check that must be catastrophic.
    """

    largest: bool = False

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """``|W|``; its square for whole channels, whose mean then ranks them by their norm."""
        magnitude = scores.magnitude(target.matrix())
        if isinstance(self.pattern, Channels):
            # divided first: squares of small numbers would vanish
            magnitude = (magnitude / magnitude.max().clamp_min(torch.finfo(torch.float32).tiny)).square()
        return -magnitude if self.largest else magnitude


@register("random", paper="magnitude", when="after training", needs_data=False, criterion=("random",))
@dataclass
class Random(LayerwisePruner):
    """Prune weights at random: the control at the same pattern.

    Parameters
    ----------
    seed
        Of the draw; together with the layer's name it decides the mask, whatever the order of the layers.
    """

    seed: int = 0

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """Uniform noise."""
        generator = torch.Generator().manual_seed(hash_seed(self.seed, target.name))
        return scores.random(target.matrix(), generator)


def hash_seed(seed: int, name: str) -> int:
    """A seed of its own for each name, the same in every process."""
    value = seed & 0xFFFFFFFF
    for byte in name.encode():
        value = (value * 1_000_003 ^ byte) & 0x7FFFFFFFFFFFFFFF
    return value

"""Which channels of an activation count for a token: a score, |x_j| · c_j, and a selection among the scores.

Nearly every method that skips activations without training is a choice of c and of a selection. With c = 1 it is
magnitude; with the norms of the weight's columns it is the size of a channel's contribution to the output; with the
root of a partner's second moment it is what a gate lets through. The selections are a threshold, the k largest, the
k largest of every group, and the point farthest from the chord of the sorted scores.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.selection import check_scores, keep_highest
from gossamer.errors import ConfigurationError, ModelError, SparsityError


class Selection(ABC):
    """From the scores of tokens, ``(tokens, n)``, to the channels that count, bool of the same shape."""

    @abstractmethod
    def live(self, scores: Tensor) -> Tensor:
        """True where a channel counts."""


@dataclass(frozen=True)
class Everything(Selection):
    """All channels, whatever they hold: exactly dense."""

    def live(self, scores: Tensor) -> Tensor:  # noqa: D102
        return torch.ones_like(scores, dtype=torch.bool)


@dataclass(frozen=True)
class Threshold(Selection):
    """Channels whose score is above a value; NaN counts, so that a broken activation is seen and not swallowed."""

    value: float

    def __post_init__(self) -> None:
        if not self.value >= 0:
            raise ConfigurationError(f"threshold is {self.value}; it must be at least 0, since scores are magnitudes")

    def live(self, scores: Tensor) -> Tensor:  # noqa: D102
        return (scores <= self.value).logical_not_()


@dataclass(frozen=True)
class TopK(Selection):
    """The `keep` largest of every token; of equal ones the later (:mod:`gossamer.core.selection`)."""

    keep: int

    def __post_init__(self) -> None:
        if not isinstance(self.keep, int) or self.keep < 1:
            raise ConfigurationError(f"keep is {self.keep!r}; it must be a whole number, at least 1")

    def live(self, scores: Tensor) -> Tensor:  # noqa: D102
        width = scores.shape[-1]
        if self.keep > width:
            raise SparsityError(f"keep is {self.keep}, but there are only {width} channels; give at most {width}")
        return keep_highest(scores.reshape(-1, width), width - self.keep).view(scores.shape)


@dataclass(frozen=True)
class GroupTopK(Selection):
    """The `keep` largest of every `group` neighbouring channels."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.group:
            raise ConfigurationError(f"keep is {self.keep} of a group of {self.group}; it must be from 1 to the group")

    def live(self, scores: Tensor) -> Tensor:  # noqa: D102
        if scores.shape[-1] % self.group:
            raise ConfigurationError(f"groups of {self.group} do not divide {scores.shape[-1]} channels")
        grouped = scores.reshape(-1, self.group)
        return keep_highest(grouped, self.group - self.keep).view(scores.shape)


@dataclass(frozen=True)
class Elbow(Selection):
    """Scores above that of the elbow of the sorted scores: what is large stands out, and no ratio is given."""

    least: int = 1

    def live(self, scores: Tensor) -> Tensor:  # noqa: D102
        rows = check_scores(scores).reshape(-1, scores.shape[-1])
        ordered = rows.sort(dim=1, descending=True).values
        at = farthest_from_chord(ordered)
        bound = ordered.gather(1, at.unsqueeze(1))
        live = rows > bound
        live |= (ordered[:, :1] == ordered[:, -1:]).expand_as(live)
        if self.least > 1:
            live |= rows >= ordered[:, min(self.least, rows.shape[1]) - 1, None]
        return live.view(scores.shape)


def farthest_from_chord(ordered: Tensor) -> Tensor:
    """Index of the point of each sorted row that is farthest from the line through its first and last point.

    Parameters
    ----------
    ordered
        ``(rows, n)``, sorted along the rows.

    Returns
    -------
    Tensor
        ``(rows,)`` int64; the first of several equally far; 0 where all values are equal.
    """
    rows = ordered.double()
    steps = torch.linspace(0, 1, rows.shape[1], dtype=torch.float64, device=rows.device)
    chord = rows[:, :1] + (rows[:, -1:] - rows[:, :1]) * steps
    # the distance to a line is proportional to the vertical one, whatever the scale of either axis
    return (rows - chord).abs().argmax(dim=1)


def union_over_chunks(live: Tensor, chunk: int) -> Tensor:
    """Channels that count for any token of a chunk of neighbours: what has to be read to compute them together.

    Parameters
    ----------
    live
        ``(…, tokens, n)`` bool.
    chunk
        Tokens in each chunk; the last one may be shorter.
    """
    if chunk < 1:
        raise ConfigurationError(f"chunk is {chunk}; it must be at least 1 token")
    parts = [part.any(-2, keepdim=True).expand_as(part) for part in live.split(chunk, dim=-2)]
    return torch.cat(parts, dim=-2)


@dataclass(frozen=True, eq=False)
class ChannelRule:
    """A score and a selection.

    Attributes
    ----------
    selection
        Which scores are enough.
    scale
        c, ``(n,)`` float32, or None for 1.
    """

    selection: Selection
    scale: Tensor | None = None

    def scores(self, inputs: Tensor) -> Tensor:
        """|x_j| · c_j in float32, ``(…, n)``.

        Raises
        ------
        ModelError
            If the input has another width than the rule was made for.
        """
        scores = inputs.detach().abs().float()
        if self.scale is None:
            return scores
        if self.scale.shape[0] != inputs.shape[-1]:
            raise ModelError(
                f"the rule was made for {self.scale.shape[0]} channels, the input has {inputs.shape[-1]}; "
                f"calibrate on the model that you run"
            )
        return scores * self.scale.to(scores.device)

    def to(self, device: torch.device) -> ChannelRule:
        """The same rule with its scale on a device."""
        if self.scale is None or self.scale.device == device:
            return self
        return ChannelRule(self.selection, self.scale.to(device))

    def live(self, inputs: Tensor) -> Tensor:
        """The channels that count, bool ``(…, n)``."""
        if isinstance(self.selection, Everything):
            return torch.ones_like(inputs, dtype=torch.bool)
        return self.selection.live(self.scores(inputs))

    def thresholds(self, width: int) -> Tensor | None:
        """What |x_j| has to exceed, ``(width,)`` float32, where the selection is by threshold; None otherwise.

        A channel without any weight (c = 0) never counts and has an infinite threshold; where everything counts the
        threshold is −1.
        """
        if isinstance(self.selection, Everything):
            return torch.full((width,), -1.0)
        if not isinstance(self.selection, Threshold):
            return None
        if self.scale is None:
            return torch.full((width,), self.selection.value)
        # 0/0 is a channel without weight under a threshold of zero
        return (self.selection.value / self.scale.cpu().float()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def column_norms(weight: Tensor) -> Tensor:
    """‖W[:, j]‖₂ of a matrix ``(out, in)``, ``(in,)`` float32, computed in float64."""
    return weight.detach().double().norm(dim=0).float()

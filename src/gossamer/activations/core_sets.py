"""Core neurons and core tokens: the neurons that most of a prompt uses, and the tokens that use these neurons.

Two tokens overlap in the neurons that both of them activate. How large that overlap is tells the angle between them,
so that counting set bits takes the place of comparing directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.channel_rules import Elbow, farthest_from_chord
from gossamer.core.selection import check_scores, keep_highest
from gossamer.errors import CalibrationError, ConfigurationError, SparsityError

Active = Literal["top", "positive"]


@dataclass(frozen=True)
class CoreNeurons:
    """Sentence-wise core neurons of a layer [Wang et al., 2025, arXiv 2505.19235].

    Parameters
    ----------
    rho
        Share of a token's positive activations that count as its own core neurons, in (0, 1].
    beta
        Share of the layer's neurons that are kept: those that belong to the most tokens, in (0, 1].
    active
        ``top``: the share `rho`; ``positive``: every positive activation, as in the released code.
    """

    rho: float = 0.2
    beta: float = 0.4
    active: Active = "top"

    def __post_init__(self) -> None:
        for name, value in (("rho", self.rho), ("beta", self.beta)):
            if not 0 < value <= 1:
                raise SparsityError(f"{name} is {value!r}; it must be in (0, 1], such as 0.4 for two fifths")
        _check_active(self.active)

    def of_tokens(self, activations: Tensor) -> Tensor:
        """Γ_ρ(m): each token's core neurons.

        Parameters
        ----------
        activations
            ``(tokens, f)``, act(gate) ⊙ up of each token.

        Returns
        -------
        Tensor
            ``(tokens, f)`` bool; ⌈ρ · positive ones⌉ in every row, none in one without a positive activation.
        """
        positive = activations > 0
        if self.active == "positive":
            return positive
        order = activations.float().argsort(dim=1, descending=True, stable=True)
        count = (self.rho * positive.sum(1, keepdim=True).double()).sub(1e-9).ceil().clamp_min(0)
        ranks = torch.arange(activations.shape[1], device=activations.device).expand_as(order)
        return torch.zeros_like(positive).scatter_(1, order, ranks < count)

    def fit(self, activations: Tensor) -> Tensor:
        """Γ*: indices of the ⌈β f⌉ neurons that are core neurons of the most tokens, ``(n,)``, ascending.

        Of equally frequent ones the later goes first, as everywhere (:mod:`gossamer.core.selection`).

        Raises
        ------
        CalibrationError
            If there is no token.
        """
        rows = _rows(activations)
        counts = self.of_tokens(rows).sum(0)
        width = rows.shape[1]
        kept = max(1, math.ceil(self.beta * width - 1e-9))
        return keep_highest(counts.unsqueeze(0), width - kept, "frequencies of neurons")[0].nonzero().flatten()


@dataclass(frozen=True)
class CoreTokens:
    """Tokens that are kept: text, the first few, and those whose neurons match [Wang et al., 2025, arXiv 2505.19235].

    Parameters
    ----------
    keep
        What stays whatever its score: ``text`` (all tokens that may not be dropped), ``sink`` (the first positions).
    sinks
        How many first positions, on which attention rests.
    elbow
        Keep the scores above the elbow of the sorted ones, which adapts to image and question; False for `share`.
    share
        Share of the droppable tokens that is kept without an elbow, in (0, 1].
    least
        Fewest droppable tokens that are kept.
    active
        A token's neurons Γ(m): all ``positive`` ones, or the ``top`` share of the core neurons' rule.
    reference
        None for s(m) = |Γ(m) ∩ Γ*|; a place such as −5 for |Γ(m) ∩ Γ(r)| with that token, as in the released code.
    """

    keep: tuple[str, ...] = ("text", "sink")
    sinks: int = 5
    elbow: bool = True
    share: float = 0.3
    least: int = 1
    active: Active = "positive"
    reference: int | None = None

    def __post_init__(self) -> None:
        for name in self.keep:
            if name not in ("text", "sink"):
                raise ConfigurationError(f"keep has {name!r}; it may hold text and sink")
        if "text" not in self.keep:
            raise ConfigurationError("keep lacks 'text'; tokens that are not marked as droppable always stay")
        if not 0 < self.share <= 1:
            raise SparsityError(f"share is {self.share!r}; it must be in (0, 1], such as 0.3")
        for name, value in (("sinks", self.sinks), ("least", self.least)):
            if not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"{name} is {value!r}; it must be a whole number, at least 0")
        _check_active(self.active)

    def scores(self, activations: Tensor, neurons: CoreNeurons | None = None) -> Tensor:
        """s(m) of each token, ``(tokens,)`` float32 whole numbers, from activations ``(tokens, f)``."""
        rows = _rows(activations)
        neurons = neurons if neurons is not None else CoreNeurons()
        own = (neurons.of_tokens(rows) if self.active == "top" else rows > 0).float()
        if self.reference is not None:
            if not -len(rows) <= self.reference < len(rows):
                raise ConfigurationError(f"reference is {self.reference}, but the prompt has {len(rows)} tokens")
            return own @ own[self.reference]
        return own[:, neurons.fit(rows)].sum(1)

    def select(
        self, activations: Tensor, droppable: Tensor | None = None, neurons: CoreNeurons | None = None
    ) -> Tensor:
        """The tokens that stay.

        Parameters
        ----------
        activations
            ``(tokens, f)``.
        droppable
            ``(tokens,)`` bool, True at image tokens; None if all may go.
        neurons
            How core neurons are found.

        Returns
        -------
        Tensor
            ``(n,)`` int64, ascending.
        """
        return self.choose(self.scores(activations, neurons), droppable)

    def choose(self, scores: Tensor, droppable: Tensor | None = None) -> Tensor:
        """The tokens that stay by any scores ``(tokens,)``; see :meth:`select`."""
        free = torch.ones(len(scores), dtype=torch.bool) if droppable is None else droppable.detach().cpu().clone()
        if len(free) != len(scores):
            raise ConfigurationError(f"droppable marks {len(free)} tokens of a prompt of {len(scores)}; give one each")
        if "sink" in self.keep:
            free[: self.sinks] = False
        values = check_scores(scores.detach().cpu(), "scores of tokens")[free]
        if not len(values):
            return torch.arange(len(scores))
        if self.elbow:
            good = Elbow(max(1, self.least)).live(values.unsqueeze(0))[0]
        else:
            count = min(len(values), max(self.least, math.ceil(self.share * len(values) - 1e-9)))
            good = keep_highest(values.unsqueeze(0), len(values) - count)[0]
        stays = ~free
        stays[free] = good
        return stays.nonzero().flatten()


def max_distance_elbow(values: Tensor) -> float | None:
    """The elbow of values: that of the descending curve's point farthest from the line through its ends.

    Parameters
    ----------
    values
        ``(n,)``, in any order.

    Returns
    -------
    float or None
        What is above it stands out; None where all values are equal, so that nothing does.
    """
    if not values.numel():
        raise CalibrationError("there are no values, so there is no elbow; give at least one")
    ordered = check_scores(values).flatten().sort(descending=True).values
    if ordered[0] == ordered[-1]:
        return None
    return float(ordered[int(farthest_from_chord(ordered.unsqueeze(0)))])


def overlaps(activations: Tensor) -> Tensor:
    """|Γ(m) ∩ Γ(n)| for all pairs of tokens, ``(tokens, tokens)`` int64, with Γ the positive activations.

    Counted in float32, which is exact up to 2²⁴ neurons; half precision would lose counts above 2048.
    """
    active = (_rows(activations) > 0).float()
    return (active @ active.T).long()


def expected_overlap(cosine: Tensor, neurons: int) -> Tensor:
    """F (1/4 + arcsin(cos θ) / 2π): the mean overlap of two tokens under random weights [arXiv 2505.19235].

    With independent Gaussian rows of the gate, both tokens are positive at a row with the probability that it lies in
    the wedge between their half-spaces. It grows with the cosine, from 0 for opposite tokens to f/2 for equal ones.

    Parameters
    ----------
    cosine
        Of the angle between the tokens, any shape, from −1 to 1.
    neurons
        F.
    """
    return neurons * (0.25 + torch.asin(cosine.double().clamp(-1, 1)) / (2 * math.pi))


def projection_importance(attention: Tensor, outputs: Tensor) -> Tensor:
    """Attention of the last token to each, times the cosine of the angle between both's outputs [arXiv 2505.19235].

    What a token adds to the last one counts by its projection on it; attention alone leaves the direction out.

    Parameters
    ----------
    attention
        ``(tokens,)``: how much the last token attends to each.
    outputs
        ``(tokens, d)``: what the layer puts out for each.
    """
    return attention.double() * torch.nn.functional.cosine_similarity(outputs.double(), outputs[-1:].double(), dim=1)


def _rows(activations: Tensor) -> Tensor:
    rows = activations.detach()
    if rows.dim() == 3 and rows.shape[0] == 1:
        rows = rows[0]
    if rows.dim() != 2:
        raise ConfigurationError(
            f"activations have shape {tuple(rows.shape)}; statistics are those of one sequence, (tokens, neurons)"
        )
    if not len(rows):
        raise CalibrationError("there is no token; give the activations of a prompt")
    return rows


def _check_active(active: str) -> None:
    if active not in get_args(Active):
        raise ConfigurationError(f"active is {active!r}; it must be top or positive")

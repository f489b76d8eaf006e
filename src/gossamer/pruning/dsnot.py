"""DSnoT: keep the weights, change the mask, until what the zeros take away adds up to nothing.

Pruning shifts the mean of a layer's output: row i loses ``ε_i = Σ_j∈pruned W_ij·μ_j``, where ``μ_j`` is the mean input.
Dynamic Sparse No Training takes weights back in and throws others out, one pair per row and cycle, such that ε moves
to zero. What comes back contributes much to ε and does so reliably: the largest ``W_ij·μ_j`` per variance of the
input. What goes must push ε the same way, and among those it is the weight that Wanda would miss least. Each row
goes its own way and stops when its ε is small. No gradient, no weight changes, no forward pass beyond calibration.

How this differs from the released code, on purpose: a row whose useful weights are used up stops, where the reference
walks on into weights of the wrong sign or already kept; a variance of zero is lifted to a small share of the mean
variance; and the variance is that of all tokens together, where the reference averages the variance within each
batch and so leaves out how the means of batches differ (little, for sequences of hundreds of tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.calibration import InputMoments, Statistic, Statistics, per_weight
from gossamer.core.patterns import NM
from gossamer.core.registry import register
from gossamer.core.scores import input_weighted
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError
from gossamer.pruning.base import LayerwisePruner
from gossamer.pruning.refinement import MaskRefiner, Refinement, Start

_LEAST_VARIANCE = 1e-6  # of the mean variance
FEED_FORWARD = (
    *("*.mlp.*", "*.ffn.*", "*.feed_forward.*", "*.fc1", "*.fc2", "*.fc_in", "*.fc_out"),
    *("*.dense_h_to_4h", "*.dense_4h_to_h", "*.intermediate.dense", "*[0-9].output.dense", "*.experts*"),
    *("*.block_sparse_moe.*", "*.DenseReluDense.*", "*.lin1", "*.lin2"),
)
"""Globs on the names that models give to the layers between attention and attention."""
_GROWING, _PRUNING = ("contribution", "magnitude"), ("wanda", "contribution")


@register(
    "dsnot",
    paper="dsnot",
    when="after training",
    topology="dynamic",
    criterion=("activation",),
    patterns=("unstructured", "n:m"),
)
@dataclass
class DSnoT(MaskRefiner):
    """Swap pruned and kept weights of a row until its expected output error is near zero.

    Zhang et al., 2024, "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", arXiv 2310.08915,
    eqs. 3 to 6. It acts on the mean input only: where the mean is near zero, as after a norm, the first ε is small
    and there is little to gain; :attr:`refinements` tells how small.

    Parameters
    ----------
    max_cycles
        At most so many swaps in a row.
    threshold
        A row stops at |ε| ≤ `threshold`, in units of an output summed over `sequence_length` tokens.
    sequence_length
        Tokens that ``μ`` is summed over; by default those of a calibration sequence, as in the paper, where the
        threshold is therefore stricter per token the longer the sequences are. 1 makes it an error per token.
    variance_power
        Exponent of the variance in the growing criterion; 0 ignores the variance.
    growing
        Rank what comes back by ``"contribution"`` to ε per variance, or, as an ablation, by ``"magnitude"``.
    pruning
        Rank what goes by ``"wanda"`` (least |W|·‖X‖ first), or, as an ablation, by ``"contribution"`` (what moves
        ε most first). With N:M the lowest score of the initial method goes, of the same group (Wanda's score where
        the initial method has none).
    same_sign
        Also stop a row whose next swap would turn the sign of ε. N:M patterns always do.
    skip
        These layers keep their initial mask: as in the released code the feed-forward layers, by the names that
        models commonly give them; ``()`` refines all layers.
    """

    skip: Sequence[str] = FEED_FORWARD
    max_cycles: int = 50
    threshold: float = 0.1
    sequence_length: int | None = None
    variance_power: float = 1.0
    growing: str = "contribution"
    pruning: str = "wanda"
    same_sign: bool = False

    needs: ClassVar[tuple[type[Statistic], ...]] = (InputMoments,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ConfigurationError(f"sequence_length is {self.sequence_length}; it must be at least 1, or None")
        _check_criteria(self._group, self.max_cycles, self.threshold, self.variance_power, self.growing, self.pruning)

    @property
    def _group(self) -> int | None:
        return self.pattern.m if isinstance(self.pattern, NM) else None

    def initial_score(self, target: Target, stats: Statistics) -> Tensor | None:
        """The initial method's score, which only N:M patterns ask for."""
        if not isinstance(self.pattern, NM) or type(self._starter).score is LayerwisePruner.score:
            return None
        return self._starter.score(target, stats).flatten(1)

    def refine(self, start: Start) -> Refinement:  # noqa: D102
        moments: InputMoments = start.stats[InputMoments]
        tokens = self.sequence_length or moments.tokens / self.sequences
        mean, variance, norm = (
            per_weight(start.target, values).flatten(1)
            for values in (moments.mean * tokens, moments.variance, moments.norm)
        )
        moved = start.residual * start.mask
        return refine_mask(
            start.weight,
            start.mask,
            mean,
            variance,
            norm,
            group=self._group,
            score=start.score,
            offset=(moved * mean).sum(1, dtype=torch.float64),
            max_cycles=self.max_cycles,
            threshold=self.threshold,
            variance_power=self.variance_power,
            growing=self.growing,
            pruning=self.pruning,
            same_sign=self.same_sign,
        )


def refine_mask(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    *,
    group: int | None = None,
    score: Tensor | None = None,
    offset: Tensor | None = None,
    max_cycles: int = 50,
    threshold: float = 0.1,
    variance_power: float = 1.0,
    growing: str = "contribution",
    pruning: str = "wanda",
    same_sign: bool = False,
) -> Refinement:
    """Refine the mask of one matrix; all rows at once, nothing but tensors.

    Parameters
    ----------
    weight
        ``(out, in)``: for each weight the value it has if kept.
    mask
        ``(out, in)`` bool, True where kept.
    mean
        ``(in,)`` or ``(out, in)``: mean of each input feature, times the number of tokens `threshold` is meant for.
    variance, norm
        As `mean`: variance and ‖X_j‖₂ of each input feature; the scale of neither matters.
    group
        M of an N:M mask: a swap then stays within M consecutive inputs, and `same_sign` is in force.
    score
        ``(out, in)``, for N:M: the lowest goes first. By default Wanda's.
    offset
        ``(out,)``: part of ε that comes from changed weights and not from zeros.
    max_cycles, threshold, variance_power, growing, pruning, same_sign
        See :class:`DSnoT`.

    Returns
    -------
    Refinement
        Its errors are ε, in the units of `mean`. Among equally good weights which one is taken is not specified,
        but always the same one.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.
    """
    _check_criteria(group, max_cycles, threshold, variance_power, growing, pruning)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    contribution = weight * mean
    direction = contribution.sign()
    error = (contribution * ~mask).sum(1, dtype=torch.float64)
    error = error if offset is None else error + offset
    reliable = _per_variance(contribution, variance, variance_power)
    useful = weight.abs() * direction if growing == "magnitude" else reliable
    limit = min(max_cycles, weight.shape[1])
    grow = _Queues(useful * ~mask, limit)
    wanda = input_weighted(weight, norm)
    drop: _Queues | _Groups
    if group is None:
        # what goes has the opposite sign of what comes back
        spared = direction / wanda.clamp_min(torch.finfo(wanda.dtype).tiny) if pruning == "wanda" else contribution
        drop = _Queues(-spared * mask, limit)
    else:
        drop = _Groups(wanda if score is None else score, mask, group)
    return _swap(contribution, mask, error, grow, drop, max_cycles, threshold, same_sign or group is not None)


def _per_variance(contribution: Tensor, variance: Tensor, power: float) -> Tensor:
    average = variance.mean()
    variance = variance.clamp_min(_LEAST_VARIANCE * average) if average > 0 else torch.ones_like(variance)
    return contribution / (variance**power).to(contribution.dtype)


def _swap(
    contribution: Tensor,
    mask: Tensor,
    error: Tensor,
    grow: _Queues,
    drop: _Queues | _Groups,
    max_cycles: int,
    threshold: float,
    same_sign: bool,
) -> Refinement:
    before, first_sign, refined = error, error.sign(), mask.clone()
    active = torch.ones_like(error, dtype=torch.bool)
    swaps = torch.zeros_like(error, dtype=torch.long)
    for _ in range(max_cycles):
        side = (error > 0).long().unsqueeze(1)
        back, available = grow.front(side)
        out, possible = drop.front(side, back)
        active = active & (error.abs() > threshold) & available & (possible | drop.passes_over)
        swap = active & possible
        after = error + (contribution.gather(1, out) - contribution.gather(1, back)).squeeze(1)
        if same_sign:
            turns = swap & (after.sign() != first_sign)
            active, swap = active & ~turns, swap & ~turns
        if not active.any():
            break
        error = torch.where(swap, after, error)
        swaps += swap
        chosen = swap.unsqueeze(1)
        refined.scatter_(1, back, refined.gather(1, back) | chosen)
        refined.scatter_(1, out, refined.gather(1, out) & ~chosen)
        grow.advance(side, active.unsqueeze(1))
        drop.advance(side, chosen, out)
    return Refinement(refined, swaps, before, error)


class _Queues:
    """Two queues of columns for each row: where ε > 0 the largest keys above 0, else the smallest below 0.

    A weight whose contribution is exactly zero has key 0 and is in neither: it cannot change ε.
    """

    passes_over = False

    def __init__(self, key: Tensor, limit: int):
        negative, positive = (key.topk(limit, dim=1, largest=largest) for largest in (False, True))
        self._columns, self._limit = torch.cat([negative.indices, positive.indices], 1), limit
        self._counts = torch.stack([(negative.values < 0).sum(1), (positive.values > 0).sum(1)], 1)
        self._position = torch.zeros_like(self._counts)

    def front(self, side: Tensor, back: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next column of each row, ``(rows, 1)``, and whether there is one, ``(rows,)``."""
        position = self._position.gather(1, side)
        column = self._columns.gather(1, side * self._limit + position.clamp_max(self._limit - 1))
        return column, (position < self._counts.gather(1, side)).squeeze(1)

    def advance(self, side: Tensor, taken: Tensor, column: Tensor | None = None) -> None:
        """Move on in the rows where the front was taken, ``(rows, 1)`` bool."""
        self._position.scatter_add_(1, side, taken.long())


class _Groups:
    """The kept weights of each N:M group by score. A candidate whose group has none of them left is passed over."""

    passes_over = True

    def __init__(self, score: Tensor, mask: Tensor, size: int):
        self._score = score.masked_fill(~mask, torch.inf)
        self._within = torch.arange(size, device=score.device)

    def front(self, side: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest of the group of `back`, and whether it may go."""
        size = len(self._within)
        columns = back // size * size + self._within
        lowest = self._score.gather(1, columns).min(1, keepdim=True)
        return columns.gather(1, lowest.indices), (lowest.values < torch.inf).squeeze(1)

    def advance(self, side: Tensor, taken: Tensor, column: Tensor) -> None:
        """Never offer again what was taken."""
        self._score.scatter_(1, column, self._score.gather(1, column).masked_fill(taken, torch.inf))


def _check_criteria(
    group: int | None, max_cycles: int, threshold: float, variance_power: float, growing: str, pruning: str
) -> None:
    if max_cycles < 1 or threshold < 0 or variance_power < 0:
        raise ConfigurationError(
            f"max_cycles is {max_cycles}, threshold {threshold} and variance_power {variance_power}; "
            f"the first must be at least 1, the others at least 0"
        )
    for name, value, known in (("growing", growing, _GROWING), ("pruning", pruning, _PRUNING)):
        if value not in known:
            raise ConfigurationError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if group is not None and pruning != "wanda":
        raise ConfigurationError(f"pruning is {pruning!r}, but with N:M the initial score decides; leave it at 'wanda'")

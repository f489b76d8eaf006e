"""What a scorer says of an explanation: areas under curves with intervals, by strength and by kind of negative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gossamer.errors import NonFiniteError
from gossamer.features.autointerp.windows import Window

_RESAMPLES = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """How good an explanation is by one scorer.

    Attributes
    ----------
    scorer, metric
        Its name, and what `value` is: ``auc``, ``correlation``, ``accuracy``, or ``nats``.
    value
        The score; None if nothing was judged.
    low, high
        Its 95% bootstrap interval over windows; None if there are too few.
    balanced_accuracy, f1
        Of the judgements at one half, where they are probabilities.
    per_quantile
        The score of active windows of each strength alone, 1 being the weakest.
    per_negative
        The score against each kind of inactive windows alone.
    count, abstained
        Windows that were judged, and those for which the judge had no answer; the latter are left out of all numbers.
    facts
        Further numbers of the scorer.
    """

    scorer: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    balanced_accuracy: float | None = None
    f1: float | None = None
    per_quantile: Mapping[int, float] = field(default_factory=dict)
    per_negative: Mapping[str, float] = field(default_factory=dict)
    count: int = 0
    abstained: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answered(self) -> float:
        """Share of the windows for which the judge had an answer."""
        return self.count / max(self.count + self.abstained, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        plain["per_quantile"] = {str(quantile): value for quantile, value in self.per_quantile.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Score:
        """What :meth:`to_dict` has written."""
        return cls(**{**plain, "per_quantile": {int(q): v for q, v in plain["per_quantile"].items()}})


def auc(positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray) -> float | None:
    """Probability that a positive lies above a negative, ties counted half; None if one of them is missing.

    Examples
    --------
    >>> auc([0.9, 0.5], [0.5, 0.1])
    0.875
    """
    if not len(positive) or not len(negative):
        return None
    return float(_wins(positive, negative).mean())


def _wins(positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray) -> np.ndarray:
    """1 where a positive (row) lies above a negative (column), 1/2 where they are equal."""
    above, below = np.asarray(positive, np.float64)[:, None], np.asarray(negative, np.float64)[None]
    if not (np.isfinite(above).all() and np.isfinite(below).all()):
        raise NonFiniteError("a judgement is NaN or infinite; the judge must abstain with None instead")
    return (above > below) + 0.5 * (above == below)


def auc_interval(
    positive: Sequence[float] | np.ndarray, negative: Sequence[float] | np.ndarray, seed: int = 0
) -> tuple[float, float] | None:
    """95% bootstrap interval of :func:`auc`, positives and negatives drawn apart; None for fewer than two of either."""
    if len(positive) < 2 or len(negative) < 2:
        return None
    wins, draw = _wins(positive, negative), np.random.default_rng(seed)
    rows, columns = (draw.multinomial(size, np.full(size, 1 / size), _RESAMPLES) / size for size in wins.shape)
    areas = np.einsum("ri,ij,rj->r", rows, wins, columns, optimize=True)
    low, high = np.quantile(areas, [0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2])
    return float(low), float(high)


def mean_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """95% bootstrap interval of a mean; None for fewer than two values."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return None
    drawn = array[np.random.default_rng(seed).integers(len(array), size=(_RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(drawn, [0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Judged:
    """A window and what a judge made of it.

    Attributes
    ----------
    window
        What was shown.
    positive
        Whether the explanation should fit.
    answer
        How well it does; None where the judge abstained.
    """

    window: Window
    positive: bool
    answer: float | None


def ranking_score(scorer: str, judged: Sequence[Judged], probabilities: bool, **facts: Any) -> Score:
    """Score of judgements by how well they set positives above negatives.

    Parameters
    ----------
    scorer
        Its name.
    judged
        All judgements.
    probabilities
        Whether answers are probabilities, of which those above one half say yes.
    **facts
        Further numbers.
    """
    answered = [(j, j.answer) for j in judged if j.answer is not None]
    positive = [(j, answer) for j, answer in answered if j.positive]
    negative = [(j, answer) for j, answer in answered if not j.positive]
    above, below = [answer for _, answer in positive], [answer for _, answer in negative]
    interval = auc_interval(above, below) or (None, None)
    quantiles = {
        quantile: [a for j, a in positive if j.window.quantile == quantile] for quantile in _quantiles(positive)
    }
    kinds = {kind: [a for j, a in negative if j.window.kind == kind] for kind in _kinds(negative)}
    balanced, f1 = _at_one_half(above, below) if probabilities else (None, None)
    return Score(
        scorer,
        "auc",
        auc(above, below),
        *interval,
        balanced_accuracy=balanced,
        f1=f1,
        per_quantile={quantile: area for quantile, part in quantiles.items() if (area := auc(part, below)) is not None},
        per_negative={kind: area for kind, part in kinds.items() if (area := auc(above, part)) is not None},
        count=len(answered),
        abstained=len(judged) - len(answered),
        facts=facts,
    )


def _quantiles(judged: Sequence[tuple[Judged, float]]) -> list[int]:
    return sorted({j.window.quantile for j, _ in judged})


def _kinds(judged: Sequence[tuple[Judged, float]]) -> list[str]:
    return sorted({j.window.kind for j, _ in judged})


def _at_one_half(positive: Sequence[float], negative: Sequence[float]) -> tuple[float | None, float | None]:
    """Balanced accuracy and F1 of saying yes above one half."""
    if not len(positive) or not len(negative):
        return None, None
    hits, alarms = sum(p > 0.5 for p in positive), sum(n > 0.5 for n in negative)
    balanced = (hits / len(positive) + 1 - alarms / len(negative)) / 2
    return balanced, 2 * hits / (len(positive) + hits + alarms)


def paired_p_value(differences: Sequence[float]) -> float:
    """One-sided p-value of a positive mean by flipping signs, 20,000 times or all ways if there are fewer."""
    array = np.asarray(differences, np.float64)
    if not len(array):
        return 1.0
    if len(array) <= 14:
        signs = 1 - 2 * ((np.arange(1 << len(array))[:, None] >> np.arange(len(array))) & 1)
        return float((signs @ array >= array.sum() - 1e-12).mean())
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(20_000, len(array)))
    return float(((signs @ array >= array.sum() - 1e-12).sum() + 1) / (len(signs) + 1))

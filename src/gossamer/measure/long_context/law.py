"""A law for accuracy under sparse attention, and whether it predicts what it has not seen.

logit(accuracy) = b0 + bN log N + bn log n + bC log(1 / (1 − s)) + a term for the task, with N weights, n tokens and
sparsity s, fitted by least squares for one phase. A law is worth having only if it predicts the largest model, the
longest prompt or the highest sparsity from the rest, better than the mean of each task does. The form is reconstructed;
of the paper's fits only tables of errors on held-out maxima were seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.frontier import Frontier, Row

Link = Literal["logit", "log"]
Axis = Literal["parameters", "length", "sparsity"]
AXES: tuple[Axis, ...] = ("parameters", "length", "sparsity")


@dataclass(frozen=True)
class SparseAttentionLaw:
    """A fitted law.

    Attributes
    ----------
    link
        ``logit`` or ``log``: which function of accuracy is linear.
    coefficients
        Of log N, log n and log(1 / (1 − s)), by axis; those that do not vary in the data are 0.
    tasks
        Task → its term, with b0.
    floor
        Accuracies are kept this far from 0 and 1 before the link.
    r_squared
        On the rows it was fitted to, in accuracy.
    """

    link: Link
    coefficients: dict[str, float]
    tasks: dict[str, float]
    floor: float
    r_squared: float

    def predict(self, row: Row) -> float:
        """Accuracy at a row's place; its scores are not looked at."""
        linear = self.tasks[row.task] + sum(self.coefficients[axis] * _feature(row, axis) for axis in AXES)
        if self.link == "log":
            return min(1.0, math.exp(linear))
        return 1 / (1 + math.exp(-max(min(linear, 50.0), -50.0)))


@dataclass(frozen=True)
class Validation:
    """How well a law predicts the rows at the largest value of an axis, having seen all others.

    Attributes
    ----------
    axis, held_out
        Which axis, and its largest value.
    rows
        How many were held out.
    r_squared, error
        Of the law: share of the variance explained, and mean absolute error, in accuracy.
    baseline_r_squared, baseline_error
        Of the mean of each task over the rows that were seen.
    """

    axis: Axis
    held_out: float
    rows: int
    r_squared: float
    error: float
    baseline_r_squared: float
    baseline_error: float

    @property
    def beats_baseline(self) -> bool:
        """Whether the law errs less than the mean of each task."""
        return self.error < self.baseline_error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "beats_baseline": self.beats_baseline}


def fit_sparse_attention_law(frontier: Frontier | Sequence[Row], link: Link = "logit") -> SparseAttentionLaw:
    """Fit the law to rows of one phase.

    Parameters
    ----------
    frontier
        Rows with scores; those without are left out. Dense rows may be among them, at sparsity 0.
    link
        Which function of accuracy is linear.

    Raises
    ------
    ConfigurationError
        If there are fewer rows than parameters, or no such link.
    """
    rows = _usable(frontier)
    if link not in ("logit", "log"):
        raise ConfigurationError(f"link is {link!r}; it must be 'logit' or 'log'")
    tasks = list(dict.fromkeys(row.task for row in rows))
    varying = [axis for axis in AXES if len({_feature(row, axis) for row in rows}) > 1]
    if len(rows) < len(tasks) + len(varying) + 1:
        raise ConfigurationError(
            f"{len(rows)} rows with scores for {len(tasks) + len(varying)} parameters; evaluate more sparsities, "
            "lengths or models"
        )
    floor = 0.5 / max(2, max(len(row.scores) for row in rows))
    design = np.array(
        [[*(_feature(row, axis) for axis in varying), *(float(row.task == task) for task in tasks)] for row in rows]
    )
    target = np.array([_linked(row.accuracy, link, floor) for row in rows])
    solved = np.linalg.lstsq(design, target, rcond=None)[0].tolist()
    coefficients = dict.fromkeys(AXES, 0.0) | dict(zip(varying, solved))
    law = SparseAttentionLaw(link, coefficients, dict(zip(tasks, solved[len(varying) :])), floor, 0.0)
    quality = r_squared([row.accuracy for row in rows], [law.predict(row) for row in rows])
    return SparseAttentionLaw(link, coefficients, law.tasks, floor, quality)


def validate_law(frontier: Frontier | Sequence[Row], axis: Axis, link: Link = "logit") -> Validation:
    """Hold out the largest value of an axis, fit the law to the rest, and compare what it predicts.

    Parameters
    ----------
    frontier, link
        As in :func:`fit_sparse_attention_law`.
    axis
        ``parameters``, ``length`` or ``sparsity``.

    Raises
    ------
    ConfigurationError
        If the axis has fewer than three values for its slope to be known without the largest, or is unknown.
    """
    if axis not in AXES:
        raise ConfigurationError(f"axis is {axis!r}; it must be one of {', '.join(AXES)}")
    rows = _usable(frontier)
    values = sorted({float(getattr(row, axis)) for row in rows})
    if len(values) < 3:
        raise ConfigurationError(
            f"{axis} has {len(values)} values; three are needed to predict the largest from the others"
        )
    seen = [row for row in rows if getattr(row, axis) < values[-1]]
    unseen = [row for row in rows if getattr(row, axis) == values[-1]]
    law = fit_sparse_attention_law(seen, link)
    unseen = [row for row in unseen if row.task in law.tasks]
    truth = [row.accuracy for row in unseen]
    guesses = [law.predict(row) for row in unseen]
    means = [_mean([other.accuracy for other in seen if other.task == row.task]) for row in unseen]
    return Validation(
        axis,
        values[-1],
        len(unseen),
        r_squared(truth, guesses),
        _error(truth, guesses),
        r_squared(truth, means),
        _error(truth, means),
    )


def r_squared(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """One less the squared errors over those of the mean; 0 where nothing varies."""
    actual, guessed = np.asarray(truth), np.asarray(guesses)
    total = float(np.square(actual - actual.mean()).sum())
    return 1 - float(np.square(actual - guessed).sum()) / total if total > 0 else 0.0


def _usable(frontier: Frontier | Sequence[Row]) -> list[Row]:
    rows = frontier.rows if isinstance(frontier, Frontier) else frontier
    kept = [row for row in rows if row.scores]
    if not kept:
        raise ConfigurationError("no row has scores; evaluate something first")
    return kept


def _feature(row: Row, axis: str) -> float:
    if axis == "sparsity":
        realised = row.sparsity if row.realised is None else row.realised
        return -math.log(max(1 - realised, 1e-6))
    return math.log(getattr(row, axis))


def _linked(accuracy: float, link: Link, floor: float) -> float:
    kept = min(max(accuracy, floor), 1 - floor if link == "logit" else 1.0)
    return math.log(kept) if link == "log" else math.log(kept / (1 - kept))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _error(truth: Sequence[float], guesses: Sequence[float]) -> float:
    return _mean([abs(a - b) for a, b in zip(truth, guesses)])

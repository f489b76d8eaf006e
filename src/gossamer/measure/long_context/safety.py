"""The largest sparsity at which accuracy is kept, with a statistical guarantee.

Sparse and dense attention answer the same prompts, and scores are compared prompt by prompt. A sparsity is safe on a
task if a test that keeps its level at any number of prompts rejects that accuracy falls by the tolerance or more; where
not even equal answers to all prompts would convince it, nothing is concluded. Several tasks are several chances to be
wrong, which Holm's procedure takes into account. Tasks that dense attention does not do have nothing to lose, and say
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import beta, binom

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.frontier import DENSE, Frontier, Row

_STAKES = (np.arange(32) + 0.5) / 32  # shares of the capital that are bet


@dataclass(frozen=True)
class Difference:
    """Sparse minus dense accuracy on the same prompts.

    Attributes
    ----------
    mean
        Of the scores' differences.
    low
        Lower confidence bound, one-sided.
    p_value
        Of the hypothesis that the difference is −tolerance or lower.
    """

    mean: float
    low: float
    p_value: float


@dataclass(frozen=True)
class SafeSparsity:
    """How sparse a method may be in a model at a length.

    Attributes
    ----------
    model, method, phase, length
        Which.
    tasks
        Task → largest sparsity that is safe; 0 if none is. Tasks of which nothing is known are missing.
    everywhere
        Largest sparsity that is safe on all tasks that dense attention does; 0 if none is, None if that is not known.
    outcomes
        Task → sparsity → whether it is safe; None where that is not known. Tasks that dense attention does not do are
        missing.
    left_out
        Task → why nothing is known of it.
    differences
        Task → sparsity → difference from dense.
    """

    model: str
    method: str
    phase: str
    length: int
    tasks: Mapping[str, float]
    everywhere: float | None
    outcomes: Mapping[str, Mapping[float, bool | None]]
    left_out: Mapping[str, str]
    differences: Mapping[str, Mapping[float, Difference]]

    def safe_at(self, sparsity: float) -> bool | None:
        """Whether a sparsity is safe on all tasks that dense attention does; None if that is not known."""
        return _all_safe([found.get(sparsity) for found in self.outcomes.values()])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {
            task: {str(s): asdict(difference) for s, difference in found.items()}
            for task, found in self.differences.items()
        }
        outcomes = {task: {str(s): safe for s, safe in found.items()} for task, found in self.outcomes.items()}
        return {**asdict(self), "outcomes": outcomes, "differences": plain}


def paired_test(
    sparse: Sequence[float],
    dense: Sequence[float],
    tolerance: float = 0.05,
    alpha: float = 0.05,
    graded: bool | None = None,
) -> Difference:
    """Test prompt by prompt whether accuracy falls by less than a tolerance, at a level that holds for any number.

    If it falls by the tolerance or more, at least that share of all prompts is lost. For scores of 0 and 1 the number
    of lost prompts is therefore tested with the exact binomial distribution; prompts that are won do not count. Graded
    scores are tested by betting [Waudby-Smith & Ramdas, 2024, JRSS B 86(1), arXiv 2010.09686]: whoever stakes a share c
    of a capital on each prompt in turn, which pays ``y / (1 − tolerance)`` for ``y = 1 + sparse − dense``, gains
    nothing on average if accuracy falls by the tolerance, so that the inverse of the capital is a p-value. The capital
    is the mean over 32 stakes.

    Parameters
    ----------
    sparse, dense
        Scores from 0 to 1; the same place is the same prompt.
    tolerance
        Loss that is accepted, in accuracy, in [0, 1).
    alpha
        Level of the one-sided bound.
    graded
        Whether scores lie between 0 and 1 as well; by default as they are.

    Raises
    ------
    ConfigurationError
        If the lengths differ or there is no prompt, or a number is out of range.

    Examples
    --------
    >>> paired_test([1.0] * 59, [1.0] * 59).p_value < 0.05 < paired_test([1.0] * 58, [1.0] * 58).p_value
    True
    """
    if len(sparse) != len(dense) or not len(sparse):
        raise ConfigurationError(f"{len(sparse)} and {len(dense)} scores; give one of each for one or more prompts")
    _check(tolerance, alpha)
    difference = np.asarray(sparse, dtype=np.float64) - np.asarray(dense, dtype=np.float64)
    if graded is None:
        graded = _is_graded([*sparse, *dense])
    low, p_value = _by_betting(difference, tolerance, alpha) if graded else _by_counting(difference, tolerance, alpha)
    return Difference(float(difference.mean()), low, p_value)


def prompts_needed(tolerance: float = 0.05, alpha: float = 0.05, tasks: int = 1, graded: bool = False) -> int:
    """The fewest prompts a task with which :func:`paired_test` can call anything safe, corrected for several tasks.

    Raises
    ------
    ConfigurationError
        If the tolerance is 0, so that no number is enough, or a number is out of range.

    Examples
    --------
    >>> prompts_needed(), prompts_needed(tasks=4), prompts_needed(graded=True)
    (59, 86, 88)
    """
    _check(tolerance, alpha)
    if tolerance == 0 or tasks < 1:
        raise ConfigurationError(f"tolerance is {tolerance} and tasks {tasks}; they must be above 0 and 1 or more")
    count = max(1, math.ceil(math.log(alpha / tasks) / math.log1p(-tolerance)))
    while _least_p(count, tolerance, graded) > alpha / tasks:
        count += 1
    return count


def holm(p_values: Mapping[str, float], alpha: float = 0.05) -> set[str]:
    """Names of the hypotheses that are rejected, so that any false rejection has a chance of `alpha` at most.

    Source: Holm [1979, Scandinavian Journal of Statistics 6(2), pages 65-70].
    """
    rejected: set[str] = set()
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > alpha / (len(p_values) - place):
            break
        rejected.add(name)
    return rejected


def max_safe_sparsity(
    frontier: Frontier, alpha: float = 0.05, tolerance: float = 0.05, able: float = 0.5
) -> list[SafeSparsity]:
    """The largest safe sparsity of every method in every model at every length, for each task and for all.

    Sparsities are tested from the lowest upwards and the first that is not safe ends it: an unsafe one is not redeemed
    by a luckier one above it. Holm's correction runs over the tasks at each sparsity.

    Parameters
    ----------
    frontier
        Of :func:`~gossamer.measure.long_context.frontier.frontier`.
    alpha, tolerance
        As in :func:`paired_test`.
    able
        Accuracy of dense attention from which on a task says anything.
    """
    graded = {
        task: _is_graded([score for row in frontier.where(task=task).rows for score in row.scores])
        for task in frontier.values("task")
    }
    found = []
    for model in frontier.values("model"):
        for length in frontier.where(model=model).values("length"):
            part = frontier.where(model=model, length=length)
            judge = _Judge(part, graded, alpha, tolerance, able)
            found += [judge.safe(method) for method in part.values("method") if method != DENSE]
    return found


@dataclass(frozen=True)
class _Judge:
    """Judges the methods in a model at a length."""

    part: Frontier
    graded: Mapping[str, bool]
    alpha: float
    tolerance: float
    able: float

    def safe(self, method: str) -> SafeSparsity:
        mine = self.part.where(method=method)
        first, left_out = mine.rows[0], {}
        outcomes: dict[str, dict[float, bool | None]] = {}
        for task in mine.values("task"):
            dense = self.part.where(task=task, method=DENSE).accuracy
            if dense >= self.able:
                outcomes[task] = {}
            else:
                left_out[task] = f"dense attention scores {dense:.2f}, below {self.able:g}"
        differences: dict[str, dict[float, Difference]] = {task: {} for task in outcomes}
        for sparsity in sorted(mine.values("sparsity")):
            rows = {row.task: row for row in mine.where(sparsity=sparsity).rows if row.task in outcomes}
            for task, found in self._differences(rows).items():
                differences[task][sparsity] = found
            at_once = {task: found[sparsity] for task, found in differences.items() if sparsity in found}
            safe = holm({task: found.p_value for task, found in at_once.items()}, self.alpha)
            for task, row in rows.items():
                now = self._outcome(row, at_once.get(task), task in safe, len(at_once))
                outcomes[task][sparsity] = _all_safe([*outcomes[task].values(), now])
        tasks = {}
        for task, judged in outcomes.items():
            largest = _largest(judged)
            if largest is None:
                left_out[task] = self._unknown(mine, task, len(outcomes))
            else:
                tasks[task] = largest
        together = {s: _all_safe([found.get(s) for found in outcomes.values()]) for s in mine.values("sparsity")}
        return SafeSparsity(
            first.model, method, first.phase, first.length, tasks, _largest(together), outcomes, left_out, differences
        )

    def _differences(self, rows: Mapping[str, Row]) -> dict[str, Difference]:
        found = {}
        for task, row in rows.items():
            twin = self.part.dense_twin(row)
            if twin is not None and row.scores:
                found[task] = paired_test(row.scores, twin.scores, self.tolerance, self.alpha, self.graded[task])
        return found

    def _outcome(self, row: Row, found: Difference | None, safe: bool, tasks: int) -> bool | None:
        if found is None:
            return None  # the method cannot go there
        if safe or found.mean <= -self.tolerance:
            return safe
        hopeless = _least_p(len(row.scores), self.tolerance, self.graded[row.task]) > self.alpha / tasks
        return None if hopeless else False

    def _unknown(self, mine: Frontier, task: str, tasks: int) -> str:
        count = max(len(row.scores) for row in mine.where(task=task).rows)
        if not count:
            return "the method cannot go there"
        if not self.tolerance:
            return "no number of prompts shows that nothing at all is lost"
        needed = prompts_needed(self.tolerance, self.alpha, tasks, self.graded[task])
        return f"{count} prompts cannot tell; {needed} are needed"


def _all_safe(outcomes: Sequence[bool | None]) -> bool | None:
    """False if any is, else None if any is or there are none, else True."""
    if False in outcomes:
        return False
    return None if None in outcomes or not outcomes else True


def _largest(outcomes: Mapping[float, bool | None]) -> float | None:
    """Largest safe sparsity; 0 if the lowest is not safe, None if that is not known."""
    safe = [sparsity for sparsity, outcome in outcomes.items() if outcome]
    return max(safe) if safe else 0.0 if outcomes and outcomes[min(outcomes)] is False else None


def _by_counting(difference: np.ndarray, tolerance: float, alpha: float) -> tuple[float, float]:
    """Lower bound and p-value by the exact binomial distribution of the prompts that are lost."""
    count, lost = len(difference), int((difference < 0).sum())
    most = 1.0 if lost == count else float(beta.ppf(1 - alpha, lost + 1, count - lost))  # Clopper and Pearson's
    return -most, float(binom.cdf(lost, count, tolerance))


def _by_betting(difference: np.ndarray, tolerance: float, alpha: float) -> tuple[float, float]:
    """Lower bound and p-value of a mean by the capital of a bet that it is higher."""
    paid = 1 + difference
    low, high = 0.0, float(paid.mean())
    for _ in range(30 if high > 0 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if _capital(paid, middle) >= -math.log(alpha) else (low, middle)
    return low - 1, math.exp(min(0.0, -_capital(paid, 1 - tolerance)))


def _capital(paid: np.ndarray, mean: float) -> float:
    """Logarithm of what 1 becomes if every prompt pays its value over the mean of the hypothesis."""
    gains = np.log1p(_STAKES[:, None] * (paid / mean - 1)).sum(1)
    return float(np.logaddexp.reduce(gains)) - math.log(len(_STAKES))


def _least_p(count: int, tolerance: float, graded: bool) -> float:
    """The p-value of equal answers to all prompts."""
    return math.exp(-_capital(np.ones(count), 1 - tolerance)) if graded else (1 - tolerance) ** count


def _is_graded(scores: Sequence[float]) -> bool:
    return any(score not in (0, 1) for score in scores)


def _check(tolerance: float, alpha: float) -> None:
    if not 0 < alpha < 1 or not 0 <= tolerance < 1:
        raise ConfigurationError(f"alpha is {alpha} and tolerance {tolerance}; they must be in (0, 1) and [0, 1)")

"""The largest sparsity at which accuracy is kept, with a statistical guarantee.

Sparse and dense attention answer the same prompts, so the difference of their scores is resampled prompt by prompt. A
sparsity is safe on a task if the lower bound of that difference lies above −tolerance. Several tasks are several
chances to be wrong, which Holm's procedure takes into account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.frontier import DENSE, Frontier, Row


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
        Task → largest sparsity that is safe; 0 if none is.
    everywhere
        Largest sparsity that is safe on all tasks at once.
    differences
        Task → sparsity → difference from dense.
    """

    model: str
    method: str
    phase: str
    length: int
    tasks: Mapping[str, float]
    everywhere: float
    differences: Mapping[str, Mapping[float, Difference]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = {
            task: {str(s): asdict(difference) for s, difference in found.items()}
            for task, found in self.differences.items()
        }
        return {**asdict(self), "differences": plain}


def paired_bootstrap(
    sparse: Sequence[float],
    dense: Sequence[float],
    tolerance: float = 0.05,
    alpha: float = 0.05,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Test by resampling prompts whether accuracy has fallen by less than a tolerance.

    Parameters
    ----------
    sparse, dense
        Scores; the same place is the same prompt.
    tolerance
        Loss that is accepted, in accuracy.
    alpha
        Level of the one-sided bound.
    resamples, seed
        How often prompts are drawn with replacement, and by which generator.

    Raises
    ------
    ConfigurationError
        If the lengths differ or there are fewer than two prompts, or a number is out of range.
    """
    if len(sparse) != len(dense) or len(sparse) < 2:
        raise ConfigurationError(f"{len(sparse)} and {len(dense)} scores; give one of each for two or more prompts")
    if not 0 < alpha < 1 or tolerance < 0 or resamples < 1:
        raise ConfigurationError(
            f"alpha is {alpha}, tolerance {tolerance}, resamples {resamples}; they must be in (0, 1), 0 or more, 1 or "
            "more"
        )
    difference = np.asarray(sparse, dtype=np.float64) - np.asarray(dense, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(difference), size=(resamples, len(difference)))
    means = difference[drawn].mean(1)
    p_value = (1 + int((means <= -tolerance + 1e-12).sum())) / (1 + resamples)
    return Difference(float(difference.mean()), float(np.quantile(means, alpha)), p_value)


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
    frontier: Frontier, alpha: float = 0.05, tolerance: float = 0.05, resamples: int = 2000, seed: int = 0
) -> list[SafeSparsity]:
    """The largest safe sparsity of every method in every model at every length, for each task and for all.

    Sparsities are tested from the lowest upwards and the first that is not safe ends it: an unsafe one is not redeemed
    by a luckier one above it. Holm's correction runs over the tasks at each sparsity.

    Parameters
    ----------
    frontier
        Of :func:`~gossamer.measure.long_context.frontier.frontier`.
    alpha, tolerance, resamples, seed
        As in :func:`paired_bootstrap`.
    """
    found = []
    for model in frontier.values("model"):
        for length in frontier.where(model=model).values("length"):
            part = frontier.where(model=model, length=length)
            for method in part.values("method"):
                if method != DENSE:
                    found.append(_safe(part, part.where(method=method), alpha, tolerance, resamples, seed))
    return found


def _safe(part: Frontier, mine: Frontier, alpha: float, tolerance: float, resamples: int, seed: int) -> SafeSparsity:
    first = mine.rows[0]
    tasks = mine.values("task")
    differences: dict[str, dict[float, Difference]] = {task: {} for task in tasks}
    largest = dict.fromkeys(tasks, 0.0)
    alive, everywhere, whole = set(tasks), 0.0, True
    for sparsity in sorted(mine.values("sparsity")):
        rows = {row.task: row for row in mine.where(sparsity=sparsity).rows}
        for task, row in rows.items():
            found = _difference(part, row, alpha, tolerance, resamples, seed)
            if found is not None:
                differences[task][sparsity] = found
        safe = holm({t: differences[t][sparsity].p_value for t in rows if sparsity in differences[t]}, alpha)
        alive &= safe
        largest.update(dict.fromkeys(alive, sparsity))
        whole = whole and alive == set(tasks)
        everywhere = sparsity if whole else everywhere
    return SafeSparsity(first.model, first.method, first.phase, first.length, largest, everywhere, differences)


def _difference(
    part: Frontier, row: Row, alpha: float, tolerance: float, resamples: int, seed: int
) -> Difference | None:
    twin = part.dense_twin(row)
    if twin is None or not row.scores:
        return None
    return paired_bootstrap(row.scores, twin.scores, tolerance, alpha, resamples, seed)

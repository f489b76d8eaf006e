"""What the experiments have in common that set one-shot pruners side by side on a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gossamer.papers.experiment import Observation
from gossamer.papers.statistics import Interval, paired_difference


def case(method: str, sparsity: float | str, **options: Any) -> list[Any]:
    """A case in the form that a budget keeps: label, method, options. A sparsity may be an N:M pattern."""
    where = {"pattern": sparsity} if isinstance(sparsity, str) else {"sparsity": sparsity}
    extra = "".join(f" {name}={value}" for name, value in options.items())
    return [f"{method}{extra} at {sparsity}", method, {**where, **options}]


def gap(observations: Sequence[Observation], worse: str, better: str, measure: str = "nll") -> Interval:
    """How much the first case lies above the second, paired by seed, with its interval."""
    first, second = ([o["points"][label][measure] for o in observations] for label in (worse, better))
    return paired_difference(first, second)


def mean(observations: Sequence[Observation], label: str, measure: str = "nll") -> float:
    """Mean of a measure over the seeds."""
    return sum(o["points"][label][measure] for o in observations) / len(observations)

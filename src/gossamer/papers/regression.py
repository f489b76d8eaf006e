"""Least squares with intervals, for the question of what a gap depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.papers.statistics import Interval, t_quantile


def linear_regression(
    rows: Sequence[Mapping[str, float]], predictors: Sequence[str], outcome: str, confidence: float = 0.95
) -> dict[str, Interval]:
    """Fit ``outcome = c₀ + Σ cᵢ · predictorᵢ``.

    Parameters
    ----------
    rows
        Observations, taken as independent with errors of one variance.
    predictors, outcome
        Names in the rows.
    confidence
        Level of the intervals, in (0, 1).

    Returns
    -------
    dict of str to Interval
        Coefficient of each predictor, and ``"intercept"``.

    Raises
    ------
    ConfigurationError
        If there are no more rows than coefficients, or predictors do not vary independently.
    """
    design = np.array([[1.0, *(row[name] for name in predictors)] for row in rows], dtype=np.float64)
    measured = np.array([row[outcome] for row in rows], dtype=np.float64)
    count = len(predictors) + 1
    if len(rows) <= count:
        raise ConfigurationError(f"{len(rows)} rows cannot determine {count} coefficients and their errors; add rows")
    if np.linalg.matrix_rank(design) < count:
        raise ConfigurationError(f"of {', '.join(predictors)} one follows from the others; leave it out or vary it")
    inverse = np.linalg.inv(design.T @ design)
    solved = inverse @ design.T @ measured
    variance = np.square(measured - design @ solved).sum() / (len(rows) - count)
    halves = t_quantile(0.5 + confidence / 2, len(rows) - count) * np.sqrt(variance * np.diag(inverse))
    names = ("intercept", *predictors)
    return {
        name: Interval(float(value), float(value - half), float(value + half), confidence)
        for name, value, half in zip(names, solved, halves)
    }

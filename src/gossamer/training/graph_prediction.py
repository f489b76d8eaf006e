"""How a graph's numbers relate to the accuracy of the network with its wiring, and whether they foretell it.

The rows of :func:`gossamer.training.graph_study.structure_study` are related to one of their results: by correlation,
feature by feature, and by a regression that predicts the result of graphs which it has not seen. How much of that is
chance is what the same regression finds after the results have been shuffled over the graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.errors import ConfigurationError, MissingDependencyError, NonFiniteError, UnknownNameError

Rows = Sequence[Mapping[str, float]]
REGRESSORS = ("bayesian ridge", "random forest", "adaboost")
_FEWEST = 3  # rows a fold is trained on


def feature_correlations(rows: Rows, features: Sequence[str], result: str) -> dict[str, float]:
    """Pearson correlation of each feature with a result; features that are the same everywhere are left out.

    Raises
    ------
    ConfigurationError
        If there are fewer than three rows, or a row lacks a column.
    NonFiniteError
        If a number is NaN or infinite.
    """
    table, wanted = _table(rows, features, result)
    found = {}
    for name, column in zip(features, table.T):
        if np.ptp(column) > 0 and np.ptp(wanted) > 0:
            found[name] = float(np.corrcoef(column, wanted)[0, 1])
    return found


@dataclass(frozen=True)
class Prediction:
    """How well a regression foretells a result.

    Attributes
    ----------
    r2
        Share of the variance that predictions of graphs not seen explain: 0 for predicting the mean, 1 if perfect.
    shuffled
        The same after results have been shuffled over the graphs, once for each permutation.
    """

    r2: float
    shuffled: tuple[float, ...]

    @property
    def p(self) -> float:
        """Probability of an R² as high under shuffling: (1 + number as high) / (1 + permutations)."""
        return (1 + sum(value >= self.r2 for value in self.shuffled)) / (1 + len(self.shuffled))


def predict_result(
    rows: Rows,
    features: Sequence[str],
    result: str,
    regressor: str = "random forest",
    folds: int = 5,
    permutations: int = 99,
    trees: int = 50,
    seed: int = 0,
) -> Prediction:
    """Predict a result from the features, each graph by a regression that has not seen it, and test against chance.

    Parameters
    ----------
    rows
        One a graph.
    features, result
        Columns to predict from, and to predict.
    regressor
        ``"random forest"``, ``"adaboost"`` or ``"bayesian ridge"``, as scikit-learn has them; features are scaled to
        [0, 1] on what the regression may see.
    folds
        Parts, each predicted by a regression on the others; at least 2.
    permutations
        How often the results are shuffled for the test; 0 for no test.
    trees
        Of a random forest, and at most of AdaBoost.
    seed
        Of folds, regressors and shuffles.

    Raises
    ------
    MissingDependencyError
        If scikit-learn is not installed.
    UnknownNameError
        If there is no such regressor.
    ConfigurationError
        If there are too few rows for the folds, a row lacks a column, or the result is the same everywhere.
    NonFiniteError
        If a number is NaN or infinite.
    """
    if regressor not in REGRESSORS:
        raise UnknownNameError("regressor", regressor, REGRESSORS)
    table, wanted = _table(rows, features, result)
    if folds < 2 or permutations < 0 or trees < 1 or len(wanted) - -(-len(wanted) // max(folds, 1)) < _FEWEST:
        raise ConfigurationError(
            f"folds is {folds}, permutations {permutations} and trees {trees} for {len(wanted)} graphs; at least 2 "
            f"folds, each leaving {_FEWEST} graphs, 0 permutations and 1 tree are needed"
        )
    if np.ptp(wanted) == 0:
        raise ConfigurationError(f"{result} is {wanted[0]:g} for every graph; there is nothing to predict")
    generator = np.random.default_rng(seed)
    parts = np.array_split(generator.permutation(len(wanted)), folds)
    model = _regressor(regressor, trees, seed)
    r2 = _held_out_r2(model, table, wanted, parts)
    shuffles = (generator.permutation(wanted) for _ in range(permutations))
    return Prediction(r2, tuple(_held_out_r2(model, table, each, parts) for each in shuffles))


def _held_out_r2(model: Any, table: np.ndarray, wanted: np.ndarray, parts: list[np.ndarray]) -> float:
    """Errors of held-out predictions over those of the mean of what the regression saw, taken from 1."""
    errors = of_mean = 0.0
    for held_out in parts:
        seen = np.setdiff1d(np.arange(len(wanted)), held_out)
        low, high = table[seen].min(0), table[seen].max(0)
        scaled = (table - low) / np.where(high > low, high - low, 1)
        model.fit(scaled[seen], wanted[seen])
        errors += float(np.square(wanted[held_out] - model.predict(scaled[held_out])).sum())
        of_mean += float(np.square(wanted[held_out] - wanted[seen].mean()).sum())
    return 1 - errors / of_mean


def _regressor(name: str, trees: int, seed: int) -> Any:
    try:
        from sklearn.ensemble import AdaBoostRegressor, RandomForestRegressor
        from sklearn.linear_model import BayesianRidge
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "graphs", "predicting accuracy from graphs") from error
    if name == "bayesian ridge":
        return BayesianRidge()
    if name == "adaboost":
        return AdaBoostRegressor(n_estimators=trees, random_state=seed)
    return RandomForestRegressor(n_estimators=trees, random_state=seed)


def _table(rows: Rows, features: Sequence[str], result: str) -> tuple[np.ndarray, np.ndarray]:
    if len(rows) < 3 or not features:
        raise ConfigurationError(f"{len(rows)} graphs and {len(features)} features; at least 3 and 1 are needed")
    for column in (*features, result):
        if any(column not in row for row in rows):
            raise ConfigurationError(f"a row has no column {column!r}; it has: {', '.join(rows[0])}")
    table = np.array([[row[name] for name in features] for row in rows], dtype=np.float64)
    wanted = np.array([row[result] for row in rows], dtype=np.float64)
    if not (np.isfinite(table).all() and np.isfinite(wanted).all()):
        raise NonFiniteError(f"a feature or {result} is NaN or infinite; leave out the graph it comes from")
    return table, wanted

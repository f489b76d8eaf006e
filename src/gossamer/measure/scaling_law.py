"""Scaling laws: from a few runs to the loss of those that nobody has made.

Chinchilla's law (Hoffmann et al., 2022, arXiv 2203.15556) splits a loss into what no model can avoid, what more
parameters would save, and what more text would save. Jin et al. (2025, arXiv 2501.12486) put the average number of
active parameters over the run in the place of the number at its end, and the same law then covers models that were
pruned while they trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from gossamer.errors import ConfigurationError, NonFiniteError, UnknownNameError

PARAMETERS = ("E", "A", "alpha", "B", "beta")
_EXPONENTS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
_FLOORS = (0.05, 0.3, 0.6, 0.9)  # of the lowest loss
_STEEPEST = 5.0  # exponent: beyond it a term is a step between two sizes, and no power of them
_STARTS = 4  # of the grid, from which the search goes on
_SMOOTH = 30.0  # times δ: the first search, in which nearly every run counts by its square


@dataclass(frozen=True)
class LawFit:
    """``L(N, D) = E + A / N^alpha + B / D^beta``, fitted.

    Attributes
    ----------
    E, A, alpha, B, beta
        Of the law; N in parameters and D in tokens, as they were given.
    intervals
        Parameter → ends of its interval, by resampling the runs; empty if that was not asked for.
    objective
        Mean Huber loss of the logarithms at the optimum.
    runs
        How many were fitted.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    objective: float = 0.0
    runs: int = 0

    def predict(self, parameters: Any, tokens: Any) -> Any:
        """Loss of models with so many (average) parameters on so many tokens; numbers or arrays."""
        return self.E + self.A / np.asarray(parameters) ** self.alpha + self.B / np.asarray(tokens) ** self.beta

    def score(self, parameters: Any, tokens: Any, losses: Any) -> float:
        """R²: the share of the variance of the losses that the law explains; negative if it is worse than the mean."""
        losses = np.asarray(losses, dtype=np.float64)
        residual = np.square(losses - self.predict(parameters, tokens)).sum()
        return float(1 - residual / np.square(losses - losses.mean()).sum())

    def relative_error(self, parameters: Any, tokens: Any, losses: Any) -> float:
        """Mean of ``|predicted − measured| / measured``."""
        losses = np.asarray(losses, dtype=np.float64)
        return float((np.abs(self.predict(parameters, tokens) - losses) / losses).mean())

    def best_split(self, compute: float) -> tuple[float, float]:
        """Parameters and tokens of the dense model of least loss for so many operations, ``C = 6 N D``."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        parameters = (ratio * (compute / 6) ** self.beta) ** (1 / (self.alpha + self.beta))
        return parameters, compute / (6 * parameters)


def fit_scaling_law(
    runs: Mapping[str, Sequence[float]] | Sequence[Mapping[str, float]] | Any,
    n_col: str = "n_avg",
    d_col: str = "tokens",
    loss_col: str = "loss",
    *,
    delta: float = 1e-3,
    resamples: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> LawFit:
    """Fit the law to runs, by Huber's loss on logarithms.

    ``Σ Huber_δ(log(exp(a − α log N) + exp(b − β log D) + exp(e)) − log L)`` is minimised with L-BFGS, from the best
    points of a grid of exponents and floors; ``A = exp(a)``, ``B = exp(b)``, ``E = exp(e)``, so that no loss below E
    can break a logarithm (Hoffmann et al., 2022, section 3.3). Exponents stay between 0 and 5: where the data ask for
    others, because size or text make no difference in them, the best point of the grid stands.

    Parameters
    ----------
    runs
        Columns by name: a mapping, a sequence of rows, or a data frame.
    n_col, d_col, loss_col
        Names of the columns: parameters, tokens and loss, all positive.
    delta
        Where Huber's loss turns from squares to absolute values.
    resamples
        How many samples of the runs, with replacement, give the intervals; 0 for none.
    confidence
        Level of the intervals, in (0, 1).
    seed
        Of the resampling.

    Returns
    -------
    LawFit

    Raises
    ------
    ConfigurationError
        If there are fewer runs than the law has parameters, fewer than three sizes or three budgets, or a number is
        out of range.
    UnknownNameError
        If there is no such column.
    NonFiniteError
        If a value is not finite.
    """
    columns = [_column(runs, name) for name in (n_col, d_col, loss_col)]
    _check(columns, (n_col, d_col, loss_col), delta, resamples, confidence)
    logs = tuple(torch.from_numpy(np.log(column)) for column in columns)
    best, objective = _fit(logs, _grid(columns)[:_STARTS], delta)
    intervals: dict[str, tuple[float, float]] = {}
    if resamples:
        drawn = _resampled(logs, best, delta, resamples, seed)
        ends = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0)
        intervals = {name: (float(ends[0, i]), float(ends[1, i])) for i, name in enumerate(PARAMETERS)}
    return LawFit(**_named(best), intervals=intervals, objective=objective / len(logs[0]), runs=len(logs[0]))


def _column(runs: Any, name: str) -> np.ndarray:
    if isinstance(runs, Sequence) and not isinstance(runs, str):
        known = sorted(set.intersection(*(set(row) for row in runs))) if runs else []
        values = [row[name] for row in runs if name in row] if name in known or not runs else None
    else:
        known = list(runs.keys())
        values = runs[name] if name in known else None
    if values is None:
        raise UnknownNameError("column", name, [str(each) for each in known])
    return np.asarray(values, dtype=np.float64)


def _check(columns: list[np.ndarray], names: tuple[str, ...], delta: float, resamples: int, confidence: float) -> None:
    for column, name in zip(columns, names):
        if not np.isfinite(column).all():
            raise NonFiniteError(f"{name} holds {column[~np.isfinite(column)][0]}; leave out the run it comes from")
        if (column <= 0).any():
            raise ConfigurationError(f"{name} holds {column.min():g}; parameters, tokens and losses are above 0")
    count = len(columns[0])
    if count < len(PARAMETERS):
        raise ConfigurationError(f"{count} runs cannot determine the {len(PARAMETERS)} parameters of the law; add runs")
    for column, name in zip(columns[:2], names):
        if len(np.unique(column)) < 3:
            raise ConfigurationError(
                f"{name} takes {len(np.unique(column))} values; a power and a floor need at least 3: vary it more"
            )
    if not delta > 0 or resamples < 0 or not 0 < confidence < 1:
        raise ConfigurationError(
            f"delta, resamples and confidence are {delta}, {resamples} and {confidence}; they must be above 0, not "
            f"below 0, and in (0, 1)"
        )


def _grid(columns: list[np.ndarray]) -> list[torch.Tensor]:
    """Starting points ``(a, α, b, β, e)``, best first: for given exponents and floor the rest is least squares."""
    parameters, tokens, losses = columns
    found = []
    for alpha, beta, floor in itertools.product(_EXPONENTS, _EXPONENTS, _FLOORS):
        lowest = floor * losses.min()
        design = np.stack([parameters**-alpha, tokens**-beta], axis=1)
        scale = design.max(axis=0)
        solved = np.linalg.lstsq(design / scale / losses[:, None], (losses - lowest) / losses, rcond=None)[0]
        # a negative share of the loss has no logarithm: a thousandth of it stands in
        positive = np.maximum(solved, 1e-3 * lowest) / scale
        error = np.square(np.log((lowest + design @ positive) / losses)).sum()
        point = [math.log(positive[0]), alpha, math.log(positive[1]), beta, math.log(lowest)]
        found.append((error, point))
    return [torch.tensor(point, dtype=torch.float64) for _, point in sorted(found)]


def _fit(logs: tuple[torch.Tensor, ...], starts: Sequence[torch.Tensor], delta: float) -> tuple[torch.Tensor, float]:
    """The best of the searches from all starts, and its objective."""
    smooth = _objective(logs, _SMOOTH * delta)
    valleys: list[torch.Tensor] = []
    for point in (_search(smooth, start, logs) for start in starts):
        if not any(torch.allclose(point, other, rtol=1e-3, atol=1e-3) for other in valleys):
            valleys.append(point)
    exact = _objective(logs, delta)
    found = [_search(exact, point, logs) for point in valleys]
    best = min(found, key=lambda point: exact(point)[0])
    return best, exact(best)[0]


Objective = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


def _objective(logs: tuple[torch.Tensor, ...], delta: float) -> Objective:
    """Sum of Huber's loss of a point ``(a, α, b, β, e)``, and its gradient."""
    log_n, log_d, log_loss = logs

    def evaluate(point: torch.Tensor) -> tuple[float, torch.Tensor]:
        a, alpha, b, beta, e = point
        terms = torch.stack([a - alpha * log_n, b - beta * log_d, e.expand_as(log_n)])
        residual = torch.logsumexp(terms, 0) - log_loss
        size = residual.abs()
        values = torch.where(size <= delta, residual.square() / 2, delta * (size - delta / 2))
        slope = residual.clamp(-delta, delta) * torch.softmax(terms, 0)
        gradient = torch.stack(
            [slope[0].sum(), -(slope[0] @ log_n), slope[1].sum(), -(slope[1] @ log_d), slope[2].sum()]
        )
        return float(values.sum()), gradient

    return evaluate


def _search(objective: Objective, start: torch.Tensor, logs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """L-BFGS, in coordinates in which a term and its exponent do not pull at each other."""
    centre_n, centre_d = logs[0].mean(), logs[1].mean()
    back = torch.eye(5, dtype=torch.float64)  # from (value of the term at the centre, exponent) to (a, α)
    back[0, 1], back[2, 3] = centre_n, centre_d
    scale = float(objective(start)[0]) or 1.0
    point = torch.nn.Parameter(torch.linalg.solve(back, start))
    optimiser = torch.optim.LBFGS(
        [point],
        max_iter=150,
        max_eval=300,
        tolerance_grad=1e-10,
        tolerance_change=1e-13,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, gradient = objective(back @ point.detach())
        point.grad = back.T @ gradient / scale
        return value / scale

    optimiser.step(closure)
    found = back @ point.detach()
    lawful = bool(torch.isfinite(found).all()) and all(0 < float(found[place]) < _STEEPEST for place in (1, 3))
    return found if lawful and objective(found)[0] <= scale else start


def _resampled(
    logs: tuple[torch.Tensor, ...], best: torch.Tensor, delta: float, resamples: int, seed: int
) -> np.ndarray:
    """Parameters of the law for samples of the runs that still determine it, ``(resamples, 5)``."""
    generator = np.random.default_rng(seed)
    drawn: list[list[float]] = []
    while len(drawn) < resamples:
        rows = generator.integers(len(logs[0]), size=len(logs[0]))
        sample = tuple(column[rows] for column in logs)
        if min(len(torch.unique(column)) for column in sample[:2]) >= 3:
            drawn.append(list(_named(_fit(sample, [best], delta)[0]).values()))
    return np.array(drawn)


def _named(point: torch.Tensor) -> dict[str, float]:
    a, alpha, b, beta, e = point.tolist()
    return {"E": math.exp(e), "A": math.exp(a), "alpha": alpha, "B": math.exp(b), "beta": beta}

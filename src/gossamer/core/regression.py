"""Linear maps from one set of vectors to another, by least squares, and how much of a variance they explain.

Activations of a model are badly scaled: a few of their dimensions are hundreds of times larger than the others. Least
squares in float32 loses the small ones, so sums are taken in float64, a chunk of the rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, NonFiniteError

_ROWS = 8192  # that are turned into float64 at a time


@dataclass(frozen=True, eq=False)
class LinearMap:
    """``y ≈ x · weight + intercept``.

    Attributes
    ----------
    weight
        ``(inputs, outputs)`` float64.
    intercept
        ``(outputs,)`` float64.
    """

    weight: Tensor
    intercept: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs ``(rows, outputs)`` of ``(rows, inputs)``, in the dtype of `x`; computed in float64."""
        parts = [part.double() @ self.weight + self.intercept for part in x.split(_ROWS)]
        return torch.cat(parts).to(x.dtype) if parts else x.new_zeros(0, self.weight.shape[1])


def fit_linear(x: Tensor, y: Tensor, ridge: float = 0.0, intercept: bool = False, cutoff: float = 1e-9) -> LinearMap:
    """Least squares of `y` on `x`.

    Parameters
    ----------
    x
        ``(rows, inputs)``, of any floating type.
    y
        ``(rows, outputs)`` or ``(rows,)``.
    ridge
        Weight of the squared length of the map, in units of the mean square of the inputs times their number of rows;
        0 for none.
    intercept
        Whether there is a constant besides.
    cutoff
        Singular values of `x` below this share of the largest count as zero. What normal equations in float64 cannot
        tell from rounding, below about 1e-8, counts as zero too.

    Returns
    -------
    LinearMap
        Of all solutions, the one of least length.

    Raises
    ------
    ConfigurationError
        If shapes do not fit, there are no rows, or the ridge is negative.
    NonFiniteError
        If a value is NaN or infinite.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> fit_linear(x, x @ torch.tensor([[2.0], [3.0]])).weight.flatten().round(decimals=6).tolist()
    [2.0, 3.0]
    """
    y = y[:, None] if y.dim() == 1 else y
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or not len(x):
        raise ConfigurationError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}; give equally many rows, at least one")
    if not ridge >= 0:
        raise ConfigurationError(f"ridge is {ridge}; it must be 0 or more")
    x_mean, y_mean = _means(x, y) if intercept else (x.new_zeros((), dtype=torch.float64),) * 2
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
    for some_x, some_y in zip(x.split(_ROWS), y.split(_ROWS)):
        centred = some_x.double() - x_mean
        gram.addmm_(centred.t(), centred)
        cross.addmm_(centred.t(), some_y.double() - y_mean)
    if not bool(torch.isfinite(gram.sum() + cross.sum())):
        raise NonFiniteError("x or y holds NaN or infinity; leave out the rows that do")
    weight = _solved(gram, cross, ridge, cutoff)
    constant = y_mean - x_mean @ weight if intercept else weight.new_zeros(y.shape[1])
    return LinearMap(weight, constant)


def _means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0, dtype=torch.float64), y.mean(0, dtype=torch.float64)


def _solved(gram: Tensor, cross: Tensor, ridge: float, cutoff: float) -> Tensor:
    values, directions = torch.linalg.eigh(gram)
    floor = max(cutoff**2, len(values) * torch.finfo(torch.float64).eps) * values[-1].clamp(min=0)
    kept = values > floor
    weights = torch.where(kept, 1 / (values + ridge * gram.diagonal().mean()).where(kept, 1), 0)
    return directions @ (weights[:, None] * (directions.t() @ cross))


@dataclass(frozen=True)
class Determination:
    """Shares of a variance that guesses explain, R²; below 0 where the mean would have been a better guess.

    Attributes
    ----------
    mean
        Over the dimensions that vary, each counting alike.
    pooled
        Of all dimensions together, each counting by its variance.
    """

    mean: float
    pooled: float


def determination(y: Tensor, guess: Tensor) -> Determination:
    """R² of guesses, ``1 − Σ (y − ŷ)² / Σ (y − ȳ)²`` over the rows.

    Parameters
    ----------
    y, guess
        ``(rows, outputs)`` or ``(rows,)``, alike.

    Raises
    ------
    ConfigurationError
        If shapes differ, or there are fewer than two rows.
    """
    if y.shape != guess.shape or y.dim() not in (1, 2) or len(y) < 2:
        raise ConfigurationError(
            f"y is {tuple(y.shape)} and the guess {tuple(guess.shape)}; give two alike, of two rows or more"
        )
    y, guess = (part.double().reshape(len(part), -1) for part in (y, guess))
    left, total = (y - guess).square().sum(0), (y - y.mean(0)).square().sum(0)
    varies = total > 0
    if not bool(varies.any()):
        return Determination(0.0, 0.0)
    mean = float((1 - left[varies] / total[varies]).mean())
    return Determination(mean, float(1 - left.sum() / total.sum()))

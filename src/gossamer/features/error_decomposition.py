"""The dark matter of a sparse autoencoder: what it leaves unexplained, split into two kinds of error.

Much of the error ``e = x − x̂`` of an autoencoder, and nearly all of its length, is a linear function of the activation
itself: features that a larger dictionary would learn, and dense ones that none will. What is left after the best linear
map, the *nonlinear error*, behaves differently. It does not shrink with the dictionary, and seems to be made by the
autoencoder itself [Engels et al., 2024, arXiv 2410.14670].

>>> report = error_decomposition(x, x_hat, documents=documents)  # doctest: +SKIP
>>> print(report.table())  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.core.regression import LinearMap, determination, fit_linear
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError

MOST_TOKENS = 150_000  # to fit on, and again to score on, as in the paper
_ENOUGH = 5  # tokens for each dimension


class Autoencoder(Protocol):
    """Anything that turns activations into codes, and codes into activations."""

    def encode(self, x: Tensor) -> Any:
        """Codes of activations ``(tokens, d)``."""

    def decode(self, codes: Any) -> Tensor:
        """Activations ``(tokens, d)`` of codes."""


@torch.no_grad()
def reconstruct(sae: Autoencoder, x: Tensor, rows: int = 2048) -> Tensor:
    """What an autoencoder makes of activations ``(tokens, d)``, some rows at a time."""
    return torch.cat([sae.decode(sae.encode(part)) for part in x.split(rows)])


@dataclass(frozen=True, kw_only=True)
class ErrorScores:
    """How much of the error is a linear function of the activation, on tokens that the map was not fitted on.

    Attributes
    ----------
    r2_vec, r2_vec_pooled
        R² of the error vector, as the mean over dimensions and with all dimensions pooled.
    r2_norm
        R² of its squared length.
    r2_norm_by_length
        The same from the length of the activation alone, the baseline.
    fvu, fvu_linear, fvu_nonlinear
        Fraction of the variance that is not explained, ``Σ‖x − x̂‖² / Σ‖x − x̄‖²``, and its two parts: the second is
        that of ``x̂ + W x``, the first is what the map takes away.
    nmse, nmse_nonlinear
        Mean over tokens of ``‖x − x̂‖² / ‖x‖²``, without and with the map's help.
    tokens
        Scored.
    """

    r2_vec: float
    r2_vec_pooled: float
    r2_norm: float
    r2_norm_by_length: float
    fvu: float
    fvu_linear: float
    fvu_nonlinear: float
    nmse: float
    nmse_nonlinear: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return {field.name: getattr(self, field.name) for field in fields(ErrorScores)}


@dataclass(frozen=True, kw_only=True, eq=False)
class ErrorReport(ErrorScores):
    """The error of an autoencoder taken apart; scores leave outlier tokens out.

    Attributes
    ----------
    W
        The linear map ``(d, d)`` float64, ``e ≈ x · W``.
    shrinkage
        What reconstructions were multiplied by, about their mean, before anything else; 1 if that was not asked for.
    centre
        That mean, ``(d,)``.
    outliers
        Tokens that were left out.
    with_outliers
        The scores when they are fitted and scored too; these very scores if there are none.
    scored
        Rows that were scored, int64.
    """

    W: Tensor
    shrinkage: float
    centre: Tensor
    outliers: int
    with_outliers: ErrorScores
    scored: Tensor

    def linear_error(self, x: Tensor) -> Tensor:
        """The part of the error that is a linear function of activations, ``x · W``."""
        return LinearMap(self.W, self.W.new_zeros(()))(x)

    def parts(self, x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Linear and nonlinear error of activations and their reconstructions, ``(tokens, d)`` each."""
        linear = self.linear_error(x)
        return linear, x - rescaled(x_hat, self.centre, self.shrinkage) - linear

    def table(self) -> str:
        """The numbers, one a line, without and with outliers."""
        lines = [f"{'':20}{'outliers out':>14}{'in':>10}"]
        everything = self.with_outliers.to_dict()
        for name, value in self.to_dict().items():
            shown = (f"{number:.0f}" if name == "tokens" else f"{number:.4f}" for number in (value, everything[name]))
            lines.append("{:20}{:>14}{:>10}".format(name, *shown))
        return "\n".join(lines)


def rescaled(x_hat: Tensor, centre: Tensor, scale: float) -> Tensor:
    """Reconstructions stretched about a centre."""
    return x_hat if scale == 1 else centre.to(x_hat) + scale * (x_hat - centre.to(x_hat))


def error_decomposition(
    x: Tensor,
    x_hat: Tensor,
    *,
    documents: Tensor | None = None,
    train_frac: float = 0.5,
    ridge: float = 0.0,
    outlier: float = 10.0,
    refit_scale: bool = False,
    most: int = MOST_TOKENS,
    seed: int = 0,
) -> ErrorReport:
    """Split the error of a reconstruction into what is linear in the activation and what is not.

    ``e ≈ x · W`` and ``‖e‖² ≈ x · a + b`` are fitted by least squares on some tokens and scored on others. The signs
    are those of the paper, ``e = x − x̂``.

    Parameters
    ----------
    x, x_hat
        Activations and their reconstructions, ``(tokens, d)``. Leave out the first token of a document, which is
        unlike all others; the paper leaves out the first 200.
    documents
        For every token the number of its document, ``(tokens,)``. Tokens of one document are then on one side of the
        split, as they should be: they resemble each other.
    train_frac
        Share of the tokens, or documents, that is fitted.
    ridge
        As in :func:`gossamer.core.regression.fit_linear`.
    outlier
        Tokens whose activation is more than so many times as long as the median are left out: a handful of them can
        carry most of the variance. Scores with them are reported too.
    refit_scale
        Whether to stretch the reconstructions first, by the one number that fits best: an autoencoder trained with an
        ℓ1 penalty shrinks, which makes an error along x by construction.
    most
        Tokens that are fitted at most, and scored at most.
    seed
        Of the split.

    Raises
    ------
    ConfigurationError
        If shapes do not fit or a number is out of range.
    CalibrationError
        If there are fewer than five tokens to fit for every dimension: then a map explains noise.
    NonFiniteError
        If a value is NaN or infinite.
    """
    _check(x, x_hat, outlier, most)
    length = x.double().norm(dim=1)
    usual = length <= outlier * length.median()
    fitted, scored = split_rows(len(x), documents, train_frac, seed, most)
    enough = int(usual[fitted].sum())
    if enough < _ENOUGH * x.shape[1]:
        raise CalibrationError(
            f"{enough} tokens to fit for {x.shape[1]} dimensions; give at least {_ENOUGH * x.shape[1]}, or a map "
            "explains noise"
        )
    kept = fitted[usual[fitted]]
    centre = x_hat[kept].mean(0, dtype=torch.float64)
    shrinkage = _best_scale(x[kept], x_hat[kept], centre) if refit_scale else 1.0
    x_hat = rescaled(x_hat, centre, shrinkage)
    told = scored[usual[scored]]
    weight, scores = _scores(x, x_hat, kept, told, ridge)
    everything = scores if bool(usual.all()) else _scores(x, x_hat, fitted, scored, ridge)[1]
    return ErrorReport(
        **scores.to_dict(),
        W=weight,
        shrinkage=shrinkage,
        centre=centre,
        outliers=int((~usual).sum()),
        with_outliers=everything,
        scored=told,
    )


def split_rows(
    count: int, documents: Tensor | None, share: float, seed: int, most: int = MOST_TOKENS
) -> tuple[Tensor, Tensor]:
    """Random rows to fit on and others to score on, int64 each, ascending.

    Parameters
    ----------
    count
        Rows.
    documents
        ``(count,)``; those of one document stay together. None if every row stands for itself.
    share
        Of the documents, or rows, that are fitted; in (0, 1).
    seed
        Of the choice.
    most
        Of either kind.

    Raises
    ------
    ConfigurationError
        If the share is out of range, or `documents` has another length.
    CalibrationError
        If one side would be empty.
    """
    if not 0 < share < 1:
        raise ConfigurationError(f"train_frac is {share}; it must lie in (0, 1), such as 0.5")
    groups = torch.arange(count) if documents is None else torch.as_tensor(documents).cpu().long()
    if groups.shape != (count,):
        raise ConfigurationError(f"documents is {tuple(groups.shape)}; give a number for each of the {count} tokens")
    generator = generator_for("split of tokens", seed)
    names, place = groups.unique(return_inverse=True)
    chosen = torch.zeros(len(names), dtype=torch.bool)
    chosen[torch.randperm(len(names), generator=generator)[: round(share * len(names))]] = True
    sides = []
    for side in (chosen[place], ~chosen[place]):
        rows = side.nonzero()[:, 0]
        if not len(rows):
            raise CalibrationError(f"{len(names)} documents cannot be split in shares of {share}; give more")
        some = torch.randperm(len(rows), generator=generator)[:most]
        sides.append(rows[some].sort().values)
    return sides[0], sides[1]


def _check(x: Tensor, x_hat: Tensor, outlier: float, most: int) -> None:
    if x.dim() != 2 or x.shape != x_hat.shape:
        raise ConfigurationError(f"x is {tuple(x.shape)} and x_hat {tuple(x_hat.shape)}; both must be (tokens, d)")
    if not outlier > 1 or most < 1:
        raise ConfigurationError(f"outlier is {outlier} and most {most}; give a number above 1, and at least 1")
    for name, values in (("x", x), ("x_hat", x_hat)):
        wrong = (~torch.isfinite(values)).any(1).nonzero()
        if len(wrong):
            raise NonFiniteError(f"{name} of token {int(wrong[0])} holds NaN or infinity; the capture is damaged")


def _best_scale(x: Tensor, x_hat: Tensor, centre: Tensor) -> float:
    away, wanted = x_hat.double() - centre, x.double() - centre
    return float((away * wanted).sum() / away.square().sum().clamp(min=torch.finfo(torch.float64).tiny))


def _scores(x: Tensor, x_hat: Tensor, fitted: Tensor, scored: Tensor, ridge: float) -> tuple[Tensor, ErrorScores]:
    error = x - x_hat
    linear = fit_linear(x[fitted], error[fitted], ridge)
    squared = error.double().square().sum(1)
    length = x.double().norm(dim=1, keepdim=True)
    seen, wrong, size = x[scored], error[scored], squared[scored]
    guess = linear(seen)
    vector = determination(wrong, guess)
    total = float((seen.double() - seen.mean(0, dtype=torch.float64)).square().sum())
    left = (wrong - guess).double().square().sum(1)
    fvu, nonlinear = float(size.sum()) / total, float(left.sum()) / total
    own = seen.double().square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
    return linear.weight, ErrorScores(
        r2_vec=vector.mean,
        r2_vec_pooled=vector.pooled,
        r2_norm=_held_out(x, squared, fitted, scored, ridge),
        r2_norm_by_length=_held_out(length, squared, fitted, scored, ridge),
        fvu=fvu,
        fvu_linear=fvu - nonlinear,
        fvu_nonlinear=nonlinear,
        nmse=float((size / own).mean()),
        nmse_nonlinear=float((left / own).mean()),
        tokens=len(scored),
    )


def _held_out(x: Tensor, y: Tensor, fitted: Tensor, scored: Tensor, ridge: float = 0.0) -> float:
    """R² on other rows of a fit with an intercept."""
    found = fit_linear(x[fitted], y[fitted], ridge, intercept=True)
    return determination(y[scored], found(x[scored].double())[:, 0]).mean


def norm_predictability(
    x_hat_error: Tensor,
    predictors: Mapping[str, Tensor],
    *,
    documents: Tensor | None = None,
    train_frac: float = 0.5,
    seed: int = 0,
) -> dict[str, float]:
    """How well simpler things than the whole activation predict the squared length of an error.

    Parameters
    ----------
    x_hat_error
        Errors, or parts of them, ``(tokens, d)``.
    predictors
        Name → values, ``(tokens,)`` or ``(tokens, size)``: the number of active features, the model's loss, the length
        of the activation. Integer ``(tokens,)`` values are names, such as token ids, for each of which the mean of the
        fitted tokens is the guess.

    Returns
    -------
    dict
        Name → R² on tokens that were not fitted.
    """
    squared = x_hat_error.double().square().sum(1)
    fitted, scored = split_rows(len(squared), documents, train_frac, seed)
    found = {}
    for name, values in predictors.items():
        if values.dim() == 1 and not values.is_floating_point():
            found[name] = determination(squared[scored], _means_of(values.long(), squared, fitted)[scored]).mean
        else:
            found[name] = _held_out(values.reshape(len(squared), -1), squared, fitted, scored)
    return found


def _means_of(names: Tensor, y: Tensor, fitted: Tensor) -> Tensor:
    """For every row the mean of the fitted rows of its name, or of all if there is none."""
    count = torch.bincount(names[fitted], minlength=int(names.max()) + 1)
    total = torch.zeros(len(count), dtype=y.dtype).index_add(0, names[fitted], y[fitted])
    return torch.where(count > 0, total / count.clamp(min=1), y[fitted].mean())[names]

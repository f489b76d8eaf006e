"""Reconstruction error against the number of non-zeros: the only fair way to compare penalties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.coding.thresholding import lam_for_l0, sparse_encode
from gossamer.errors import ConfigurationError
from gossamer.kernels.pursuit import orthogonal_matching_pursuit

_SAMPLE = 2000
_RIDGE = 1e-8
_DEEPER = 4  # than the mean: as many steps of a pursuit as a signal may take
_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Point:
    """One place on a curve.

    Attributes
    ----------
    l0
        Mean non-zeros of a code.
    error
        Squared error of all signals over their squares.
    lam
        The weight of the penalty.
    """

    l0: float
    error: float
    lam: float = 0.0


def l0_error_curve(
    x: Tensor,
    dictionary: Tensor,
    penalty: str,
    targets: Sequence[float],
    *,
    refit: bool = False,
    max_iter: int = 200,
    parameters: dict[str, Any] | None = None,
    **options: Any,
) -> list[Point]:
    """Errors of codes whose weight is chosen for each number of non-zeros.

    Parameters
    ----------
    x, dictionary
        ``(signals, size)`` and ``(atoms, size)``.
    penalty
        One of :data:`gossamer.core.prox.PENALTIES` with a weight, or ``"omp"`` for orthogonal matching pursuit, which
        goes on for every signal as long as a step takes enough off its error.
    targets
        Mean non-zeros that are asked for. Weights are found on up to 2000 of the signals.
    refit
        Whether codes are replaced by the least squares fit of the atoms that they use, which takes the shrinkage of
        the l1 norm away.
    max_iter, parameters, options
        Of :func:`gossamer.coding.thresholding.sparse_encode`.

    Raises
    ------
    ConfigurationError, UnknownNameError, NonFiniteError
        As :func:`gossamer.coding.thresholding.sparse_encode`.
    """
    every = max(1, len(x) // _SAMPLE)
    sample, points = x[::every][:_SAMPLE], []
    for target in targets:
        if penalty == "omp":
            points.append(_pursued(x, dictionary, target))
            continue
        options = {"max_iter": max_iter, "parameters": parameters, **options}
        lam = lam_for_l0(sample, dictionary, penalty, target, **options)
        codes = sparse_encode(x, dictionary, penalty, lam, **options)
        points.append(point(x, dictionary, refitted(x, dictionary, codes) if refit else codes, lam))
    return points


@torch.no_grad()
def _pursued(x: Tensor, dictionary: Tensor, target: float) -> Point:
    """Every signal takes the steps at which its ``½ ‖residual‖² + λ steps`` is least; λ gives the mean."""
    depth = min(math.ceil(_DEEPER * target), *dictionary.shape)
    gains = torch.cat([_gains(part, dictionary, depth) for part in x.split(max(1, _ENTRIES // (depth * x.shape[1])))])
    saved = torch.nn.functional.pad(gains.cumsum(1), (1, 0)) / 2
    steps = torch.arange(depth + 1, dtype=torch.float64, device=x.device)
    low, high = -40.0, math.log(float(saved.max().clamp(min=1e-30)) + 1)
    for _ in range(60):
        middle = (low + high) / 2
        best = (saved - math.exp(middle) * steps).argmax(1)
        low, high = (middle, high) if float(best.double().mean()) > target else (low, middle)
    total = x.square().sum(dtype=torch.float64)
    left = total - 2 * saved.gather(1, best[:, None]).sum()
    return Point(float(best.double().mean()), float(left / total.clamp(min=1e-300)), math.exp(middle))


def _gains(x: Tensor, dictionary: Tensor, depth: int) -> Tensor:
    """By how much every step of a pursuit lowers the squared residual, ``(signals, depth)``."""
    found = orthogonal_matching_pursuit(x, dictionary, depth)
    chosen = dictionary[found.atoms].double()
    # spans are nested, so that a step gains the square along the direction that it adds
    directions = torch.linalg.qr(chosen.transpose(1, 2)).Q
    gains = torch.einsum("ndt,nd->nt", directions, x.double()).square()
    return gains.masked_fill(found.values == 0, 0)


def point(x: Tensor, dictionary: Tensor, codes: Tensor, lam: float = 0.0) -> Point:
    """Where codes lie."""
    left = (x - codes @ dictionary).square().sum(dtype=torch.float64)
    return Point(
        float((codes != 0).sum(1, dtype=torch.float64).mean()),
        float(left / x.square().sum(dtype=torch.float64).clamp(min=1e-300)),
        lam,
    )


@torch.no_grad()
def refitted(x: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    """The least squares fit of every signal by the atoms that its code uses, ``(signals, atoms)``."""
    used = codes != 0
    most = max(1, int(used.sum(1).max()) if len(used) else 1)
    parts = zip(*(part.split(max(1, _ENTRIES // (most * max(most, x.shape[1])))) for part in (x, used)), strict=True)
    return torch.cat([_refit(rows, dictionary, mask, most) for rows, mask in parts])


def _refit(x: Tensor, dictionary: Tensor, used: Tensor, most: int) -> Tensor:
    taken, atoms = used.to(torch.int8).topk(most, dim=1)
    taken = taken.bool()
    chosen = dictionary[atoms].double() * taken[:, :, None]
    gram = chosen @ chosen.transpose(1, 2)
    # places that hold no atom ask for zero, and atoms that depend on each other share
    gram.diagonal(dim1=1, dim2=2).add_(torch.where(taken, _RIDGE, 1.0))
    values = torch.linalg.solve(gram, chosen @ x.double()[:, :, None])[:, :, 0]
    found = torch.zeros(used.shape, dtype=x.dtype, device=x.device)
    return found.scatter_(1, atoms, (values * taken).to(x.dtype))


def units_needed(sizes: Sequence[int], errors: Sequence[float], target: float) -> float | None:
    """How many units reach an error, between those that were tried on a straight line of logarithms.

    Parameters
    ----------
    sizes, errors
        Of dictionaries, in ascending order of size.
    target
        The error that is to be reached.

    Returns
    -------
    float or None
        The smallest size if that reaches it already, None if the largest does not.

    Raises
    ------
    ConfigurationError
        If there is no size, or they are not in order.
    """
    if not sizes or len(sizes) != len(errors) or list(sizes) != sorted(set(sizes)):
        raise ConfigurationError(f"sizes are {list(sizes)} and errors {len(errors)}; give one each, sizes ascending")
    if errors[0] <= target:
        return float(sizes[0])
    for i in range(1, len(sizes)):
        if errors[i] <= target:
            low, high = torch.tensor([sizes[i - 1], sizes[i]], dtype=torch.float64).log()
            above, below = torch.tensor([errors[i - 1], errors[i]], dtype=torch.float64).clamp(min=1e-300).log()
            share = (above - torch.tensor(target, dtype=torch.float64).log()) / (above - below)
            return float((low + share * (high - low)).exp())
    return None

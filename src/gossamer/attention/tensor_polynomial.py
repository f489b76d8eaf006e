"""Polynomials that stand in for the exponential function, and what they cost when their argument is a sum of products.

On a bounded interval a polynomial of low degree is close to exp. If its argument is ``Σ_c q_c a_c b_c``, it is a sum
over monomials in d variables, and each monomial factors over q, a and b: attention over pairs then needs no pair.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

import numpy as np
import torch
from scipy.special import iv
from torch import Tensor

from gossamer.errors import ConfigurationError

Basis = Literal["chebyshev", "taylor"]
_HIGHEST = 200
_GRID = 2001


def exp_polynomial(bound: float, eps: float, basis: Basis = "chebyshev") -> np.ndarray:
    """Coefficients ``p_0 … p_g`` of the shortest polynomial with ``|p(x) − eˣ| ≤ eps · eˣ`` on [−bound, bound].

    Alman & Song, 2024, ICLR, arXiv 2310.04064, use Taylor's; Chebyshev's series converges faster. An error relative
    to eˣ keeps p positive, so that it can be a weight.

    Parameters
    ----------
    bound
        Largest size of the argument, at least 0.
    eps
        Relative error, in (0, 1).
    basis
        ``taylor`` (at 0) or ``chebyshev`` (a truncated series, returned in powers of x).

    Raises
    ------
    ConfigurationError
        If an argument is out of range, or the bound needs more than 200 powers or more digits than there are.
    """
    degree = required_degree(bound, eps, basis)
    return truncated_exp(bound, degree, basis)


def required_degree(bound: float, eps: float, basis: Basis = "chebyshev") -> int:
    """The smallest degree for which :func:`exp_polynomial` reaches its error, measured on a fine grid.

    It grows like ``bound`` where that is large, and like ``log(1/eps) / log(log(1/eps) / bound)`` where it is small.
    """
    if not (math.isfinite(bound) and bound >= 0) or not 0 < eps < 1:
        raise ConfigurationError(f"bound is {bound} and eps {eps}; they must be at least 0 and in (0, 1)")
    if basis not in ("chebyshev", "taylor"):
        raise ConfigurationError(f"basis is {basis!r}; it must be 'chebyshev' or 'taylor'")
    return _required_degree(float(bound), float(eps), basis)


@cache
def _required_degree(bound: float, eps: float, basis: Basis) -> int:
    previous = math.inf
    for degree in range(_HIGHEST + 1):
        error = relative_error(truncated_exp(bound, degree, basis), bound)
        if error <= eps:
            return degree
        # from here on the sum of large terms of both signs has lost all of its digits
        if degree > 2 * bound + 20 and error >= previous:
            break
        previous = error
    raise ConfigurationError(
        f"no polynomial reaches a relative error of {eps:g} of exp on [-{bound:g}, {bound:g}] in double precision; "
        f"allow a larger eps or make entries smaller"
    )


def truncated_exp(bound: float, degree: int, basis: Basis = "chebyshev") -> np.ndarray:
    """Coefficients in powers of x of the series of eˣ on [−bound, bound], cut behind `degree`."""
    powers = np.arange(degree + 1)
    if basis == "taylor" or bound == 0:
        return 1.0 / np.array([math.factorial(int(power)) for power in powers], dtype=np.float64)
    series = 2 * iv(powers, bound)
    series[0] /= 2
    return np.polynomial.chebyshev.cheb2poly(series) / bound ** powers.astype(np.float64)


def relative_error(coefficients: np.ndarray, bound: float) -> float:
    """Largest ``|p(x) e⁻ˣ − 1|`` on [−bound, bound]; below 1, p is positive there."""
    x = bound * np.cos(np.linspace(0, np.pi, _GRID))
    return float(np.abs(np.polynomial.polynomial.polyval(x, coefficients) * np.exp(-x) - 1).max())


def feature_count(width: int, degree: int) -> int:
    """Monomials in `width` variables of degree at most `degree`: ``binom(width + degree, degree)``."""
    return math.comb(width + degree, degree)


@cache
def monomial_exponents(width: int, degree: int) -> np.ndarray:
    """Exponents of all monomials, ``(features, width)`` int64, ordered by degree; the first is the constant."""
    found = [np.zeros((1, width), dtype=np.int64)]
    first = np.zeros(1, dtype=np.int64)
    for _ in range(degree):
        parents, variables = _children(first, width)
        found.append(found[-1][parents] + np.eye(width, dtype=np.int64)[variables])
        first = variables
    return np.concatenate(found)


def _children(last: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Each monomial times each variable not before its own last one: parents and variables of the next degree."""
    counts = width - last
    parents = np.repeat(np.arange(len(last)), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    return parents, np.arange(len(parents)) - starts + last[parents]


def monomial_features(x: Tensor, degree: int) -> Tensor:
    """All monomials of the entries of each row, ``(…, d)`` → ``(…, binom(d + degree, degree))``.

    The order is that of :func:`monomial_exponents`. Each is one multiplication away from one of a degree less.
    """
    if degree < 0:
        raise ConfigurationError(f"degree is {degree}; it must be at least 0")
    parts = [torch.ones_like(x[..., :1])]
    last = np.zeros(1, dtype=np.int64)
    for _ in range(degree):
        parents, variables = _children(last, x.shape[-1])
        index = torch.from_numpy(parents).to(x.device), torch.from_numpy(variables).to(x.device)
        parts.append(parts[-1].index_select(-1, index[0]) * x.index_select(-1, index[1]))
        last = variables
    return torch.cat(parts, -1)


def monomial_weights(coefficients: np.ndarray, width: int, scale: float) -> np.ndarray:
    """Weights w with ``Σ_m w_m Π_t (x_t)^m = p(scale · Σ_c Π_t x_tc)``: ``p_|m| · multinomial(m) · scale^|m|``."""
    exponents = monomial_exponents(width, len(coefficients) - 1)
    degrees = exponents.sum(1)
    factorials = np.array([math.lgamma(k + 1) for k in range(len(coefficients))])
    multinomial = np.exp(factorials[degrees] - factorials[exponents].sum(1))
    return coefficients[degrees] * np.round(multinomial) * float(scale) ** degrees

"""The LASSO for many signals at a time, until a duality gap proves that it is solved.

``min ½ ‖y − Σ aⱼ φⱼ‖² + λ Σ |aⱼ|`` has a dual whose value is never above it. The residual, scaled until no atom has
more than λ in common with it, is a point of the dual; the gap between both bounds how far codes are from optimal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.coding.proximal_gradient import Done, ProximalGradient, check_problem
from gossamer.core.prox import L1
from gossamer.errors import ConfigurationError

Method = Literal["fista", "cd"]

_GAP_EVERY = 5  # sweeps of coordinate descent over active codes between two over all of them
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class LassoSolution:
    """Codes with their certificate.

    Attributes
    ----------
    codes
        ``(signals, atoms)``.
    gap
        Duality gap of every signal, ``(signals,)``: its objective is at most this much above the smallest there is.
    converged
        Which gaps are within the tolerance, bool ``(signals,)``.
    n_iter
        Steps, or sweeps over the atoms.
    """

    codes: Tensor
    gap: Tensor
    converged: Tensor
    n_iter: int


@torch.no_grad()
def lasso(
    x: Tensor,
    dictionary: Tensor,
    lam: float,
    *,
    method: Method = "fista",
    tolerance: float = 1e-4,
    max_iter: int = 1000,
    nonnegative: bool = False,
    start: Tensor | None = None,
) -> LassoSolution:
    """Codes of signals under the l1 norm.

    Parameters
    ----------
    x, dictionary
        ``(signals, size)`` and ``(atoms, size)``, atoms of any length.
    lam
        λ, above 0. The same as ``alpha = lam / size`` of scikit-learn's ``Lasso(fit_intercept=False)``.
    method
        ``"fista"``: accelerated proximal gradient steps with restarts, all codes at a time. ``"cd"``: coordinate
        descent, one atom after another for all signals; better where atoms are much alike and codes very sparse.
    tolerance
        A signal is done when its duality gap is at most this share of its own ``½ ‖y‖²``.
    max_iter
        Steps or sweeps at most.
    nonnegative
        Whether codes may not be below 0.
    start
        Codes to start from, zero by default.

    Raises
    ------
    ConfigurationError
        If shapes do not fit or a value is out of range.
    NonFiniteError
        If a signal or an atom holds NaN or infinity.

    Examples
    --------
    >>> lasso(torch.tensor([[3.0, 0.5]]), torch.eye(2), 1.0).codes
    tensor([[2., 0.]])
    """
    check_problem(x, dictionary)
    if not 0 < lam < math.inf or not tolerance >= 0 or max_iter < 1:
        raise ConfigurationError(
            f"lam is {lam}, tolerance {tolerance} and max_iter {max_iter}; give more than 0, 0 or more, and 1 or more"
        )
    if method not in get_args(Method):
        raise ConfigurationError(f"method is {method!r}; use one of {', '.join(get_args(Method))}")
    shape = (len(x), len(dictionary))
    if start is not None and start.shape != shape:
        raise ConfigurationError(f"start is {tuple(start.shape)}; give {shape}, the codes")
    codes = x.new_zeros(shape) if start is None else start
    if method == "cd":
        codes, steps = _coordinate_descent(x, dictionary, lam, codes, tolerance, max_iter, nonnegative)
    else:
        done = _gap_closed(dictionary, lam, tolerance, nonnegative)
        found = ProximalGradient(dictionary, L1(lam, nonnegative), done, max_iter).solve(x, codes)
        codes, steps = found.codes, found.n_iter
    gap = duality_gap(x, dictionary, codes, lam, nonnegative)
    return LassoSolution(codes, gap, gap <= tolerance * x.square().sum(1) / 2, steps)


def duality_gap(x: Tensor, dictionary: Tensor, codes: Tensor, lam: float, nonnegative: bool = False) -> Tensor:
    """How much the objective of codes may be above the smallest, ``(signals,)``: see :func:`lasso`."""
    residual = x - codes @ dictionary
    common = residual @ dictionary.t()
    most = (common if nonnegative else common.abs()).amax(1).clamp(min=_TINY if x.dtype == torch.float64 else 1e-30)
    squares, along = residual.square().sum(1), (x * residual).sum(1)
    # the multiple of the residual that makes the dual largest, among those that it allows
    scale = torch.minimum(along / squares.clamp(min=torch.finfo(x.dtype).tiny), lam / most)
    scale = scale.clamp(min=0) if nonnegative else torch.maximum(scale, -lam / most)
    dual = scale * along - scale.square() * squares / 2
    return (squares / 2 + lam * codes.abs().sum(1) - dual).clamp(min=0)


def _gap_closed(dictionary: Tensor, lam: float, tolerance: float, nonnegative: bool) -> Done:
    def done(x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        return duality_gap(x, dictionary, after, lam, nonnegative) <= tolerance * x.square().sum(1) / 2

    return done


def _coordinate_descent(
    x: Tensor, dictionary: Tensor, lam: float, codes: Tensor, tolerance: float, max_iter: int, nonnegative: bool
) -> tuple[Tensor, int]:
    """Sweeps over atoms: a few over those that some signal uses, then one over all, until every gap is closed."""
    found, left = codes.clone(), torch.arange(len(x), device=x.device)
    gram = dictionary @ dictionary.t()
    lengths = gram.diagonal().clone()
    able = lengths > 0
    done, sweeps = _gap_closed(dictionary, lam, tolerance, nonnegative), 0
    while sweeps < max_iter and len(left):
        own = found[left]
        common = (x[left] - own @ dictionary) @ dictionary.t()  # anew, as updates drift
        for turn in range(min(_GAP_EVERY, max_iter - sweeps)):
            atoms = able if turn == 0 else able & (own != 0).any(0)
            for j in atoms.nonzero().flatten().tolist():
                _update(own, common, gram[j], float(lengths[j]), lam, j, nonnegative)
            sweeps += 1
        found[left] = own
        left = left[~done(x[left], own, own)]
    return found, sweeps


def _update(own: Tensor, common: Tensor, gram: Tensor, length: float, lam: float, j: int, nonnegative: bool) -> None:
    """Set code j of every signal to its best value, and correct what is in common with all atoms."""
    before = own[:, j].clone()
    after = L1(lam, nonnegative).prox(common[:, j] + before * length) / length
    change = after - before
    moved = change.nonzero().flatten()
    if len(moved):
        own[:, j] = after
        common[moved] -= change[moved, None] * gram

"""Iterative thresholding: sparse codes of many signals at a time, by proximal gradient steps.

Codes a of a signal y minimise ``½ ‖y − Σ aⱼ φⱼ‖² + Σ R(aⱼ)``. A step follows the gradient of the error and applies the
threshold of the penalty R; which threshold that is decides what comes out, and is all that differs between the soft
thresholds of l1 (ISTA, or FISTA where accelerated), iterative hard thresholding, and what lies between.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gossamer.coding.proximal_gradient import Acceleration, ProximalGradient, SparseSolution, check_problem, still
from gossamer.core.prox import CEL0, KSparse, Penalty
from gossamer.core.prox import penalty as named_penalty
from gossamer.errors import ConfigurationError

_STAGES = 10
_TINY = 1e-12


@torch.no_grad()
def iterative_thresholding(
    x: Tensor,
    dictionary: Tensor,
    penalty: Penalty,
    *,
    start: Tensor | None = None,
    step: float | None = None,
    max_iter: int = 200,
    tolerance: float = 1e-4,
    acceleration: Acceleration = "auto",
    continuation: float = 1.0,
    monitor: bool = False,
) -> SparseSolution:
    """Sparse codes by proximal gradient steps.

    Parameters
    ----------
    x
        ``(signals, size)``.
    dictionary
        ``(atoms, size)``; a :class:`~gossamer.core.prox.CEL0` penalty must know their lengths if they are not one.
    penalty
        What codes cost.
    start
        Codes to start from, ``(signals, atoms)``; zero by default. Without convexity the result depends on it.
    step
        γ; by default 0.99 over the square of the largest singular value of the dictionary, with which the objective
        never rises.
    max_iter
        Steps at most.
    tolerance
        A signal is done when no code of it moved by more than this share of its largest code; 0 takes all steps.
    acceleration
        ``"restart"``: Nesterov's steps [Beck & Teboulle, 2009], begun anew where they turn against the descent
        [O'Donoghue & Candès, 2015]; only for convex penalties. ``"monotone"``: the better of Nesterov's and a plain
        step [Li & Lin, 2015], for any penalty. ``"none"``: plain. ``"auto"``: restart if convex, otherwise none.
    continuation
        Factor on λ at the start, from which it falls in ten stages to its own value: a way around local minima. Not
        for hard thresholds, which from few codes let no others in.
    monitor
        Whether the objective is computed at every step, which costs about one step more each.

    Raises
    ------
    ConfigurationError
        If shapes do not fit, a number is out of range, or Nesterov's steps are asked for without convexity.
    NonFiniteError
        If a signal or an atom holds NaN or infinity.

    Examples
    --------
    >>> found = iterative_thresholding(torch.tensor([[3.0, 0.5]]), torch.eye(2), CEL0(1.0))
    >>> found.codes
    tensor([[3., 0.]])
    """
    check_problem(x, dictionary)
    if not tolerance >= 0 or max_iter < 1:
        raise ConfigurationError(f"max_iter is {max_iter} and tolerance {tolerance}; give 1 or more, and at least 0")
    if not continuation >= 1:
        raise ConfigurationError(f"continuation is {continuation}; λ starts at least at its own value: give 1 or more")
    if start is not None and start.shape != (len(x), len(dictionary)):
        raise ConfigurationError(f"start is {tuple(start.shape)}; give {(len(x), len(dictionary))}, the codes")
    stages = [penalty]
    if continuation > 1 and not isinstance(penalty, KSparse):
        stages = [replace(penalty, lam=penalty.lam * continuation ** (1 - i / (_STAGES - 1))) for i in range(_STAGES)]
    codes = x.new_zeros(len(x), len(dictionary)) if start is None else start
    history: list[float] = []
    for stage in stages:
        solver = ProximalGradient(dictionary, stage, still(tolerance), max(1, max_iter // len(stages)), step)
        found = solver.solve(x, codes, acceleration, monitor)
        codes = found.codes
        history += found.history
    return replace(found, n_iter=found.n_iter * len(stages), history=history)


def sparse_encode(
    x: Tensor,
    dictionary: Tensor,
    penalty: str = "cel0",
    lam: float | None = None,
    target_l0: float | None = None,
    *,
    max_iter: int = 200,
    parameters: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Codes ``(signals, atoms)`` under a penalty given by its name.

    Parameters
    ----------
    x, dictionary
        ``(signals, size)`` and ``(atoms, size)``, atoms of any length above 0.
    penalty
        One of :data:`gossamer.core.prox.PENALTIES`.
    lam, target_l0
        Its weight, or in its place how many codes of a signal are to be other than zero in the mean.
    max_iter, options
        Of :func:`iterative_thresholding`.
    parameters
        Of the penalty, besides its weight.

    Raises
    ------
    ConfigurationError
        If not exactly one of `lam` and `target_l0` is given; and as :func:`iterative_thresholding`.
    """
    if (lam is None) == (target_l0 is None):
        raise ConfigurationError(f"lam is {lam} and target_l0 {target_l0}; give one of the two")
    if lam is None:
        lam = lam_for_l0(x, dictionary, penalty, target_l0, max_iter=max_iter, parameters=parameters, **options)
    one = fitted_penalty(penalty, lam, dictionary, parameters)
    return iterative_thresholding(x, dictionary, one, max_iter=max_iter, **options).codes


def fitted_penalty(name: str, lam: float, dictionary: Tensor, parameters: dict[str, Any] | None = None) -> Penalty:
    """A penalty by its name; CEL0 learns the lengths of the atoms, if they are not all one."""
    one = named_penalty(name, lam, **(parameters or {}))
    if isinstance(one, CEL0) and "length" not in (parameters or {}):
        lengths = dictionary.norm(dim=1)
        if not bool((lengths > 0).all()):
            empty = int((lengths == 0).nonzero()[0])
            raise ConfigurationError(f"atom {empty} is zero; take it out of the dictionary, or draw it anew")
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-4):
            one = replace(one, length=lengths)
    return one


def lam_for_l0(
    x: Tensor,
    dictionary: Tensor,
    penalty: str,
    target: float | None,
    *,
    parameters: dict[str, Any] | None = None,
    rounds: int = 16,
    **options: Any,
) -> float:
    """The weight at which codes of these signals have so many non-zeros in the mean.

    Found between two weights that are drawn together, until the count is within one percent or after so many rounds.

    Raises
    ------
    ConfigurationError
        If `target` does not lie between 0 and the number of atoms, or the penalty has no weight.
    """
    if target is None or not 0 < target < len(dictionary) or penalty == "k-sparse":
        raise ConfigurationError(
            f"target_l0 is {target} of {len(dictionary)} atoms under {penalty}; give a number between, and a penalty "
            f"with a weight"
        )

    def count(log: float) -> float:
        one = fitted_penalty(penalty, math.exp(log), dictionary, parameters)
        codes = iterative_thresholding(x, dictionary, one, **options).codes
        return float((codes != 0).sum(1, dtype=torch.float64).mean())

    wanted = math.log(target)
    high = math.log(float((x @ dictionary.t()).abs().max().clamp(min=_TINY)))
    while (few := count(high)) > target:
        high += math.log(4)
    low = high - math.log(100)
    while (many := count(low)) < target and low > high - 40:
        high, few, low = low, many, low - math.log(10)
    for _ in range(rounds):
        # counts are nearly a power of the weight; steps stay away from the ends, where they are not
        ends = [math.log(max(found, 0.01 * target)) for found in (many, few)]
        share = (ends[0] - wanted) / (ends[0] - ends[1]) if ends[0] > ends[1] else 0.5
        middle = low + (high - low) * min(max(share, 0.1), 0.9)
        found = count(middle)
        if abs(found - target) <= 0.01 * target:
            return math.exp(middle)
        if found > target:
            low, many = middle, found
        else:
            high, few = middle, found
    return math.exp((low + high) / 2)


def locally_competitive(
    x: Tensor, dictionary: Tensor, penalty: Penalty, *, rate: float = 0.1, max_iter: int = 300
) -> Tensor:
    """Codes by the dynamics of neurons that inhibit each other [Rozell et al., 2008].

    Potentials u follow ``u̇ = Φy − u − (ΦΦᵀ − 1) a`` with activities ``a = prox(u)``; where they come to rest, a is
    stationary for the same objective as in :func:`iterative_thresholding`, if atoms have the length one.

    Parameters
    ----------
    x, dictionary, penalty
        As in :func:`iterative_thresholding`.
    rate
        Step of time over the neurons' time constant, in (0, 1].
    max_iter
        Steps.

    Returns
    -------
    Tensor
        Activities, ``(signals, atoms)``.

    Raises
    ------
    ConfigurationError, NonFiniteError
        If shapes do not fit, a number is out of range, or not finite.
    """
    check_problem(x, dictionary)
    if not 0 < rate <= 1 or max_iter < 1:
        raise ConfigurationError(f"rate is {rate} and max_iter {max_iter}; rates lie in (0, 1], steps are 1 or more")
    drive = x @ dictionary.t()
    inhibition = dictionary @ dictionary.t()
    inhibition.diagonal().sub_(1)
    potential = torch.zeros_like(drive)
    activity = penalty.prox(potential)
    for _ in range(max_iter):
        potential.lerp_(torch.addmm(drive, activity, inhibition, alpha=-1), rate)
        activity = penalty.prox(potential)
    return activity

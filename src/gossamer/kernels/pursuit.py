"""Greedy coding: one atom after the other, for many signals at a time.

Matching pursuit takes the atom that has most in common with what is left, subtracts it, and looks again [Mallat and
Zhang, 1993]. Orthogonal matching pursuit also fits all chosen atoms anew after every step [Pati et al., 1993]. Atoms
have the length one throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.kernels import pursuit_compiled as compiled
from gossamer.kernels import pursuit_triton

_GRAM_BYTES = 1 << 30  # largest matrix of products of atoms that is made unasked
_PAYS = 4  # products of all atoms cost as much as so many steps of as many signals as atoms
_UNIT = 1e-3


@dataclass(frozen=True, eq=False)
class Pursuit:
    """What a pursuit has chosen, step by step.

    Attributes
    ----------
    atoms
        ``(signals, steps)`` int64; an atom may be chosen twice by matching pursuit.
    values
        ``(signals, steps)``: what was taken of the atom at that step, or for orthogonal pursuit in the end; 0 from the
        step on at which a signal was done.
    residual
        ``(signals, size)``: what is left.
    width
        Number of atoms in the dictionary.
    """

    atoms: Tensor
    values: Tensor
    residual: Tensor
    width: int

    @property
    def codes(self) -> SparseCodes:
        """Atoms and values of every signal, each atom once; gradients reach the values."""
        rows = len(self.atoms)
        taken = self.values.detach() != 0
        place = (torch.arange(rows, device=self.atoms.device)[:, None] * self.width + self.atoms)[taken]
        once, where = place.unique(return_inverse=True)
        values = self.values.new_zeros(len(once)).index_add(0, where, self.values[taken])
        starts = torch.zeros(rows + 1, dtype=torch.int64, device=self.atoms.device)
        torch.cumsum(torch.bincount(once // self.width, minlength=rows), 0, out=starts[1:])
        return SparseCodes(once % self.width, values, starts, self.width)


def matching_pursuit(
    x: Tensor,
    dictionary: Tensor,
    k: int,
    *,
    tolerance: float = 0.0,
    nonnegative: bool = True,
    gram: Tensor | bool | None = None,
) -> Pursuit:
    """Code signals by matching pursuit, with the exact gradient of what it computes.

    A signal is done after k steps, when its residual is not longer than the tolerance, or when no atom has anything in
    common with it. The residual never grows, and is orthogonal to the atom that was chosen last. Gradients treat the
    choice of atoms as fixed; they need the choices, the values and the last residual only, no copy of the dictionary
    for any step.

    Parameters
    ----------
    x
        ``(signals, size)``.
    dictionary
        ``(atoms, size)``, each of length one.
    k
        Steps.
    tolerance
        Length of a residual that is good enough.
    nonnegative
        Whether atoms are only added, not subtracted.
    gram
        Products of all atoms, ``(atoms, atoms)``, with which a step costs as many operations as there are atoms; True
        makes them, False does without; by default they are made where that takes at most 1 GiB and pays.

    Raises
    ------
    ConfigurationError
        If shapes do not fit, k is below 1, the tolerance below 0, or an atom does not have the length one.
    NonFiniteError
        If a signal is NaN or infinite.
    """
    _check(x, dictionary, k, tolerance)
    if gram is None:
        gram = len(dictionary) ** 2 * x.element_size() <= _GRAM_BYTES and k * len(x) >= _PAYS * len(dictionary)
    products = (dictionary.detach() @ dictionary.detach().t()) if gram is True else gram if gram is not False else None
    atoms = _choose(x.detach(), dictionary.detach(), k, tolerance, nonnegative, products)
    values, residual = _Path.apply(x, dictionary, atoms)
    return Pursuit(atoms.clamp(min=0), values, residual, len(dictionary))


def _choose(x: Tensor, dictionary: Tensor, k: int, tolerance: float, nonnegative: bool, gram: Any) -> Tensor:
    """Atoms of every step, −1 from the step on at which a signal is done."""
    if gram is not None and compiled.usable(x, dictionary, gram):
        return compiled.choose(x, dictionary, k, tolerance, nonnegative, gram)
    if gram is not None and pursuit_triton.usable(x, dictionary, gram):
        return pursuit_triton.choose(x, dictionary, k, tolerance, nonnegative, gram)
    if gram is None and nonnegative and x.dtype == torch.float32 and compiled.usable(x, dictionary):
        return compiled.choose_one_by_one(x, dictionary, k, tolerance)
    rows = torch.arange(len(x), device=x.device)
    residual, common = x.clone(), x @ dictionary.t()
    atoms = torch.full((len(x), k), -1, dtype=torch.int64, device=x.device)
    going = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for step in range(k):
        if (gram is None and step) or (step and step % compiled.REFRESH == 0):
            common = residual @ dictionary.t()
        best = (common if nonnegative else common.abs()).argmax(1)
        value = common[rows, best]
        going = going & (value > 0 if nonnegative else value != 0) & (residual.norm(dim=1) > tolerance)
        if not bool(going.any()):
            break
        atoms[:, step] = torch.where(going, best, -1)
        value = torch.where(going, value, 0)
        residual = residual - value[:, None] * dictionary[best]
        if gram is not None:
            common = common - value[:, None] * gram[best]
    return atoms


def _follow(residual: Tensor, dictionary: Tensor, atoms: Tensor) -> Tensor:
    """Values along given atoms, which are taken from the residuals in place."""
    if compiled.usable(residual, dictionary):
        return compiled.follow(residual, dictionary, atoms)
    values = residual.new_zeros(atoms.shape)
    for step in range(atoms.shape[1]):
        chosen = atoms[:, step]
        atom = dictionary[chosen.clamp(min=0)]
        values[:, step] = torch.where(chosen >= 0, (residual * atom).sum(1), 0)
        residual -= values[:, step, None] * atom
    return values


class _Path(torch.autograd.Function):
    """Values and last residual of a pursuit along given atoms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dictionary: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
        residual = x.clone(memory_format=torch.contiguous_format)
        values = _follow(residual, dictionary, atoms)
        ctx.save_for_backward(dictionary, atoms, values, residual)
        return values, residual

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dictionary, atoms, values, residual = ctx.saved_tensors
        if compiled.usable(dictionary, residual):
            of_both = compiled.go_back(dictionary, atoms, values, residual, grads[0], grads[1], ctx.needs_input_grad[1])
            return *of_both, None
        of_values, flow = grads[0], grads[1].clone()
        of_dictionary = torch.zeros_like(dictionary)
        for step in reversed(range(atoms.shape[1])):
            chosen = atoms[:, step].clamp(min=0)
            taken = (atoms[:, step] >= 0)[:, None]
            atom, value = dictionary[chosen], values[:, step, None]
            before = residual + value * atom
            of_value = torch.where(taken, of_values[:, step, None] - (flow * atom).sum(1, keepdim=True), 0)
            of_dictionary.index_add_(0, chosen, torch.where(taken, of_value * before - value * flow, 0))
            flow = flow + of_value * atom
            residual = before
        return flow, of_dictionary, None


@torch.no_grad()
def orthogonal_matching_pursuit(
    x: Tensor, dictionary: Tensor, k: int, *, tolerance: float = 0.0, nonnegative: bool = False
) -> Pursuit:
    """Code signals by orthogonal matching pursuit, all at a time.

    After every step the values of all chosen atoms are those of the least squares fit, by a Cholesky factor that grows
    by one row [Rubinstein et al., 2008]. No atom is chosen twice.

    Parameters
    ----------
    x, dictionary, k, tolerance
        As in :func:`matching_pursuit`.
    nonnegative
        Whether only atoms with a positive correlation are chosen; values may become negative all the same.

    Raises
    ------
    ConfigurationError, NonFiniteError
        As :func:`matching_pursuit`; also if k is larger than the number of atoms.
    """
    _check(x, dictionary, k, tolerance)
    if k > len(dictionary):
        raise ConfigurationError(f"k is {k}; there are only {len(dictionary)} atoms to choose from")
    if compiled.usable(x, dictionary) and len(dictionary) ** 2 * x.element_size() <= _GRAM_BYTES:
        return Pursuit(*compiled.match_orthogonally(x, dictionary, k, tolerance, nonnegative), len(dictionary))
    count, rows = len(x), torch.arange(len(x), device=x.device)
    start = x @ dictionary.t()
    common, residual = start, x
    atoms = torch.zeros(count, k, dtype=torch.int64, device=x.device)
    values, steps = x.new_zeros(count, k), torch.zeros(count, dtype=torch.int64, device=x.device)
    factor = x.new_zeros(count, k, k)
    wanted = x.new_zeros(count, k)  # correlations of the chosen atoms with the signal
    going = torch.ones(count, dtype=torch.bool, device=x.device)
    for step in range(k):
        ranked = (common if nonnegative else common.abs()).clone()
        ranked.scatter_(1, atoms[:, :step], -torch.inf)
        best = ranked.argmax(1)
        row = _next_row(factor[:, :step, :step], dictionary, atoms[:, :step], best)
        left = 1 - row.square().sum(1)
        enough = left > torch.finfo(x.dtype).eps * 8  # or the atom is a combination of the chosen ones
        going = going & enough & (ranked[rows, best] > 0) & (residual.norm(dim=1) > tolerance)
        if not bool(going.any()):
            break
        atoms[:, step] = best
        factor[:, step, :step] = row
        factor[:, step, step] = left.clamp(min=torch.finfo(x.dtype).eps).sqrt()
        wanted[:, step] = start[rows, best]
        fitted = _backward(factor[:, : step + 1, : step + 1], _forward(factor[:, : step + 1, : step + 1], wanted))
        values[:, : step + 1] = torch.where(going[:, None], fitted, values[:, : step + 1])
        steps += going
        chosen = dictionary[atoms[:, : step + 1]]
        residual = x - torch.einsum("nt,ntd->nd", values[:, : step + 1], chosen)
        common = residual @ dictionary.t()
    done = torch.arange(k, device=x.device) >= steps[:, None]
    return Pursuit(atoms, values.masked_fill(done, 0), residual, len(dictionary))


def _next_row(factor: Tensor, dictionary: Tensor, chosen: Tensor, best: Tensor) -> Tensor:
    products = torch.einsum("ntd,nd->nt", dictionary[chosen], dictionary[best])
    return _forward(factor, products)


def _forward(factor: Tensor, right: Tensor) -> Tensor:
    """Solve ``L y = b`` for many small lower triangles, column by column."""
    steps = factor.shape[1]
    found = right[:, :steps].clone()
    for i in range(steps):
        found[:, i] /= factor[:, i, i]
        if i + 1 < steps:
            found[:, i + 1 :] -= factor[:, i + 1 :, i] * found[:, i : i + 1]
    return found


def _backward(factor: Tensor, right: Tensor) -> Tensor:
    """Solve ``Lᵀ y = b``."""
    found = right.clone()
    for i in reversed(range(factor.shape[1])):
        found[:, i] /= factor[:, i, i]
        if i:
            found[:, :i] -= factor[:, i, :i] * found[:, i : i + 1]
    return found


def _check(x: Tensor, dictionary: Tensor, k: int, tolerance: float) -> None:
    if x.dim() != 2 or dictionary.dim() != 2 or x.shape[1] != dictionary.shape[1] or not len(dictionary):
        raise ConfigurationError(
            f"x is {tuple(x.shape)}, the dictionary {tuple(dictionary.shape)}; give (signals, size) and (atoms, size)"
        )
    if k < 1 or not tolerance >= 0:
        raise ConfigurationError(f"k is {k} and tolerance {tolerance}; give at least one step, and at least 0")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"signal {int((~torch.isfinite(x)).any(1).nonzero()[0])} holds NaN or infinity")
    lengths = dictionary.detach().norm(dim=1)
    worst = int((lengths - 1).abs().argmax())
    if not abs(float(lengths[worst]) - 1) <= _UNIT:
        raise ConfigurationError(
            f"atom {worst} has the length {float(lengths[worst]):.4g}; divide atoms by their length"
        )

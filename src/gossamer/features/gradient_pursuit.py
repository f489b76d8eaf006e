"""Coding with a frozen dictionary by gradient pursuit, an encoder that needs no training.

After every new atom all chosen ones are moved at once, along the gradient and as far as is best, which is nearly as
good as fitting them anew and much cheaper [Blumensath and Davies, 2008]. With values kept from falling below zero it
tells how much of an autoencoder's error is its encoder's fault [Engels et al., 2024, arXiv 2410.14670, section 6].
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.features.sae import SAE
from gossamer.kernels.codes import decode
from gossamer.kernels.pursuit import Pursuit


@torch.no_grad()
def gradient_pursuit(
    x: Tensor, dictionary: Tensor, k: int | Tensor, *, nonneg: bool = True, gram: Tensor | None = None
) -> Pursuit:
    """Code signals by gradient pursuit.

    In every step ``r = x − a D``, the atom of the largest ``D r`` that was not chosen yet joins the chosen S; then
    ``g = D_S r`` and ``a_S ← max(a_S + α g, 0)`` with the best step, ``α = ‖g‖² / ‖g D_S‖²``. A signal is done after k
    steps, or when no other atom has anything in common with what is left, and the rest of its budget stays unused.

    Parameters
    ----------
    x
        ``(signals, d)``; subtract the bias of an autoencoder first.
    dictionary
        ``(atoms, d)``, of any length but zero.
    k
        Steps: for all, or for every signal, ``(signals,)``.
    nonneg
        Whether values stay at zero or above; otherwise atoms are chosen by the size of ``D r``.
    gram
        Products of all atoms, ``(atoms, atoms)``. With it a step gathers a few of its rows instead of multiplying with
        the whole dictionary.

    Returns
    -------
    Pursuit
        With ``codes``, ``atoms``, ``values`` and the last ``residual``.

    Raises
    ------
    ConfigurationError
        If shapes do not fit, or k is below 0 or above the number of atoms.
    NonFiniteError
        If a signal is NaN or infinite.
    """
    budget = _checked(x, dictionary, k, gram)
    steps = int(budget.max()) if len(budget) else 0
    rows = torch.arange(len(x), device=x.device)
    atoms = torch.zeros(len(x), steps, dtype=torch.int64, device=x.device)
    values = x.new_zeros(len(x), steps)
    going = torch.ones(len(x), dtype=torch.bool, device=x.device)
    residual = x
    start = common = x @ dictionary.t()
    for step in range(steps):
        ranked = common.clone() if nonneg else common.abs()
        ranked.scatter_(1, atoms[:, :step], -torch.inf)
        best = ranked.argmax(1)
        going = going & (step < budget) & (ranked[rows, best] > 0)
        if not bool(going.any()):
            break
        atoms[:, step] = best
        chosen = atoms[:, : step + 1]
        gradient = common.gather(1, chosen) * going[:, None]
        size = _decoded(chosen, gradient, dictionary).square().sum(1)
        length = torch.where(size > 0, gradient.square().sum(1) / size.clamp(min=torch.finfo(x.dtype).tiny), 0)
        moved = values[:, : step + 1] + length[:, None] * gradient
        values[:, : step + 1] = moved.clamp(min=0) if nonneg else moved
        residual = x - _decoded(chosen, values[:, : step + 1], dictionary)
        taken = None if gram is None else _decoded(chosen, values[:, : step + 1], gram)
        common = residual @ dictionary.t() if taken is None else start - taken
    return Pursuit(atoms, values, residual, len(dictionary))


def _decoded(chosen: Tensor, values: Tensor, dictionary: Tensor) -> Tensor:
    return decode(SparseCodes.from_rows(chosen, values, len(dictionary)), dictionary)


def _checked(x: Tensor, dictionary: Tensor, k: int | Tensor, gram: Tensor | None) -> Tensor:
    if x.dim() != 2 or dictionary.dim() != 2 or x.shape[1] != dictionary.shape[1] or not len(dictionary):
        raise ConfigurationError(
            f"x is {tuple(x.shape)}, the dictionary {tuple(dictionary.shape)}; give (signals, d) and (atoms, d)"
        )
    if gram is not None and gram.shape != (len(dictionary), len(dictionary)):
        raise ConfigurationError(f"gram is {tuple(gram.shape)}; {len(dictionary)} atoms have as many products each")
    budget = torch.as_tensor(k, device=x.device)
    budget = budget.expand(len(x)) if budget.dim() == 0 else budget
    if budget.shape != (len(x),) or budget.is_floating_point():
        raise ConfigurationError(
            f"k is {tuple(budget.shape)}; give a whole number, or one for each of {len(x)} signals"
        )
    if len(budget) and not 0 <= int(budget.min()) <= int(budget.max()) <= len(dictionary):
        raise ConfigurationError(
            f"k is from {int(budget.min())} to {int(budget.max())}; it must be from 0 to the {len(dictionary)} atoms"
        )
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"signal {int((~torch.isfinite(x)).any(1).nonzero()[0])} holds NaN or infinity")
    return budget


@torch.no_grad()
def pursue(sae: SAE, x: Tensor, k: int | Tensor | None = None, rows: int = 1024) -> SparseCodes:
    """Codes of activations ``(tokens, d)`` by pursuit with an autoencoder's own dictionary.

    Parameters
    ----------
    sae
        Whose decoder, bias and scale are used; ``sae.decode`` takes the codes.
    x
        Activations.
    k
        Features of a token; by default as many as the encoder uses for that token, so that the two can be compared.
    rows
        Tokens at a time.
    """
    parts = []
    dictionary = sae.decoder.detach()
    gram = dictionary @ dictionary.t() if len(x) > len(dictionary) else None
    for first in range(0, len(x), rows):
        some = x[first : first + rows]
        if k is None:
            budget = _active(sae.encode(some))
        else:
            budget = k[first : first + rows] if isinstance(k, Tensor) and k.dim() else k
        found = gradient_pursuit(some * sae.scale - sae.bias, dictionary, budget, gram=gram)
        parts.append(found.codes)
    return SparseCodes.cat(parts)


def _active(codes: SparseCodes) -> Tensor:
    return torch.zeros(len(codes), dtype=torch.int64).index_add(0, codes.row_of, (codes.values > 0).long())

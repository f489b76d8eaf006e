"""Pursuits by compiled code: signals one after the other, each step with one row of the products of atoms.

See :mod:`gossamer.kernels.pursuit`, which checks what comes in and has the same in torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.encode_select import PreparedEncoder, encode_topk
from gossamer.kernels.native import native, offers

REFRESH = 32  # steps after which correlations are computed anew: updates drift
_CHUNK = 1 << 24  # products of signals with atoms that are in memory at a time


def choose(x: Tensor, dictionary: Tensor, k: int, tolerance: float, nonnegative: bool, gram: Tensor) -> Tensor:
    """Atoms of every step, ``(signals, k)``, −1 from the step on at which a signal is done.

    `gram` are the products of all atoms; values are those of :func:`gossamer.kernels.pursuit.matching_pursuit`.
    """
    x, dictionary, gram = x.contiguous(), dictionary.contiguous(), gram.contiguous()
    atoms = torch.full((len(x), k), -1, dtype=torch.int64)
    for part in _parts(len(x), len(dictionary)):
        residual, chosen = x[part].clone(), atoms[part]
        going = torch.ones(len(residual), dtype=torch.bool)
        for first in range(0, k, REFRESH):
            common = residual @ dictionary.t()
            native().pursuit_match(
                *_atoms(dictionary, gram),
                len(residual),
                min(REFRESH, k - first),
                tolerance,
                nonnegative,
                common.data_ptr(),
                residual.data_ptr(),
                chosen[:, first:].data_ptr(),
                k,
                going.data_ptr(),
                torch.get_num_threads(),
            )
            if not bool(going.any()):
                break
    return atoms


def choose_one_by_one(x: Tensor, dictionary: Tensor, k: int, tolerance: float) -> Tensor:
    """The same without products of atoms: those with signals anew for every step, of which the highest is kept."""
    atoms = torch.full((len(x), k), -1, dtype=torch.int64)
    residual, dictionary = x.contiguous().clone(), dictionary.contiguous()
    prepared = PreparedEncoder.of(dictionary, len(x))
    for step in range(k):
        found = encode_topk(residual, dictionary, None, 1, prepared=prepared)
        going = (found.counts > 0) & (residual.norm(dim=1) > tolerance)
        if step:
            going &= atoms[:, step - 1] >= 0
        if not bool(going.any()):
            break
        best = torch.full((len(x),), -1, dtype=torch.int64)
        best[found.counts > 0] = found.indices.long()
        atoms[:, step] = torch.where(going, best, -1)
        follow(residual, dictionary, atoms[:, step : step + 1])
    return atoms


def usable(x: Tensor, *others: Tensor) -> bool:
    """Whether compiled code pursues in these numbers."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and offers("pursuit_match")
    return known and all(other.dtype == x.dtype and other.device == x.device for other in others)


def _atoms(dictionary: Tensor, gram: Tensor | None = None) -> tuple[Any, ...]:
    """A dictionary as compiled code takes it; its parts must outlive the call."""
    wide = dictionary.dtype == torch.float64
    parts = (wide, *dictionary.shape, dictionary.data_ptr())
    return parts if gram is None else (*parts, gram.data_ptr())


def _parts(signals: int, atoms: int) -> list[slice]:
    """Signals of which all products with atoms are in memory at a time."""
    step = max(1, _CHUNK // max(1, atoms))
    return [slice(first, first + step) for first in range(0, signals, step)]


def follow(residual: Tensor, dictionary: Tensor, atoms: Tensor) -> Tensor:
    """Values along given atoms, which are taken from the residuals in place."""
    values, dictionary, atoms = residual.new_zeros(atoms.shape), dictionary.contiguous(), atoms.contiguous()
    native().pursuit_follow(
        *_atoms(dictionary),
        len(residual),
        atoms.shape[1],
        atoms.data_ptr(),
        values.data_ptr(),
        residual.data_ptr(),
        torch.get_num_threads(),
    )
    return values


def go_back(
    dictionary: Tensor,
    atoms: Tensor,
    values: Tensor,
    residual: Tensor,
    of_values: Tensor,
    of_residual: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of signals and, if wanted, of the dictionary, from those of :func:`follow`'s values and residuals."""
    dictionary, atoms, of_residual = dictionary.contiguous(), atoms.contiguous(), of_residual.contiguous()
    of_values, flow = of_values.clone(memory_format=torch.contiguous_format), of_residual.clone()
    of_dictionary = torch.zeros_like(dictionary) if wanted else None
    native().pursuit_go_back(
        *_atoms(dictionary),
        len(flow),
        atoms.shape[1],
        atoms.data_ptr(),
        values.data_ptr(),
        residual.data_ptr(),
        of_residual.data_ptr(),
        flow.data_ptr(),
        of_values.data_ptr(),
        0 if of_dictionary is None else of_dictionary.data_ptr(),
        torch.get_num_threads(),
    )
    return flow, of_dictionary


def match_orthogonally(
    x: Tensor, dictionary: Tensor, k: int, tolerance: float, nonnegative: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms, values and residuals of the orthogonal pursuit, with the products of all atoms."""
    x, dictionary = x.contiguous(), dictionary.contiguous()
    gram = dictionary @ dictionary.t()
    atoms = torch.empty(len(x), k, dtype=torch.int64)
    values, residual = x.new_empty(len(x), k), torch.empty_like(x)
    for part in _parts(len(x), len(dictionary)):
        start = x[part] @ dictionary.t()
        native().pursuit_match_orthogonally(
            *_atoms(dictionary, gram),
            len(start),
            k,
            tolerance,
            nonnegative,
            start.data_ptr(),
            x[part].data_ptr(),
            atoms[part].data_ptr(),
            values[part].data_ptr(),
            residual[part].data_ptr(),
            torch.get_num_threads(),
        )
    return atoms, values, residual

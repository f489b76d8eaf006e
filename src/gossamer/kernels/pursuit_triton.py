"""Matching pursuit on a GPU, in Triton: a program follows one signal and reads one row of the Gram matrix a step.

Correlations and residuals are kept in memory, so that a step costs as many operations as there are atoms and numbers
of a signal together. Every sum has one order, so that results repeat to the bit. See :mod:`gossamer.kernels.pursuit`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import MissingDependencyError
from gossamer.kernels.pursuit_compiled import REFRESH

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None

_ATOMS, _NUMBERS = 1024, 256  # that a program looks at together


def usable(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton pursues where these tensors are, and in their numbers."""
    known = triton is not None and x.is_cuda and x.dtype == torch.float32
    return known and all(other.dtype == x.dtype and other.device == x.device for other in others)


def choose(x: Tensor, dictionary: Tensor, k: int, tolerance: float, nonnegative: bool, gram: Tensor) -> Tensor:
    """Atoms of every step, ``(signals, k)`` int64, −1 from the step on at which a signal is done.

    Parameters
    ----------
    x
        ``(signals, size)`` float32.
    dictionary
        ``(atoms, size)`` float32, each of length one.
    k, tolerance, nonnegative
        As in :func:`gossamer.kernels.pursuit.matching_pursuit`.
    gram
        Products of all atoms, ``(atoms, atoms)`` float32.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    """
    if triton is None:
        raise MissingDependencyError("triton", "gpu", "matching pursuit on a GPU")
    signals, atoms = len(x), len(dictionary)
    residual = x.clone(memory_format=torch.contiguous_format)
    dictionary, gram = dictionary.contiguous(), gram.contiguous()
    chosen = torch.full((signals, k), -1, dtype=torch.int64, device=x.device)
    going = torch.ones(signals, dtype=torch.int32, device=x.device)
    for first in range(0, k if signals else 0, REFRESH):
        _match[(signals,)](
            residual @ dictionary.t(),
            residual,
            dictionary,
            gram,
            chosen,
            going,
            atoms,
            x.shape[1],
            k,
            first,
            min(first + REFRESH, k),
            tolerance,
            NONNEGATIVE=nonnegative,
            ATOMS=min(_ATOMS, triton.next_power_of_2(atoms)),
            NUMBERS=min(_NUMBERS, triton.next_power_of_2(x.shape[1])),
        )
    return chosen


if triton is not None:

    @triton.jit
    def _match(
        common,
        residual,
        dictionary,
        gram,
        chosen,
        going,
        atoms,
        size,
        k,
        step,
        last,
        tolerance,
        NONNEGATIVE: tl.constexpr,
        ATOMS: tl.constexpr,
        NUMBERS: tl.constexpr,
    ):
        signal = tl.program_id(0).to(tl.int64)
        common += signal * atoms
        residual += signal * size
        goes = tl.load(going + signal)
        while (goes != 0) & (step < last):
            square = 0.0
            for first in range(0, size, NUMBERS):
                number = first + tl.arange(0, NUMBERS)
                left = tl.load(residual + number, mask=number < size, other=0)
                square += tl.sum(left * left, 0)
            highest, value, best = 0.0, 0.0, tl.zeros((), dtype=tl.int32)
            for first in range(0, atoms, ATOMS):
                atom = first + tl.arange(0, ATOMS)
                score = tl.load(common + atom, mask=atom < atoms, other=0)
                size_of = score if NONNEGATIVE else tl.abs(score)
                top = tl.max(size_of, 0)
                # of equal ones the first, in this tile and in all
                if top > highest:
                    best = tl.min(tl.where(size_of == top, atom, atoms), 0)
                    value = tl.sum(tl.where(atom == best, score, 0.0), 0)
                    highest = top
            if (highest > 0) & (tl.sqrt(square) > tolerance):
                tl.store(chosen + signal * k + step, best.to(tl.int64))
                row = best.to(tl.int64)
                for first in range(0, size, NUMBERS):
                    number = first + tl.arange(0, NUMBERS)
                    there = number < size
                    left = tl.load(residual + number, mask=there, other=0)
                    part = tl.load(dictionary + row * size + number, mask=there, other=0)
                    tl.store(residual + number, left - value * part, mask=there)
                for first in range(0, atoms, ATOMS):
                    atom = first + tl.arange(0, ATOMS)
                    there = atom < atoms
                    score = tl.load(common + atom, mask=there, other=0)
                    shared = tl.load(gram + row * atoms + atom, mask=there, other=0)
                    tl.store(common + atom, score - value * shared, mask=there)
                # the next step reads what other threads have written
                tl.debug_barrier()
            else:
                goes = 0
            step += 1
        tl.store(going + signal, goes)

"""Whether a learner cares in which directions its data are written down.

A learner is *equivariant* under a group of rotations if training on rotated samples gives the rotated predictor:
``A(XU, y)(xU) = A(X, y)(x)``. Such a learner can do no better on a task than on the same task behind a random rotation
it does not know, which is where lower bounds for fully connected networks come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, UnknownNameError

Group = Literal["orthogonal", "block", "shared-block"]
Learner = Callable[[Tensor, Tensor, Tensor], Callable[[Tensor], Tensor]]


def random_rotation(
    k: int,
    d: int,
    group: Group = "orthogonal",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A random orthogonal matrix for vectors of k patches of d numbers.

    Parameters
    ----------
    k, d
        Patches, and numbers in each.
    group
        ``"orthogonal"``: any, uniform (Haar); ``"block"``: one for each patch; ``"shared-block"``: the same for all.
    generator
        On the CPU.
    dtype
        Of the result.

    Returns
    -------
    Tensor
        ``(kd, kd)``.

    Raises
    ------
    UnknownNameError
        If there is no such group.
    ConfigurationError
        If a size is not positive.
    """
    if group not in get_args(Group):
        raise UnknownNameError("group of rotations", group, get_args(Group))
    if min(k, d) < 1:
        raise ConfigurationError(f"k and d are {k} and {d}; both must be positive")
    count, size = {"orthogonal": (1, k * d), "block": (k, d), "shared-block": (1, d)}[group]
    q, r = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))
    # without these signs the distribution of q would depend on the algorithm
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    blocks = q if group != "shared-block" else q.expand(k, d, d)
    return torch.block_diag(*blocks).to(dtype)


def check_equivariance(
    train: Learner,
    x: Tensor,
    y: Tensor,
    test: Tensor,
    initial: Tensor,
    group: Group = "orthogonal",
    repeats: int = 3,
    seed: int = 0,
) -> float:
    """Largest change of a prediction when data, test data and initial weights are rotated together.

    Rotating the initial weights as well stands for an initial distribution that no rotation changes: with it, the
    claim about distributions becomes one about numbers.

    Parameters
    ----------
    train
        ``train(x, y, initial)`` returns the predictor, a function from ``(m, k, d)`` to ``(m,)``.
    x, y, test
        ``(n, k, d)``, ``(n,)`` and ``(m, k, d)``.
    initial
        First weights, ``(units, kd)`` for the group of all rotations and for one of blocks; a filter ``(units, d)``
        for shared blocks, or ``(k, d)`` with a row for each block.
    group
        See :func:`random_rotation`.
    repeats
        How many rotations are tried.
    seed
        Of the rotations.

    Returns
    -------
    float
        Relative to the largest prediction; zero up to rounding if the learner is equivariant.
    """
    generator = generator_for("rotations", seed)
    k, d = x.shape[1:]
    plain = train(x, y, initial)(test)
    largest = 0.0
    for _ in range(repeats):
        rotation = random_rotation(k, d, group, generator, x.dtype)
        turned = [(each.flatten(1) @ rotation).view_as(each) for each in (x, test)]
        found = train(turned[0], y, _rotate_weights(initial, rotation, k, d))(turned[1])
        largest = max(largest, float((found - plain).abs().max()))
    return largest / max(float(plain.abs().max()), torch.finfo(x.dtype).tiny)


def _rotate_weights(weights: Tensor, rotation: Tensor, k: int, d: int) -> Tensor:
    """Rows that see everything are rotated as the data are; a row that sees one patch as that patch is."""
    if weights.shape[-1] == k * d:
        return weights @ rotation
    blocks = torch.stack([rotation[i * d : (i + 1) * d, i * d : (i + 1) * d] for i in range(k)])
    if len(weights) == k:
        return torch.einsum("kd,kde->ke", weights, blocks)
    return weights @ blocks[0]

"""First weights of equal size and different structure, which decide how much a network changes when it learns.

At a fixed Frobenius norm, a matrix of high effective rank leaves a network little to change (*lazy*), one of low rank
makes it change a lot (*rich*), unless its few directions are those that task and data need. Structure that is found in
brains, cell types, Dale's law, over-represented motifs, lowers the effective rank; so does a mask that leaves a block,
but not one that leaves random places.

Everything returns recurrent weights ``(n, n)``, rows the receiving and columns the sending units, with the norm
``gain · √n`` that independent Gaussian weights of variance ``gain²/n`` have on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.core.effective_rank import match_norm, truncate_rank
from gossamer.errors import ConfigurationError, check_sparsity

GAIN = 1.25


def gaussian(n: int, gain: float = GAIN, generator: torch.Generator | None = None) -> Tensor:
    """Independent weights ``gain · N(0, 1)/√n``, whose norm is not fixed but close to ``gain · √n``.

    Liu et al., 2024, arXiv 2310.08513, take a gain of 1.25.
    """
    _check(n, gain)
    return torch.randn(n, n, generator=generator) * (gain / math.sqrt(n))


def low_rank(n: int, rank: int, gain: float = GAIN, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian weights cut to a rank, with the norm they had.

    See :func:`gossamer.core.effective_rank.truncate_rank`.
    """
    return truncate_rank(gaussian(n, gain, generator), rank)


def aligned_low_rank(
    direction: Tensor,
    outputs: int,
    norm: float,
    alignment: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights ``norm · u vᵀ`` of rank one that read out what the task needs, or that and something else.

    Parameters
    ----------
    direction
        What the task depends on, β, ``(inputs,)``; with features F of the data, ``wᵀF``.
    outputs
        Rows.
    norm
        Frobenius norm of the result, positive.
    alignment
        Cosine c between v and the direction, in [0, 1]: 1 is the lazy exception of Liu et al., 2024, arXiv
        2310.08513; at 0 the rank-one matrix knows nothing of the task.
    generator
        Of u, and of the rest of v.

    Returns
    -------
    Tensor
        ``(outputs, inputs)``.

    Raises
    ------
    ConfigurationError
        If the direction is no vector or zero, or a number is out of range.
    """
    if direction.dim() != 1 or not float(direction.norm()) > 0:
        raise ConfigurationError(f"the direction has shape {tuple(direction.shape)}; a vector other than 0 is needed")
    if outputs < 1 or not norm > 0 or not 0 <= alignment <= 1:
        raise ConfigurationError(
            f"outputs, norm and alignment are {outputs}, {norm} and {alignment}; positive, positive and in [0, 1]"
        )
    unit = direction / direction.norm()
    rest = torch.randn(unit.shape, generator=generator, dtype=unit.dtype)
    rest = rest - (rest @ unit) * unit
    if len(unit) > 1:
        rest = rest / rest.norm()
    v = alignment * unit + math.sqrt(1 - alignment**2) * rest
    u = torch.randn(outputs, generator=generator, dtype=unit.dtype)
    return match_norm(torch.outer(u, v), float(norm))


def dale(
    n: int,
    gain: float = GAIN,
    inhibitory: float = 0.2,
    balanced: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dale's law: all weights from one unit have one sign.

    Parameters
    ----------
    n, gain, generator
        See :func:`gaussian`.
    inhibitory
        Share of units whose weights are negative, in (0, 1).
    balanced
        Whether these are larger by as much as they are fewer, so that excitation and inhibition cancel on average.
    """
    _check(n, gain)
    if not 0 < inhibitory < 1:
        raise ConfigurationError(f"inhibitory is {inhibitory}; it must be a share in (0, 1), such as 0.2")
    count = max(1, round(inhibitory * n))
    sign = torch.ones(n)
    sign[n - count :] = -((n - count) / count if balanced else 1.0)
    return match_norm(gaussian(n, gain, generator).abs() * sign, gain * math.sqrt(n))


def cell_types(
    n: int,
    gain: float = GAIN,
    types: int = 4,
    strength: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Units of a few types; the mean weight depends on the types of both ends.

    Parameters
    ----------
    n, gain, generator
        See :func:`gaussian`.
    types
        Number of equal groups, from 1 to n.
    strength
        Share of the squared norm that the means hold, in [0, 1]; they have at most the rank `types`.
    """
    _check(n, gain)
    if not 1 <= types <= n or not 0 <= strength <= 1:
        raise ConfigurationError(f"types and strength are {types} and {strength}; 1 to {n}, and in [0, 1]")
    kind = torch.arange(n) * types // n
    means = torch.randn(types, types, generator=generator)[kind][:, kind]
    return _mix(match_norm(means, 1.0), match_norm(gaussian(n, gain, generator), 1.0), strength, gain, n)


def motifs(
    n: int,
    gain: float = GAIN,
    reciprocal: float = 0.0,
    chain: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Gaussian weights whose two-edge motifs are over- or under-represented.

    Parameters
    ----------
    n, gain, generator
        See :func:`gaussian`.
    reciprocal
        Correlation of ``W_ij`` with ``W_ji``, in [−1, 1].
    chain
        Correlation of ``W_ij`` with ``W_jk``, in [−1/2, 1/2]: units that receive much also send much, or little. It
        adds a part of rank two, with as many convergent and divergent motifs.
    """
    _check(n, gain)
    if not -1 <= reciprocal <= 1 or not -0.5 <= chain <= 0.5:
        raise ConfigurationError(f"reciprocal and chain are {reciprocal} and {chain}; in [−1, 1] and [−1/2, 1/2]")
    draw = torch.randn(n, n, generator=generator)
    plus, minus = math.sqrt(1 + reciprocal), math.sqrt(1 - reciprocal)
    pairs = (plus * (draw + draw.t()) + minus * (draw - draw.t())) / 2
    receives = torch.randn(n, generator=generator)
    sends = receives * math.copysign(1.0, chain)
    shared = receives.unsqueeze(1) + sends.unsqueeze(0)
    # Cov(W_ij, W_jk) = |chain| · Cov(sends_j, receives_j) = chain
    return match_norm(math.sqrt(1 - 2 * abs(chain)) * pairs + math.sqrt(abs(chain)) * shared, gain * math.sqrt(n))


def sparse(n: int, density: float, gain: float = GAIN, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian weights at random places, exactly ``round(density · n²)`` of them; almost all of the rank stays."""
    return _masked(n, gain, random_mask(n, density, generator), generator)


def one_block(n: int, density: float, gain: float = GAIN, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian weights within one square of the same density, which has rank ``√density · n``."""
    return _masked(n, gain, block_mask(n, density), generator)


def modular(n: int, blocks: int, gain: float = GAIN, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian weights within equal squares along the diagonal; all of the rank stays."""
    _check(n, gain)
    if not 1 <= blocks <= n:
        raise ConfigurationError(f"blocks is {blocks}; it must lie between 1 and {n}")
    kind = torch.arange(n) * blocks // n
    return _masked(n, gain, kind.unsqueeze(1) == kind, generator)


def like_connectome(
    connectome: Tensor,
    n: int,
    gain: float = GAIN,
    randomize: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Weights with the places, signs and relative sizes of a measured connectome.

    Parameters
    ----------
    connectome
        Signed synapse counts, ``(m, m)``, rows the receiving neurons.
    n
        Units: as many neurons are drawn, if there are more.
    gain, generator
        See :func:`gaussian`.
    randomize
        Whether the weights are shuffled over all places, diagonal included: the control that keeps the values and
        loses the structure.

    Raises
    ------
    ConfigurationError
        If there are fewer neurons than units, or no synapse among those that were drawn.
    """
    _check(n, gain)
    if connectome.dim() != 2 or connectome.shape[0] != connectome.shape[1] or len(connectome) < n:
        raise ConfigurationError(f"the connectome has shape {tuple(connectome.shape)}; at least {(n, n)} is needed")
    chosen = torch.randperm(len(connectome), generator=generator)[:n]
    weights = connectome[chosen][:, chosen].float()
    if not weights.any():
        raise ConfigurationError(f"there is no synapse among {n} of {len(connectome)} neurons; take more")
    if randomize:
        weights = weights.flatten()[torch.randperm(n * n, generator=generator)].view(n, n)
    return match_norm(weights, gain * math.sqrt(n))


def random_mask(n: int, density: float, generator: torch.Generator | None = None) -> Tensor:
    """``(n, n)`` bool, True at exactly ``round(density · n²)`` random places, at least one."""
    check_sparsity(1 - density, "1 − density")
    mask = torch.zeros(n * n, dtype=torch.bool)
    mask[torch.randperm(n * n, generator=generator)[: max(1, round(density * n * n))]] = True
    return mask.view(n, n)


def block_mask(n: int, density: float) -> Tensor:
    """``(n, n)`` bool, True in the square of the first ``round(√density · n)`` rows and columns."""
    check_sparsity(1 - density, "1 − density")
    side = torch.arange(n) < max(1, round(math.sqrt(density) * n))
    return side.unsqueeze(1) & side


INITIALIZATIONS: dict[str, Callable[..., Tensor]] = {
    "gaussian": gaussian,
    "dale": dale,
    "cell types": cell_types,
    "motifs": motifs,
}
"""Ways to draw first weights that need nothing but a size, by name."""


def _masked(n: int, gain: float, mask: Tensor, generator: torch.Generator | None) -> Tensor:
    return match_norm(gaussian(n, gain, generator) * mask, gain * math.sqrt(n))


def _mix(first: Tensor, second: Tensor, share: float, gain: float, n: int) -> Tensor:
    mixed = math.sqrt(share) * first + math.sqrt(1 - share) * second
    return match_norm(mixed, gain * math.sqrt(n))


def _check(n: int, gain: float) -> None:
    if n < 1 or not gain > 0:
        raise ConfigurationError(f"n and gain are {n} and {gain}; both must be positive")

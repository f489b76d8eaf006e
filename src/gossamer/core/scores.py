"""Which weights matter: scores of the shape of the weight, higher = more worth keeping.

All functions are pure, return float32, and follow the device of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """``|W|``."""
    return weight.abs().float()


def input_weighted(weight: Tensor, input_norm: Tensor) -> Tensor:
    """``|W_ij| · ‖X_j‖₂``: Wanda's score [Sun et al., 2023, arXiv 2306.11695, eq. 1].

    Parameters
    ----------
    weight
        ``(out, in)`` or ``(out, in, kernel…)``.
    input_norm
        Broadcastable to `weight`.
    """
    return weight.abs().float() * input_norm.float()


def relative_importance(weight: Tensor, input_norm: Tensor, power: float = 0.5) -> Tensor:
    """``(|W_ij| / Σ_i|W_ij| + |W_ij| / Σ_j|W_ij|) · ‖X_j‖₂^power``: RIA [Zhang et al., 2024, ICLR, eq. 3]."""
    absolute = weight.abs().float()
    inputs = tuple(range(1, weight.dim()))
    tiny = torch.finfo(torch.float32).tiny
    share_of_column = absolute / absolute.sum(0, keepdim=True).clamp_min(tiny)
    share_of_row = absolute / absolute.sum(inputs, keepdim=True).clamp_min(tiny)
    return (share_of_column + share_of_row) * input_norm.float() ** power


def lamp(weight: Tensor) -> Tensor:
    """``W_u² / Σ_{|W_v| ≥ |W_u|} W_v²``, by which layers compare: LAMP [Lee et al., 2021, arXiv 2010.07611].

    The largest weight of every layer scores 1, so that a layer loses its last weight only when all have but one left.
    Zeros score 0.
    """
    flat = weight.double().flatten().square()
    ordered, order = flat.sort(stable=True)
    not_smaller = ordered.flip(0).cumsum(0).flip(0)
    share = ordered / not_smaller.clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(flat).scatter_(0, order, share).view(weight.shape).float()


def random(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in [0, 1), drawn on the CPU so that a seed means the same on every device."""
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """``|W · ∂L/∂W|``: first-order change of the loss on removal [Molchanov et al., 2017, arXiv 1611.06440]."""
    return (weight.float() * gradient.float()).abs()


def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """``½ W² · E[(∂L/∂W)²]``: second-order change with the diagonal Fisher information as curvature."""
    return 0.5 * weight.float().square() * squared_gradient.float()


def surgeon(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """``W² / [H⁻¹]_jj``: error of removing one weight when the others make up for it [Hassibi & Stork, 1992].

    Parameters
    ----------
    weight
        ``(out, in)``.
    inverse_diagonal
        Diagonal of the inverse Hessian (or squared diagonal of its Cholesky factor), broadcastable to `weight`.
    """
    return weight.float().square() / inverse_diagonal.float()


def combined(*weighted: tuple[float, Tensor]) -> Tensor:
    """Weighted sum of scores, each first divided by its mean so that their scales do not decide."""
    total = torch.zeros_like(weighted[0][1], dtype=torch.float32)
    for share, score in weighted:
        mean = score.float().mean()
        total += share * score.float() / torch.where(mean > 0, mean, 1)
    return total

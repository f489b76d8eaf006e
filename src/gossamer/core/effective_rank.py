"""How many directions a matrix really uses, and matrices that use fewer of them at the same norm."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, NonFiniteError, UnknownNameError

RankKind = Literal["participation", "stable", "entropy"]


def effective_rank(matrix: Tensor, kind: RankKind = "participation") -> float | Tensor:
    """Effective rank from the singular values σ: 1 if one direction has it all, n if n share alike.

    Parameters
    ----------
    matrix
        ``(..., m, n)``.
    kind
        ``"participation"``: ``(Σσ)² / Σσ²``; ``"stable"``: ``Σσ² / max σ²``, which is ‖W‖_F²/‖W‖₂²; ``"entropy"``:
        ``exp(−Σ p log p)`` with ``p = σ/Σσ`` (Roy & Vetterli, 2007). The first is what Liu et al., 2024, arXiv
        2310.08513, vary.

    Returns
    -------
    float or Tensor
        A number for one matrix, ``(...)`` for a stack; 0 for a matrix of zeros.

    Raises
    ------
    UnknownNameError
        If there is no such kind.
    ConfigurationError
        If it is no matrix.
    NonFiniteError
        If it holds NaN or infinity.
    """
    values = _singular_values(matrix)
    total = values.sum(-1)
    if kind == "participation":
        found = total.square() / values.square().sum(-1)
    elif kind == "stable":
        found = values.square().sum(-1) / values[..., 0].square()
    elif kind == "entropy":
        shares = values / total.unsqueeze(-1)
        found = torch.special.entr(shares).sum(-1).exp()
    else:
        raise UnknownNameError("effective rank", kind, get_args(RankKind))
    found = torch.where(total > 0, found, 0.0)
    return float(found) if found.dim() == 0 else found


def truncate_rank(matrix: Tensor, rank: int, keep_norm: bool = True) -> Tensor:
    """Keep the largest singular values, and if wanted the Frobenius norm.

    Liu et al., 2024, arXiv 2310.08513, section 3: the rank changes and ‖W‖_F does not, so that a difference in what
    is learnt afterwards is due to the rank alone. The spectral norm grows in return.

    Parameters
    ----------
    matrix
        ``(..., m, n)``.
    rank
        From 1 to ``min(m, n)``.
    keep_norm
        Whether the result is scaled to the norm that the matrix had.

    Raises
    ------
    ConfigurationError
        If it is no matrix, or `rank` is out of range.
    NonFiniteError
        If it holds NaN or infinity.
    """
    _check(matrix)
    most = min(matrix.shape[-2:])
    if not 1 <= rank <= most:
        raise ConfigurationError(f"rank is {rank}; it must lie between 1 and {most} for a matrix {tuple(matrix.shape)}")
    if rank == most:
        return matrix.clone()
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    result = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    if keep_norm:
        result = match_norm(result, matrix.double())
    return result.to(matrix.dtype)


def match_norm(matrix: Tensor, other: Tensor | float) -> Tensor:
    """Scale each matrix to the Frobenius norm of another, or to a number; zeros stay zeros."""
    wanted = other if isinstance(other, float) else torch.linalg.matrix_norm(other)[..., None, None]
    norm = torch.linalg.matrix_norm(matrix)[..., None, None]
    return matrix * (wanted / norm.clamp_min(torch.finfo(matrix.dtype).tiny))


def _singular_values(matrix: Tensor) -> Tensor:
    _check(matrix)
    return torch.linalg.svdvals(matrix.double())


def _check(matrix: Tensor) -> None:
    if matrix.dim() < 2 or matrix.numel() == 0:
        raise ConfigurationError(f"the shape is {tuple(matrix.shape)}; a matrix (..., m, n) is needed")
    if not torch.isfinite(matrix).all():
        raise NonFiniteError("the matrix holds NaN or infinity and has no singular values; look at what made it")

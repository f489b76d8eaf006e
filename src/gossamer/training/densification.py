"""What fine-tuning does to weights that pretraining never saw: how far they move, and whether the matrix turns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.errors import ConfigurationError, TargetError


@dataclass(frozen=True)
class Movement:
    """The way of one matrix through fine-tuning.

    Attributes
    ----------
    name
        Of the parameter.
    revived, kept
        Root mean square of the change of a weight that had been masked, and of one that was pretrained.
    revived_share
        Share of the squared change of the matrix that the revived weights made.
    relative
        Norm of the change over the norm before it.
    angle
        Mean principal angle between the leading left singular subspaces before and after, in degrees: 0 if the matrix
        still writes into the same subspace, 90 if into another.
    """

    name: str
    revived: float
    kept: float
    revived_share: float
    relative: float
    angle: float


def snapshot(model: nn.Module, masks: MaskSet) -> dict[str, Tensor]:
    """Copies of the weights that the masks cover, as they are now.

    Raises
    ------
    TargetError
        If the model has no such parameter.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in masks:
        if name not in parameters:
            raise TargetError(f"the model has no parameter {name!r}: these masks belong to another model")
    return {name: parameters[name].detach().clone() for name in masks}


def movements(before: Mapping[str, Tensor], model: nn.Module, masks: MaskSet, rank: int = 8) -> list[Movement]:
    """How each matrix has moved since a :func:`snapshot` [Thangarasa et al., 2023, arXiv 2303.10464, analysis].

    Parameters
    ----------
    before
        Weights at the end of sparse pretraining.
    model
        The same model, fine-tuned.
    masks
        True where a weight was pretrained.
    rank
        Dimension of the subspaces, cut to the size of the matrix.

    Raises
    ------
    TargetError
        If names do not fit.
    """
    after = snapshot(model, masks)
    if set(before) != set(after):
        raise TargetError(
            f"the snapshot lacks or adds {sorted(set(before) ^ set(after))[0]!r}; take it with these masks"
        )
    found = []
    for name, new in after.items():
        mask, old = masks[name].to(new.device), before[name].to(new.device).double()
        change = (new.double() - old).square()
        total = float(change.sum())
        found.append(
            Movement(
                name,
                _root_mean(change[~mask]),
                _root_mean(change[mask]),
                float(change[~mask].sum()) / total if total else 0.0,
                math.sqrt(total / float(old.square().sum())) if old.any() else math.inf,
                math.degrees(float(principal_angles(old.flatten(1), new.flatten(1), rank).mean())),
            )
        )
    return found


def principal_angles(first: Tensor, second: Tensor, rank: int) -> Tensor:
    """Angles between the spaces spanned by the leading left singular vectors of two matrices.

    Parameters
    ----------
    first, second
        ``(out, in)``, with equally many rows.
    rank
        Dimension of both spaces, at least 1; cut to the smaller side of the matrices.

    Returns
    -------
    Tensor
        ``(rank,)`` float64, in radians, ascending, from 0 to π/2.

    Raises
    ------
    ConfigurationError
        If `rank` is below 1, or the rows differ.
    """
    if rank < 1 or len(first) != len(second):
        raise ConfigurationError(
            f"rank is {rank}, and the matrices have {len(first)} and {len(second)} rows; at least 1 and equally many "
            f"are needed"
        )
    rank = min(rank, *first.shape, *second.shape)
    bases = [torch.linalg.svd(matrix.double(), full_matrices=False).U[:, :rank] for matrix in (first, second)]
    cosines = torch.linalg.svdvals(bases[0].T @ bases[1]).clamp(0, 1)
    # where the cosine is near 1 it is blind; what is left outside the other space shows the small angles
    sines = torch.linalg.svdvals(bases[1] - bases[0] @ (bases[0].T @ bases[1])).clamp(0, 1).flip(0)
    return torch.where(cosines > 0.7, torch.asin(sines), torch.acos(cosines))


def _root_mean(squares: Tensor) -> float:
    return math.sqrt(float(squares.mean())) if squares.numel() else 0.0

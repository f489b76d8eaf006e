"""Other ways to choose the links of every query, at the same number: by truth, by chance, by nearness, by projection.

Each makes scores of the shape that :meth:`~gossamer.attention.link_attention.LinkMask.topk` takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError


def oracle_scores(q: Tensor, k: Tensor, prefix: int = 1) -> Tensor:
    """The true scores ``q kᵀ``, ``(batch, heads, rows, keys)``: no other choice can hold more of the attention."""
    return q[:, :, prefix:] @ k.transpose(-1, -2)


def random_scores(q: Tensor, k: Tensor, generator: torch.Generator | None = None, prefix: int = 1) -> Tensor:
    """Chance: every set of links of one size is as likely as any other."""
    shape = (*q.shape[:2], q.shape[2] - prefix, k.shape[2])
    return torch.rand(shape, generator=generator).to(q.device)


def local_scores(q: Tensor, k: Tensor, prefix: int = 1) -> Tensor:
    """Nearness on the square grid of patches, the same for all images; keys of the prefix count as nearest.

    Raises
    ------
    ConfigurationError
        If the patches form no square.
    """
    patches = k.shape[2] - prefix
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ConfigurationError(f"{patches} patches form no square grid; a local window needs one")
    place = torch.arange(patches, device=q.device)
    grid = torch.stack([place // side, place % side], 1).double()
    near = -torch.cdist(grid, grid).to(q.dtype)
    near = torch.nn.functional.pad(near, (prefix, 0), value=1.0)
    return near.expand(*q.shape[:2], -1, -1)


def projected_scores(
    q: Tensor, k: Tensor, prototypes: int, generator: torch.Generator | None = None, prefix: int = 1
) -> Tensor:
    """A map of low rank by a random projection of the keys along tokens, ``q (E k)ᵀ E`` with E of M rows.

    The map of Linformer [Wang et al., 2020, arXiv 2006.04768] without any training: ``EᵀE`` is the identity on
    average, so the scores are right on average, with an error that falls as ``M^−½``.

    Parameters
    ----------
    q, k, prefix
        See :func:`oracle_scores`.
    prototypes
        M.
    generator
        Of E, on the CPU.
    """
    drawn = torch.randn(prototypes, k.shape[2], generator=generator) / math.sqrt(prototypes)
    drawn = drawn.to(q)
    return (q[:, :, prefix:] @ (drawn @ k).transpose(-1, -2)) @ drawn

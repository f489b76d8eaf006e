"""From scores of blocks to the blocks that are read.

Every function takes scores ``(batch, heads, query blocks, key blocks)`` and gives bool of the same shape. What may be
read at all is `allowed`, ``(query blocks, key blocks)``; what is read whatever its score, `always`, can be broadcast to
the scores and comes out of the same budget. Of equal scores the first is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.kernels.block_choice import best_blocks, heaviest_blocks


def top_blocks(scores: Tensor, keep: int | Tensor, allowed: Tensor, always: Tensor | None = None) -> Tensor:
    """The best blocks of every row.

    Parameters
    ----------
    scores
        Any finite numbers.
    keep
        How many a row; one number, or something that can be broadcast to ``(batch, heads, query blocks)``. A row that
        may read fewer reads them all, and one that must read more than that reads what it must.
    allowed, always
        See the module.

    Raises
    ------
    ConfigurationError
        If a row is to keep no block.
    """
    counts = torch.as_tensor(keep, device=scores.device)
    if bool((counts < 1).any()):
        raise ConfigurationError(f"keep is {int(counts.min())}; every row of queries must read at least one block")
    return best_blocks(scores, counts, allowed, always)


def mass_blocks(scores: Tensor, threshold: float | Tensor, allowed: Tensor, always: Tensor | None = None) -> Tensor:
    """The fewest blocks of every row that hold a share of its mass.

    Blocks that are read whatever their score count first; then blocks follow in descending order as long as those
    before them hold less than the share.

    Parameters
    ----------
    scores
        Not negative.
    threshold
        Share in (0, 1], one number or one for each head, ``(heads,)``; with 1 all allowed blocks are read.
    allowed, always
        See the module.

    Raises
    ------
    ConfigurationError
        If a threshold is outside (0, 1].
    """
    share = torch.as_tensor(threshold, dtype=torch.float64, device=scores.device)
    if not bool(((share > 0) & (share <= 1)).all()):
        raise ConfigurationError(f"threshold is {threshold}; it must be in (0, 1], where 1 reads everything")
    return heaviest_blocks(scores, share[:, None] if share.dim() else share, allowed, always)


def sinks_and_diagonal(geometry: BlockMask, sinks: int = 1, recent: int = 1, key_mask: Tensor | None = None) -> Tensor:
    """The first blocks of keys and the last ones before each row's own end.

    Parameters
    ----------
    geometry
        Any mask of the same lengths and block sizes.
    sinks
        Number of first blocks.
    recent
        Number of last ones, the diagonal included.
    key_mask
        Bool ``(batch, keys)``, False at padding: the first block then is the first with a real key.

    Returns
    -------
    Tensor
        Bool ``(query blocks, key blocks)``, or ``(batch, 1, query blocks, key blocks)`` where there is padding.
    """
    if key_mask is None:
        return geometry.geometry.ends(sinks, recent)
    first = (key_mask.int().argmax(-1) // geometry.block_size[1])[:, None, None, None]
    columns = torch.arange(geometry.grid[1], device=geometry.blocks.device)
    begin = (columns >= first) & (columns < first + sinks) & geometry.allowed
    return begin | geometry.geometry.ends(0, recent)


def ranks(scores: Tensor) -> Tensor:
    """Place of every score in its row, 0 for the highest; of equal ones the first comes first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)

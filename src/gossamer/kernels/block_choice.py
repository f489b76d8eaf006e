"""Which blocks of every row are read, by their scores: the best so many, or the fewest that hold a share of the mass.

Scores are ``(batch, heads, query blocks, key blocks)``; `allowed`, ``(query blocks, key blocks)``, says what may be
read at all, and `always`, which can be broadcast to the scores, what is read whatever its score, before all others. Of
equal scores the first is taken. Compiled code puts a row in order only as far as it is kept, and keeps exactly what
torch alone keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.native import native, offers

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # whose numbers float32 holds exactly


def best_blocks(scores: Tensor, counts: Tensor, allowed: Tensor, always: Tensor | None = None) -> Tensor:
    """The best blocks of every row.

    Parameters
    ----------
    scores, allowed, always
        See the module.
    counts
        How many of a row; can be broadcast to ``(batch, heads, query blocks)``. What is always read counts.

    Returns
    -------
    Tensor
        Bool, of the shape of the scores.
    """
    if _suits("best_blocks", scores, allowed, always):
        return _compiled("best_blocks", scores, counts.long(), allowed, always)
    order = _order(scores, allowed, always)
    places = torch.arange(scores.shape[-1], device=scores.device)
    return _kept(order, places < counts[..., None], allowed, always)


def heaviest_blocks(scores: Tensor, shares: Tensor, allowed: Tensor, always: Tensor | None = None) -> Tensor:
    """The fewest blocks of every row that hold a share of its mass: as long as those before hold less, one follows.

    Parameters
    ----------
    scores
        Mass of every block, not negative. It is added up in float64, that of a row from the first block to the last,
        that of kept blocks in the order in which they are taken.
    allowed, always
        See the module.
    shares
        In (0, 1]; can be broadcast to ``(batch, heads, query blocks)``. With 1, all allowed blocks are read.

    Returns
    -------
    Tensor
        Bool, of the shape of the scores.
    """
    if _suits("heaviest_blocks", scores, allowed, always):
        return _compiled("heaviest_blocks", scores, shares.double(), allowed, always)
    mass = torch.where(allowed, scores, 0).double()
    order = _order(scores, allowed, always)
    share = shares[..., None].double()
    before = mass.gather(-1, order).cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    wanted = (before < share * mass.cumsum(-1)[..., -1:]) | (share == 1)
    return _kept(order, wanted, allowed, always)


def _order(scores: Tensor, allowed: Tensor, always: Tensor | None) -> Tensor:
    found = scores.masked_fill(~allowed, float("-inf"))
    found = found if always is None else found.masked_fill(always & allowed, float("inf"))
    return found.argsort(dim=-1, descending=True, stable=True)


def _kept(order: Tensor, wanted: Tensor, allowed: Tensor, always: Tensor | None) -> Tensor:
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, wanted.expand_as(order)) & allowed
    return kept if always is None else kept | (always & allowed)


def _suits(name: str, scores: Tensor, allowed: Tensor, always: Tensor | None) -> bool:
    masks = [allowed] if always is None else [allowed, always]
    return (
        offers(name)
        and not torch.compiler.is_compiling()
        and scores.dim() == 4
        and scores.dtype in _DTYPES
        and allowed.shape == scores.shape[-2:]
        and all(mask.dtype == torch.bool and mask.device == scores.device for mask in masks)
        and scores.device.type == "cpu"
    )


def _compiled(name: str, scores: Tensor, of_rows: Tensor, allowed: Tensor, always: Tensor | None) -> Tensor:
    scores, allowed = scores.detach().float().contiguous(), allowed.contiguous()
    of_rows = of_rows.expand(scores.shape[:3]).contiguous()
    kept = torch.empty(scores.shape, dtype=torch.bool)
    must = allowed if always is None else always if always.stride(-1) == 1 else always.contiguous()
    must = must.expand(scores.shape)
    about = (0 if always is None else must.data_ptr(), *must.stride()[:3])
    grid = (*scores.shape, scores.data_ptr(), allowed.data_ptr(), *about, kept.data_ptr())
    getattr(native(), name)(grid, of_rows.data_ptr(), torch.get_num_threads())
    return kept

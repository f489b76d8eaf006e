"""AdaSpa: a video transformer searches its block pattern exactly, but only twice.

Once the log-sum-exp of every row of scores is known, one more pass over queries and keys gives the exact weight of
every block, in a memory that grows with the number of blocks. Over the steps of a diffusion both the pattern and the
log-sum-exps hardly change. So the last dense step searches, a later step searches again with the old log-sum-exps at
half the price, and all others read the blocks that were found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.attention.base import Answer, check_share
from gossamer.attention.selection import top_blocks
from gossamer.attention.state import StepwiseAttention
from gossamer.core.block_mask import BlockMask, block_count
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, SparsityError, check_sparsity
from gossamer.kernels.attention import attention_with_lse, block_mass, block_sparse_attention
from gossamer.models.attention_sites import AttentionCall

_LARGEST = 60.0  # exponent: e^60 may be summed over any number of keys in float32
_LEAST_SPARSITY = 1 / 3


@register(
    "adaspa",
    paper="adaspa",
    when="at inference",
    granularity="blocks",
    needs_data=False,
    criterion=("activation",),
    allocation="measured",
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class AdaSpa(StepwiseAttention):
    """Exact block weights found at two steps, and used at all others [Xia et al., 2025, arXiv 2502.21079].

    With W[p, q] the softmax weights summed over block (p, q), every row of blocks keeps the ⌈(1 − s) n_b⌉ largest.
    Heads whose kept share of W (recall) is high get sparsity (1 + s) / 2, as many of the lowest get (3s − 1) / 2.

    Parameters
    ----------
    sparsity
        s, in [0, 1); with `head_adaptive` at least 1/3.
    block_size
        Tokens of a block.
    search_steps
        Which steps search, counted from 1; those before the first are dense, and the first is dense itself.
    recall
        Above which a head counts as easy.
    text_tokens
        Which tokens are text; their blocks are always read, both ways. By default the context that ``begin`` was told.
    head_adaptive
        Whether heads get three levels of sparsity, or all the same.
    row_wise
        Whether all rows of a head keep equally many blocks; otherwise its heaviest blocks are kept wherever they are,
        and at least one a row.
    reorder
        Order in which tokens are cut into blocks, a permutation ``(n,)``, such as from :func:`tile_order`; by default
        that of the model. `text_tokens` are places in it.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.
    """

    sparsity: float = 0.8
    block_size: int = 64
    search_steps: tuple[int, ...] = (10, 30)
    recall: float = 0.8
    text_tokens: slice | None = None
    head_adaptive: bool = True
    row_wise: bool = True
    reorder: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity)
        check_share(self.recall, "recall")
        if self.head_adaptive:
            _check_levels(self.sparsity)
        steps = list(self.search_steps)
        if not steps or steps[0] < 1 or steps != sorted(set(steps)):
            raise ConfigurationError(f"search_steps is {self.search_steps}; give ascending steps from 1, as (10, 30)")
        if self.block_size < 1:
            raise ConfigurationError(f"block_size is {self.block_size}; it must be 1 or more, such as 64")

    def mix(self, call: AttentionCall) -> Answer | None:
        """Dense, a search, or the blocks that the last search found."""
        step = self.cache.index + 1
        if step < self.search_steps[0]:
            return None
        if self.reorder is not None:
            call = _reordered(call, self.reorder)
        answer = self._searched(call) if step == self.search_steps[0] else self._sparse(call, step)
        if self.reorder is None:
            return answer
        return replace(answer, output=answer.output[:, :, self.reorder.argsort()])

    def _searched(self, call: AttentionCall) -> Answer:
        """The fused search: dense attention, whose log-sum-exps a second pass turns into weights."""
        output, lse = attention_with_lse(
            call.query, call.key, call.value, causal=False, scale=call.scale, key_mask=call.key_mask
        )
        self.cache.put(call, "log-sum-exp", lse)
        self.cache.put(call, "pattern", self.pattern(call, self._mass(call, lse)))
        return Answer(output, 1.0)

    def _sparse(self, call: AttentionCall, step: int) -> Answer:
        if step in self.search_steps:
            lse = bounded(call, self.cache.get(call, "log-sum-exp"))
            self.cache.put(call, "pattern", self.pattern(call, self._mass(call, lse)))
        mask: BlockMask = self.cache.get(call, "pattern")
        output = block_sparse_attention(
            call.query, call.key, call.value, mask, scale=call.scale, key_mask=call.key_mask
        )
        return Answer(output, mask.real_density(call.key_mask))

    def _mass(self, call: AttentionCall, lse: Tensor) -> Tensor:
        return block_mass(
            call.query, call.key, lse, self.block_size, causal=False, scale=call.scale, key_mask=call.key_mask
        )

    def pattern(self, call: AttentionCall, mass: Tensor) -> BlockMask:
        """The blocks to keep of weights ``(batch, heads, query blocks, key blocks)``.

        Parameters
        ----------
        call
            What they are the weights of.
        mass
            W.
        """
        always = self._text_blocks(call, mass)
        levels = torch.full(mass.shape[:2], self.sparsity, dtype=torch.float64, device=mass.device)
        mask = self._selected(call, mass, levels, always)
        if not self.head_adaptive:
            return mask
        return self._selected(call, mass, head_levels(mask.recall(mass), self.sparsity, self.recall), always)

    def _selected(self, call: AttentionCall, mass: Tensor, levels: Tensor, always: Tensor) -> BlockMask:
        rows, columns = mass.shape[-2:]
        # (1 − 0.7) · 10 must be 3 and not a little more
        keep = ((1 - levels) * columns).round(decimals=9).ceil().clamp(min=1).long()[..., None]
        allowed = torch.ones_like(always)
        if self.row_wise:
            blocks = top_blocks(mass, keep, allowed, always)
        else:
            first = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
            flat, forced = mass.flatten(2)[:, :, None], (first | always).flatten(2)[:, :, None]
            blocks = top_blocks(flat, keep * rows, allowed.view(1, -1), forced).view_as(mass)
        n = call.query.shape[2]
        return BlockMask(blocks, n, n, (self.block_size, self.block_size), causal=False)

    def _text_blocks(self, call: AttentionCall, mass: Tensor) -> Tensor:
        """Blocks with text among their queries or keys, bool ``(query blocks, key blocks)``."""
        text = self.cache.context if self.text_tokens is None else self.text_tokens
        start, stop, _ = text.indices(call.query.shape[2])
        found = torch.zeros(mass.shape[-2:], dtype=torch.bool, device=mass.device)
        if stop > start:
            covered = slice(start // self.block_size, block_count(stop, self.block_size))
            found[covered], found[:, covered] = True, True
        return found

    def expected_cost(self, steps: int) -> float:
        """Attention of a sample relative to dense: (t + (N − t)(1 − s) + searches / 2) / N, t the first search.

        A search is one pass over queries and keys, half of an attention. Text is left out.
        """
        dense = min(self.search_steps[0], steps)
        searches = sum(step <= steps for step in self.search_steps)
        return (dense + (steps - dense) * (1 - self.sparsity) + searches / 2) / steps


def head_levels(recall: Tensor, sparsity: float, threshold: float = 0.8) -> Tensor:
    """Three levels of sparsity by the recall of heads, of the same mean.

    Parameters
    ----------
    recall
        Share of the weights that each head keeps at `sparsity`, ``(batch, heads)``.
    sparsity
        s.
    threshold
        c heads lie above it; the c highest get (1 + s) / 2, the c lowest (3s − 1) / 2. c is at most half of the heads.

    Returns
    -------
    Tensor
        Sparsity of each head, float64 ``(batch, heads)``.

    Raises
    ------
    SparsityError
        If s is below 1/3, where the lowest level would be negative.
    """
    _check_levels(sparsity)
    heads = recall.shape[-1]
    count = (recall > threshold).sum(-1, keepdim=True).clamp(max=heads // 2)
    places = recall.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    levels = torch.full(recall.shape, sparsity, dtype=torch.float64, device=recall.device)
    levels = levels.masked_fill(places < count, (1 + sparsity) / 2)
    return levels.masked_fill(places >= heads - count, max(0.0, (3 * sparsity - 1) / 2))


def bounded(call: AttentionCall, lse: Tensor) -> Tensor:
    """Old log-sum-exps, raised where new scores could overflow: only the ranking of blocks matters.

    No score of a row exceeds scale · ‖q‖ · max ‖k‖.
    """
    longest = call.key.float().norm(dim=-1).amax(-1).repeat_interleave(call.group, 1)
    most = abs(call.scale) * call.query.float().norm(dim=-1) * longest[..., None]
    return torch.maximum(lse, (most - _LARGEST).to(lse.dtype))


def tile_order(grid: tuple[int, int, int], tile: tuple[int, int, int], text_tokens: int = 0) -> Tensor:
    """Order that brings the tokens of a tile of a video together, ``(n,)``.

    Parameters
    ----------
    grid
        Frames, rows and columns of tokens, in raster order.
    tile
        Frames, rows and columns of a tile.
    text_tokens
        In front; they stay there.

    Raises
    ------
    ConfigurationError
        If tiles do not divide the grid.
    """
    if any(part < 1 or side % part for side, part in zip(grid, tile, strict=True)):
        raise ConfigurationError(f"tile is {tile}; each side must divide that of the grid {grid}")
    places = torch.arange(math.prod(grid)).view(grid)
    for axis in (2, 1, 0):
        places = places.unflatten(axis, (-1, tile[axis]))
    tiled = places.permute(0, 2, 4, 1, 3, 5).flatten()
    return torch.cat([torch.arange(text_tokens), tiled + text_tokens])


def _reordered(call: AttentionCall, order: Tensor) -> AttentionCall:
    n = call.query.shape[2]
    if order.shape != (n,):
        raise ConfigurationError(f"reorder has {tuple(order.shape)} places for {n} tokens; give a permutation of them")
    key_mask = None if call.key_mask is None else call.key_mask[:, order]
    query, key, value = (part[:, :, order] for part in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, key_mask=key_mask)


def _check_levels(sparsity: float) -> None:
    if sparsity < _LEAST_SPARSITY:
        raise SparsityError(
            f"sparsity is {sparsity}; three levels of heads need at least 1/3, or set head_adaptive=False"
        )

"""S2-Attention: every head reads its own shard of the context, and the heads together read all of it.

Lin et al. give each head a strided slice of blocks besides a short window. One head does little work; no token is lost
to all of them. The slices are chosen so that a block which a head has skipped once is never read again by it: at
decoding its keys and values are freed. A model is trained with the pattern, so that reading less is no approximation
afterwards. A few layers stay dense.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.attention import base
from gossamer.attention.pattern_attention import SparseAttention, attend_blocks, attend_each
from gossamer.attention.s2_cache import S2Cache, ShardedLayer, shards_of
from gossamer.attention.s2_pattern import LocalStridePattern
from gossamer.core.block_mask import BlockMask
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import gather_attention
from gossamer.models.attention_sites import AttentionCall

__all__ = ["LocalStridePattern", "S2Attention", "S2Cache", "SparseAttention"]


@register(
    "s2-attention",
    paper="s2-attention",
    when="layer",
    granularity="blocks",
    needs_data=False,
    criterion=("structure",),
    allocation="fixed",
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class S2Attention(base.SparseAttention):
    """Attention of a Hugging Face model in shards, for training and for decoding [Lin et al., 2024].

    ``with S2Attention().active(model)``: train, fine-tune or generate. A model has to be trained with the pattern, or
    fine-tuned with it; then what it reads at inference is what it has learned to read. With an
    :class:`~gossamer.attention.s2_cache.S2Cache` keys and values that no later token reads are freed.

    Parameters
    ----------
    block_size, local_blocks, vert_stride, num_dense_heads, homogeneous, offset
        See :class:`~gossamer.attention.s2_pattern.LocalStridePattern`.
    dense_layers
        Layers that stay dense, by default the first two.
    dense_period
        One layer in so many stays dense as well, beginning with the first; None for no more.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.
    """

    block_size: int = 64
    local_blocks: int = 4
    vert_stride: int = 8
    num_dense_heads: int = 0
    homogeneous: bool = False
    offset: int = 0
    dense_layers: tuple[int, ...] = (0, 1)
    dense_period: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pattern(max(1, self.num_dense_heads))
        if self.block_size < 1:
            raise ConfigurationError(f"block_size is {self.block_size}; it must be at least 1, such as 64")
        if self.dense_period is not None and self.dense_period < 1:
            raise ConfigurationError(f"dense_period is {self.dense_period}; it must be at least 1, or None")

    def pattern(self, num_heads: int, num_kv_heads: int | None = None) -> LocalStridePattern:
        """The pattern of a layer with so many heads."""
        return LocalStridePattern(
            num_heads,
            num_kv_heads,
            self.local_blocks,
            self.vert_stride,
            self.num_dense_heads,
            self.homogeneous,
            self.offset,
        )

    def is_dense(self, layer: int | None) -> bool:
        """Whether a layer is left dense; a call of no layer in particular never is."""
        if layer is None:
            return False
        return layer in self.dense_layers or (self.dense_period is not None and layer % self.dense_period == 0)

    def attend(self, call: AttentionCall) -> base.Answer | None:
        """Attention of a call, or None if it is to stay dense."""
        shards = shards_of(call.key)
        if shards is not None:
            if call.window is not None:
                raise ConfigurationError(
                    f"{call.place} has a sliding window of its own, but the S2Cache keeps shards for it; name it "
                    "in dense_layers"
                )
            return _from_cache(call, shards)
        if self.is_dense(call.layer) or call.slides or not call.causal:
            return None
        pattern = self.pattern(call.query.shape[1], call.key.shape[1])
        keys = call.key.shape[2]
        first, last = _real(call)
        if call.phase == "decode":
            return _one_query(call, pattern, self.block_size, first, last)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
            def mask(length: int, past: int) -> BlockMask:
                return pattern.mask(length, self.block_size, past)

            return attend_blocks(q, k, v, mask, scale, self.block_size, (self.block_size, self.block_size))

        density = _density(pattern, self.block_size, keys - call.query.shape[2], first, last)
        if call.key_mask is None:
            return base.Answer(attend(call.query, call.key, call.value, call.scale), density)
        return base.Answer(attend_each(attend, call.query, call.key, call.value, call.scale, first, last), density)


def _real(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """First real key of each sequence, and the one behind the last."""
    if call.key_mask is None:
        batch, keys = call.key.shape[0], call.key.shape[2]
        return torch.zeros(batch, dtype=torch.int64), torch.full((batch,), keys)
    places = torch.arange(1, call.key_mask.shape[1] + 1, device=call.key_mask.device)
    last = (call.key_mask * places).amax(1)
    first = torch.where(last > 0, call.key_mask.int().argmax(1), last)
    if not bool((call.key_mask.sum(1) == last - first).all()):
        raise ConfigurationError(
            "a sequence has padding between real tokens; shards are counted from the first to the last"
        )
    return first.cpu(), last.cpu()


def _density(pattern: LocalStridePattern, size: int, past: int, first: Tensor, last: Tensor) -> float:
    """Share of the pairs that the queries behind `past` read, of each sequence from its first real key to its last."""
    kept, allowed = 0.0, 0
    for (begin, end), times in Counter(zip(first.tolist(), last.tolist())).items():
        length, before = end - begin, max(past, begin) - begin
        if length > before:
            kept += times * (_pairs(pattern, size, length, before) - _pairs(pattern, size, before, before))
            allowed += times * (length * (length + 1) - before * (before + 1)) // 2
    return kept / max(allowed, 1)


def _pairs(pattern: LocalStridePattern, size: int, length: int, past: int) -> float:
    """Pairs of a head that queries from the beginning of the block of `past` on read in a sequence of a length."""
    if length == past - past % size:
        return 0.0
    mask = pattern.mask(length, size, past - past % size)
    return float(mask.densities.mean()) * mask.geometry.pair_count


def _one_query(call: AttentionCall, pattern: LocalStridePattern, size: int, first: Tensor, last: Tensor) -> base.Answer:
    """Decoding with a cache that holds everything: only the tokens of the pattern are read."""
    keys = call.key.shape[2]
    rows = {length: pattern.tokens(length, size) for length in set((keys - first).tolist()) if length > 0}
    width = max((indices.shape[1] for indices, _ in rows.values()), default=0)
    heads = pattern.kv_heads
    indices, counts = torch.zeros(len(first), heads, width, dtype=torch.int64), torch.zeros(len(first), heads).long()
    for row, (begin, end) in enumerate(zip(first.tolist(), last.tolist())):
        if begin < keys and end == keys:  # else this query is padding
            found, counts[row] = rows[keys - begin]
            indices[row, :, : found.shape[1]] = found + begin
    indices = indices.clamp(max=keys - 1).to(call.key.device)
    out = gather_attention(call.query, call.key, call.value, indices, counts.to(call.key.device), scale=call.scale)
    real = int((keys - first)[last == keys].sum())
    return base.Answer(out, int(counts.sum()) / heads / max(real, 1))


def _from_cache(call: AttentionCall, shards: ShardedLayer) -> base.Answer:
    """Decoding with a cache that holds no more than the pattern reads: all of it.

    Raises
    ------
    ConfigurationError
        If the cache was made for other padding than there is.
    """
    length, paddings = shards.get_seq_length(), shards.paddings
    padded = [0] * len(paddings) if call.key_mask is None else _real(call)[0].tolist()
    if padded != paddings:
        raise ConfigurationError(
            f"the S2Cache was made for sequences with {paddings} tokens of padding in front, but these have {padded}; "
            "make it with the prompt's mask: S2Cache(method, layers, attention_mask)"
        )
    group = call.query.shape[1] // shards.num_heads
    out = call.query.new_empty(*call.query.shape[:3], shards.value_size)
    read = 0
    for part in shards.read():
        mine = (part.heads[:, None] * group + torch.arange(group)).flatten().to(call.query.device)
        out[:, mine] = gather_attention(
            call.query[:, mine], part.keys, part.values, part.indices, part.counts, scale=call.scale
        )
        read += int(part.counts.sum())
    pairs = (read / shards.num_heads, float(sum(length - padding for padding in paddings)))
    return base.Answer(out, pairs[0] / pairs[1], pairs)

"""Attention inside a fixed pattern of blocks, as a module: in training and at inference, padded and packed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gossamer.attention.s2_pattern import LocalStridePattern, common_and_rest, split_tiles
from gossamer.core.block_mask import BlockMask, block_count
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import block_sparse_attention

Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
MaskOf = Callable[[int, int], BlockMask]
"""Number of keys, and how many of the first queries are not asked for → the blocks."""

_SMALLEST_BLOCK = 16


class SparseAttention(nn.Module):
    """Causal attention inside a fixed pattern of blocks, with its gradients; for any length.

    Lin et al., 2024, "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads",
    arXiv 2407.17678.

    Parameters
    ----------
    block_size
        Tokens of a block of the pattern: a power of two from 16.
    sparse_pattern
        A :class:`~gossamer.attention.s2_pattern.LocalStridePattern`, which fits any length; or bool ``(heads, blocks,
        blocks)`` or ``(blocks, blocks)`` for all heads, which must be causal, and fits as many blocks and fewer.
    seq_dim
        Dimension of the tokens in 4-dimensional inputs, 1 or 2; heads are the other.
    block_m, block_n
        Queries and keys of a tile of the kernel, powers of two from 16. By default the pattern's blocks. Smaller ones
        split a block. A larger `block_m` takes what several blocks of queries have in common at once and the rest by
        itself; the result is the same.
    head_range
        First and last-but-one head that this process computes, where heads are spread over several.

    Raises
    ------
    ConfigurationError
        If a size is not allowed, or a pattern not square, not causal, or a query left without a key.

    Warns
    -----
    UserWarning
        If a pattern reads blocks again that it has skipped before: their keys and values cannot be freed.

    Examples
    --------
    >>> attention = SparseAttention(16, LocalStridePattern(4, local_blocks=1, vert_stride=4))
    >>> q, k, v = torch.randn(3, 2, 4, 100, 32)
    >>> attention(q, k, v).shape
    torch.Size([2, 4, 100, 32])
    """

    def __init__(
        self,
        block_size: int,
        sparse_pattern: LocalStridePattern | Tensor,
        *,
        seq_dim: int = 2,
        block_m: int | None = None,
        block_n: int | None = None,
        head_range: tuple[int, int] | None = None,
    ):
        super().__init__()
        for name, size in (("block_size", block_size), ("block_m", block_m), ("block_n", block_n)):
            if size is not None and (size < _SMALLEST_BLOCK or size & (size - 1)):
                raise ConfigurationError(f"{name} is {size}; it must be a power of two and at least {_SMALLEST_BLOCK}")
        if block_n is not None and block_n > block_size:
            raise ConfigurationError(f"block_n is {block_n}; it can be no larger than the block size {block_size}")
        if seq_dim not in (1, 2):
            raise ConfigurationError(f"seq_dim is {seq_dim}; tokens are dimension 1 or 2 of (batch, …, head size)")
        self.block_size, self.seq_dim = block_size, seq_dim
        self.block_m, self.block_n = block_m or block_size, block_n or block_size
        self.pattern = sparse_pattern if isinstance(sparse_pattern, LocalStridePattern) else None
        blocks = None if self.pattern is not None else _checked(torch.as_tensor(sparse_pattern))
        self.register_buffer("blocks", blocks, persistent=False)
        self.num_heads = self.pattern.num_heads if self.pattern is not None else len(blocks)
        self.head_range = head_range
        if head_range is not None and not 0 <= head_range[0] < head_range[1] <= self.num_heads:
            raise ConfigurationError(f"head_range is {head_range}; it must lie within the {self.num_heads} heads")
        if not self.is_kv_cache_efficient:
            warnings.warn(
                "the pattern reads blocks again that earlier queries have skipped, so their keys and values cannot be "
                "freed",
                UserWarning,
                stacklevel=2,
            )

    @property
    def is_union_complete(self) -> bool:
        """Whether the heads together read every earlier block."""
        return self.pattern.is_union_complete if self.pattern is not None else self._whole().is_union_complete

    @property
    def is_kv_cache_efficient(self) -> bool:
        """Whether a block that a head has once skipped can be freed."""
        return self.pattern is not None or self._whole().is_cache_efficient

    def mask(self, seq_len: int, past: int = 0) -> BlockMask:
        """The blocks of a sequence, of the heads of this process; see :meth:`LocalStridePattern.mask`.

        Raises
        ------
        ConfigurationError
            If the sequence is longer than a pattern that was given as a tensor.
        """
        mask = self._all_heads(seq_len, past)
        if self.head_range is None or mask.blocks.shape[1] == 1:
            return mask
        heads = mask.blocks[:, slice(*self.head_range)]
        return BlockMask(heads, mask.query_length, mask.key_length, mask.block_size)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sm_scale: float | None = None,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        left_paddings: Tensor | None = None,
        seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attention of queries to keys; sequences are aligned at their ends, so that queries may be the last few.

        Parameters
        ----------
        q, k, v
            4-dimensional, tokens in `seq_dim`; or, packed, ``(tokens of all sequences, heads, head size)``.
        sm_scale
            Of the scores; by default one over the root of the head size.
        cu_seqlens_q, cu_seqlens_k
            Where the packed sequences begin and the last one ends, ``(sequences + 1,)``; keys as queries by default.
        left_paddings
            Padding at the beginning of each sequence, ``(batch,)``. Blocks are counted from the first real token, so
            that padding changes nothing.
        seqlens
            Real tokens of each sequence, where padding is at its end, ``(batch,)``.

        Returns
        -------
        Tensor
            The shape of `q` but for the size of the values; zero where a query is padding.

        Raises
        ------
        ConfigurationError
            If shapes do not fit, or more than one kind of lengths is given.
        """
        if sum(given is not None for given in (cu_seqlens_q, left_paddings, seqlens)) > 1:
            raise ConfigurationError("give one of cu_seqlens_q, left_paddings and seqlens; each says the lengths alone")
        if cu_seqlens_q is not None:
            return self._packed(q, k, v, sm_scale, cu_seqlens_q, cu_seqlens_k)
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
            raise ConfigurationError(
                f"q has shape {tuple(q.shape)}; give 4 dimensions, or cu_seqlens_q with packed ones"
            )
        if self.seq_dim == 1:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        first, last = _bounds(k, left_paddings, seqlens)
        if first is None:
            out = self._attend(q, k, v, sm_scale)
        else:
            out = attend_each(self._attend, q, k, v, sm_scale, first, last)
        return out.transpose(1, 2) if self.seq_dim == 1 else out

    def _packed(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, starts_q: Tensor, starts_k: Tensor | None
    ) -> Tensor:
        starts_k = starts_q if starts_k is None else starts_k
        for name, part, starts in (("q", q, starts_q), ("k", k, starts_k)):
            rising = bool((starts.diff() >= 0).all()) and int(starts[0]) == 0
            if part.dim() != 3 or not rising or int(starts[-1]) != len(part):
                raise ConfigurationError(
                    f"{name} has shape {tuple(part.shape)}; packed sequences are (tokens, heads, size), and their "
                    f"places must rise from 0 to {len(part)}"
                )
        if len(starts_q) != len(starts_k):
            raise ConfigurationError(f"{len(starts_q) - 1} sequences of queries but {len(starts_k) - 1} of keys")
        parts = []
        ends = zip(starts_q.tolist(), starts_q[1:].tolist(), starts_k.tolist(), starts_k[1:].tolist())
        for begin_q, end_q, begin_k, end_k in ends:
            if begin_q < end_q:
                one = [x.transpose(0, 1)[None] for x in (q[begin_q:end_q], k[begin_k:end_k], v[begin_k:end_k])]
                parts.append(self._attend(*one, scale)[0].transpose(0, 1))
        return torch.cat(parts)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return attend_blocks(q, k, v, self.mask, scale, self.block_size, (self.block_m, self.block_n))

    def _all_heads(self, length: int, past: int) -> BlockMask:
        if self.pattern is not None:
            return self.pattern.mask(length, self.block_size, past)
        count = block_count(length, self.block_size)
        if count > self.blocks.shape[-1]:
            raise ConfigurationError(
                f"the sequence has {length} tokens, the pattern {self.blocks.shape[-1]} blocks of {self.block_size}; "
                "give a larger pattern, or a LocalStridePattern, which fits any length"
            )
        rows = self.blocks[None, :, past // self.block_size : count, :count]
        return BlockMask(rows, length - past, length, (self.block_size, self.block_size))

    def _whole(self) -> BlockMask:
        return self._all_heads(self.blocks.shape[-1] * self.block_size, 0)

    def extra_repr(self) -> str:
        """What is not a module."""
        kept = self.pattern if self.pattern is not None else tuple(self.blocks.shape)
        return f"block_size={self.block_size}, {kept}"


def _checked(blocks: Tensor) -> Tensor:
    """A pattern given by the user, as bool ``(heads, blocks, blocks)``."""
    blocks = blocks.bool()
    blocks = blocks[None] if blocks.dim() == 2 else blocks
    if blocks.dim() != 3 or blocks.shape[-1] != blocks.shape[-2] or not blocks.numel():
        raise ConfigurationError(
            f"the pattern has shape {tuple(blocks.shape)}; (heads, blocks, blocks) is needed, as many rows as columns"
        )
    ahead = blocks.triu(1).nonzero()
    if len(ahead):
        head, row, column = ahead[0].tolist()
        raise ConfigurationError(
            f"head {head} reads block {column} from block {row}; a causal pattern reads no later one"
        )
    empty = (~blocks.any(-1)).nonzero()
    if len(empty):
        head, row = empty[0].tolist()
        raise ConfigurationError(f"block {row} of head {head} reads nothing; keep at least its own block")
    return blocks


def _bounds(k: Tensor, left: Tensor | None, lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """First real token, and the one behind the last, of each sequence."""
    if left is None and lengths is None:
        return None, None
    given = left if left is not None else lengths
    if tuple(given.shape) != (k.shape[0],) or int(given.min()) < 0 or int(given.max()) > k.shape[2]:
        raise ConfigurationError(
            f"lengths are {given.tolist()}; {k.shape[0]} numbers between 0 and {k.shape[2]} are needed, one a sequence"
        )
    if left is not None:
        return left, torch.full_like(left, k.shape[2])
    return torch.zeros_like(lengths), lengths


def attend_each(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, scale: float | None, first: Tensor, last: Tensor
) -> Tensor:
    """Attention of each sequence without its padding; `first` and `last` bound its real keys."""
    queries, keys = q.shape[2], k.shape[2]
    past = keys - queries
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    rows = []
    for row, (begin, end) in enumerate(zip(first.tolist(), last.tolist())):
        begin_q, end_q = max(0, begin - past), max(0, end - past)
        one = out[row : row + 1]
        if begin_q < end_q:
            here = slice(row, row + 1)
            found = attend(q[here, :, begin_q:end_q], k[here, :, begin:end], v[here, :, begin:end], scale)
            one = pad(found, (0, 0, begin_q, queries - end_q))
        rows.append(one)
    return torch.cat(rows)


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: MaskOf, scale: float | None, block_size: int, tile: tuple[int, int]
) -> Tensor:
    """Attention by a pattern whose blocks are counted from the first key, also for the last few queries.

    Parameters
    ----------
    q, k, v, scale
        See :class:`SparseAttention`.
    mask
        ``mask(keys, past)`` gives the blocks of all queries behind `past`, a multiple of the block size.
    block_size
        Tokens of a block.
    tile
        Queries and keys of a tile of the kernel.
    """
    queries, keys = q.shape[2], k.shape[2]
    if queries > keys:
        raise ConfigurationError(f"{queries} queries but {keys} keys; causal attention needs as many keys at least")
    # queries that begin inside a block get the rest of the block in front of them
    spare = (keys - queries) % block_size
    if spare:
        q = pad(q, (0, 0, spare, 0))
    pattern = mask(keys, keys - queries - spare)
    if pattern.blocks.shape[1] not in (1, q.shape[1]):
        raise ConfigurationError(
            f"q has {q.shape[1]} heads, the pattern {pattern.blocks.shape[1]}; give a pattern for this many"
        )
    out = _in_tiles(q, k, v, _on(pattern, q), scale, tile)
    return out[:, :, spare:]


def _on(pattern: BlockMask, q: Tensor) -> BlockMask:
    return pattern if pattern.blocks.device == q.device else pattern.to(q.device)


def _in_tiles(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockMask, scale: float | None, tile: tuple[int, int]
) -> Tensor:
    size = pattern.block_size[0]
    smaller = (min(tile[0], size), tile[1])
    if smaller != pattern.block_size:
        pattern = split_tiles(pattern, *smaller)
    if tile[0] <= size:
        return block_sparse_attention(q, k, v, pattern, scale=scale)
    parts = common_and_rest(pattern, tile[0] // size)
    found = [block_sparse_attention(q, k, v, part, scale=scale, return_lse=True) for part in parts]
    outs, sums = torch.stack([out for out, _ in found]), torch.stack([lse for _, lse in found])
    return (outs * sums.softmax(0)[..., None].to(outs.dtype)).sum(0)

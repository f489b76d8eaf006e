"""Attention over blocks and over listed tokens on a GPU, in Triton: see :mod:`gossamer.kernels.attention`.

A program goes through the key blocks of one tile of queries from the first to the last, so that a result always repeats
to the bit. Gradients come from :mod:`gossamer.kernels.attention_reference`, which works on any device.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import MissingDependencyError
from gossamer.kernels.attention_reference import Visibility

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None

_ROWS, _COLUMNS, _LIST = 64, 64, 1024  # queries of a program, keys that it reads at a time, listed tokens of a program


def suits(*tensors: Tensor) -> bool:
    """Whether tensors lie on a GPU, in a dtype for which this is right, and Triton is there."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return triton is not None and all(x.is_cuda and x.dtype in dtypes and x.shape[-1] <= 256 for x in tensors)


def forward(q: Tensor, k: Tensor, v: Tensor, visible: Visibility, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`gossamer.kernels.attention_reference.forward`.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    """
    _check()
    batch, heads, queries, size = q.shape
    keys, value_size = k.shape[2], v.shape[3]
    outputs = torch.empty(batch, heads, queries, value_size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if not outputs.numel():
        return outputs, lse
    blocks, (rows, columns) = visible.blocks, visible.block_size
    if blocks is None:
        grid = (1, 1, -(-queries // rows), -(-keys // columns))
        blocks = torch.ones(grid, dtype=torch.bool, device=q.device)
    counts, indices = _lists(blocks)
    counts, indices = counts.expand(batch, heads, -1), indices.expand(batch, heads, -1, -1)
    mask = visible.key_mask
    tile = min(max(16, triton.next_power_of_2(rows)), _ROWS if size <= 128 else 32)
    tiles = -(-rows // tile)
    wide = max(16, triton.next_power_of_2(size)), max(16, triton.next_power_of_2(value_size))
    _attend[(counts.shape[2] * tiles, batch * heads)](
        *(q, k, v, outputs, lse, counts, indices, q if mask is None else mask.to(torch.uint8)),
        *(*q.stride(), *k.stride(), *v.stride(), *counts.stride(), *indices.stride()),
        *(heads, heads // k.shape[1], queries, keys, size, value_size, rows, columns, tiles),
        *(keys - queries if visible.offset is None else visible.offset, visible.window or 0, scale),
        CAUSAL=visible.causal,
        WINDOW=visible.window is not None,
        MASKED=mask is not None,
        ROWS=tile,
        COLUMNS=min(max(16, triton.next_power_of_2(columns)), _COLUMNS if size <= 128 else 32),
        SIZE=wide[0],
        VALUE_SIZE=wide[1],
    )
    return outputs, lse


def gather(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`gossamer.kernels.attention_reference.gather`.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    """
    _check()
    batch, heads, queries, size = q.shape
    lists, length = indices.shape[1:]
    value_size, pieces = v.shape[3], max(-(-length // _LIST), 1)
    parts = torch.zeros(batch, heads, queries, pieces, value_size, dtype=torch.float32, device=q.device)
    sums = torch.full(parts.shape[:-1], float("-inf"), device=q.device)
    indices = indices.contiguous()
    if parts.numel() and length:
        _gather[(pieces, batch * heads * queries)](
            *(q, k, v, indices, indices if counts is None else counts.long().contiguous(), parts, sums),
            *(*q.stride(), *k.stride(), *v.stride()),
            *(heads, queries, heads // k.shape[1], heads // lists, lists, length, size, value_size, scale),
            COUNTED=counts is not None,
            PIECE=_LIST,
            COLUMNS=32,
            SIZE=triton.next_power_of_2(size),
            VALUE_SIZE=triton.next_power_of_2(value_size),
        )
    lse = sums.logsumexp(-1)
    shares = (sums - torch.where(lse == float("-inf"), 0.0, lse)[..., None]).exp()
    return (parts * shares[..., None]).sum(3).to(q.dtype), lse


def _lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each block of queries reads, and which."""
    order = blocks.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _check() -> None:
    if triton is None:
        raise MissingDependencyError("Triton", "gpu", "attention on a GPU")


if triton is not None:

    @triton.jit
    def _attend(
        q,
        k,
        v,
        outputs,
        lse,
        counts,
        indices,
        real,
        q_batch,
        q_head,
        q_row,
        q_one,
        k_batch,
        k_head,
        k_row,
        k_one,
        v_batch,
        v_head,
        v_row,
        v_one,
        c_batch,
        c_head,
        c_row,
        i_batch,
        i_head,
        i_row,
        i_one,
        heads,
        group,
        queries,
        keys,
        size,
        value_size,
        height,
        width,
        tiles,
        offset,
        window,
        scale,
        CAUSAL: tl.constexpr,
        WINDOW: tl.constexpr,
        MASKED: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        SIZE: tl.constexpr,
        VALUE_SIZE: tl.constexpr,
    ):
        block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
        local = tile * ROWS + tl.arange(0, ROWS)
        row = block * height + local
        inside = (local < height) & (row < queries)
        channel, value_channel = tl.arange(0, SIZE), tl.arange(0, VALUE_SIZE)
        here = q + batch * q_batch + head * q_head + row[:, None].to(tl.int64) * q_row + channel[None, :] * q_one
        query = tl.load(here, mask=inside[:, None] & (channel < size)[None, :], other=0.0)
        key_base, value_base = (
            k + batch * k_batch + (head // group) * k_head,
            v + batch * v_batch + (head // group) * v_head,
        )
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, VALUE_SIZE), tl.float32)
        list_of = indices + batch * i_batch + head * i_head + block * i_row
        for n in range(tl.load(counts + batch * c_batch + head * c_head + block * c_row)):
            begin = tl.load(list_of + n * i_one) * width
            for step in range(0, width, COLUMNS):
                column = begin + step + tl.arange(0, COLUMNS)
                there = (step + tl.arange(0, COLUMNS) < width) & (column < keys)
                if MASKED:
                    there = there & (tl.load(real + batch * keys + column, mask=there, other=0) != 0)
                place = column.to(tl.int64)
                key = tl.load(
                    key_base + place[None, :] * k_row + channel[:, None] * k_one,
                    mask=there[None, :] & (channel < size)[:, None],
                    other=0.0,
                )
                scores = tl.dot(query, key, input_precision="ieee") * scale
                distance = row[:, None] + offset - column[None, :]
                seen = there[None, :] & inside[:, None]
                if CAUSAL:
                    seen = seen & (distance >= 0)
                if WINDOW:
                    seen = seen & (distance < window) & (distance > -window)
                scores = tl.where(seen, scores, float("-inf"))
                high = tl.maximum(most, tl.max(scores, 1))
                shift = tl.where(high == float("-inf"), 0.0, high)
                weights = tl.exp(scores - shift[:, None])
                share = tl.exp(most - shift)
                total = total * share + tl.sum(weights, 1)
                value = tl.load(
                    value_base + place[:, None] * v_row + value_channel[None, :] * v_one,
                    mask=there[:, None] & (value_channel < value_size)[None, :],
                    other=0.0,
                )
                sums = sums * share[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
                most = high
        nothing = total == 0.0
        found = tl.where(nothing[:, None], 0.0, sums / tl.where(nothing, 1.0, total)[:, None])
        at = (batch * heads + head) * queries + row
        to = outputs + at[:, None] * value_size + value_channel[None, :]
        tl.store(to, found.to(outputs.dtype.element_ty), mask=inside[:, None] & (value_channel < value_size)[None, :])
        logarithm = tl.where(nothing, float("-inf"), most + tl.log(tl.where(nothing, 1.0, total)))
        tl.store(lse + at, logarithm, mask=inside)

    @triton.jit
    def _gather(
        q,
        k,
        v,
        indices,
        counts,
        parts,
        lse,
        q_batch,
        q_head,
        q_row,
        q_one,
        k_batch,
        k_head,
        k_row,
        k_one,
        v_batch,
        v_head,
        v_row,
        v_one,
        heads,
        queries,
        group,
        shared,
        lists,
        length,
        size,
        value_size,
        scale,
        COUNTED: tl.constexpr,
        PIECE: tl.constexpr,
        COLUMNS: tl.constexpr,
        SIZE: tl.constexpr,
        VALUE_SIZE: tl.constexpr,
    ):
        piece, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
        row, head, batch = item % queries, item // queries % heads, item // queries // heads
        line = batch * lists + head // shared
        last = length
        if COUNTED:
            last = tl.load(counts + line).to(tl.int32)
        last = tl.minimum(last, (piece + 1) * PIECE)
        channel, value_channel = tl.arange(0, SIZE), tl.arange(0, VALUE_SIZE)
        query = tl.load(
            q + batch * q_batch + head * q_head + row * q_row + channel * q_one, mask=channel < size, other=0.0
        )
        key_base, value_base = (
            k + batch * k_batch + (head // group) * k_head,
            v + batch * v_batch + (head // group) * v_head,
        )
        most = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        sums = tl.zeros((VALUE_SIZE,), tl.float32)
        for begin in range(piece * PIECE, last, COLUMNS):
            token = begin + tl.arange(0, COLUMNS)
            there = token < last
            place = tl.load(indices + line * length + token, mask=there, other=0).to(tl.int64)
            key = tl.load(
                key_base + place[:, None] * k_row + channel[None, :] * k_one,
                mask=there[:, None] & (channel < size)[None, :],
                other=0.0,
            )
            scores = tl.sum(key.to(tl.float32) * query.to(tl.float32)[None, :], 1) * scale
            scores = tl.where(there, scores, float("-inf"))
            high = tl.maximum(most, tl.max(scores, 0))
            shift = tl.where(high == float("-inf"), 0.0, high)
            weights = tl.exp(scores - shift)
            share = tl.exp(most - shift)
            total = total * share + tl.sum(weights, 0)
            value = tl.load(
                value_base + place[:, None] * v_row + value_channel[None, :] * v_one,
                mask=there[:, None] & (value_channel < value_size)[None, :],
                other=0.0,
            )
            sums = sums * share + tl.sum(weights[:, None] * value.to(tl.float32), 0)
            most = high
        nothing = total == 0.0
        at = item * tl.num_programs(0) + piece
        found = tl.where(nothing, 0.0, sums / tl.where(nothing, 1.0, total))
        tl.store(parts + at * value_size + value_channel, found, mask=value_channel < value_size)
        tl.store(lse + at, tl.where(nothing, float("-inf"), most + tl.log(tl.where(nothing, 1.0, total))))

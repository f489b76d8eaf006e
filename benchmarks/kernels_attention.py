"""Attention kernels against torch's ``scaled_dot_product_attention`` of the same dtype on the same tensors.

Limits are those of arithmetic or bytes: at a share r of the causal blocks, attention can take r of the dense time;
selection by antidiagonals of stride S adds 1 / (2 S), since scores are half of the work; a decode step must read the
labels of all tokens, and keys and values of the chosen ones. Selection is counted wherever it is part of the method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Options, Row, main, paired
from gossamer.attention.xattention import XAttention
from gossamer.core.block_mask import BlockMask
from gossamer.kernels.attention import (
    antidiagonal_mass,
    block_mass,
    block_sparse_attention,
    label_attention,
)
from gossamer.kernels.attention_labels import Labels, make_labels
from gossamer.kernels.native import instruction_set
from gossamer.measure import Timing, interleave
from gossamer.models.attention_sites import AttentionCall

_PEER = "torch scaled_dot_product_attention"
_BLOCK, _SHARE = 64, 0.1
#: tokens → how many times faster a tenth of the blocks must be, and whole XAttention with it
BARS = {8192: (6.5, 5.0), 32768: (8.0, 5.0)}
DENSE_BAR, DECODE_BAR = 0.9, 6.0
_STRIDE, _SCORING_STRIDE = 16, 8
_CONTEXT, _KEPT = 32768, 16  # tokens of a decode step, of which one in so many is read, by one in so many channels


def measure(options: Options) -> list[Row]:
    """Prompts of two lengths, three head sizes and two dtypes, then decode steps."""
    rows = []
    for tokens in (1024, 2048) if options.quick else BARS:
        for size in (64,) if options.quick else (64, 128, 256):
            for dtype in (torch.float32, torch.bfloat16):
                if size == 256 and tokens == 32768 and dtype == torch.bfloat16:
                    continue  # a second takes longer than it tells
                rows.extend(_prompt(options, tokens, size, dtype))
    for dtype in (torch.bfloat16, torch.float32):
        rows.extend(_decode(options, dtype))
    return rows


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _topics(tokens: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of a text whose topics return: a query agrees best with the keys of its topic."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(24, size, generator=generator)
    runs = torch.randint(24, (tokens // 128 + 1,), generator=generator).repeat_interleave(128)[:tokens]
    about = topics[runs]
    return tuple(about + torch.randn(tokens, size, generator=generator) for _ in range(2))  # type: ignore[return-value]


def _some_blocks(heads: int, tokens: int) -> BlockMask:
    """The diagonal, and random blocks before it up to the share."""
    count = tokens // _BLOCK
    scores = torch.rand(1, heads, count, count, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(count)
    before = rows[:, None] > rows
    ranks = scores.masked_fill(~before, -1).argsort(-1, descending=True).argsort(-1)
    wanted = ((rows + 1) * _SHARE).round().clamp(min=1) - 1
    blocks = (ranks < wanted[:, None]) & before | torch.eye(count, dtype=torch.bool)
    return BlockMask(blocks, tokens, tokens, (_BLOCK, _BLOCK))


def _prompt(options: Options, tokens: int, size: int, dtype: torch.dtype) -> list[Row]:
    heads = 1 if tokens > 8192 else 2
    made = [_topics(tokens, size, seed) for seed in range(heads)]
    q, k = (torch.stack([pair[i] for pair in made])[None].to(dtype) for i in range(2))
    v = _draw(1, heads, tokens, size, seed=9).to(dtype)
    some, every = _some_blocks(heads, tokens), BlockMask.full(tokens, block_size=_BLOCK)
    call = AttentionCall(0, q, k, v, size**-0.5)
    method, kept = _xattention(call)
    lse = block_sparse_attention(q, k, v, every, return_lse=True)[1]
    runs: dict[str, Callable[[], object]] = {
        "torch": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "some": lambda: block_sparse_attention(q, k, v, some),
        "every": lambda: block_sparse_attention(q, k, v, every),
        "xattention": lambda: block_sparse_attention(q, k, v, method.prefill(call) or every),
        "antidiagonals": lambda: antidiagonal_mass(q, k, _SCORING_STRIDE, _BLOCK),
        "mass": lambda: block_mass(q, k, lse, _BLOCK),
    }
    repeats = 2 if options.quick else 3 if tokens > 8192 else 7
    seconds = interleave(runs, repeats=repeats, warmup=1)
    case = f"{tokens} tokens, head size {size}, {_name(dtype)}, {torch.get_num_threads()} threads, {instruction_set()}"
    row = partial(_row, case=case, seconds=seconds, options=options)
    bars = BARS.get(tokens, (0.0, 0.0))
    return [
        row("attention to a tenth of the causal blocks of 64", "some", bar=bars[0], share=some.density),
        row("attention to all causal blocks of 64", "every", bar=DENSE_BAR, share=1.0),
        row(
            f"XAttention with selection, stride {_STRIDE}, {kept:.1%} of blocks kept",
            "xattention",
            bar=bars[1],
            share=kept + 0.5 / _STRIDE,
        ),
        row(f"antidiagonal scoring, stride {_SCORING_STRIDE}", "antidiagonals", bar=10.0, share=0.5 / _SCORING_STRIDE),
        row("exact mass of blocks, without attention", "mass", bar=1 / 0.6, share=0.5),
    ]


def _row(
    operation: str, name: str, *, case: str, seconds: dict[str, Timing], options: Options, bar: float, share: float
) -> Row:
    theirs = seconds["torch"]
    return paired(
        operation, case, seconds[name], _PEER, theirs, 0.0 if options.quick else bar, limit=share * theirs.median
    )


def _xattention(call: AttentionCall) -> tuple[XAttention, float]:
    """The method with the threshold at which it keeps a tenth of the blocks, and how much it keeps."""
    low, high = 0.001, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        mask = XAttention(threshold=middle, stride=_STRIDE, block_size=_BLOCK).prefill(call)
        if mask is None or mask.density > _SHARE:
            high = middle
        else:
            low = middle
    method = XAttention(threshold=low, stride=_STRIDE, block_size=_BLOCK)
    mask = method.prefill(call)
    return method, 1.0 if mask is None else mask.density


def _decode(options: Options, dtype: torch.dtype) -> list[Row]:
    return [row for heads in (8, 32) for row in _step(options, heads, dtype)]


def _step(options: Options, heads: int, dtype: torch.dtype) -> list[Row]:
    tokens = 2048 if options.quick else _CONTEXT
    size, shared = 128, 8
    labels, count = size // _KEPT, tokens // _KEPT
    q = _draw(1, heads, 1, size, seed=0).to(dtype)
    k, v = (_draw(1, shared, tokens, size, seed=seed).to(dtype) for seed in (1, 2))
    channels = torch.arange(labels).repeat(shared, 1)
    by_bits = {bits: make_labels(k[..., :labels].contiguous(), bits) for bits in (16, 4)}

    def step(k_labels: Labels) -> Callable[[], object]:
        return lambda: label_attention(q, k, v, channels, k_labels, count)

    runs: dict[str, Callable[[], object]] = {
        "torch": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=heads != shared),
        **{f"{bits} bits": step(k_labels) for bits, k_labels in by_bits.items()},
    }
    seconds = interleave(runs, repeats=3 if options.quick else 15, warmup=2)
    case = (
        f"{tokens} tokens, {heads} heads of {size}, {shared} key heads, {_name(dtype)}, "
        f"{torch.get_num_threads()} threads, {instruction_set()}"
    )
    operation = f"decode step, 1/{_KEPT} of tokens by 1/{_KEPT} of channels, choice included"
    row = partial(_row, operation, seconds=seconds, options=options, bar=DECODE_BAR)
    whole = 2 * k.nbytes
    return [
        row(f"{bits} bits", case=f"{case}, labels of {bits} bits", share=k_labels.nbytes / whole + 1 / _KEPT)
        for bits, k_labels in by_bits.items()
    ]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(measure)

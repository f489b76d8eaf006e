"""Attention over all the steps of a sample: methods that remember, against torch's dense attention at every step.

The limits are those of arithmetic: dense steps, the passes of searches, and the share of pairs that sparse steps
compute. Searching is part of what is timed. A sparse step of Re-ttention is also timed alone, once with its window as
the paper defines it and once rounded up to blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Options, Row, main, paired
from gossamer.attention.adaspa import AdaSpa
from gossamer.attention.local_windows import WindowMask, masked_attention
from gossamer.attention.re_ttention import Rettention
from gossamer.attention.sparsed import SparseD
from gossamer.attention.state import StepwiseAttention
from gossamer.kernels.native import instruction_set
from gossamer.measure import interleave

_PEER = "torch scaled_dot_product_attention"
_BLOCK, _HEADS, _SIZE, _STEPS = 64, 4, 64, 20
_OF_LIMIT = 0.8  # share of the possible ratio that is asked for
_KEEP = 1 / 32


def measure(options: Options) -> list[Row]:
    """Whole samples, then single sparse steps."""
    tokens = 1024 if options.quick else 4096
    q, k, v = (_draw(tokens, seed) for seed in range(3))
    window = WindowMask.keeping(_KEEP, tokens)
    blocks = window.to_blocks(_BLOCK)
    sparsed, adaspa, rettention = (
        SparseD(block_size=_BLOCK),
        AdaSpa(block_size=_BLOCK, search_steps=(4, 12)),
        Rettention(keep=_KEEP),
    )
    context = slice(0, tokens // 2)
    runs: dict[str, Callable[[], object]] = {
        "dense step": lambda: scaled_dot_product_attention(q, k, v),
        "window": lambda: masked_attention(q, k, v, window),
        "blocks": lambda: masked_attention(q, k, v, blocks),
        "dense": lambda: [scaled_dot_product_attention(q, k, v) for _ in range(_STEPS)],
    }
    for name, method in (("SparseD", sparsed), ("AdaSpa", adaspa), ("Re-ttention", rettention)):
        runs[name] = lambda method=method: _sample(method, q, k, v, context)  # type: ignore[misc]
    seconds = interleave(runs, repeats=2 if options.quick else 7, warmup=1)
    case = (
        f"{tokens} tokens, {_HEADS} heads of {_SIZE}, float32, {torch.get_num_threads()} threads, {instruction_set()}"
    )
    _sample(sparsed, q, k, v, context)
    density = next(iter(sparsed.cache.named("pattern").values())).density
    costs = {
        "SparseD": sparsed.expected_cost(_STEPS, density),
        "AdaSpa": adaspa.expected_cost(_STEPS),
        "Re-ttention": rettention.expected_cost(_STEPS, window.density),
    }
    rows = []
    for name, cost in costs.items():
        operation = f"{name}, attention of {_STEPS} steps with searches"
        bar = 0.0 if options.quick else _OF_LIMIT / cost
        dense = seconds["dense"]
        rows.append(paired(operation, case, seconds[name], _PEER, dense, bar, limit=cost * dense.median))
    dense = seconds["dense step"]
    for name, share in (("window", window.density), ("blocks", blocks.density)):
        operation = f"Re-ttention's sparse step, 1/32 of the tokens, {name}"
        rows.append(paired(operation, case, seconds[name], _PEER, dense, 0.0, limit=share * dense.median))
    return rows


def _sample(method: StepwiseAttention, q: Tensor, k: Tensor, v: Tensor, context: slice) -> None:
    method.begin(_STEPS, context if isinstance(method, SparseD) else slice(0, 0))
    for index in range(_STEPS):
        method.step(index)
        method(q, k, v, is_causal=False)


def _draw(tokens: int, seed: int) -> Tensor:
    return torch.randn(1, _HEADS, tokens, _SIZE, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    main(measure)

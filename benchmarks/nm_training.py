"""A training step of a transformer block whose weights are chosen anew, N of every M, after every step.

The block is that of :mod:`benchmarks.training_step`, with AdamW in float32, dense and under SR-STE in turns. Beside it
the choice alone, for one large matrix: against the reference's way, which sorts every group, and against the time that
reading the weights and writing them masked must take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Row, compare, main, paired
from benchmarks.training_step import Block
from gossamer.core.nm_sparsifier import NMSparsifier
from gossamer.core.patterns import NM
from gossamer.measure import interleave
from gossamer.measure.memory import read_bandwidth
from gossamer.training.sr_ste import SRSTE

PATTERNS = ("2:4", "1:4", "2:8", "1:16", "1:32")
BAR = 1 / 1.10  # a sparse step may take a tenth longer than a dense one
MILLISECONDS = 0.015  # … and the mask of a large matrix so many seconds
TIMES_SORTING = 30


def measure(options: Options) -> list[Row]:
    """Steps, then masks."""
    width, heads, length, batch = (64, 2, 16, 2) if options.quick else (1024, 16, 256, 8)
    torch.manual_seed(0)
    block = Block(width, heads)
    inputs = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))
    steps = {"dense": _step(copy.deepcopy(block), inputs)}
    for pattern in PATTERNS:
        steps[pattern] = _step(copy.deepcopy(block), inputs, SRSTE(pattern=pattern, keep=(), heads=True))
    timings = interleave(steps, repeats=2 if options.quick else 7)
    weights = sum(parameter.numel() for parameter in block.parameters()) / 1e6
    found = []
    for pattern in PATTERNS:
        case = f"{pattern} chosen every step; block of {weights:.1f} M weights, {batch} × {length} tokens, AdamW"
        found.append(paired("N:M training step", case, timings[pattern], "dense torch", timings["dense"], BAR))
    return [*found, *_masks(256 if options.quick else 4096, 2 if options.quick else 7)]


def _step(block: nn.Module, inputs: Tensor, method: NMSparsifier | None = None) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4)
    if method is not None:
        method.attach(block, optimizer)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        block(inputs).square().mean().backward()
        optimizer.step()

    return step


def _masks(width: int, repeats: int) -> list[Row]:
    """The 2:4 mask of a matrix of scores: time against a fixed bar, and against sorting."""
    scores = torch.randn(width, width, generator=torch.Generator().manual_seed(2)).abs()
    pattern = NM(2, 4)
    limit = 5 * scores.numel() / read_bandwidth()  # four bytes are read and one is written for every weight
    case = f"2:4 of {width} × {width}, float32"
    sorting = compare(
        "N:M mask",
        case,
        lambda: pattern.select(scores),
        "argsort and scatter",
        lambda: _by_sorting(scores),
        TIMES_SORTING,
        limit,
        repeats,
    )
    allowed = Row(
        **{
            **sorting.__dict__,
            "operation": "N:M mask, time",
            "peer": "time allowed",
            "theirs": MILLISECONDS,
            "ratio": MILLISECONDS / sorting.ours,
            "ratio_low": MILLISECONDS / sorting.ours,
            "ratio_high": MILLISECONDS / sorting.ours,
            "bar": 1.0,
            "met": sorting.ours <= MILLISECONDS,
        }
    )
    return [sorting, allowed]


def _by_sorting(scores: Tensor) -> Tensor:
    groups = scores.view(-1, 4)
    dropped = groups.argsort(dim=1)[:, :2]
    return torch.ones_like(groups).scatter_(1, dropped, 0).view(scores.shape)


if __name__ == "__main__":
    main(measure)

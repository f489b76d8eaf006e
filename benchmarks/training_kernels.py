"""The products of training with weights of which only the non-zeros exist, masks in place, and a change of topology.

The peer of a product is torch's dense one; that of the gradient of the non-zeros has to mask what it does not need.
The limit of a product is the time that its operations take at the rate of dense products measured here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Row, main, paired
from gossamer.core.masks import mask_, pack_bits
from gossamer.core.targets import find_targets
from gossamer.core.topology import Topology
from gossamer.kernels.native import instruction_set
from gossamer.kernels.sparse_rows import SparseRows
from gossamer.measure import interleave, peak_flops, read_bandwidth

#: outputs, inputs of a layer
SHAPES = ((2560, 640), (640, 2560), (4096, 1024))
BATCHES = (256, 2048)
#: sparsity → how much faster than torch the forward product and the gradient of the non-zeros have to be
BARS = {0.9: (3.0, 2.5), 0.95: (5.0, 2.5)}


def measure(options: Options) -> list[Row]:
    """Products by shape, sparsity and batch; then masks and topology on one square layer."""
    rounds = 2 if options.quick else 15
    shapes, batches = (((96, 64),), (32,)) if options.quick else (SHAPES, BATCHES)
    found = []
    for out, inputs in shapes:
        for sparsity in BARS:
            for batch in batches:
                found += _products(out, inputs, sparsity, batch, rounds)
    side = 128 if options.quick else 4096
    return [
        *found,
        _fresh_memory(64 if options.quick else 4096, 2048, rounds),
        *_masking(side, rounds),
        _exchange(side, 2 if options.quick else 5),
    ]


def _products(out: int, inputs: int, sparsity: float, batch: int, rounds: int) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inputs, generator=generator)
    mask = torch.rand(out, inputs, generator=generator) >= sparsity
    x, gradient = torch.randn(batch, inputs, generator=generator), torch.randn(batch, out, generator=generator)
    rows, columns, values = SparseRows.from_mask(mask), SparseRows.transposed(mask), weight[mask]
    dense = weight * mask
    forward, at_nonzeros = BARS[sparsity]
    contenders: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor], float]] = {
        "forward": (lambda: rows.multiply(values, x), lambda: nn.functional.linear(x, dense), forward),
        "gradient of inputs": (lambda: columns.multiply(values, gradient), lambda: gradient @ dense, 0.0),
        "gradient of non-zeros": (lambda: rows.outer(x, gradient), lambda: (gradient.t() @ x).mul_(mask), at_nonzeros),
    }
    case = (
        f"{out} × {inputs}, {sparsity:.0%} zero, batch {batch}, {torch.get_num_threads()} threads, {instruction_set()}"
    )
    limit = 2 * rows.nonzeros * batch / peak_flops()
    found = []
    for operation, (ours, theirs, bar) in contenders.items():
        timings = interleave({"ours": ours, "theirs": theirs}, repeats=rounds, warmup=2)
        peer = "torch, float32" + (", then mask" if "non-zeros" in operation else "")
        found.append(
            paired(f"sparse training, {operation}", case, timings["ours"], peer, timings["theirs"], bar, limit)
        )
    return found


def _fresh_memory(out: int, batch: int, rounds: int) -> Row:
    """What it costs any product that its result is memory which the process has not touched yet."""
    again = torch.empty(batch, out)
    timings = interleave(
        {"again": lambda: again.fill_(1.0), "fresh": lambda: torch.empty(batch, out).fill_(1.0)}, repeats=rounds
    )
    case = f"{batch} × {out} float32"
    return paired(
        "filling a result in memory used before", case, timings["again"], "in fresh memory", timings["fresh"], 0.0
    )


def _masking(side: int, rounds: int) -> list[Row]:
    """A mask of one bit a weight, on weights that a step has moved and on those that are zero already."""
    generator = torch.Generator().manual_seed(0)
    weight, mask = torch.randn(side, side, generator=generator), torch.rand(side, side, generator=generator) < 0.1
    moved, bits, removed = weight.clone(), pack_bits(mask), ~mask
    timings = interleave(
        {
            "copy": lambda: moved.copy_(weight),
            "copy and mask": lambda: mask_(moved.copy_(weight), bits),
            "copy and fill": lambda: moved.copy_(weight).masked_fill_(removed, 0),
            "mask": lambda: mask_(moved, bits),
            "fill": lambda: moved.masked_fill_(removed, 0),
        },
        repeats=rounds,
    )
    size, bandwidth = weight.numel(), read_bandwidth()
    case, peer = f"{side}², float32, 90% zero", "masked_fill_ with a bool mask"
    return [
        paired(
            *("mask in place, after a copy", case, timings["copy and mask"], peer, timings["copy and fill"], 1.0),
            limit=timings["copy"].median + (8 + 1 / 8) * size / bandwidth,
        ),
        paired(
            *("mask in place, zeros already there", case, timings["mask"], peer, timings["fill"], 1.0),
            limit=(4 + 1 / 8) * size / bandwidth,
        ),
    ]


def _exchange(side: int, rounds: int) -> Row:
    """Drop 30% of the weights that there are and grow as many; the peer only sorts what has to be ranked."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.utils.skip_init(nn.Linear, side, side, bias=False))
    weight = model[0].weight
    nn.init.normal_(weight, generator=generator)
    gradient = torch.randn(side, side, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    topology = Topology(find_targets(model, heads=True), optimizer)
    topology.prune(0.9)

    def sort_twice() -> tuple[Tensor, Tensor]:
        mask = topology.mask("0.weight")
        falling = weight.detach().abs().masked_fill(~mask, torch.inf).flatten().sort()
        return falling.indices, gradient.abs().masked_fill(mask, -1).flatten().sort(descending=True).indices

    timings = interleave(
        {
            "ours": lambda: topology.exchange(0.3, lambda *_: gradient.abs()),
            "theirs": sort_twice,
        },
        repeats=rounds,
    )
    limit = 8 * weight.numel() * 4 / read_bandwidth()  # three passes to find each threshold, one to mark
    case = f"{side}², 90% zero, 30% exchanged"
    return paired("prune and regrow", case, timings["ours"], "two full sorts", timings["theirs"], 10.0, limit)


if __name__ == "__main__":
    main(measure)

"""The two products of a layer under bidirectional pruning, with weights in N:M stored as such, against dense ones.

Forwards the groups lie along the inputs, backwards along the outputs; the third product, the gradient of the weights,
is dense and the same for all. Ours are the products of training that touch non-zeros only, and the packed N:M storage
that decoding uses, which expands a tile at a time for many vectors. The limit is the time of the operations that are
left at the rate of dense products measured here: M / N times faster than dense.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Row, main, paired
from gossamer.core.patterns import NM
from gossamer.kernels.native import instruction_set
from gossamer.kernels.nm import NMMatrix
from gossamer.kernels.sparse_rows import SparseRows
from gossamer.measure import interleave, peak_flops
from gossamer.training.bdwp import backward_mask

SHAPE, BATCH = (2048, 1024), 1024
PATTERNS = ((2, 4), (2, 8), (2, 16), (1, 16))


def measure(options: Options) -> list[Row]:
    """Both products at every pattern."""
    rounds = 2 if options.quick else 11
    (out, inputs), batch = ((64, 32), 32) if options.quick else (SHAPE, BATCH)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, inputs, generator=generator)
    x, gradient = torch.randn(batch, inputs, generator=generator), torch.randn(batch, out, generator=generator)
    found: list[Row] = []
    for n, m in PATTERNS:
        forward, backward = NM(n, m).select(weight.abs()), backward_mask(weight, n, m)
        ahead, behind = weight * forward, weight * backward
        found += _rows(f"forward, {n}:{m}", x, ahead, SparseRows.from_mask(forward), ahead[forward], (n, m), rounds)
        columns = SparseRows.transposed(backward)
        found += _rows(f"backward, {n}:{m}", gradient, behind.t(), columns, behind[backward], (n, m), rounds)
    return found


def _rows(
    name: str, x: Tensor, weight: Tensor, index: SparseRows, values: Tensor, pattern: tuple[int, int], rounds: int
) -> list[Row]:
    packed = NMMatrix.from_dense(weight.contiguous(), "float32", NM(*pattern))
    dense = weight.contiguous()
    ways: dict[str, Callable[[], Tensor]] = {
        "non-zeros only": lambda: index.multiply(values, x),
        "packed N:M": lambda: packed.linear(x),
        "torch": lambda: nn.functional.linear(x, dense),
    }
    timings = interleave(ways, repeats=rounds, warmup=1)
    case = f"{name}, {len(weight)} × {weight.shape[1]}, batch {len(x)}, {torch.get_num_threads()} threads"
    limit = 2 * index.nonzeros * len(x) / peak_flops()
    return [
        paired(
            f"bidirectional product, {way}",
            f"{case}, {instruction_set()}",
            timings[way],
            "torch, float32",
            timings["torch"],
            0.0,
            limit,
        )
        for way in ("non-zeros only", "packed N:M")
    ]


if __name__ == "__main__":
    main(measure)

"""Products with packed N:M matrices: one vector and many, against our own dense rows and against torch.

Dense rows are read at the memory limit, so that the ratio for one vector can reach what N:M spares in bytes: 1.88 for
2:4 in float32, 3.76 for 1:4. The bitmask of the same weights is shown beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Options, Row, main, paired
from gossamer.core.patterns import NM
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.native import instruction_set
from gossamer.kernels.nm import NMMatrix
from gossamer.measure import interleave, read_bandwidth

#: pattern, format → how much faster than our dense rows of float32, or of bfloat16 for the other formats; 0 where
#: nothing is asked
BARS = {
    ("2:4", "float32"): 1.6,
    ("1:4", "float32"): 2.9,
    ("4:8", "float32"): 0.0,
    ("1:16", "float32"): 0.0,
    ("2:4", "bfloat16"): 0.0,
    ("1:4", "bfloat16"): 0.0,
    ("1:8", "bfloat16"): 0.0,
    ("2:4", "int8"): 0.0,
    ("1:4", "int8"): 0.0,
}
SHAPE = (11008, 4096)
#: patterns whose products with more vectors are measured, and how many
BATCHED = ("2:4", "1:4")
BATCHES = (2, 4, 8, 16, 32, 64, 256)


def measure(options: Options) -> list[Row]:
    """All patterns in turns; the weights are random, for only their number matters."""
    return [*_one_vector(options), *_many_vectors(options)]


def _one_vector(options: Options) -> list[Row]:
    weight = _weight(options)
    x = torch.randn(1, weight.shape[1])
    twins = {format: DenseMatrix.from_dense(weight, format) for format in ("float32", "bfloat16")}
    matrices, masks = {}, {}
    for pattern, format in BARS:
        pruned = _pruned(weight, pattern)
        matrices[pattern, format] = NMMatrix.from_dense(pruned, format, NM(*map(int, pattern.split(":"))))
        masks[pattern, format] = BitmaskMatrix.from_dense(pruned, format)
    contenders = {
        **{f"dense {format}": (lambda twin=twin: twin.linear(x)) for format, twin in twins.items()},
        **{f"nm {case}": (lambda matrix=matrix: matrix.linear(x)) for case, matrix in matrices.items()},
        **{f"bitmask {case}": (lambda matrix=matrix: matrix.linear(x)) for case, matrix in masks.items()},
    }
    seconds = interleave(contenders, repeats=2 if options.quick else 15, warmup=2)
    bandwidth, found = read_bandwidth(), []
    for case, matrix in matrices.items():
        pattern, format = case
        where, ours, limit = _case(weight, 1), seconds[f"nm {case}"], matrix.nbytes / bandwidth
        twin = "float32" if format == "float32" else "bfloat16"
        operation = f"{pattern} {format} × vector"
        peer = f"our dense {twin} rows"
        found.append(paired(operation, where, ours, peer, seconds[f"dense {twin}"], BARS[case], limit))
        found.append(paired(operation, where, ours, f"bitmask, {format}", seconds[f"bitmask {case}"], 0.0, limit))
    return found


def _many_vectors(options: Options) -> list[Row]:
    weight = _weight(options)
    found = []
    for pattern in BATCHED:
        pruned = _pruned(weight, pattern)
        matrix = NMMatrix.from_dense(pruned)
        for batch in BATCHES[:2] if options.quick else BATCHES:
            x = torch.randn(batch, weight.shape[1])
            contenders = {
                "ours": lambda x=x, matrix=matrix: matrix.linear(x),
                "torch": lambda x=x, pruned=pruned: torch.nn.functional.linear(x, pruned),
            }
            seconds = interleave(contenders, repeats=2 if options.quick else 7)
            operation = f"{pattern} float32 × vectors"
            peer = "torch linear, float32"
            found.append(paired(operation, _case(weight, batch), seconds["ours"], peer, seconds["torch"], 1.0))
    return found


def _weight(options: Options) -> Tensor:
    return torch.randn((512, 512) if options.quick else SHAPE, generator=torch.Generator().manual_seed(0))


def _pruned(weight: Tensor, pattern: str) -> Tensor:
    return weight * NM(*map(int, pattern.split(":"))).select(weight.abs())


def _case(weight: Tensor, batch: int) -> str:
    rows, columns = weight.shape
    return f"{rows} × {columns}, batch {batch}, {torch.get_num_threads()} threads, {instruction_set()}"


if __name__ == "__main__":
    main(measure)

"""Vectors times a sparse matrix that no cache holds: against our own dense rows, and against torch in bfloat16.

Kinds that begin with ``integer`` round the vector to int8. The last rows are what ``compress`` makes of layers with one
vector and with many: each is measured against the layer as torch has it, which must never be faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Options, Row, compare, main, paired
from gossamer.kernels.blocks import block_height
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.kinds import pack
from gossamer.kernels.native import instruction_set
from gossamer.measure import interleave, read_bandwidth
from gossamer.runtime.choice import Case, candidates, fastest, measure_storages

#: kind, format, sparsity → how much faster than our dense bfloat16 rows, and than torch in bfloat16; 0 where nothing is
#: asked
BARS = {
    ("bitmask", "bfloat16", 0.5): (1.65, 2.4),
    ("bitmask", "bfloat16", 0.7): (2.4, 3.5),
    ("bitmask", "bfloat16", 0.8): (2.8, 4.5),
    ("bitmask", "int8", 0.5): (0.0, 4.0),
    ("integer_bitmask", "int8", 0.5): (0.0, 4.0),
    ("integer_bitmask", "int8", 0.8): (0.0, 0.0),
    ("dense", "int8", 0.0): (0.0, 0.0),
    ("integer_dense", "int8", 0.0): (0.0, 0.0),
    ("bitmask", "int4", 0.5): (0.0, 0.0),
    ("csr", "bfloat16", 0.95): (0.0, 0.0),
    ("csr", "int8", 0.95): (0.0, 0.0),
    ("blocks4", "bfloat16", 0.8): (0.0, 0.0),
    ("blocks16", "bfloat16", 0.5): (0.0, 0.0),
    ("blocks16", "bfloat16", 0.8): (0.0, 0.0),
    ("blocks16", "int8", 0.8): (0.0, 0.0),
}
SHAPE = (11008, 4096)
#: height of the kept blocks and sparsity of the layers that ``compress`` chooses for, and vectors at a time
LAYERS = ((1, 0.5), (1, 0.8), (1, 0.95), (16, 0.8))
BATCHES = (1, 4, 8, 16, 32, 64, 256)
LAYER_SHAPE = (4096, 4096)


def measure(options: Options) -> list[Row]:
    """All formats in turns; the weights are random, for only their number matters."""
    return [*_one_vector(options), *_batches(options)]


def _one_vector(options: Options) -> list[Row]:
    rows, columns = (512, 512) if options.quick else SHAPE
    rounds = 2 if options.quick else 15
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(1, columns, generator=generator)
    plain, rounded = weight.bfloat16(), x.bfloat16()
    twin = DenseMatrix.from_dense(plain)
    matrices = {case: pack(_sparse(plain, _height(case[0]), case[2], generator), *case[:2]) for case in BARS}
    contenders = {
        "torch": lambda: torch.nn.functional.linear(rounded, plain),
        "dense": lambda: twin.linear(x),
        **{str(case): (lambda matrix=matrix: matrix.linear(x)) for case, matrix in matrices.items()},
    }
    seconds = interleave(contenders, repeats=rounds, warmup=2)
    found = []
    for case, matrix in matrices.items():
        kind, format, sparsity = case
        where = f"{rows} × {columns}, {sparsity:.0%} zero, {_machine()}"
        ours, limit = seconds[str(case)], matrix.nbytes / read_bandwidth()
        against_dense, against_torch = BARS[case]
        operation = f"{format} {kind} × vector"
        peer = "our dense bfloat16 rows"
        found.append(paired(operation, where, ours, peer, seconds["dense"], against_dense, limit))
        peer = "torch linear, bfloat16"
        found.append(paired(operation, where, ours, peer, seconds["torch"], against_torch, limit))
    return found


def _batches(options: Options) -> list[Row]:
    """What is chosen for a layer, for every number of vectors, against the layer as it was."""
    rows, columns = (256, 512) if options.quick else LAYER_SHAPE
    generator = torch.Generator().manual_seed(0)
    found = []
    for height, sparsity in LAYERS:
        weight = _sparse(torch.randn(rows, columns, generator=generator).bfloat16(), height, sparsity, generator)
        for batch in BATCHES[:2] if options.quick else BATCHES:
            found.append(_chosen(weight, batch, 2 if options.quick else 11))
    return found


def _chosen(weight: Tensor, batch: int, rounds: int) -> Row:
    rows, columns = weight.shape
    density, height = float((weight != 0).float().mean()), block_height(weight)
    case = Case(rows, columns, density, weight.dtype, batch, block=height)
    storages = candidates(["bfloat16"], weight.dtype, density=density, block=height)
    best = fastest(measure_storages(case, storages, repeats=min(rounds, 5)))
    x = torch.randn(batch, columns).bfloat16()
    where = f"{rows} × {columns}, {1 - density:.0%} zero in blocks of {height}, batch {batch}, {_machine()}"
    peer = "torch linear, bfloat16"
    if best.kind == "plain":  # the layer stays what it is
        time = interleave({"layer": lambda: torch.nn.functional.linear(x, weight)}, repeats=rounds)["layer"]
        return paired(f"chosen: {best}", where, time, peer, time, 1.0)
    matrix = pack(weight, best.kind, best.format)
    limit = matrix.nbytes / read_bandwidth()
    return compare(
        f"chosen: {best}",
        where,
        lambda: matrix.linear(x),
        peer,
        lambda: torch.nn.functional.linear(x, weight),
        1.0,
        limit,
        rounds,
    )


def _machine() -> str:
    return f"{torch.get_num_threads()} threads, {instruction_set()}"


def _height(kind: str) -> int:
    return int(kind.removeprefix("blocks")) if kind.startswith("blocks") else 1


def _sparse(weight: Tensor, height: int, sparsity: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(-(-len(weight) // height), weight.shape[1], generator=generator) >= sparsity
    return weight * kept.repeat_interleave(height, 0)[: len(weight)]


if __name__ == "__main__":
    main(measure)

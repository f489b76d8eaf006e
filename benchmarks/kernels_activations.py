"""Products of few live channels: one vector and chunks of eight, against our own dense kernels and against torch.

At a share s of silent channels, 1 − s of the weights have to be read, so that the ratio against dense bfloat16 rows,
which are read at the memory limit, can reach 1 / (1 − s). In a gated feed-forward block the gate is always read, unless
a router says beforehand which neurons are wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Row, main, paired
from gossamer.kernels.channel_products import input_sparse, masked_output
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.gated_feedforward import GatedFeedforward
from gossamer.kernels.native import instruction_set
from gossamer.measure import interleave, read_bandwidth

SHAPE = (11008, 4096)
#: format, share of silent channels → how much faster than our dense rows of bfloat16, and than torch in bfloat16; 0
#: where nothing is asked
BARS = {
    ("bfloat16", 0.0): (0.0, 0.0),
    ("bfloat16", 0.1): (0.0, 0.0),
    ("bfloat16", 0.5): (1.75, 2.5),
    ("bfloat16", 0.65): (2.5, 3.6),
    ("bfloat16", 0.8): (4.2, 6.0),
    ("float32", 0.5): (0.0, 0.0),
    ("int8", 0.5): (0.0, 0.0),
    ("int4", 0.5): (0.0, 0.0),
}
GATED_BAR, CHUNK_BAR = 2.2, 2.3
_FIRING, _CHUNK, _CHUNK_SILENT = 0.1, 8, 0.7


def measure(options: Options) -> list[Row]:
    """One vector, chunks, and feed-forward blocks; the weights are random, for only their number matters."""
    return [*_one_vector(options), *_outputs(options), *_one_block(options), *_chunk(options)]


def _shape(options: Options) -> tuple[int, int]:
    return (512, 512) if options.quick else SHAPE


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _repeats(options: Options) -> int:
    return 2 if options.quick else 15


def _one_vector(options: Options) -> list[Row]:
    weight = _random(*_shape(options))
    columns = weight.shape[1]
    x = torch.randn(1, columns)
    half, plain = weight.bfloat16(), x.bfloat16()
    dense = DenseMatrix.from_dense(weight, "bfloat16")
    matrices = {format: ChannelMatrix.from_dense(weight, format) for format in dict.fromkeys(f for f, _ in BARS)}
    ordered = x.abs().flatten().sort().values
    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: dense.linear(x),
        "torch": lambda: nn.functional.linear(plain, half),
    }
    for format, share in BARS:
        silent = int(share * columns)
        limits = torch.full((columns,), float(ordered[silent - 1]) if silent else 0.0)
        runs[f"{format} {share}"] = lambda m=matrices[format], t=limits: input_sparse(m, x, t)
    seconds = interleave(runs, repeats=_repeats(options), warmup=2)
    bandwidth, found = read_bandwidth(), []
    for (format, share), bars in BARS.items():
        ours = seconds[f"{format} {share}"]
        limit = (1 - share) * matrices[format].nbytes / bandwidth
        operation, where = f"{format}, {share:.0%} of inputs silent", _case(weight.shape, 1)
        for peer, name, bar in (
            ("our dense bfloat16 rows", "dense", bars[0]),
            ("torch linear, bfloat16", "torch", bars[1]),
        ):
            found.append(paired(operation, where, ours, peer, seconds[name], bar, limit))
    return found


def _outputs(options: Options) -> list[Row]:
    weight, share = _random(*_shape(options)), 0.9
    x, gate = torch.randn(1, weight.shape[1]), torch.rand(1, weight.shape[0])
    gate *= gate > share
    dense, four = DenseMatrix.from_dense(weight, "bfloat16"), NibbleRowMatrix.from_dense(weight)
    wanted = float((gate != 0).float().mean())
    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: dense.linear(x) * gate,
        "bfloat16": lambda: masked_output(dense, x, gate),
        "int4": lambda: masked_output(four, x, gate),
    }
    seconds = interleave(runs, repeats=_repeats(options), warmup=2)
    found = []
    for format, matrix in (("bfloat16", dense), ("int4", four)):
        limit = wanted * matrix.nbytes / read_bandwidth()
        operation = f"{format}, {share:.0%} of outputs not wanted"
        case = _case(weight.shape, 1)
        found.append(paired(operation, case, seconds[format], "our dense bfloat16 rows", seconds["dense"], 0.0, limit))
    return found


def _block(options: Options) -> tuple[GatedFeedforward, list[Tensor]]:
    neurons, inputs = _shape(options)
    gate, up, down = _random(neurons, inputs), _random(neurons, inputs), _random(inputs, neurons)
    rows = [DenseMatrix.from_dense(weight, "bfloat16") for weight in (gate, up)]
    block = GatedFeedforward(*rows, ChannelMatrix.from_dense(down, "bfloat16"), "fatrelu")
    return block, [weight.bfloat16() for weight in (gate, up, down)]


def _ours_dense(block: GatedFeedforward, down: DenseMatrix, x: Tensor) -> Tensor:
    return down.linear(torch.relu(block.gate.linear(x)) * block.up.linear(x))


def _torch_dense(weights: list[Tensor], x: Tensor) -> Tensor:
    gate, up, down = weights
    linear = nn.functional.linear
    return linear(torch.relu(linear(x, gate)) * linear(x, up), down)


def _one_block(options: Options) -> list[Row]:
    block, weights = _block(options)
    neurons, inputs = block.gate.shape
    x = torch.randn(1, inputs)
    before = block.gate.linear(x).flatten().sort().values
    cut = float(before[int((1 - _FIRING) * neurons) - 1])
    firing = GatedFeedforward(block.gate, block.up, block.down, "fatrelu", cut)
    down, half = DenseMatrix.from_dense(weights[2]), x.bfloat16()
    runs: dict[str, Callable[[], object]] = {
        "ours": lambda: firing(x),
        "dense": lambda: _ours_dense(block, down, x),
        "torch": lambda: _torch_dense(weights, half),
    }
    seconds = interleave(runs, repeats=_repeats(options), warmup=2)
    limit = (1 + 2 * _FIRING) * block.gate.nbytes / read_bandwidth()
    operation, case = f"gated feed-forward, {1 - _FIRING:.0%} zeros in the gate", _case(block.gate.shape, 1)
    return [
        paired(operation, case, seconds["ours"], "our dense block, bfloat16", seconds["dense"], GATED_BAR, limit),
        paired(operation, case, seconds["ours"], "torch, bfloat16", seconds["torch"], GATED_BAR, limit),
    ]


def _chunk(options: Options) -> list[Row]:
    """Eight tokens whose union of neurons a router has found, and eight whose gate has to be computed first."""
    block, weights = _block(options)
    neurons, inputs = block.gate.shape
    x = torch.randn(_CHUNK, inputs)
    union = torch.rand(neurons, generator=torch.Generator().manual_seed(0)) >= _CHUNK_SILENT
    wanted = union.expand(_CHUNK, neurons).contiguous()
    down, half = DenseMatrix.from_dense(weights[2]), x.bfloat16()
    wide = [weight.float() for weight in weights]
    runs: dict[str, Callable[[], object]] = {
        "routed": lambda: block(x, wanted),
        "dense": lambda: _ours_dense(block, down, x),
        "torch": lambda: _torch_dense(weights, half),
        "torch float32": lambda: _torch_dense(wide, x),
    }
    seconds = interleave(runs, repeats=_repeats(options), warmup=2)
    limit = 3 * float(union.float().mean()) * block.gate.nbytes / read_bandwidth()
    operation = f"routed feed-forward, {_CHUNK_SILENT:.0%} of neurons silent in the chunk"
    case = _case(block.gate.shape, _CHUNK)
    return [
        paired(operation, case, seconds["routed"], peer, seconds[name], CHUNK_BAR, limit)
        for peer, name in (
            ("our dense block, bfloat16", "dense"),
            ("torch, bfloat16", "torch"),
            ("torch, float32", "torch float32"),
        )
    ]


def _case(shape: tuple[int, ...], batch: int) -> str:
    return f"{shape[0]} × {shape[1]}, batch {batch}, {torch.get_num_threads()} threads, {instruction_set()}"


if __name__ == "__main__":
    main(measure)

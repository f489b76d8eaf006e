"""Convolutions with sparse weights against torch's dense ones (oneDNN), on the shapes of MobileNet v1 and v2 at 224².

The limit of a row is the longer of two times: to read the input and write the output once at the measured bandwidth,
and to multiply what is stored at the measured rate. On the shapes of MobileNet v1 there are also one thread, other
libraries that multiply sparse matrices, and weights in two bytes and in one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Row, compare, main
from gossamer.core.kernel_groups import KernelGroup
from gossamer.core.patterns import Block
from gossamer.kernels.convolution import BlockedKernels
from gossamer.kernels.convolution_bytes import ByteKernels
from gossamer.kernels.depthwise import depthwise
from gossamer.kernels.images import Window
from gossamer.measure import interleave, peak_flops, read_bandwidth

#: input channels, output channels, height = width
V1 = (
    (32, 64, 112),
    (64, 128, 56),
    (128, 128, 56),
    (128, 256, 28),
    (256, 256, 28),
    (256, 512, 14),
    (512, 512, 14),
    (512, 1024, 7),
    (1024, 1024, 7),
)
V2 = (
    *((32, 16, 112), (16, 96, 112), (96, 24, 56), (24, 144, 56), (144, 24, 56), (144, 32, 28), (32, 192, 28)),
    *((192, 32, 28), (192, 64, 14), (64, 384, 14), (384, 64, 14), (384, 96, 14), (96, 576, 14), (576, 96, 14)),
    *((576, 160, 7), (160, 960, 7), (960, 160, 7), (960, 320, 7), (320, 1280, 7)),
)
SPARSITIES = (0.7, 0.8, 0.9, 0.95)
BLOCKS = (1, 2, 4)
GROUPED = (0.3, 0.5, 0.7, 0.8)
#: channels, height = width, stride, of depthwise 3 × 3 convolutions of MobileNet v1
DEPTHWISE = ((64, 112, 2), (128, 56, 1), (256, 28, 1), (512, 14, 1), (512, 14, 2))
#: what is wanted at a sparsity; elsewhere a sparse kernel only has to be as fast as the dense one
BARS = {0.8: 1.5, 0.9: 2.0}
GROUP_BARS = {0.3: 1.2, 0.5: 1.7}
_ALIVE = 3
_LIBRARY = "1 × 1, 90% zero, blocks of 1"


def measure(options: Options) -> list[Row]:
    """All comparisons, in the order of the module's text."""
    machine = _Machine(read_bandwidth(), peak_flops(), 3 if options.quick else 15)
    pointwise = [(256, 256, 14)] if options.quick else [*V1, *V2]
    larger = [(64, 64, 28)] if options.quick else [(64, 64, 56), (128, 128, 28), (256, 256, 14)]
    first = pointwise[: len(V1)]
    rows = []
    for case in pointwise:
        rows += _rows(machine, case, 1, [(s, block, BARS.get(s, 1.0)) for s in SPARSITIES for block in BLOCKS])
    for case in first:
        rows += _rows(machine, case, 1, [(s, 16, GROUP_BARS.get(s, 1.0)) for s in GROUPED])
    for case in larger:
        rows += _rows(machine, case, 3, [(s, 16, 1.0) for s in GROUPED])
    for case in first:
        for kind in ("float16", "int8"):
            rows += _rows(machine, case, 1, [(0.5, 16, 1.0), (0.8, 4, 1.0)], kind)
    rows += [row for case in first for row in _library_rows(machine, *case)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in first if threads > 1 else []:
            rows += _rows(machine, case, 1, [(0.8, 1, BARS[0.8]), (0.9, 1, BARS[0.9]), (0.9, 4, BARS[0.9])])
    finally:
        torch.set_num_threads(threads)
    return rows + [_depthwise_row(*case, machine) for case in DEPTHWISE[: 1 if options.quick else None]]


@dataclass(frozen=True)
class _Machine:
    """Bytes and operations a second, and how often both sides are measured."""

    bandwidth: float
    rate: float
    rounds: int


class _Peer:
    """The dense convolution in the layout that is faster for torch: that of our own, or with the channels last."""

    def __init__(self, x: Tensor, outputs: int, kernel: int):
        self.weight = torch.randn(outputs, x.shape[1], kernel, kernel)
        self.padding = kernel // 2
        last = (x.to(memory_format=torch.channels_last), self.weight.to(memory_format=torch.channels_last))
        layouts = {"torch, dense": (x, self.weight), "torch, dense, channels last": last}
        seconds = {name: _best(lambda pair=pair: self._convolve(*pair)) for name, pair in layouts.items()}
        self.name = min(seconds, key=seconds.__getitem__)
        self.operands = layouts[self.name]

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.conv2d(x, weight, padding=self.padding)

    def __call__(self) -> Tensor:
        return self._convolve(*self.operands)


def _best(run: Callable[[], object]) -> float:
    return interleave({"run": run}, repeats=5)["run"].median


def _pruned(weight: Tensor, block: int, sparsity: float) -> Tensor:
    pattern = KernelGroup(block) if weight.shape[2] > 1 or len(weight) % block else Block((block, 1))
    return weight * pattern.select(torch.rand_like(weight), sparsity)


def _rows(
    machine: _Machine,
    case: tuple[int, int, int],
    size: int,
    prunings: list[tuple[float, int, float]],
    kind: str = "float32",
) -> list[Row]:
    """One shape with kernels of one size, by sparsity, block and bar; `kind` is what weights are stored as."""
    inputs, outputs, side = case
    x = torch.randn(1, inputs, side, side)
    dense = _Peer(x, outputs, size)
    window, threads = Window(padding=(dense.padding, dense.padding)), torch.get_num_threads()
    rows = []
    for sparsity, block, bar in prunings:
        weight = _pruned(dense.weight, block, sparsity)
        kernels: BlockedKernels | ByteKernels
        if kind == "int8":
            kernels = ByteKernels.from_dense(weight, block)
        else:
            kernels = BlockedKernels.from_dense(weight, block, dtype=getattr(torch, kind))
        moved = 4 * (inputs + outputs) * side * side + kernels.nbytes
        products = 2 * kernels.kept * kernels.block * size * size * side * side
        limit = max(moved / machine.bandwidth, 0.0 if kind == "int8" else products / machine.rate)
        group = f"{sparsity:.0%} zero, blocks of {block}" + (f", {kind}" if kind != "float32" else "")
        group += ", 1 thread" if threads == 1 else ""
        named = f"{inputs} → {outputs}, {size} × {size} at {side}², {group}"
        ours, theirs = _kept(partial(kernels.convolve, x, window=window)), _kept(dense)
        group = f"{size} × {size}, {group}"
        row = compare("sparse convolution", named, ours, dense.name, theirs, bar, limit, machine.rounds, group)
        rows.append(row)
    return rows


def _library_rows(machine: _Machine, inputs: int, outputs: int, side: int) -> list[Row]:
    """Against products of compressed sparse rows with the image as a matrix; what is not installed is left out."""
    x, rows = torch.randn(1, inputs, side, side), []
    weight = _pruned(torch.randn(outputs, inputs, 1, 1), 1, 0.9)
    kernels = BlockedKernels.from_dense(weight)
    ours, matrix, columns = _kept(partial(kernels.convolve, x)), weight[:, :, 0, 0], x.view(inputs, -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that its sparse rows are in beta
        peers: dict[str, Callable[[], object]] = {
            "torch.sparse, CSR": partial(torch.mm, matrix.to_sparse_csr(), columns)
        }
    if find_spec("scipy"):
        from scipy.sparse import csr_array

        peers["scipy, CSR"] = partial(csr_array(matrix.numpy()).dot, columns.numpy())
    limit = (4 * (inputs + outputs) * side * side + kernels.nbytes) / machine.bandwidth
    case = f"{inputs} → {outputs}, 1 × 1 at {side}², {_LIBRARY.partition(', ')[2]}"
    for name, peer in peers.items():
        row = compare("sparse convolution", case, ours, name, _kept(peer), 1.0, limit, machine.rounds, _LIBRARY)
        rows.append(row)
    return rows


def _depthwise_row(channels: int, side: int, stride: int, machine: _Machine) -> Row:
    """Against torch in the same layout, since a network would have to convert from and to another."""
    x, weight = torch.randn(1, channels, side, side), torch.randn(channels, 1, 3, 3)
    window = Window((stride, stride), (1, 1))
    limit = 4 * (x.numel() + x.numel() // stride**2) / machine.bandwidth
    case = f"{channels} channels, 3 × 3 at {side}², stride {stride}"
    ours = _kept(lambda: depthwise(x, weight, None, window))
    theirs = _kept(lambda: nn.functional.conv2d(x, weight, None, stride, 1, 1, channels))
    return compare("depthwise convolution", case, ours, "torch, same layout", theirs, 1.0, limit, machine.rounds)


def _kept(run: Callable[[], object]) -> Callable[[], object]:
    """Keep a few outputs alive, as a network does: memory that is given back at once has to be mapped again."""
    kept: list[object] = []

    def call() -> None:
        kept.append(run())
        if len(kept) > _ALIVE:
            kept.pop(0)

    return call


if __name__ == "__main__":
    with torch.inference_mode():
        main(measure)

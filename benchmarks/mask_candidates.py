"""What a choice among all N:M masks of every group takes, beside the weights and the logits themselves.

A soft mask of a weight matrix is made from logits and Gumbel noise, and gradients go back to the logits. Ours works in
chunks and makes the softmax again in the backward pass; the plain way multiplies every group with all its masks, and
the usual way, as in the authors' code, leaves torch to keep noise and softmax. Each runs in a process of its own, and
what is reported is the highest resident memory above what the process had with weights, logits and libraries.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import Options, Row, compare, main, paired
from gossamer.core.patterns import NM
from gossamer.measure import Timing
from gossamer.measure.memory import peak_memory
from gossamer.training.mask_distribution import Clock, MaskGate

PATTERNS = ((2, 4), (3, 7), (4, 8))  # 6, 35 and 70 masks
BAR = 4.0
SIZES = {"quick": (64, 112), "full": (1024, 1120)}


def gate(n: int, m: int, shape: tuple[int, int], seed: int = 0) -> MaskGate:
    """Logits of a layer."""
    return MaskGate("layer", torch.Size(shape), NM(n, m), 1, Clock(100.0, 1.0, seed=seed)).train()


def ours(choice: MaskGate, weight: Tensor) -> None:
    """Forward and backward of :class:`MaskGate`."""
    choice(weight).backward(weight)


def usual(choice: MaskGate, weight: Tensor) -> None:
    """Gumbel-softmax of torch, and one product with the table of masks."""
    p = torch.nn.functional.gumbel_softmax(choice.clock.kappa * choice.logits.T, choice.clock.tau)
    (weight * (p @ choice.candidates).view(weight.shape)).backward(weight)


def plain(choice: MaskGate, weight: Tensor) -> None:
    """Every group under all its masks, and their mean."""
    p = torch.nn.functional.gumbel_softmax(choice.clock.kappa * choice.logits.T, choice.clock.tau)
    masked = weight.view(-1, 1, choice.m) * choice.candidates
    (p.unsqueeze(2) * masked).sum(1).view(weight.shape).backward(weight)


WAYS: dict[str, Callable[[MaskGate, Tensor], None]] = {"ours": ours, "usual": usual, "plain": plain}


def measure(options: Options) -> list[Row]:
    """Bytes of each pattern, and the time of 2:4."""
    size = "quick" if options.quick else "full"
    rows = []
    for n, m in PATTERNS:
        taken = {way: _apart(way, n, m, size) for way in WAYS}
        patterns = len(gate(n, m, (1, m)).logits)
        case = f"{n}:{m}, {patterns} masks a group, {' × '.join(map(str, SIZES[size]))} weights, forward and backward"
        for way, peer, bar in (("plain", "all masks of every weight", BAR), ("usual", "torch's gumbel_softmax", 1.0)):
            times = [Timing.of([float(max(1, taken[each]))]) for each in ("ours", way)]
            row = paired("memory of a choice of masks", case, times[0], peer, times[1], bar)
            rows.append(Row(**{**row.__dict__, "unit": "B"}))
    shape = SIZES[size]
    weight, choices = torch.randn(shape), {way: gate(2, 4, shape) for way in ("ours", "usual")}
    rows.append(
        compare(
            "time of a choice of masks",
            f"2:4, {' × '.join(map(str, shape))} weights, forward and backward",
            lambda: ours(choices["ours"], weight),
            "torch's gumbel_softmax",
            lambda: usual(choices["usual"], weight),
            1.0,
        )
    )
    return rows


def _apart(way: str, n: int, m: int, size: str) -> int:
    """Bytes, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks.mask_candidates", "--child", way, str(n), str(m), size]
    # memory that malloc keeps for itself would be taken for memory in use
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "65536"}
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=environment, check=True
    )
    return int(finished.stdout.splitlines()[-1])


def _child(way: str, n: int, m: int, size: str) -> None:
    torch.manual_seed(0)
    # libraries take their own buffers first; with another seed, so that the noise of this one is still to be made
    WAYS[way](gate(n, m, (4, m), seed=1), torch.randn(4, m))
    choice, weight = gate(n, m, SIZES[size]), torch.randn(SIZES[size])
    with peak_memory() as peak:
        WAYS[way](choice, weight)
    print(peak.increase)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--child", nargs=4, metavar=("WAY", "N", "M", "SIZE"))
    child = parser.parse_known_args()[0].child
    if child:
        _child(child[0], int(child[1]), int(child[2]), child[3])
    else:
        main(measure)

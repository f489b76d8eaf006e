"""Products of group-sparse four-bit matrices with one vector: against torch, and balanced against split by rows.

Half of the 1×16 groups are gone, so that a weight takes 3.13 bits. The last rows are matrices whose rows keep very
different numbers of groups (log-normal): in random order, and with the longest rows first, which is the worst that
equal shares of rows can meet.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import Options, Row, compare, main
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.groups import GROUP, GroupMatrix
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.measure import read_bandwidth

SHAPES = ((11008, 4096), (4096, 4096))
_INT4_GROUP = 32  # the smallest that torch's own four-bit product takes


def random_matrix(rows: int, columns: int, kept: Tensor, seed: int = 0) -> GroupMatrix:
    """Random codes, scales and zeros for the groups that are kept."""
    generator = torch.Generator().manual_seed(seed)
    width = columns // GROUP
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, width, generator=generator) + 0.5).half().float() / 64
    zeros = torch.randint(4, 12, (rows, width), generator=generator)
    return GroupMatrix.from_codes(codes, kept, scales, zeros)


def scattered(counts: Tensor, width: int, seed: int = 0) -> Tensor:
    """Mask of so many groups in each row, at random places."""
    ranks = torch.rand(len(counts), width, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    return ranks < counts.unsqueeze(1)


def log_normal_counts(rows: int, width: int, seed: int = 0) -> Tensor:
    """Groups of rows that differ by orders of magnitude, up to full ones."""
    drawn = torch.randn(rows, generator=torch.Generator().manual_seed(seed))
    return (width * torch.exp(1.5 * drawn - 2)).round().clamp(0, width).long()


def torch_int4(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Weights and scales in the form of torch's own four-bit product."""
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.rand(columns // _INT4_GROUP, rows, 2, dtype=torch.bfloat16)


def random_nibbles(rows: int, columns: int, group: int = 32) -> NibbleMatrix:
    """A dense matrix of 4.5 bits a weight, of random codes: their values cost nothing."""
    panels = -(-rows // 16)
    words = torch.randint(-(2**31), 2**31, (panels, columns // 8, 16), dtype=torch.int64).to(torch.int32)
    return NibbleMatrix((rows, columns), words, torch.full((panels, columns // group, 16), 0.01).half(), None, group)


def measure(options: Options) -> list[Row]:
    """One vector, all threads that torch uses."""
    shapes = ((512, 512),) if options.quick else SHAPES
    repeats = 3 if options.quick else 21
    bandwidth = read_bandwidth()
    return [
        *(row for shape in shapes for row in _against_dense(*shape, bandwidth, repeats)),
        *(row for shape in shapes for row in _schedules(*shape, bandwidth, repeats)),
    ]


def _against_dense(rows: int, columns: int, bandwidth: float, repeats: int) -> list[Row]:
    width = columns // GROUP
    matrix = random_matrix(rows, columns, scattered(torch.full((rows,), width // 2), width))
    dense = matrix.expand().bfloat16()
    ours = DenseMatrix.from_dense(dense)
    x = torch.randn(1, columns).bfloat16()
    packed, grids = torch_int4(rows, columns)
    nibbles = random_nibbles(rows, columns)
    limit, case = matrix.nbytes / bandwidth, f"{rows} × {columns}, batch 1"
    wanted = torch.nn.functional.linear(x, dense).float()
    assert float((matrix.linear(x).float() - wanted).norm() / wanted.norm()) < 0.02
    peers = [
        ("torch linear, bfloat16", lambda: torch.nn.functional.linear(x, dense), 5.0),
        ("our dense bfloat16 row kernel", lambda: ours.linear(x), 1.0),
        (
            f"torch int4 in groups of {_INT4_GROUP}, dense",
            lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, _INT4_GROUP, grids),
            1.0,
        ),
        ("NibbleMatrix (dense 4.5 bit, our own)", lambda: nibbles.linear(x), 1.15),
    ]
    return [
        compare("W4, half of the 1×16 groups", case, lambda: matrix.linear(x), peer, theirs, bar, limit, repeats)
        for peer, theirs, bar in peers
    ]


def _schedules(rows: int, columns: int, bandwidth: float, repeats: int) -> list[Row]:
    width = columns // GROUP
    counts = log_normal_counts(rows, width)
    cases = {
        "equal rows": (torch.full((rows,), int(counts.float().mean())), 0.95),
        "log-normal rows": (counts, 0.95),
        "log-normal rows, longest first": (counts.sort(descending=True).values, 1.3),
    }
    found = []
    for name, (kept, bar) in cases.items():
        balanced = random_matrix(rows, columns, scattered(kept, width))
        by_rows, x = replace(balanced, balanced=False), torch.randn(1, columns)
        assert torch.equal(balanced.linear(x), by_rows.linear(x))
        share = math.ceil(100 * balanced.kept / (rows * width))
        found.append(
            compare(
                "equal shares of groups",
                f"{rows} × {columns}, {name}, {share}% kept",
                lambda balanced=balanced, x=x: balanced.linear(x),  # type: ignore[misc]
                "equal shares of rows",
                lambda by_rows=by_rows, x=x: by_rows.linear(x),  # type: ignore[misc]
                bar,
                balanced.nbytes / bandwidth,
                repeats,
            )
        )
    return found


if __name__ == "__main__":
    main(measure)

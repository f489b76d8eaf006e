"""Products with packed matrices on a GPU, in Triton: bitmasks, N:M, dense of four bits, single weights and blocks.

One program makes the outputs of one row, panel or band for one vector: it goes through what is stored there from the
first column to the last, so that a product always repeats to the bit. Weights of which nothing is stored are left out;
an infinite or NaN input does not reach the outputs through them. Groups of 1 × 16 are in
:mod:`gossamer.kernels.groups_triton`, where rows of very different lengths share programs.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.blocks import BlockMatrix
from gossamer.kernels.groups_triton import check_call
from gossamer.kernels.integer import IntegerDenseMatrix
from gossamer.kernels.matrix import PackedMatrix, rounded_codes, rounding
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.kernels.nm import NMMatrix

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None

_PANEL = 16  # rows of a program for four-bit weights and N:M


def linear(matrix: PackedMatrix, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ matrix.T + bias`` on the device of `x`, where the parts of the matrix must be as well.

    Parameters
    ----------
    matrix
        ``(rows, columns)``: a bitmask, N:M, four-bit dense, of blocks of one column, single weights among them, or one
        of the two that round their inputs to int8.
    x
        ``(…, columns)``, any floating dtype. Sums are formed in float32. Inputs are rounded only for matrices that are
        packed for it, and for at most 64 vectors, as by the compiled kernels.
    bias
        ``(rows,)``.

    Returns
    -------
    Tensor
        ``(…, rows)`` in the dtype of `x`.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    ConfigurationError
        If `x` does not fit the matrix, or there is no Triton version for its kind.
    """
    check_call(matrix, x)
    rows, columns = matrix.shape
    launch: Callable[..., None] | None = next((r for kind, r in _LAUNCHES.items() if isinstance(matrix, kind)), None)
    if launch is None:
        raise ConfigurationError(f"{type(matrix).__name__} has no Triton version here; pack the layer as a bitmask")
    flat = x.reshape(math.prod(x.shape[:-1]), columns).contiguous()
    outputs = torch.zeros(len(flat), rows, dtype=torch.float32, device=x.device)
    if outputs.numel() and columns:
        if matrix.activations == "int8" and matrix.rounds(len(flat)) and rounding():
            codes, steps = rounded_codes(flat)
            flat = (codes.unflatten(1, (-1, 32)) * steps[..., None]).flatten(1)[:, :columns].contiguous()
        launch(matrix, flat, outputs)
    if bias is not None:
        outputs += bias.float()
    return outputs.to(x.dtype).view(*x.shape[:-1], rows)


def _launch_bitmask(matrix: BitmaskMatrix, x: Tensor, outputs: Tensor) -> None:
    rows, columns = matrix.shape
    scaled = matrix.scales is not None
    _bitmask_rows[(rows, len(x))](
        matrix.bits,
        matrix.values,
        matrix.starts,
        matrix.scales if scaled else matrix.starts,  # any address: it is not read
        x,
        outputs,
        rows,
        columns,
        matrix.bits.shape[1],
        matrix.group if scaled else 64,
        SCALED=scaled,
        NIBBLES=matrix.format == "int4",
        WORDS=16,
    )


def _launch_nibbles(matrix: NibbleMatrix, x: Tensor, outputs: Tensor) -> None:
    rows, columns = matrix.shape
    offsets = matrix.offsets is not None
    _nibble_panels[(-(-rows // _PANEL), len(x))](
        matrix.words,
        matrix.scales,
        matrix.offsets if offsets else matrix.scales,
        x,
        outputs,
        rows,
        columns,
        matrix.words.shape[1],
        matrix.scales.shape[1],
        matrix.group // 8,
        OFFSETS=offsets,
        PANEL=_PANEL,
        CHUNK=32,
    )


def _launch_blocks(matrix: BlockMatrix, x: Tensor, outputs: Tensor) -> None:
    rows, columns = matrix.shape
    scaled, narrow = matrix.scales is not None, matrix.places.dtype == torch.uint16
    _block_bands[(len(matrix.starts) - 1, len(x))](
        matrix.starts,
        matrix.places.view(torch.int16) if narrow else matrix.places,
        matrix.values,
        matrix.scales if scaled else matrix.starts,
        x,
        outputs,
        rows,
        columns,
        SCALED=scaled,
        NARROW=narrow,
        HEIGHT=matrix.height,
        CHUNK=256 // matrix.height,
    )


def _launch_nm(matrix: NMMatrix, x: Tensor, outputs: Tensor) -> None:
    rows, columns = matrix.shape
    n, m = matrix.n, matrix.m
    bits, groups, scaled = (m - 1).bit_length(), -(-columns // m), matrix.scales is not None
    _nm_panels[(-(-rows // _PANEL), len(x))](
        matrix.values,
        matrix.places,
        matrix.scales if scaled else matrix.pattern,
        x,
        outputs,
        rows,
        columns,
        groups,
        min(groups, matrix.group // m) if scaled else groups,
        matrix.places.shape[1],
        N=n,
        M=m,
        BITS=bits,
        PLACES=32 // bits,
        SCALED=scaled,
        PANEL=_PANEL,
        CHUNK=32,
    )


def _launch_integer_dense(matrix: IntegerDenseMatrix, x: Tensor, outputs: Tensor) -> None:
    rows, columns = matrix.shape
    scaled = matrix.scales is not None
    _integer_rows[(-(-rows // _PANEL), len(x))](
        matrix.values,
        matrix.scales if scaled else matrix.values,
        x,
        outputs,
        rows,
        columns,
        matrix.group if scaled else max(1, columns),
        SCALED=scaled,
        PANEL=_PANEL,
        CHUNK=64,
    )


_LAUNCHES: dict[type[PackedMatrix], Callable[[Any, Tensor, Tensor], None]] = {
    IntegerDenseMatrix: _launch_integer_dense,
    BitmaskMatrix: _launch_bitmask,
    NibbleMatrix: _launch_nibbles,
    NMMatrix: _launch_nm,
    BlockMatrix: _launch_blocks,
}


if triton is not None:

    @triton.jit
    def _bitmask_rows(
        bits,
        values,
        starts,
        scales,
        inputs,
        outputs,
        rows,
        columns,
        width,
        group,
        SCALED: tl.constexpr,
        NIBBLES: tl.constexpr,
        WORDS: tl.constexpr,
    ):
        row, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        runs = (columns + group - 1) // group
        following = tl.load(starts + row)
        lane = tl.arange(0, 64)
        total = tl.zeros((WORDS, 64), dtype=tl.float32)
        for first in range(0, width, WORDS):
            number = first + tl.arange(0, WORDS)
            word = tl.load(bits + row * width + number, mask=number < width, other=0)
            kept = ((word[:, None] >> lane[None, :].to(tl.int64)) & 1).to(tl.int32)
            counts = tl.sum(kept, 1)
            before = tl.cumsum(counts, 0) - counts  # values of the words before, and of the bits before in a word
            at = following + before[:, None] + tl.cumsum(kept, 1) - kept
            there = kept != 0
            if NIBBLES:
                pair = tl.load(values + at // 2, mask=there, other=0).to(tl.int32)
                code = (pair >> ((at % 2) * 4).to(tl.int32)) & 15
                weight = tl.where(code > 7, code - 16, code).to(tl.float32)
            else:
                weight = tl.load(values + at, mask=there, other=0).to(tl.float32)
            column = number[:, None] * 64 + lane[None, :]
            if SCALED:
                weight *= tl.load(scales + row * runs + column // group, mask=there, other=0)
            x = tl.load(inputs + vector * columns + column, mask=there, other=0).to(tl.float32)
            total += weight * x
            following += tl.sum(counts, 0)
        tl.store(outputs + vector * rows + row, tl.sum(tl.sum(total, 1), 0))

    @triton.jit
    def _integer_rows(
        steps,
        scales,
        inputs,
        outputs,
        rows,
        columns,
        group,
        SCALED: tl.constexpr,
        PANEL: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        panel, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        row = panel * PANEL + tl.arange(0, PANEL)
        runs = (columns + group - 1) // group
        total = tl.zeros((PANEL, CHUNK), dtype=tl.float32)
        for first in range(0, columns, CHUNK):
            column = first + tl.arange(0, CHUNK)
            there = (row < rows)[:, None] & (column < columns)[None, :]
            weight = tl.load(steps + row[:, None] * columns + column[None, :], mask=there, other=0).to(tl.float32)
            if SCALED:
                weight *= tl.load(scales + row[:, None] * runs + (column // group)[None, :], mask=there, other=0)
            x = tl.load(inputs + vector * columns + column, mask=column < columns, other=0).to(tl.float32)
            total += weight * x[None, :]
        tl.store(outputs + vector * rows + row, tl.sum(total, 1), mask=row < rows)

    @triton.jit
    def _nibble_panels(
        words,
        scales,
        offsets,
        inputs,
        outputs,
        rows,
        columns,
        width,
        runs,
        words_of_run,
        OFFSETS: tl.constexpr,
        PANEL: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        panel, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        lane = tl.arange(0, PANEL)
        total = tl.zeros((CHUNK, PANEL), dtype=tl.float32)
        for first in range(0, width, CHUNK):
            number = first + tl.arange(0, CHUNK)
            there = (number < width)[:, None] & (lane >= 0)[None, :]
            word = tl.load(words + (panel * width + number[:, None]) * PANEL + lane[None, :], mask=there, other=0)
            grid = (panel * runs + (number // words_of_run)[:, None]) * PANEL + lane[None, :]
            scale = tl.load(scales + grid, mask=there, other=0).to(tl.float32)
            offset = -8.0 * scale
            if OFFSETS:
                offset = tl.load(offsets + grid, mask=there, other=0).to(tl.float32)
            for i in tl.static_range(8):
                code = (word >> (8 * (i % 4) + 4 * (i // 4))) & 15
                column = number * 8 + i
                x = tl.load(inputs + vector * columns + column, mask=column < columns, other=0).to(tl.float32)
                total += (scale * code.to(tl.float32) + offset) * x[:, None]
        row = panel * PANEL + lane
        tl.store(outputs + vector * rows + row, tl.sum(total, 0), mask=row < rows)

    @triton.jit
    def _nm_panels(
        values,
        places,
        scales,
        inputs,
        outputs,
        rows,
        columns,
        groups,
        run,
        words,
        N: tl.constexpr,
        M: tl.constexpr,
        BITS: tl.constexpr,
        PLACES: tl.constexpr,
        SCALED: tl.constexpr,
        PANEL: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        panel, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        lane = tl.arange(0, PANEL)
        runs, steps = (groups + run - 1) // run, N * groups
        words_of_pass = (run + PLACES - 1) // PLACES
        total = tl.zeros((CHUNK, PANEL), dtype=tl.float32)
        for first in range(0, steps, CHUNK):
            step = first + tl.arange(0, CHUNK)
            there = (step < steps)[:, None] & (lane >= 0)[None, :]
            number = step // (N * run)
            within = step - number * N * run
            length = tl.minimum(run, groups - number * run)  # of the run; the last may be shorter
            group = within % length
            word = number * N * words_of_pass + within // length * ((length + PLACES - 1) // PLACES) + group // PLACES
            stored = tl.load(places + (panel * words + word[:, None]) * PANEL + lane[None, :], mask=there, other=0)
            place = (stored >> ((group % PLACES) * BITS)[:, None]) & (M - 1)
            column = (number * run + group)[:, None] * M + place
            at = (panel * steps + step[:, None]) * PANEL + lane[None, :]
            weight = tl.load(values + at, mask=there, other=0).to(tl.float32)
            if SCALED:
                weight *= tl.load(
                    scales + (panel * runs + number[:, None]) * PANEL + lane[None, :], mask=there, other=0
                )
            x = tl.load(inputs + vector * columns + column, mask=there & (column < columns), other=0).to(tl.float32)
            total += weight * x
        row = panel * PANEL + lane
        tl.store(outputs + vector * rows + row, tl.sum(total, 0), mask=row < rows)

    @triton.jit
    def _block_bands(
        starts,
        places,
        values,
        scales,
        inputs,
        outputs,
        rows,
        columns,
        SCALED: tl.constexpr,
        NARROW: tl.constexpr,
        HEIGHT: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        band, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        low, high = tl.load(starts + band), tl.load(starts + band + 1)
        lane = tl.arange(0, HEIGHT)
        total = tl.zeros((CHUNK, HEIGHT), dtype=tl.float32)
        for first in range(low, high, CHUNK):
            block = first + tl.arange(0, CHUNK)
            there = block < high
            place = tl.load(places + block, mask=there, other=0).to(tl.int32)
            if NARROW:
                place = place & 0xFFFF
            x = tl.load(inputs + vector * columns + place, mask=there, other=0).to(tl.float32)
            within = there[:, None] & (lane >= 0)[None, :]
            weight = tl.load(values + block[:, None] * HEIGHT + lane[None, :], mask=within, other=0).to(tl.float32)
            total += weight * x[:, None]
        row = band * HEIGHT + lane
        found = tl.sum(total, 0)
        if SCALED:
            found = found * tl.load(scales + row, mask=row < rows, other=0)
        tl.store(outputs + vector * rows + row, found, mask=row < rows)

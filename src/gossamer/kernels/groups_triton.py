"""Products with group-sparse matrices on a GPU, in Triton; see :mod:`gossamer.kernels.groups` for the format.

Slices of equally many groups, wherever rows begin, go to the programs of a first kernel. Each writes one sum for every
row that it touches; a second kernel adds the few sums of each row in their order. Nothing is added atomically, so that
a product always repeats to the bit.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, MissingDependencyError
from gossamer.kernels.groups import GROUP, GroupMatrix
from gossamer.kernels.matrix import PackedMatrix

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None

SLICE = 256  # groups of a program


def available() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def check_call(matrix: PackedMatrix, x: Tensor) -> None:
    """Refuse a product that no kernel can be started for.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    ConfigurationError
        If `x` does not fit the matrix.
    """
    if not available():
        raise MissingDependencyError("triton", "gpu", "a sparse product on a GPU")
    rows, columns = matrix.shape
    device = next(iter(matrix.tensors().values())).device
    if x.shape[-1:] != (columns,) or not x.is_floating_point() or x.device != device:
        raise ConfigurationError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}; a matrix of {rows} × {columns} on {device} takes "
            f"(…, {columns}) floating-point numbers there"
        )


def linear(matrix: GroupMatrix, x: Tensor, bias: Tensor | None = None, slice_size: int = SLICE) -> Tensor:
    """``x @ matrix.T + bias`` on the device of `x`, where the parts of the matrix must be as well.

    Parameters
    ----------
    matrix
        ``(rows, columns)``.
    x
        ``(…, columns)``, any floating dtype. Sums are formed in float32.
    bias
        ``(rows,)``.
    slice_size
        Groups of a program.

    Returns
    -------
    Tensor
        ``(…, rows)`` in the dtype of `x`.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    ConfigurationError
        If `x` does not fit the matrix.
    """
    check_call(matrix, x)
    rows, columns = matrix.shape
    flat = x.reshape(-1, columns)
    padded = torch.nn.functional.pad(flat, (0, -columns % GROUP)).contiguous()
    slices = -(-matrix.kept // slice_size)
    # a slice and a row that meet have a place of their own: along the groups either of the two numbers goes up
    sums = torch.zeros(len(flat), rows + slices, dtype=torch.float32, device=x.device)
    outputs = torch.empty(len(flat), rows, dtype=torch.float32, device=x.device)
    if not outputs.numel():
        return outputs.to(x.dtype).view(*x.shape[:-1], rows)
    begins = torch.arange(slices, device=x.device) * slice_size
    ends = (begins + slice_size).clamp_max(matrix.kept)
    first = torch.searchsorted(matrix.starts, begins, right=True) - 1
    last = torch.searchsorted(matrix.starts, ends - 1, right=True) - 1
    if slices:
        _sum_slices[(slices, len(flat))](
            matrix.starts,
            matrix.places.view(torch.int16),
            matrix.words,
            matrix.scales,
            matrix.zeros,
            padded,
            sums,
            first,
            last,
            matrix.kept,
            padded.shape[1],
            rows + slices,
            slice_size,
            CHUNK=16,
        )
    _add_slices[(rows, len(flat))](matrix.starts, sums, outputs, rows, rows + slices, slice_size)
    if bias is not None:
        outputs += bias.float()
    return outputs.to(x.dtype).view(*x.shape[:-1], rows)


if triton is not None:

    @triton.jit
    def _sum_slices(
        starts,
        places,
        words,
        scales,
        zeros,
        inputs,
        sums,
        first_rows,
        last_rows,
        kept,
        width,
        sum_width,
        slice_size,
        CHUNK: tl.constexpr,
    ):
        number, vector = tl.program_id(0), tl.program_id(1)
        begin = number * slice_size
        end = tl.minimum(begin + slice_size, kept)
        lane = tl.arange(0, 16)
        shifts = (lane // 2 * 4 + lane % 2 * 32).to(tl.int64)
        for row in range(tl.load(first_rows + number), tl.load(last_rows + number) + 1):
            low = tl.maximum(tl.load(starts + row), begin)
            high = tl.minimum(tl.load(starts + row + 1), end)
            total = tl.zeros((CHUNK, 16), dtype=tl.float32)
            for at in range(low, high, CHUNK):
                group = at + tl.arange(0, CHUNK)
                there = group < high
                word = tl.load(words + group, mask=there, other=0)
                place = tl.load(places + group, mask=there, other=0).to(tl.int32) & 0xFFFF
                scale = tl.load(scales + group, mask=there, other=0).to(tl.float32)
                packed = tl.load(zeros + group // 16, mask=there, other=0)
                within = group % 16
                zero = (packed >> (within // 2 * 4 + within % 2 * 32).to(tl.int64)) & 15
                code = (word[:, None] >> shifts[None, :]) & 15
                weight = scale[:, None] * (code - zero[:, None]).to(tl.float32)
                x = tl.load(inputs + vector * width + place[:, None] * 16 + lane[None, :], mask=there[:, None], other=0)
                total += weight * x.to(tl.float32)
            tl.store(sums + vector * sum_width + number + row, tl.sum(tl.sum(total, 1), 0))

    @triton.jit
    def _add_slices(starts, sums, outputs, rows, sum_width, slice_size):
        row, vector = tl.program_id(0), tl.program_id(1)
        low, high = tl.load(starts + row), tl.load(starts + row + 1)
        total = 0.0
        if high > low:
            for number in range(low // slice_size, (high - 1) // slice_size + 1):
                total += tl.load(sums + vector * sum_width + number + row)
        tl.store(outputs + vector * rows + row, total)

"""Products with rows that lie somewhere in a larger matrix, on a GPU, in Triton: see :mod:`.row_products`.

A program makes a tile of results. It reads its rows where they lie, goes through the depth from the first number to the
last, and puts or adds the tile where it belongs; rows are listed once each, so that nothing is added atomically and a
product always repeats to the bit.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import MissingDependencyError

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None

_ROWS, _COLUMNS, _DEPTH = 64, 64, 32  # of a program's tile, and what it reads at a time


def suits(*tensors: Tensor) -> bool:
    """Whether tensors lie on a GPU, in a dtype for which this is right, and Triton is there."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return triton is not None and all(x.is_cuda and x.dtype in dtypes for x in tensors)


def row_product(
    left: Tensor,
    right: Tensor,
    outputs: Tensor,
    *,
    left_index: Tensor | None = None,
    left_turned: bool = False,
    right_index: Tensor | None = None,
    right_turned: bool = False,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """:func:`gossamer.kernels.row_products_native.row_product`.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    """
    if triton is None:
        raise MissingDependencyError("triton", "gpu", "products of rows on a GPU")
    lines = len(left) if left_index is None else len(left_index)
    rows, depth = (left.shape[1], lines) if left_turned else (lines, left.shape[1])
    width = outputs.shape[1]
    if not rows or not width:
        return outputs
    _multiply[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
        *(left, right, outputs, outputs if bias is None else bias.contiguous()),
        *(_places(part, left) for part in (left_index, right_index, index)),
        *(rows, width, depth, *_strides(left, left_turned), *_strides(right, right_turned), *outputs.stride()),
        LEFT_ROWS=left_index is not None and not left_turned,
        LEFT_DEPTH=left_index is not None and left_turned,
        RIGHT_COLUMNS=right_index is not None and not right_turned,
        RIGHT_DEPTH=right_index is not None and right_turned,
        PLACED=index is not None,
        BIASED=bias is not None,
        ADD=add,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
    )
    return outputs


def _places(index: Tensor | None, otherwise: Tensor) -> Tensor:
    return otherwise if index is None else index.contiguous()  # what stands for none is not read


def _strides(matrix: Tensor, turned: bool) -> tuple[int, int]:
    """From one row of an operand to the next, and along its depth."""
    along, across = matrix.stride()
    return (across, along) if turned else (along, across)


if triton is not None:

    @triton.jit
    def _multiply(
        left,
        right,
        outputs,
        bias,
        left_index,
        right_index,
        index,
        rows,
        width,
        depth,
        left_row,
        left_step,
        right_row,
        right_step,
        output_row,
        output_step,
        LEFT_ROWS: tl.constexpr,
        LEFT_DEPTH: tl.constexpr,
        RIGHT_COLUMNS: tl.constexpr,
        RIGHT_DEPTH: tl.constexpr,
        PLACED: tl.constexpr,
        BIASED: tl.constexpr,
        ADD: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
    ):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        row_there, column_there = row < rows, column < width
        from_row, from_column = row, column
        if LEFT_ROWS:
            from_row = tl.load(left_index + row, mask=row_there, other=0)
        if RIGHT_COLUMNS:
            from_column = tl.load(right_index + column, mask=column_there, other=0)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, depth, DEPTH):
            number = (first + tl.arange(0, DEPTH)).to(tl.int64)
            there = number < depth
            left_number, right_number = number, number
            if LEFT_DEPTH:
                left_number = tl.load(left_index + number, mask=there, other=0)
            if RIGHT_DEPTH:
                right_number = tl.load(right_index + number, mask=there, other=0)
            x = tl.load(
                left + from_row[:, None] * left_row + left_number[None, :] * left_step,
                mask=row_there[:, None] & there[None, :],
                other=0,
            )
            weight = tl.load(
                right + from_column[None, :] * right_row + right_number[:, None] * right_step,
                mask=column_there[None, :] & there[:, None],
                other=0,
            )
            total += tl.dot(x, weight, input_precision="ieee")
        if BIASED:
            total += tl.load(bias + column, mask=column_there, other=0).to(tl.float32)[None, :]
        to_row = row
        if PLACED:
            to_row = tl.load(index + row, mask=row_there, other=0)
        target = outputs + to_row[:, None] * output_row + column[None, :] * output_step
        inside = row_there[:, None] & column_there[None, :]
        if ADD:
            total += tl.load(target, mask=inside, other=0).to(tl.float32)
        tl.store(target, total.to(outputs.dtype.element_ty), mask=inside)

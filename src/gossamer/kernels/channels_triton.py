"""Products of few channels on a GPU, in Triton: see :mod:`gossamer.kernels.channel_products`.

A program makes some adjacent outputs of one vector, and goes through the list of its live channels from the first to
the last, so that a product always repeats to the bit. The list is made by torch: channels in their order, as many as
there are for each vector.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.channel_products import silenced
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.gated_feedforward import ACTIVATIONS, GatedFeedforward
from gossamer.kernels.groups_triton import check_call

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None

_OUTPUTS, _CHUNK = 64, 32  # outputs of a program; channels, or columns, that it reads at a time


def input_sparse(
    matrix: ChannelMatrix, x: Tensor, thresholds: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``W · (x ⊙ live) + bias`` on the device of `x`, where the parts of the matrix must be as well.

    Parameters
    ----------
    matrix
        ``(rows, columns)``.
    x
        ``(…, columns)``, any floating dtype. Sums are formed in float32.
    thresholds, bias
        As in :func:`gossamer.kernels.channel_products.input_sparse`.

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
    outputs = _accumulate(matrix, silenced(x.reshape(-1, columns), thresholds))
    if bias is not None:
        outputs += bias.float()
    return outputs.to(x.dtype).view(*x.shape[:-1], rows)


def delta_linear_(matrix: ChannelMatrix, delta: Tensor, state: Tensor, thresholds: Tensor | None = None) -> Tensor:
    """``state += W · delta`` in place; see :func:`gossamer.kernels.channel_products.delta_linear_`."""
    check_call(matrix, delta)
    state += _accumulate(matrix, silenced(delta.reshape(-1, matrix.shape[1]), thresholds)).view(state.shape)
    return state


def masked_output(matrix: DenseMatrix | NibbleRowMatrix, x: Tensor, gate: Tensor, bias: Tensor | None = None) -> Tensor:
    """``gate ⊙ (W · x + bias)``; see :func:`gossamer.kernels.channel_products.masked_output`."""
    check_call(matrix, x)
    rows, columns = matrix.shape
    flat, gates = x.reshape(-1, columns).contiguous(), gate.reshape(-1, rows).float().contiguous()
    outputs = torch.zeros(len(flat), rows, dtype=torch.float32, device=x.device)
    scaled, four = matrix.scales is not None, matrix.format == "int4"
    if outputs.numel():
        _masked_rows[(rows, len(flat))](
            matrix.values,
            matrix.scales if scaled else gates,
            flat,
            gates,
            gates if bias is None else bias.float().contiguous(),
            outputs,
            rows,
            columns,
            -(-columns // 32) * 16 if four else columns,
            max(1, matrix.group),
            max(1, -(-columns // max(1, matrix.group))),
            SCALED=scaled,
            FOUR=four,
            BIASED=bias is not None,
            CHUNK=_CHUNK * 4,
        )
    return outputs.to(x.dtype).view(gate.shape)


def gated_feedforward(block: GatedFeedforward, x: Tensor, wanted: Tensor | None = None) -> Tensor:
    """Outputs of a block; see :class:`gossamer.kernels.gated_feedforward.GatedFeedforward`."""
    flat = x.reshape(-1, x.shape[-1])
    neurons = block.gate.shape[0]
    every = torch.ones(len(flat), neurons, device=x.device) if wanted is None else wanted.reshape(-1, neurons).float()
    before = masked_output(block.gate, flat.float(), every, block.gate_bias)
    hidden = ACTIVATIONS[block.activation][1](before)
    if block.activation == "fatrelu":
        hidden = torch.where(before <= block.cut, 0.0, hidden)
    hidden = torch.where(every == 0, 0.0, silenced(hidden, block.thresholds))
    inner = masked_output(block.up, flat.float(), hidden, block.up_bias)
    outputs = input_sparse(block.down, inner, None, block.down_bias)
    return outputs.to(x.dtype).view(*x.shape[:-1], block.down.shape[0])


def _accumulate(matrix: ChannelMatrix, x: Tensor) -> Tensor:
    """``x @ matrix.T`` for ``(vectors, columns)`` float32, reading the channels where it is not zero."""
    rows, columns = matrix.shape
    outputs = torch.zeros(len(x), rows, dtype=torch.float32, device=x.device)
    if not outputs.numel() or not columns:
        return outputs
    live = x != 0
    counts = live.sum(1, dtype=torch.int32)
    places = (~live).to(torch.int8).argsort(dim=1, stable=True).to(torch.int32)  # the live ones first, in their order
    four = matrix.format == "int4"
    _live_channels[(triton.cdiv(rows, _OUTPUTS), len(x))](
        matrix.values,
        matrix.scales if four else outputs,
        x.contiguous(),
        places.contiguous(),
        counts,
        outputs,
        rows,
        columns,
        -(-rows // 32) * 16 if four else rows,
        max(1, matrix.group),
        max(1, -(-rows // max(1, matrix.group))),
        FOUR=four,
        OUTPUTS=_OUTPUTS,
        CHUNK=_CHUNK,
    )
    return outputs * matrix.scales if matrix.scales is not None and not four else outputs


if triton is not None:

    @triton.jit
    def _weights(values, line, place, pitch, there, FOUR: tl.constexpr):
        if FOUR:
            byte = tl.load(values + line * pitch + place // 32 * 16 + place % 16, mask=there, other=0).to(tl.int32)
            return (((byte >> (place // 16 % 2 * 4)) & 15) - 8).to(tl.float32)
        else:
            return tl.load(values + line * pitch + place, mask=there, other=0).to(tl.float32)

    @triton.jit
    def _live_channels(
        values,
        scales,
        inputs,
        places,
        counts,
        outputs,
        rows,
        columns,
        pitch,
        group,
        groups,
        FOUR: tl.constexpr,
        OUTPUTS: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        vector = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        count = tl.load(counts + vector)
        total = tl.zeros((CHUNK, OUTPUTS), dtype=tl.float32)
        for first in range(0, count, CHUNK):
            number = first + tl.arange(0, CHUNK)
            place = tl.load(places + vector * columns + number, mask=number < count, other=0).to(tl.int64)
            x = tl.load(inputs + vector * columns + place, mask=number < count, other=0)
            there = (number < count)[:, None] & (row < rows)[None, :]
            weight = _weights(values, place[:, None], row[None, :], pitch, there, FOUR)
            if FOUR:
                scale = tl.load(scales + place[:, None] * groups + row[None, :] // group, mask=there, other=0)
                weight *= scale.to(tl.float32)
            total += tl.where(there, weight * x[:, None], 0.0)
        tl.store(outputs + vector * rows + row, tl.sum(total, 0), mask=row < rows)

    @triton.jit
    def _masked_rows(
        values,
        scales,
        inputs,
        gates,
        bias,
        outputs,
        rows,
        columns,
        pitch,
        group,
        groups,
        SCALED: tl.constexpr,
        FOUR: tl.constexpr,
        BIASED: tl.constexpr,
        CHUNK: tl.constexpr,
    ):
        row, vector = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        gate = tl.load(gates + vector * rows + row)
        if gate != 0:
            total = tl.zeros((CHUNK,), dtype=tl.float32)
            for first in range(0, columns, CHUNK):
                column = first + tl.arange(0, CHUNK)
                there = column < columns
                weight = _weights(values, row, column, pitch, there, FOUR)
                if SCALED:
                    weight *= tl.load(scales + row * groups + column // group, mask=there, other=0).to(tl.float32)
                x = tl.load(inputs + vector * columns + column, mask=there, other=0).to(tl.float32)
                total += tl.where(there, weight * x, 0.0)
            found = tl.sum(total, 0)
            if BIASED:
                found += tl.load(bias + row)
            tl.store(outputs + vector * rows + row, gate * found)

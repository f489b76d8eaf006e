"""Products in which only some channels take part.

There are two ways to leave something out. :func:`input_sparse` reads the channels of live inputs
(:class:`~gossamer.kernels.channels.ChannelMatrix`); :func:`masked_output` computes the outputs that are wanted, whose
weights are the rows of an ordinary matrix (:class:`~gossamer.kernels.dense.DenseMatrix`, or in four bits
:class:`~gossamer.kernels.channels.NibbleRowMatrix`). Several vectors share one list of channels, the union of what each
wants, so that no weight is read twice.

A NaN is live, so that it is never hidden. Weights are expected to be finite: one that is not would meet the zeros of
the other vectors of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix, lines_of_rows
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.matrix import Call
from gossamer.kernels.native import available, native


def input_sparse(
    matrix: ChannelMatrix,
    x: Tensor,
    thresholds: Tensor | None = None,
    bias: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """``W · (x ⊙ live) + bias`` with ``live = |x| > thresholds``, reading the live channels only.

    Parameters
    ----------
    matrix
        ``(rows, columns)``.
    x
        ``(…, columns)``, float32 or bfloat16, on the CPU. Of 32 vectors at a time, the channels that some of them wants
        are read once; each gets only what it wants itself.
    thresholds
        ``(columns,)`` float32, at least 0: an input of at most this size counts as zero. Without them exact zeros do.
    bias
        ``(rows,)``.
    threads
        By default as many as torch uses. The result does not depend on it.

    Returns
    -------
    Tensor
        ``(…, rows)`` in the dtype of `x`; sums are formed in float32.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or thresholds do not fit.
    """
    check_thresholds(thresholds, matrix.shape[1])
    flat = flat_inputs(x, *matrix.shape)
    if bias is not None and bias.shape != (matrix.shape[0],):
        raise ConfigurationError(f"bias is {tuple(bias.shape)}; a matrix of {matrix.shape[0]} rows takes one for each")
    if not available():
        live = silenced(flat, thresholds)
        found = torch.nn.functional.linear(live, matrix.expand(), None if bias is None else bias.float())
        return found.to(x.dtype).view(*x.shape[:-1], matrix.shape[0])
    outputs = flat.new_empty(len(flat), matrix.shape[0])
    if outputs.numel():
        wide = None if bias is None else bias.detach().float().contiguous()
        arguments = Call(flat, wide, outputs).arguments(threads or torch.get_num_threads())
        native().channel_input_sparse(
            matrix.lines(), 0 if thresholds is None else thresholds.data_ptr(), False, *arguments
        )
    return outputs.view(*x.shape[:-1], matrix.shape[0])


def masked_output(
    matrix: DenseMatrix | NibbleRowMatrix,
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """``gate ⊙ (W · x + bias)``, reading only the rows of W whose gate is not zero.

    Parameters
    ----------
    matrix
        ``(rows, columns)``, its rows one after the other.
    x
        ``(…, columns)``, float32 or bfloat16, on the CPU.
    gate
        ``(…, rows)``, any floating dtype; zero wherever nothing is wanted. Of 32 vectors at a time, a row that some of
        them wants is read once.
    bias, threads
        As in :func:`input_sparse`.

    Returns
    -------
    Tensor
        ``(…, rows)`` in the dtype of `x`.

    Raises
    ------
    ConfigurationError
        If shapes or dtypes do not fit.
    """
    rows, columns = matrix.shape
    flat = flat_inputs(x, rows, columns)
    if gate.shape != (*x.shape[:-1], rows) or not gate.is_floating_point():
        raise ConfigurationError(
            f"gate is {tuple(gate.shape)} {gate.dtype}; {tuple(x.shape)} inputs of {rows} rows take "
            f"{(*x.shape[:-1], rows)} floating-point numbers"
        )
    if bias is not None and bias.shape != (rows,):
        raise ConfigurationError(f"bias is {tuple(bias.shape)}; a matrix of {rows} rows takes one for each")
    wide, gates = None if bias is None else bias.detach().float().contiguous(), gate.detach().float().contiguous()
    if not available():
        every = torch.nn.functional.linear(flat.float(), matrix.expand(), wide).view(gates.shape)
        return torch.where(gates == 0, 0.0, gates * every).to(x.dtype)
    outputs = flat.new_empty(len(flat), rows)
    if outputs.numel():
        arguments = Call(flat, wide, outputs).arguments(threads or torch.get_num_threads())
        native().channel_masked_output(lines_of_rows(matrix), gates.data_ptr(), *arguments)
    return outputs.view(gates.shape)


def delta_linear_(
    matrix: ChannelMatrix,
    delta: Tensor,
    state: Tensor,
    thresholds: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """``state += W · delta``, reading only the channels whose delta is not zero, in place.

    Parameters
    ----------
    matrix
        ``(rows, columns)``.
    delta
        ``(…, columns)``: how much every input has changed.
    state
        ``(…, rows)`` float32, contiguous: the integrator, which this changes.
    thresholds, threads
        As in :func:`input_sparse`.

    Returns
    -------
    Tensor
        `state`.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or thresholds do not fit.
    """
    check_thresholds(thresholds, matrix.shape[1])
    flat = flat_inputs(delta, *matrix.shape)
    expected = (*delta.shape[:-1], matrix.shape[0])
    if state.shape != expected or state.dtype != torch.float32 or not state.is_contiguous():
        raise ConfigurationError(
            f"state is {tuple(state.shape)} {state.dtype}; deltas of {tuple(delta.shape)} take {expected} float32, "
            f"contiguous"
        )
    if not available():
        state += torch.nn.functional.linear(silenced(flat, thresholds), matrix.expand()).view(expected)
    elif state.numel() and flat.shape[1]:
        arguments = Call(flat, None, state.detach().view(-1, matrix.shape[0])).arguments(
            threads or torch.get_num_threads()
        )
        native().channel_input_sparse(
            matrix.lines(), 0 if thresholds is None else thresholds.data_ptr(), True, *arguments
        )
        torch.autograd.graph.increment_version(state)
    return state


def silenced(x: Tensor, thresholds: Tensor | None) -> Tensor:
    """`x` in float32, zero wherever its size is at most the threshold; a NaN stays."""
    wide = x.float()
    return wide if thresholds is None else torch.where(wide.abs() <= thresholds, 0.0, wide)


def flat_inputs(x: Tensor, rows: int, columns: int) -> Tensor:
    """`x` as ``(vectors, columns)`` with adjacent columns.

    Raises
    ------
    ConfigurationError
        If shape, dtype or device of `x` do not fit.
    """
    if x.shape[-1:] != (columns,) or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu":
        raise ConfigurationError(
            f"x is {tuple(x.shape)} {x.dtype} on {x.device}; a matrix of {rows} × {columns} takes (…, {columns}) in "
            f"float32 or bfloat16 on the CPU"
        )
    flat = x.detach().reshape(-1, columns) if columns else x.detach().reshape(x.shape[:-1].numel(), 0)
    return flat if flat.stride(1) == 1 and flat.stride(0) >= columns else flat.contiguous()


def check_thresholds(thresholds: Tensor | None, count: int, name: str = "thresholds") -> None:
    """Check thresholds of so many channels.

    Raises
    ------
    ConfigurationError
        If shape, dtype or device do not fit, or one of them is negative or NaN.
    """
    if thresholds is None:
        return
    if thresholds.shape != (count,) or thresholds.dtype != torch.float32 or not thresholds.is_contiguous():
        raise ConfigurationError(
            f"{name} are {tuple(thresholds.shape)} {thresholds.dtype}; {count} channels take ({count},) float32, "
            f"contiguous"
        )
    if count and not bool((thresholds >= 0).all()):
        raise ConfigurationError(f"one of the {name} is negative or NaN; every one must be at least 0")

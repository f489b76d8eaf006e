"""Products with rows that lie somewhere in a larger matrix, which are neither copied together before nor apart behind.

A layer that treats some of its tokens reads their rows out of all, and adds what it makes of them to these rows. Rows
are gathered where the first product packs its left operand anyway, and results are added where they belong when the
last one stores them. Both are each other's gradient: what was gathered is scattered, by the transposed weights. A norm
in front of the first product reads the rows in its place, and its result is what the backward pass keeps.

After the permutation-free kernels of Wang et al., 2025, "LeMo", arXiv 2501.09767. Compiled kernels take float32 and
bfloat16 on the CPU, Triton's take GPUs. On the CPU bfloat16 is widened, so that products by matrix registers (AMX),
which torch uses where a processor has them, are many times as fast. Sums are formed in float32. Whatever else comes is
left to torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.errors import ConfigurationError
from gossamer.kernels.row_products_native import (
    add_norm_gradient_,
    inverse_of,
    norm_rows,
    row_product,
    scattered_input_gradient,
    weight_gradient,
)


def gathered_linear(
    x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None = None, threads: int | None = None
) -> Tensor:
    """``x[index] @ weight.T + bias`` without a copy of ``x[index]``.

    Parameters
    ----------
    x
        ``(rows, inputs)``.
    index
        ``(n,)`` int64, ascending, each row at most once.
    weight, bias
        ``(outputs, inputs)`` and ``(outputs,)``, of the dtype of `x`.
    threads
        By default as many as torch uses. The result does not depend on it.

    Returns
    -------
    Tensor
        ``(n, outputs)``, in the dtype of `x`. Gradients flow to `x`, weights and bias; nothing but the arguments is
        kept for them.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or rows do not fit.

    Examples
    --------
    >>> x, weight = torch.arange(6.0).view(3, 2), torch.ones(1, 2)
    >>> gathered_linear(x, torch.tensor([0, 2]), weight).tolist()
    [[1.0], [9.0]]
    """
    _check(x, index, x, weight, bias)
    return _GatheredLinear.apply(x, index, weight, bias, threads)


def scattered_linear_(
    target: Tensor,
    index: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    threads: int | None = None,
) -> Tensor:
    """``target[index] += x @ weight.T + bias``, in place and without a copy of the product.

    Parameters
    ----------
    target
        ``(rows, outputs)``, with adjacent outputs.
    index
        ``(n,)`` int64, ascending, each row at most once.
    x
        ``(n, inputs)``, of the dtype of `target`.
    weight, bias
        ``(outputs, inputs)`` and ``(outputs,)``.
    threads
        By default as many as torch uses. The result does not depend on it.

    Returns
    -------
    Tensor
        `target`. Gradients flow to what it was, to `x`, weights and bias.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or rows do not fit.

    Examples
    --------
    >>> target = torch.zeros(3, 1)
    >>> scattered_linear_(target, torch.tensor([1]), torch.ones(1, 2), torch.ones(1, 2)).flatten().tolist()
    [0.0, 2.0, 0.0]
    """
    _check(target, index, x, weight, bias)
    if x.shape[0] != len(index) or target.shape[-1] != len(weight) or target.stride(-1) != 1:
        raise ConfigurationError(
            f"target is {tuple(target.shape)} and x {tuple(x.shape)}; {len(index)} rows of {len(weight)} outputs take "
            f"({len(index)}, {weight.shape[1]}) and (rows, {len(weight)}) with adjacent outputs"
        )
    return _ScatteredLinear.apply(target, index, x, weight, bias, threads)


def gathered_rms_norm(x: Tensor, index: Tensor, gain: Tensor, eps: float = 1e-6, threads: int | None = None) -> Tensor:
    """Root-mean-square norm of ``x[index]``, ``gain · x / √(mean x² + eps)``, which reads the rows where they lie.

    Parameters
    ----------
    x
        ``(rows, width)``.
    index
        ``(n,)`` int64, ascending, each row at most once.
    gain
        ``(width,)``.
    eps
        Added to the mean square.
    threads
        As in :func:`gathered_linear`.

    Returns
    -------
    Tensor
        ``(n, width)``. It is itself what is kept for the backward pass, with one number a row, unless the gain trains
        or has zeros.

    Raises
    ------
    ConfigurationError
        If shapes, dtypes or rows do not fit.
    """
    check_index(index, x)
    if gain.shape != x.shape[1:] or gain.dtype != x.dtype:
        raise ConfigurationError(f"gain is {tuple(gain.shape)} {gain.dtype}; rows of {tuple(x.shape)} {x.dtype} differ")
    return _GatheredNorm.apply(x, index, gain, eps, threads)


def check_index(index: Tensor, x: Tensor) -> None:
    """Check which rows of a matrix are read or written.

    Raises
    ------
    ConfigurationError
        If they do not ascend, or lie outside.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ConfigurationError(f"rows are {tuple(x.shape)} {x.dtype}; give a matrix of floating-point numbers")
    if index.ndim != 1 or index.dtype != torch.int64 or index.device != x.device:
        raise ConfigurationError(f"index is {tuple(index.shape)} {index.dtype}; give (n,) int64 on {x.device}")
    inside = not len(index) or (int(index[0]) >= 0 and int(index[-1]) < len(x))
    if not inside or not bool((index.diff() > 0).all()):
        raise ConfigurationError(f"index must ascend from 0 on and stay below the {len(x)} rows there are; sort it")


def _check(x: Tensor, index: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_index(index, x)
    if inputs.ndim != 2 or weight.ndim != 2 or inputs.shape[1] != weight.shape[1]:
        raise ConfigurationError(
            f"inputs are {tuple(inputs.shape)} and weights {tuple(weight.shape)}; columns must be equally many"
        )
    if bias is not None and bias.shape != (len(weight),):
        raise ConfigurationError(f"bias is {tuple(bias.shape)}; {len(weight)} outputs take one for each")
    kinds = {x.dtype, inputs.dtype, weight.dtype} | (set() if bias is None else {bias.dtype})
    if len(kinds) > 1:
        raise ConfigurationError(f"dtypes {', '.join(sorted(map(str, kinds)))} meet; all must be one")


# ---------------------------------------------------------------------------------------------------- gradients


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None, threads: int | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, index, weight)
        ctx.shape, ctx.threads = x.shape, threads
        outputs = x.new_empty(len(index), len(weight))
        return row_product(x, weight, outputs, left_index=index.contiguous(), bias=bias, threads=threads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, index, weight = ctx.saved_tensors
        found: list[Tensor | None] = [None, None, None, None, None]
        if ctx.needs_input_grad[0]:
            there = {"right_turned": True, "index": index.contiguous(), "add": True}
            found[0] = row_product(gradient, weight, gradient.new_zeros(ctx.shape), **there, threads=ctx.threads)
        if ctx.needs_input_grad[2]:
            found[2] = weight_gradient(gradient, None, x, index, ctx.threads)
        if ctx.needs_input_grad[3]:
            found[3] = gradient.sum(0)
        return tuple(found)


class _ScatteredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        target: Tensor,
        index: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        threads: int | None,
    ) -> Tensor:
        ctx.mark_dirty(target)
        ctx.save_for_backward(index, x if ctx.needs_input_grad[3] else None, weight)
        ctx.threads = threads
        row_product(x, weight, target.detach(), bias=bias, index=index.contiguous(), add=True, threads=threads)
        return target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, x, weight = ctx.saved_tensors
        found: list[Tensor | None] = [gradient, None, None, None, None, None]
        if ctx.needs_input_grad[2]:
            found[2] = scattered_input_gradient(gradient, index, weight, ctx.threads)
        if ctx.needs_input_grad[3]:
            found[3] = weight_gradient(gradient, index, x, None, ctx.threads)
        if ctx.needs_input_grad[4]:
            found[4] = gradient.index_select(0, index).sum(0)
        return tuple(found)


class _GatheredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, gain: Tensor, eps: float, threads: int | None) -> Tensor:
        inverse = None if ctx.needs_input_grad[2] else inverse_of(gain)
        found, unit, factors = norm_rows(x, index.contiguous(), gain, eps, inverse is None, threads)
        ctx.save_for_backward(index, gain, found if unit is None else unit, inverse, factors)
        ctx.shape, ctx.threads = x.shape, threads
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        index, gain, kept, inverse, factors = ctx.saved_tensors
        to_rows = to_gain = None
        if ctx.needs_input_grad[0]:
            to_rows = gradient.new_zeros(ctx.shape)
            add_norm_gradient_(to_rows, index.contiguous(), gradient, kept, inverse, gain, factors, ctx.threads)
        if ctx.needs_input_grad[2]:
            to_gain = (gradient * kept).sum(0)
        return to_rows, None, to_gain, None, None

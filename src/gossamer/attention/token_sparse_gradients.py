"""Steps of a layer that reads and adds to some rows of its hidden states, and their gradients.

Each hands the whole on, so that its gradient comes back through all of them: a buffer of the layer's own, which
:class:`Leave` has copied, and to which each adds the gradient of its rows. Two names of one storage are not views of
each other here: autograd is not told that it is written to, and nothing is saved that would notice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer.kernels.row_products_native import (
    add_norm_gradient_,
    inverse_of,
    norm_rows,
    row_product,
    scattered_input_gradient,
    weight_gradient,
)


def _same(whole: Tensor) -> Tensor:
    return torch.empty(0, dtype=whole.dtype, device=whole.device).set_(
        whole.untyped_storage(), whole.storage_offset(), whole.shape, whole.stride()
    )


def matrix_of(tensor: Tensor) -> Tensor:
    """All rows of a batch, one after the other."""
    return tensor.reshape(-1, tensor.shape[-1])


def _own(gradient: Tensor) -> Tensor:
    return gradient if gradient.is_contiguous() else gradient.contiguous()


class RowNorm(torch.autograd.Function):
    """Norm of some rows ``(n, width)``, and the whole."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, flat: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # noqa: D102
        inverse = None if ctx.needs_input_grad[2] else inverse_of(gain)
        rows, unit, factors = norm_rows(matrix_of(whole), flat, gain, eps, inverse is None)
        ctx.save_for_backward(flat, gain, rows if unit is None else unit, inverse, factors)
        return rows, _same(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_rows: Tensor, of_whole: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        flat, gain, kept, inverse, factors = ctx.saved_tensors
        found = _own(of_whole)
        add_norm_gradient_(matrix_of(found), flat, of_rows, kept, inverse, gain, factors)
        return found, None, (of_rows * kept).sum(0) if ctx.needs_input_grad[2] else None, None


class RowProduct(torch.autograd.Function):
    """Products of some rows ``(n, outputs)``, and the whole."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, flat: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        rows = matrix_of(whole)
        # the whole may be added to before the backward pass
        ctx.save_for_backward(flat, weight, rows.index_select(0, flat) if ctx.needs_input_grad[2] else None)
        outputs = row_product(rows, weight, whole.new_empty(len(flat), len(weight)), left_index=flat, bias=bias)
        return outputs, _same(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_rows: Tensor, of_whole: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        flat, weight, rows = ctx.saved_tensors
        found = _own(of_whole)
        row_product(of_rows, weight, matrix_of(found), right_turned=True, index=flat, add=True)
        to_weight = weight_gradient(of_rows, None, rows, None) if ctx.needs_input_grad[2] else None
        return found, None, to_weight, of_rows.sum(0) if ctx.needs_input_grad[3] else None


class AddProduct(torch.autograd.Function):
    """The whole with products added to some rows."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, whole: Tensor, flat: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, private: bool
    ) -> Tensor:
        ctx.save_for_backward(flat, weight, x if ctx.needs_input_grad[3] else None)
        ctx.shape = x.shape
        out = _same(whole) if private else whole.clone(memory_format=torch.contiguous_format)
        row_product(matrix_of(x), weight, matrix_of(out), bias=bias, index=flat, add=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        flat, weight, x = ctx.saved_tensors
        found: list[Tensor | None] = [gradient, None, None, None, None, None]
        rows = matrix_of(gradient)
        if ctx.needs_input_grad[2]:
            found[2] = scattered_input_gradient(rows, flat, weight).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            found[3] = weight_gradient(rows, flat, matrix_of(x), None)
        if ctx.needs_input_grad[4]:
            found[4] = rows.index_select(0, flat).sum(0)
        return tuple(found)


class AddRows(torch.autograd.Function):
    """The whole with something added to some rows."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, flat: Tensor, rows: Tensor, private: bool) -> Tensor:  # noqa: D102
        ctx.save_for_backward(flat)
        ctx.shape = rows.shape
        out = _same(whole) if private else whole.clone(memory_format=torch.contiguous_format)
        matrix_of(out).index_add_(0, flat, matrix_of(rows))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (flat,) = ctx.saved_tensors
        return gradient, None, matrix_of(gradient).index_select(0, flat).view(ctx.shape), None


class Leave(torch.autograd.Function):
    """The whole as it is; backward, a copy of its gradient that the layer may add to."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:  # noqa: D102
        return _same(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: D102
        return gradient.clone(memory_format=torch.contiguous_format)

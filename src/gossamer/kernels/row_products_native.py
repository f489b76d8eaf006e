"""What :mod:`gossamer.kernels.row_products` is made of: products and norms of rows in place, without gradients.

Nothing here looks at indices or shapes. Compiled kernels take what :func:`compiled` says, Triton's what lies on a GPU,
and torch the rest, with copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.kernels import row_products_triton
from gossamer.kernels.native import VALUE_CODES, native, offers

_COMPILED = (torch.float32, torch.bfloat16)


def compiled(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels take these tensors."""
    there = [tensor for tensor in tensors if tensor is not None]
    kinds = {tensor.dtype for tensor in there}
    on_cpu = all(tensor.device.type == "cpu" for tensor in there)
    return on_cpu and len(kinds) == 1 and kinds <= {*_COMPILED} and offers("row_product")


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
    threads: int | None = None,
) -> Tensor:
    """``outputs[index] (+)= L Rᵀ + bias``.

    Parameters
    ----------
    left, right
        L is ``left[left_index]``, ``(n, depth)``, and R likewise ``(width, depth)``; what is turned is transposed
        after its rows were chosen.
    outputs
        ``(rows, width)``; changed in place.
    index
        Rows of it; by default all.
    bias
        ``(width,)``.
    add
        Whether results are added to what is there.
    threads
        By default as many as torch uses.

    Returns
    -------
    Tensor
        `outputs`.
    """
    left, right = left.detach(), right.detach()
    sides: dict[str, Any] = {
        "left_index": left_index,
        "left_turned": left_turned,
        "right_index": right_index,
        "right_turned": right_turned,
        "bias": None if bias is None else bias.detach(),
        "index": index,
        "add": add,
    }
    if row_products_triton.suits(left, right, outputs):
        return row_products_triton.row_product(left, right, outputs.detach(), **sides)
    if not compiled(left, right, outputs):
        return reference_product(left, right, outputs, **sides)
    wide = None if bias is None else bias.detach().float().contiguous()
    left, right = _adjacent(left), _adjacent(right)
    native().row_product(
        *(_lines(left, left_index), left_turned, _lines(right, right_index), right_turned),
        *(0 if wide is None else wide.data_ptr(), _lines(outputs, index), add, threads or torch.get_num_threads()),
    )
    return outputs


def reference_product(
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
    """:func:`row_product` by torch, with copies, on any device and in any dtype."""
    rows = left if left_index is None else left[left_index]
    columns = right if right_index is None else right[right_index]
    rows, columns = (_wide(t.T if turned else t) for t, turned in ((rows, left_turned), (columns, right_turned)))
    found = functional.linear(rows, columns, None if bias is None else _wide(bias))
    there = slice(None) if index is None else index
    outputs.detach()[there] = (_wide(outputs.detach()[there]) + found if add else found).to(outputs.dtype)
    return outputs


def norm_rows(
    x: Tensor, index: Tensor | None, gain: Tensor, eps: float, units: bool, threads: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Norm of some rows.

    Parameters
    ----------
    x, index, gain, eps, threads
        As in :func:`gossamer.kernels.row_products.gathered_rms_norm`.
    units
        Whether the rows without their gain are wanted too.

    Returns
    -------
    tuple
        The normalised rows, ``(n, width)``; these without their gain, or None; and what each was multiplied by,
        ``(n,)`` float32.
    """
    x, gain = _adjacent(x.detach()), gain.detach()
    rows = len(x) if index is None else len(index)
    if not compiled(x):
        wide = _wide(x if index is None else x[index])
        factors = (wide.square().mean(1) + eps).rsqrt()
        unit = (wide * factors[:, None]).to(x.dtype)
        return gain * unit, unit if units else None, factors
    found, unit = x.new_empty(rows, x.shape[1]), x.new_empty(rows if units else 0, x.shape[1])
    factors = torch.empty(rows)
    addresses = (found.data_ptr(), unit.data_ptr() if units else 0, factors.data_ptr())
    by_channel = gain.float().contiguous()
    native().row_norm(_lines(x, index), by_channel.data_ptr(), eps, *addresses, threads or torch.get_num_threads())
    return found, unit if units else None, factors


def add_norm_gradient_(
    target: Tensor,
    index: Tensor | None,
    gradient: Tensor,
    kept: Tensor,
    inverse: Tensor | None,
    gain: Tensor,
    factors: Tensor,
    threads: int | None = None,
) -> Tensor:
    """Add the gradient of normalised rows to where the rows lie.

    Parameters
    ----------
    target, index
        ``(rows, width)``, changed in place, and which of its rows.
    gradient
        Of the normalised rows, ``(n, width)``.
    kept, inverse
        The normalised rows and 1 / gain, ``(width,)`` float32; or these rows without their gain, and None.
    gain, factors, threads
        As in :func:`norm_rows`.

    Returns
    -------
    Tensor
        `target`.
    """
    gain = gain.detach()
    if compiled(target, gradient, kept):
        gradient, kept, gain = _adjacent(gradient), kept.contiguous(), gain.float().contiguous()
        native().row_norm_gradient(
            *(_lines(gradient, None), kept.data_ptr(), 0 if inverse is None else inverse.data_ptr(), gain.data_ptr()),
            *(factors.data_ptr(), _lines(target, index), threads or torch.get_num_threads()),
        )
        return target
    unit = _wide(kept) if inverse is None else _wide(kept) * inverse
    flow = _wide(gradient) * _wide(gain)
    found = factors[:, None] * (flow - unit * (flow * unit).mean(1, keepdim=True))
    there = slice(None) if index is None else index
    target[there] = (_wide(target[there]) + found).to(target.dtype)
    return target


def inverse_of(gain: Tensor) -> Tensor | None:
    """1 / gain in float32, by which a norm's input can be told from its output; None if it has zeros."""
    wide = _wide(gain.detach())
    return None if bool((wide == 0).any()) else (1 / wide).contiguous()


def _lines(matrix: Tensor, index: Tensor | None) -> tuple[int, int, int, int, int, int]:
    count = len(matrix) if index is None else len(index)
    places = 0 if index is None else index.data_ptr()
    return (matrix.data_ptr(), VALUE_CODES[matrix.dtype], matrix.stride(0), places, count, matrix.shape[1])


def _adjacent(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def scattered_input_gradient(gradient: Tensor, index: Tensor, weight: Tensor, threads: int | None = None) -> Tensor:
    """Gradient of `x` in :func:`gossamer.kernels.row_products.scattered_linear_`: ``gradient[index] @ weight``."""
    outputs = gradient.new_empty(len(index), weight.shape[1])
    return row_product(gradient, weight, outputs, left_index=index.contiguous(), right_turned=True, threads=threads)


def weight_gradient(
    gradient: Tensor, index: Tensor | None, x: Tensor, x_index: Tensor | None, threads: int | None = None
) -> Tensor:
    """Gradient of weights: ``gradient[index].T @ x[x_index]``, ``(outputs, inputs)``."""
    outputs = gradient.new_empty(gradient.shape[1], x.shape[1])
    sides: dict[str, Any] = {"left_index": index, "right_index": x_index, "threads": threads}
    return row_product(gradient, x, outputs, left_turned=True, right_turned=True, **sides)

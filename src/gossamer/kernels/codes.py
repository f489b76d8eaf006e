"""Products with sparse codes: only what is stored is read, forwards and backwards.

A dictionary of F atoms of size d decodes a row with k features in k·d products instead of F·d. The gradient of the
values is the product of the row's gradient with the atoms that it holds; that of the dictionary touches the atoms that
any row holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError

_CHUNK = 1 << 23  # numbers that are gathered at a time


def decode(codes: SparseCodes, dictionary: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sums of the atoms of every row, weighted by its values: ``codes · dictionary + bias``.

    Parameters
    ----------
    codes
        ``(rows, features)``.
    dictionary
        ``(features, size)``, float32, bfloat16 or float64.
    bias
        ``(size,)``.

    Returns
    -------
    Tensor
        ``(rows, size)``. Gradients reach values, dictionary and bias.

    Raises
    ------
    ConfigurationError
        If the dictionary has another number of atoms than the codes have features.
    """
    if dictionary.dim() != 2 or len(dictionary) != codes.width:
        raise ConfigurationError(
            f"dictionary is {tuple(dictionary.shape)}; codes of {codes.width} features need (features, size)"
        )
    found: Tensor = _Decode.apply(codes.values, dictionary, codes.indices, codes.starts)
    return found if bias is None else found + bias


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dictionary: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(values, dictionary, indices, starts)
        return _gathered(values, dictionary, indices, starts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        values, dictionary, indices, starts = ctx.saved_tensors
        grad = grads[0].contiguous()
        codes = SparseCodes(indices, values, starts, len(dictionary))
        of_values = products_at(codes, grad, dictionary) if ctx.needs_input_grad[0] else None
        of_dictionary = scattered(codes, grad) if ctx.needs_input_grad[1] else None
        return of_values, of_dictionary, None, None


def products_at(codes: SparseCodes, rows: Tensor, dictionary: Tensor) -> Tensor:
    """Inner products of every row with the atoms that it holds, ``(stored,)``: a product sampled at what is stored.

    Parameters
    ----------
    codes
        Says which; its values do not count.
    rows
        ``(rows, size)``.
    dictionary
        ``(features, size)``.
    """
    found = rows.new_empty(len(codes.indices))
    row_of, step = codes.row_of, max(1, _CHUNK // max(1, rows.shape[1]))
    for first in range(0, len(found), step):
        part = slice(first, first + step)
        found[part] = (rows[row_of[part]] * dictionary[codes.indices[part].long()]).sum(1)
    return found


def scattered(codes: SparseCodes, rows: Tensor) -> Tensor:
    """``codesᵀ · rows``, ``(features, size)``: every atom's sum of the rows that hold it, weighted by their values."""
    turned = codes.transposed()
    return _gathered(turned.values, rows, turned.indices, turned.starts)


def _gathered(values: Tensor, dictionary: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
    weights = values.detach().to(dictionary.dtype)
    return embedding_bag(
        indices.long(), dictionary.detach(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )

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
from gossamer.kernels.native import VALUE_CODES, native, offers

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
    if rows.shape != (len(codes), dictionary.shape[1]):
        raise ConfigurationError(
            f"rows are {tuple(rows.shape)}; {len(codes)} codes on a dictionary of {tuple(dictionary.shape)} need "
            f"{(len(codes), dictionary.shape[1])}"
        )
    rows = rows.detach().contiguous()
    if rows.dtype == torch.float32 and _compiled(dictionary):
        indices, starts, stored = _listed(codes, dictionary)
        found = torch.empty(len(indices), dtype=torch.float32)
        native().code_products(
            len(codes),
            indices.data_ptr(),
            starts.data_ptr(),
            rows.data_ptr(),
            stored.data_ptr(),
            VALUE_CODES[stored.dtype],
            stored.shape[1],
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found
    found = rows.new_empty(len(codes.indices))
    row_of, step = codes.row_of, max(1, _CHUNK // max(1, rows.shape[1]))
    for first in range(0, len(found), step):
        part = slice(first, first + step)
        found[part] = (rows[row_of[part]] * dictionary[codes.indices[part].long()]).sum(1)
    return found


def scattered(codes: SparseCodes, rows: Tensor) -> Tensor:
    """``codesᵀ · rows``, ``(features, size)``: every atom's sum of the rows that hold it, weighted by their values."""
    turned = turn(codes)
    return _gathered(turned.values, rows, turned.indices, turned.starts)


def turn(codes: SparseCodes) -> SparseCodes:
    """``(features, rows)``: for every feature, the rows that hold it, ascending; without gradients."""
    values = codes.values.detach()
    if not offers("code_turn") or values.device.type != "cpu" or values.dtype != torch.float32 or not len(codes):
        return SparseCodes(codes.indices, values, codes.starts, codes.width).transposed()
    indices, starts = codes.indices.to(torch.int32).contiguous(), codes.starts.contiguous()
    values = values.contiguous()
    holders, turned = torch.empty_like(indices), torch.empty_like(values)
    turned_starts = torch.empty(codes.width + 1, dtype=torch.int64)
    native().code_turn(
        len(codes),
        codes.width,
        indices.data_ptr(),
        values.data_ptr(),
        starts.data_ptr(),
        holders.data_ptr(),
        turned.data_ptr(),
        turned_starts.data_ptr(),
    )
    return SparseCodes(holders, turned, turned_starts, len(codes))


def _gathered(values: Tensor, dictionary: Tensor, indices: Tensor, starts: Tensor) -> Tensor:
    values, dictionary = values.detach(), dictionary.detach()
    if values.dtype == torch.float32 and _compiled(dictionary):
        codes = SparseCodes(indices, values, starts, max(len(dictionary), 1))
        indices, starts, stored = _listed(codes, dictionary)
        values = values.contiguous()
        found = torch.empty(len(codes), stored.shape[1], dtype=torch.float32)
        native().code_gather(
            len(codes),
            indices.data_ptr(),
            values.data_ptr(),
            starts.data_ptr(),
            stored.data_ptr(),
            VALUE_CODES[stored.dtype],
            stored.shape[1],
            found.data_ptr(),
            torch.get_num_threads(),
        )
        return found.to(dictionary.dtype)
    weights = values.to(dictionary.dtype)
    return embedding_bag(
        indices.long(), dictionary, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _compiled(dictionary: Tensor) -> bool:
    """Whether compiled code reads rows of this dictionary."""
    known = dictionary.dtype in (torch.float32, torch.bfloat16) and dictionary.device.type == "cpu"
    return known and offers("code_gather") and dictionary.numel() > 0


def _listed(codes: SparseCodes, dictionary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, starts and dictionary as compiled code reads them, which checks nothing."""
    if codes.indices.numel() and not 0 <= int(codes.indices.min()) <= int(codes.indices.max()) < len(dictionary):
        raise ConfigurationError(f"codes hold a feature outside the {len(dictionary)} rows of the dictionary")
    whole = int(codes.starts[0]) == 0 and int(codes.starts[-1]) == len(codes.indices)
    if not whole or bool((codes.counts < 0).any()):
        raise ConfigurationError(f"starts do not ascend from 0 to {len(codes.indices)}, the number of stored values")
    return codes.indices.to(torch.int32).contiguous(), codes.starts.contiguous(), dictionary.detach().contiguous()

"""Sparse codes on a GPU, in Triton: encoding that keeps the best features only, gathering, sampled products.

A program of the encoder serves one token: tile after tile of the features is multiplied and compared with the worst
that it holds, and the matrix of all products is never written. Programs of the others serve one row of the codes, or
one stored value. Every sum has one order, so that results repeat to the bit. See :mod:`gossamer.kernels.codes` and
:mod:`gossamer.kernels.encode_select`.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError, MissingDependencyError
from gossamer.kernels.codes import turn

try:
    import triton
    import triton.language as tl
except ImportError:  # the package works without it
    triton = None

_FEATURES, _CHANNELS = 64, 64  # of a tile of the encoder
_SIZE = 128  # numbers of an output that a program makes


def decode(codes: SparseCodes, dictionary: Tensor) -> Tensor:
    """``codes · dictionary`` without gradients, ``(rows, size)`` float32.

    Parameters
    ----------
    codes
        ``(rows, features)``.
    dictionary
        ``(features, size)``, float32, bfloat16 or float16, on the device of the codes.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    ConfigurationError
        If the dictionary does not fit.
    """
    _check(codes, dictionary)
    size = dictionary.shape[1]
    found = torch.zeros(len(codes), size, device=dictionary.device)
    if found.numel():
        parts = (codes.indices.contiguous(), codes.values.detach().float().contiguous(), codes.starts.contiguous())
        grid = (len(codes), triton.cdiv(size, _SIZE))
        _gather_row[grid](*parts, dictionary.detach().contiguous(), found, size, SIZE=_SIZE)
    return found


def products_at(codes: SparseCodes, rows: Tensor, dictionary: Tensor) -> Tensor:
    """Inner products of rows with the atoms that they hold, ``(stored,)`` float32: see the compiled version."""
    _check(codes, dictionary)
    if rows.shape != (len(codes), dictionary.shape[1]):
        raise ConfigurationError(
            f"rows are {tuple(rows.shape)}; codes and dictionary need {(len(codes), dictionary.shape[1])}"
        )
    found = torch.zeros(len(codes.indices), device=dictionary.device)
    if len(found):
        parts = (codes.indices.contiguous(), codes.row_of, rows.detach().contiguous(), dictionary.detach().contiguous())
        _sampled_product[(len(found),)](*parts, found, dictionary.shape[1], SIZE=_SIZE)
    return found


def scattered(codes: SparseCodes, rows: Tensor) -> Tensor:
    """``codesᵀ · rows``, ``(features, size)``: gradients of a dictionary; features that no row holds get zeros."""
    return decode(turn(codes), rows)


def encode_topk(x: Tensor, encoder: Tensor, bias: Tensor | None, k: int) -> SparseCodes:
    """The k highest affinities ``ReLU(x · encoder + bias)`` of every token; of equal ones the first.

    Parameters
    ----------
    x
        ``(tokens, size)``, any floating dtype; products are formed in float32.
    encoder, bias, k
        As in :func:`gossamer.kernels.encode_select.encode_topk`.

    Raises
    ------
    MissingDependencyError
        If Triton is not installed.
    ConfigurationError
        If shapes do not fit, or k is not from 1 to the number of features.
    """
    if triton is None:
        raise MissingDependencyError("triton", "gpu", "encoding on a GPU")
    if x.dim() != 2 or encoder.dim() != 2 or x.shape[1] != encoder.shape[1]:
        raise ConfigurationError(
            f"x is {tuple(x.shape)}, the encoder {tuple(encoder.shape)}; give (tokens, size) and (features, size)"
        )
    tokens, features = len(x), len(encoder)
    if not 1 <= k <= features:
        raise ConfigurationError(f"k is {k}; it must be from 1 to the {features} features")
    indices = torch.zeros(tokens, k, dtype=torch.int32, device=x.device)
    values = torch.zeros(tokens, k, device=x.device)
    if tokens:
        _best_features[(tokens,)](
            x.detach().contiguous(),
            encoder.detach().contiguous(),
            encoder if bias is None else bias.detach().float().contiguous(),
            indices,
            values,
            features,
            x.shape[1],
            k,
            BIASED=bias is not None,
            HELD=triton.next_power_of_2(k),
            FEATURES=_FEATURES,
            CHANNELS=_CHANNELS,
        )
    # features of a row ascend, and what is zero is not stored
    places = torch.where(values > 0, indices, features).long()
    order = places.argsort(dim=1)
    values, places = values.gather(1, order), places.gather(1, order)
    held = places < features
    starts = torch.zeros(tokens + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(held.sum(1), 0, out=starts[1:])
    return SparseCodes(places[held].to(torch.int32), values[held], starts, features)


def _check(codes: SparseCodes, dictionary: Tensor) -> None:
    if triton is None:
        raise MissingDependencyError("triton", "gpu", "a sparse product on a GPU")
    if dictionary.dim() != 2 or len(dictionary) != codes.width or dictionary.device != codes.indices.device:
        raise ConfigurationError(
            f"dictionary is {tuple(dictionary.shape)} on {dictionary.device}; codes of {codes.width} features on "
            f"{codes.indices.device} need (features, size) there"
        )


if triton is not None:

    @triton.jit
    def _gather_row(indices, values, starts, dictionary, outputs, size, SIZE: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        total = tl.zeros((SIZE,), dtype=tl.float32)
        first = tl.load(starts + row)
        last = tl.load(starts + row + 1)
        for i in range(first, last):
            atom = tl.load(indices + i).to(tl.int64)
            numbers = tl.load(dictionary + atom * size + column, mask=column < size, other=0).to(tl.float32)
            total += tl.load(values + i) * numbers
        tl.store(outputs + row * size + column, total, mask=column < size)

    @triton.jit
    def _sampled_product(indices, row_of, rows, dictionary, outputs, size, SIZE: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)
        atom = tl.load(indices + i).to(tl.int64)
        row = tl.load(row_of + i)
        total = tl.zeros((SIZE,), dtype=tl.float32)
        for first in range(0, size, SIZE):
            column = first + tl.arange(0, SIZE)
            there = column < size
            numbers = tl.load(dictionary + atom * size + column, mask=there, other=0).to(tl.float32)
            total += numbers * tl.load(rows + row * size + column, mask=there, other=0).to(tl.float32)
        tl.store(outputs + i, tl.sum(total, 0))

    @triton.jit
    def _best_features(
        x,
        encoder,
        bias,
        indices,
        values,
        features,
        size,
        k,
        BIASED: tl.constexpr,
        HELD: tl.constexpr,
        FEATURES: tl.constexpr,
        CHANNELS: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        slot = tl.arange(0, HELD)
        # slots beyond k are never the worst
        best = tl.where(slot < k, 0.0, float("inf"))
        place = tl.zeros((HELD,), dtype=tl.int32)
        for begin in range(0, features, FEATURES):
            feature = begin + tl.arange(0, FEATURES)
            total = tl.zeros((FEATURES, CHANNELS), dtype=tl.float32)
            for first in range(0, size, CHANNELS):
                channel = first + tl.arange(0, CHANNELS)
                there = (feature < features)[:, None] & (channel < size)[None, :]
                weight = tl.load(
                    encoder + feature[:, None].to(tl.int64) * size + channel[None, :], mask=there, other=0
                ).to(tl.float32)
                total += (
                    weight * tl.load(x + token * size + channel, mask=channel < size, other=0).to(tl.float32)[None, :]
                )
            score = tl.sum(total, 1)
            if BIASED:
                score += tl.load(bias + feature, mask=feature < features, other=0)
            score = tl.where(feature < features, score, 0.0)
            worst = tl.min(best, 0)
            highest = tl.max(score, 0)
            # what equals the worst comes later, and loses
            while highest > worst:
                found = tl.min(tl.where(score == highest, feature, features), 0)
                # of equally bad ones the one that was found last goes
                late = tl.max(tl.where(best == worst, place, -1), 0)
                out = tl.min(tl.where((best == worst) & (place == late), slot, HELD), 0)
                best = tl.where(slot == out, highest, best)
                place = tl.where(slot == out, found, place)
                score = tl.where(feature == found, 0.0, score)
                worst = tl.min(best, 0)
                highest = tl.max(score, 0)
        tl.store(indices + token * k + slot, place, mask=slot < k)
        tl.store(values + token * k + slot, best, mask=slot < k)

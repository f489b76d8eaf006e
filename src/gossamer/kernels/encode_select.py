"""Which features of a token are active: products with all of them, of which only the highest are ever written down.

The matrix of all products, tokens × features, is much larger than everything that goes in and comes out. Compiled code
forms it tile by tile in registers and keeps, for every token, the features that can still be among its best. Where the
processor has matrix registers for bfloat16, products are first formed from rounded numbers; since it is known how far
rounding moves a product (Cauchy and Schwarz, with the rounding error of this token and of these features), no feature
is lost, and what remains is computed again in float32. The result is that of float32 either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.selection import keep_highest
from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.kernels.native import VALUE_CODES, native, offers

_CHUNK = 1 << 24  # products that the reference forms at a time
_TILES_FROM = 64  # tokens for which rounding an encoder pays
_FEW = 4  # tokens for which compiled code forms all products at once, and prepares nothing


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """An encoder as compiled code compares it with tokens; worth keeping where it meets several batches.

    Attributes
    ----------
    lengths, errors
        Of the longest feature of every block, and the largest length that rounding has changed one by.
    rounded
        The features in bfloat16, blocks and channels filled up with zeros; empty where nothing is rounded.
    """

    lengths: Tensor
    errors: Tensor
    rounded: Tensor
    ready: list[bool]

    @classmethod
    def of(cls, encoder: Tensor, tokens: int, rounded: bool = True) -> PreparedEncoder:
        """Room for an encoder ``(features, size)``, which the first product fills.

        Fewer than 64 tokens are compared in float32: rounding would take longer.
        """
        block = native().code_block()
        features, size = encoder.shape
        blocks = -(-features // block)
        tiles = rounded and tokens >= _TILES_FROM and native().code_tiles()
        shape = (blocks * block, -(-size // 32) * 32) if tiles else (0, 0)
        room = torch.empty(shape, dtype=torch.bfloat16)
        return cls(torch.empty(blocks), torch.empty(blocks), room, [False])


def encode_topk(
    x: Tensor,
    encoder: Tensor,
    bias: Tensor | None,
    k: int,
    rounded: bool = True,
    prepared: PreparedEncoder | None = None,
) -> SparseCodes:
    """The k features of the highest affinity ``ReLU(x · encoder + bias)`` of every token, without gradients.

    Parameters
    ----------
    x
        Tokens ``(tokens, size)``.
    encoder
        ``(features, size)``.
    bias
        ``(features,)``.
    k
        Features of a token, at most: affinities of zero are never chosen; of equal ones the first is.
    rounded
        Whether matrix registers may look for candidates; the result is the same, but for speed.
    prepared
        :meth:`PreparedEncoder.of` of this very encoder, for several calls; it must not change between them.

    Returns
    -------
    SparseCodes
        The features of a token ascending, with their affinities.

    Raises
    ------
    ConfigurationError
        If shapes do not fit, or k is not from 1 to the number of features.
    NonFiniteError
        If the encoder holds NaN or infinity. Tokens must not.
    """
    if x.dim() != 2 or encoder.dim() != 2 or x.shape[1] != encoder.shape[1] or not len(encoder):
        raise ConfigurationError(
            f"x is {tuple(x.shape)}, the encoder {tuple(encoder.shape)}; give (tokens, size) and (features, size)"
        )
    if bias is not None and bias.shape != (len(encoder),):
        raise ConfigurationError(f"bias is {tuple(bias.shape)}; it must have {len(encoder)} numbers, one a feature")
    _check_k(k, len(encoder))
    x, encoder = x.detach().contiguous(), encoder.detach().contiguous()
    kinds = {part.dtype for part in (x, encoder, bias) if part is not None}
    if kinds != {torch.float32} or x.device.type != "cpu" or not offers("code_encode"):
        return _reference(x, encoder, bias, k)
    bias = None if bias is None else bias.detach().contiguous()
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise NonFiniteError("the bias of the encoder holds NaN or infinity; lower the learning rate")
    indices, values, counts = _room(len(x), k)
    prepared = prepared or PreparedEncoder.of(encoder, len(x), rounded)
    finite = native().code_encode(
        *(len(x), x.shape[1], len(encoder), k),
        x.data_ptr(),
        encoder.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *(prepared.lengths.data_ptr(), prepared.errors.data_ptr(), prepared.rounded.data_ptr()),
        prepared.ready[0],
        *(indices.data_ptr(), values.data_ptr(), counts.data_ptr()),
        torch.get_num_threads(),
    )
    prepared.ready[0] = prepared.ready[0] or len(x) > _FEW
    if not finite:
        raise NonFiniteError("the encoder holds NaN or infinity; lower the learning rate")
    return _codes(indices, values, counts, len(encoder))


def highest_of_rows(scores: Tensor, k: int, positive: bool = False) -> SparseCodes:
    """The k highest scores of every row; of equal ones the first.

    Parameters
    ----------
    scores
        ``(rows, features)``, any floating dtype.
    k
        How many.
    positive
        Whether only scores above zero are chosen, fewer than k if need be.

    Returns
    -------
    SparseCodes
        The features of a row ascending, with their scores; without gradients.

    Raises
    ------
    ConfigurationError
        If k is not from 1 to the number of features.
    NonFiniteError
        If a score is NaN.
    """
    if scores.dim() != 2:
        raise ConfigurationError(f"scores are {tuple(scores.shape)}; give (rows, features)")
    rows, features = scores.shape
    _check_k(k, features)
    scores = scores.detach()
    if scores.device.type != "cpu" or scores.dtype not in (torch.float32, torch.bfloat16) or not offers("code_highest"):
        return _highest_reference(scores, k, positive)
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    indices, values, counts = _room(rows, k)
    damaged = native().code_highest(
        *(rows, features, scores.stride(0), scores.data_ptr(), VALUE_CODES[scores.dtype], k, positive),
        *(indices.data_ptr(), values.data_ptr(), counts.data_ptr()),
        torch.get_num_threads(),
    )
    if damaged >= 0:
        raise NonFiniteError(f"a score of row {damaged} is NaN")
    return _codes(indices, values.to(scores.dtype), counts, features)


def _check_k(k: int, features: int) -> None:
    if not 1 <= k <= features:
        raise ConfigurationError(f"k is {k}; it must be from 1 to the {features} features")


def _room(rows: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k), torch.empty(rows, dtype=torch.int64)


def _codes(indices: Tensor, values: Tensor, counts: Tensor, features: int) -> SparseCodes:
    rows, k = indices.shape
    if not rows or int(counts.min()) == k:
        return SparseCodes.from_rows(indices, values, features)
    held = torch.arange(k) < counts[:, None]
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=starts[1:])
    return SparseCodes(indices[held], values[held], starts, features)


def _reference(x: Tensor, encoder: Tensor, bias: Tensor | None, k: int) -> SparseCodes:
    if not bool(torch.isfinite(encoder).all()):
        raise NonFiniteError("the encoder holds NaN or infinity; lower the learning rate")
    step = max(1, _CHUNK // len(encoder))
    parts = []
    for first in range(0, max(len(x), 1), step):
        scores = x[first : first + step] @ encoder.t()
        parts.append(_highest_reference(scores if bias is None else scores + bias.detach(), k, positive=True))
    return SparseCodes.cat(parts)


def _highest_reference(scores: Tensor, k: int, positive: bool) -> SparseCodes:
    # of equal scores the selection drops the first; read from the end, it keeps the first
    kept = keep_highest(scores.flip(1), scores.shape[1] - k).flip(1)
    return SparseCodes.from_mask(scores, kept & (scores > 0) if positive else kept)

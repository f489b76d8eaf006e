"""Stored N:M tensors as matrices that kernels multiply with, and back, without a dense weight in between."""

from __future__ import annotations

import numpy as np
import torch

from gossamer.core.patterns import NM
from gossamer.errors import ConfigurationError
from gossamer.kernels.nm import GROUPS, NMMatrix
from gossamer.storage.combinations import code_width, masks_by_rank, pack_codes, rank_groups, unpack_codes
from gossamer.storage.groups import Groups
from gossamer.storage.packing import DTYPES, PackedTensor


def matrix_of(packed: PackedTensor) -> NMMatrix:
    """Return a stored tensor of kind ``nm`` as a matrix, value by value.

    Parameters
    ----------
    packed
        ``(rows, columns)``, float32 or bfloat16, N:M along the columns with M a power of two from 2 to 32.

    Raises
    ------
    ConfigurationError
        If it is of another kind, shape, dtype or pattern, for which there are no N:M kernels.
    CheckpointError
        If its parts contradict each other.
    """
    pattern = packed.pattern
    if packed.kind != "nm" or pattern is None or len(packed.shape) != 2 or pattern.dim != 1 or pattern.m not in GROUPS:
        raise ConfigurationError(
            f"a {packed.kind} tensor of shape {packed.shape} ({pattern}) has no N:M kernel; it must be a matrix of "
            f"kind nm along dimension 1 with M one of {', '.join(map(str, GROUPS))}"
        )
    packed.validate()
    rows, columns = packed.shape
    groups = Groups(packed.shape, pattern)
    ranks = unpack_codes(packed.parts["codes"].numpy(), code_width(pattern.n, pattern.m), groups.count)
    table = torch.from_numpy(np.nonzero(masks_by_rank(pattern.n, pattern.m))[1].reshape(-1, pattern.n))
    places = table[torch.from_numpy(ranks.astype(np.int64))]
    shape = (rows, groups.per_line, pattern.n)
    return NMMatrix.from_groups(packed.parts["values"].view(shape), places.view(shape), pattern.m, columns)


def packed_of(matrix: NMMatrix) -> PackedTensor:
    """Return a matrix as a stored tensor of kind ``nm``; the inverse of :func:`matrix_of`.

    Raises
    ------
    ConfigurationError
        If its values are whole numbers with scales, which a plain tensor has not.
    PatternError
        If a code of its pattern would need more than 16 bits.
    """
    if matrix.scales is not None:
        raise ConfigurationError(f"{matrix!r} has scales; expand() it and encode that, or save the packed layer")
    pattern = NM(matrix.n, matrix.m)
    Groups(matrix.shape, pattern)
    values, places = matrix.groups()
    mask = torch.zeros(*places.shape[:2], pattern.m, dtype=torch.bool).scatter_(2, places, True)
    ranks = rank_groups(mask.flatten(0, 1).numpy(), pattern.n)
    codes = torch.from_numpy(pack_codes(ranks, code_width(pattern.n, pattern.m)))
    flat = values.flatten().contiguous()
    words = flat.view({2: torch.int16, 4: torch.int32}[flat.element_size()])
    parts = {"codes": codes, "values": flat}
    return PackedTensor("nm", matrix.shape, DTYPES[matrix.format], int(torch.count_nonzero(words)), parts, pattern)

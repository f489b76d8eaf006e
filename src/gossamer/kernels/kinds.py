"""All kinds of packed matrices by name: packing a weight, and putting stored parts together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.blocks import BlockMatrix, CsrMatrix, EightRowMatrix, FourRowMatrix, SixteenRowMatrix
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.groups import GROUP, GroupMatrix
from gossamer.kernels.integer import IntegerBitmaskMatrix, IntegerDenseMatrix
from gossamer.kernels.matrix import PackedMatrix
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.kernels.nm import NMMatrix

MATRICES: dict[str, type[PackedMatrix]] = {
    "dense": DenseMatrix,
    "bitmask": BitmaskMatrix,
    "groups": GroupMatrix,
    "nibbles": NibbleMatrix,
    "csr": CsrMatrix,
    "blocks4": FourRowMatrix,
    "blocks8": EightRowMatrix,
    "blocks16": SixteenRowMatrix,
    "nm": NMMatrix,
    "channels": ChannelMatrix,
    "nibble_rows": NibbleRowMatrix,
    "integer_dense": IntegerDenseMatrix,
    "integer_bitmask": IntegerBitmaskMatrix,
}
#: every name that a part of some kind of matrix has
PARTS = ("bits", "values", "starts", "scales", "places", "words", "zeros", "offsets", "pattern")
_NAMES = {kind: name for name, kind in MATRICES.items()}
_NIBBLE_GROUP = 32


def kind_of(matrix: PackedMatrix) -> str:
    """Return the name of the kind of a matrix."""
    return _NAMES[type(matrix)]


def pack(weight: Tensor, kind: str = "bitmask", format: str | None = None, group: int | None = None) -> PackedMatrix:
    """Pack a dense weight.

    Parameters
    ----------
    weight
        ``(rows, columns)``, float32, bfloat16 or float16.
    kind
        ``dense`` keeps every weight, ``bitmask`` those that are not zero, ``groups`` the 1×16 groups that are not
        wholly zero, ``nibbles`` every weight in four bits, ``csr`` the weights that are not zero with their columns,
        ``blocks4``, ``blocks8`` and ``blocks16`` the blocks of so many rows and one column that are not wholly zero,
        ``nm`` the N of every M adjacent weights of a row that the weight itself shows, ``channels`` every weight, one
        input channel after the other, and ``nibble_rows`` every weight in four bits, row after row. ``integer_dense``
        and ``integer_bitmask`` are ``dense`` and ``bitmask`` in int8 that round their inputs to int8 as well.
    format
        What a value is, such as ``bfloat16`` or ``int8``; by default the weight's dtype, ``int4`` for ``groups``,
        ``nibbles`` and ``nibble_rows``, and ``int8`` for ``integer_dense`` and ``integer_bitmask``: these five know no
        other.
    group
        Columns that share a scale: for ``dense``, ``bitmask`` and ``nm`` by default a whole row, for ``nibbles`` and
        ``nibble_rows`` 32. Groups always have 16, and ``csr`` and blocks whole rows. For ``channels`` in ``int4``
        outputs of one channel, 32 by default.

    Raises
    ------
    ConfigurationError
        If there is no such kind, or shape, dtype, format or group do not fit it.
    NonFiniteError
        If a weight has no value in the format.
    """
    if kind not in MATRICES:
        raise ConfigurationError(f"kind is {kind!r}; it must be one of {', '.join(MATRICES)}")
    if kind in ("dense", "bitmask", "nm", "channels", "integer_dense", "integer_bitmask"):
        return MATRICES[kind].from_dense(weight, format, group=group)  # type: ignore[attr-defined]
    if issubclass(MATRICES[kind], BlockMatrix):
        if group is not None:
            raise ConfigurationError(f"group is {group}; {kind} has one scale for each row")
        return MATRICES[kind].from_dense(weight, format)  # type: ignore[attr-defined]
    if format not in (None, "int4"):
        raise ConfigurationError(f"format is {format!r}; {kind} are always int4")
    if kind == "nibbles":
        return NibbleMatrix.from_dense(weight, _NIBBLE_GROUP if group is None else group)
    if kind == "nibble_rows":
        return NibbleRowMatrix.from_dense(weight, group)
    if group not in (None, GROUP):
        raise ConfigurationError(f"group is {group}; groups have {GROUP} columns")
    return GroupMatrix.from_dense(weight)


def pack_like(matrix: PackedMatrix, weight: Tensor) -> PackedMatrix:
    """Pack a weight as another one is packed.

    Raises
    ------
    ConfigurationError
        As :func:`pack` does.
    """
    if isinstance(matrix, NibbleMatrix):
        return NibbleMatrix.from_dense(weight, matrix.group, matrix.offsets is not None)
    group = getattr(matrix, "group", 0) or None
    return pack(weight, kind_of(matrix), matrix.format, group)


def rebuild(name: str, about: Mapping[str, Any], parts: Mapping[str, Tensor]) -> PackedMatrix:
    """Put stored parts together; :meth:`PackedMatrix.validate` then says whether they fit each other.

    Parameters
    ----------
    name
        Of the layer, for the error.
    about
        ``kind``, ``shape``, ``format`` and ``group``.
    parts
        Name → tensor; names that the kind does not know are ignored.

    Raises
    ------
    CheckpointError
        If a part is missing, or the kind or its format is unknown.
    """
    kind = MATRICES.get(about["kind"])
    if kind is None:
        raise CheckpointError(f"{name}: its kind is {about['kind']!r}; known are {', '.join(MATRICES)}")
    if kind in (GroupMatrix, NibbleMatrix, NibbleRowMatrix) and about["format"] != "int4":
        raise CheckpointError(f"{name}: {about['kind']} are int4, and its format is {about['format']!r}")
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    options = {key: about[key] for key in ("format", "group") if key in fields and fields[key].init}
    try:
        return kind(shape=about["shape"], **options, **{key: value for key, value in parts.items() if key in fields})  # type: ignore[call-arg]
    except TypeError as error:
        raise CheckpointError(f"{name}: a part is missing ({error}); save it again") from None


def group_density(weight: Tensor) -> float:
    """Share of the 1×16 groups of a matrix in which a weight is not zero; 0 for a matrix without weights."""
    padded = torch.nn.functional.pad(weight != 0, (0, -weight.shape[1] % GROUP))
    groups = padded.view(len(weight), -1, GROUP).any(2)
    return float(groups.float().mean()) if groups.numel() else 0.0

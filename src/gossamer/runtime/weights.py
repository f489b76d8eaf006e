"""Weights as compiled steps read them: where the parts of a stored matrix lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.blocks import BlockMatrix
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.groups import GroupMatrix
from gossamer.kernels.integer import IntegerBitmaskMatrix, IntegerDenseMatrix
from gossamer.kernels.matrix import PackedMatrix
from gossamer.kernels.native import INT4, VALUE_CODES
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.kernels.nm import NMMatrix

Pack = Callable[[str, Tensor], PackedMatrix | None]

_LANES = 16
DENSE, CHANNELS, NIBBLE_ROWS = 1, 7, 8
_KINDS: dict[type[PackedMatrix], tuple[int, tuple[str, ...]]] = {
    IntegerDenseMatrix: (9, ("values", "scales")),  # before the classes that they derive from
    IntegerBitmaskMatrix: (10, ("bits", "values", "starts", "scales")),
    DenseMatrix: (DENSE, ("values", "scales")),
    BitmaskMatrix: (2, ("bits", "values", "starts", "scales")),
    GroupMatrix: (3, ("starts", "places", "words", "scales", "zeros")),
    NibbleMatrix: (4, ("words", "scales", "offsets")),
    BlockMatrix: (5, ("starts", "places", "values", "scales")),
    NMMatrix: (6, ("values", "places", "scales", "pattern")),
    ChannelMatrix: (CHANNELS, ("values", "scales")),
    NibbleRowMatrix: (NIBBLE_ROWS, ("values", "scales")),
}
_ADDRESSES = 5


@dataclass(frozen=True)
class StoredWeight:
    """A weight as compiled code reads it; keeps its tensors alive.

    Attributes
    ----------
    kind
        1 dense, 2 bitmask, 3 groups, 4 four-bit dense, 5 blocks of one column, 6 N of every M columns, 7 channel after
        channel, 8 four-bit dense row after row, 9 and 10 as 1 and 2 with inputs that are rounded to int8.
    rows, columns
        Outputs and inputs.
    value
        Number of what a value is, for the kinds that have values.
    group
        Columns that share a scale; 0 where there are none. For blocks their height.
    tensors
        In the order of the kind's structure in the headers of ``native/src``; None where one is missing.
    bias
        ``(rows,)`` float32 or None.
    limits
        ``(columns,)`` float32, for weights stored by channels: inputs of at most this size count as zero; or None.
    """

    kind: int
    rows: int
    columns: int
    value: int
    group: int
    tensors: tuple[Tensor | None, ...]
    bias: Tensor | None = None
    limits: Tensor | None = None

    def arguments(self) -> tuple[int, ...]:
        """Sizes and addresses."""
        tensors = (*self.tensors, self.limits) if self.limits is not None else self.tensors
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        addresses += [0] * (_ADDRESSES - len(addresses))
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return (self.kind, self.rows, self.columns, self.value, self.group, bias, *addresses)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors if tensor is not None)


def describe(matrix: PackedMatrix, bias: Tensor | None = None, limits: Tensor | None = None) -> StoredWeight:
    """Say where the parts of a packed matrix lie; `limits` are thresholds of the inputs of one stored by channels.

    Raises
    ------
    ModelError
        If there is no compiled kernel for this class of matrices.
    """
    known = next((about for cls, about in _KINDS.items() if isinstance(matrix, cls)), None)
    if known is None:
        raise ModelError(f"{type(matrix).__name__} has no compiled kernel; pack the layer in another storage")
    kind, order = known
    parts = matrix.tensors()
    rows, columns = matrix.shape
    value = INT4 if matrix.format == "int4" else VALUE_CODES[parts["values"].dtype]
    group = matrix.height if isinstance(matrix, BlockMatrix) else int(getattr(matrix, "group", 0))
    tensors: tuple[Tensor | None, ...] = tuple(parts.get(name) for name in order)
    wide = None if bias is None else bias.detach().float().contiguous()
    return StoredWeight(kind, rows, columns, value, group, tensors, wide, limits)


def describe_module(module: nn.Module, name: str, pack: Pack | None) -> StoredWeight:
    """The weight of a linear layer or an embedding, packed or plain; a plain one is used where it lies."""
    bias = getattr(module, "bias", None)
    matrix = getattr(module, "matrix", None)
    if isinstance(matrix, PackedMatrix):
        return describe(matrix, bias)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not isinstance(module, nn.Linear | nn.Embedding):
        raise ModelError(f"{name} ({type(module).__name__}) is no linear layer; run the model through Hugging Face")
    weight = weight.detach()
    packed = None if pack is None else pack(name, weight)
    if packed is not None:
        return describe(packed, bias)
    if weight.device.type != "cpu" or weight.dtype not in VALUE_CODES or not weight.is_floating_point():
        raise ModelError(f"{name} is {weight.dtype} on {weight.device}; bring it to the CPU in float32 or bfloat16")
    channels = ChannelMatrix.of_view(weight)
    if channels is not None and not weight.is_contiguous():
        return describe(channels, bias)
    if weight.shape[1] % _LANES or not weight.is_contiguous():  # the last vector of a row would read beyond it
        return describe(DenseMatrix.from_dense(weight), bias)
    wide = None if bias is None else bias.detach().float().contiguous()
    rows, columns = weight.shape
    return StoredWeight(DENSE, rows, columns, VALUE_CODES[weight.dtype], 0, (weight, None), wide)


def describe_channels(module: nn.Module, name: str, limits: Tensor | None, pack: Pack | None) -> StoredWeight:
    """The weight of a linear layer of which only live channels shall be read.

    A plain weight is used where it lies if :func:`~gossamer.kernels.channels.lay_by_channels` has made it, and copied
    otherwise.

    Raises
    ------
    ModelError
        If it is packed in another storage.
    """
    matrix, weight = getattr(module, "matrix", None), getattr(module, "weight", None)
    if matrix is None and isinstance(weight, Tensor) and isinstance(module, nn.Linear):
        packed = None if pack is None else pack(name, weight.detach())
        matrix = packed or ChannelMatrix.of_view(weight.detach()) or ChannelMatrix.from_dense(weight.detach())
    if not isinstance(matrix, ChannelMatrix):
        raise ModelError(
            f"{name} ({type(module).__name__}) is stored as {type(matrix).__name__}, and its inputs have thresholds; "
            f"keep it dense, so that it can be stored by channels"
        )
    return describe(matrix, getattr(module, "bias", None), limits)


def layer_problem(weights: dict[str, StoredWeight], dim: int, hidden: int) -> str | None:
    """Say what does not fit together in one layer, if anything."""
    rows = {role: weight.rows for role, weight in weights.items()}
    columns = {role: weight.columns for role, weight in weights.items()}
    if dim < _LANES or dim % _LANES:
        return f"heads have {dim} numbers, which is no multiple of {_LANES}"
    if rows["query"] % dim or rows["key"] % dim or not rows["key"] or rows["query"] % rows["key"]:
        return f"{rows['query']} queries and {rows['key']} keys do not divide into heads of {dim}"
    expected = {
        "query": (rows["query"], hidden),
        "key": (rows["key"], hidden),
        "value": (rows["key"], hidden),
        "output": (hidden, rows["query"]),
        "gate": (rows["gate"], hidden),
        "up": (rows["gate"], hidden),
        "down": (hidden, rows["gate"]),
    }
    for role, shape in expected.items():
        if (rows[role], columns[role]) != shape:
            return f"{role} is {rows[role]} × {columns[role]} instead of {shape[0]} × {shape[1]}"
    return None

"""Weights as compiled steps read them: where the parts of a stored matrix lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.blocks import BlockMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.groups import GroupMatrix
from gossamer.kernels.matrix import PackedMatrix
from gossamer.kernels.native import INT4, VALUE_CODES
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.kernels.nm import NMMatrix

Pack = Callable[[str, Tensor], PackedMatrix | None]

_LANES = 16
_KINDS: dict[type[PackedMatrix], tuple[int, tuple[str, ...]]] = {
    DenseMatrix: (1, ("values", "scales")),
    BitmaskMatrix: (2, ("bits", "values", "starts", "scales")),
    GroupMatrix: (3, ("starts", "places", "words", "scales", "zeros")),
    NibbleMatrix: (4, ("words", "scales", "offsets")),
    BlockMatrix: (5, ("starts", "places", "values", "scales")),
    NMMatrix: (6, ("values", "places", "scales", "pattern")),
}
_ADDRESSES = 5


@dataclass(frozen=True)
class StoredWeight:
    """A weight as compiled code reads it; keeps its tensors alive.

    Attributes
    ----------
    kind
        1 dense, 2 bitmask, 3 groups, 4 four-bit dense, 5 blocks of one column, 6 N of every M columns.
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
    """

    kind: int
    rows: int
    columns: int
    value: int
    group: int
    tensors: tuple[Tensor | None, ...]
    bias: Tensor | None = None

    def arguments(self) -> tuple[int, ...]:
        """Sizes and addresses."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self.tensors]
        addresses += [0] * (_ADDRESSES - len(addresses))
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return (self.kind, self.rows, self.columns, self.value, self.group, bias, *addresses)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors if tensor is not None)


def describe(matrix: PackedMatrix, bias: Tensor | None = None) -> StoredWeight:
    """Say where the parts of a packed matrix lie.

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
    return StoredWeight(kind, rows, columns, value, group, tensors, wide)


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
    if weight.shape[1] % _LANES or not weight.is_contiguous():  # the last vector of a row would read beyond it
        return describe(DenseMatrix.from_dense(weight), bias)
    wide = None if bias is None else bias.detach().float().contiguous()
    return StoredWeight(1, *weight.shape, VALUE_CODES[weight.dtype], 0, (weight, None), wide)

"""Masks of a whole model: parameter name → which of its weights remain, at one bit a weight.

Bits are packed in C order, eight to a byte, least significant first: element ``8·b + i`` is bit ``i`` of byte ``b``;
the unused bits of the last byte are zero. The same order is used in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError, TargetError, UnknownNameError


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into ``ceil(numel / 8)`` bytes on the same device."""
    flat = mask.flatten()
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Iterable[int]) -> Tensor:
    """Undo :func:`pack_bits`: a bool tensor of the given shape.

    Raises
    ------
    CheckpointError
        If there are not exactly as many bytes as the shape needs.
    """
    shape = torch.Size(shape)
    count = shape.numel()
    if bits.numel() != (count + 7) // 8:
        raise CheckpointError(f"{bits.numel()} bytes of mask for shape {tuple(shape)}, which needs {(count + 7) // 8}")
    if bits.device.type == "cpu":
        flat = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return torch.from_numpy(flat.view(bool)).view(shape)
    spread = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return spread.flatten()[:count].bool().view(shape)


def count_bits(bits: Tensor) -> int:
    """Number of ones in packed bytes."""
    return int(np.bitwise_count(bits.cpu().numpy()).sum()) if hasattr(np, "bitwise_count") else _count_slowly(bits)


def _count_slowly(bits: Tensor) -> int:
    return int(np.unpackbits(bits.cpu().numpy()).sum())


_compiled: Callable[[Tensor, Tensor], bool] | None = None


def use_compiled_masks(function: Callable[[Tensor, Tensor], bool]) -> None:
    """Let :func:`mask_` ask compiled code first; False from it means that it has nothing for such a tensor."""
    global _compiled
    _compiled = function


@torch.no_grad()
def mask_(tensor: Tensor, bits: Tensor) -> None:
    """Zero in place the elements whose bit is 0, whatever was there, NaN and infinity included.

    Parameters
    ----------
    tensor
        Of any shape and floating dtype.
    bits
        ``ceil(numel / 8)`` bytes as of :func:`pack_bits`, on the device of the tensor.

    Raises
    ------
    CheckpointError
        If the number of bytes does not fit the tensor.
    """
    if bits.numel() != (tensor.numel() + 7) // 8:
        raise CheckpointError(f"{bits.numel()} bytes of mask for a tensor of {tensor.numel()} elements")
    if _compiled is None or not _compiled(tensor, bits):
        tensor.masked_fill_(~unpack_bits(bits, tensor.shape), 0)


@dataclass(frozen=True)
class _Packed:
    bits: Tensor
    shape: torch.Size

    def combine(self, other: _Packed, operation: Callable[[Tensor, Tensor], Tensor]) -> _Packed:
        return _Packed(operation(self.bits, other.bits), self.shape)


class MaskSet(Mapping[str, Tensor]):
    """Masks bound to parameter names, True where the weight remains.

    A read-only mapping: ``masks["model.layers.0.mlp.up_proj.weight"]`` unpacks one bool tensor of the shape of the
    parameter. Sets over the same names combine with ``&``, ``|``, ``^`` and ``~``.

    Parameters
    ----------
    masks
        Parameter name → bool tensor.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None):
        self._packed: dict[str, _Packed] = {}
        for name, mask in (masks or {}).items():
            if mask.dtype != torch.bool:
                raise CheckpointError(f"the mask of {name!r} has dtype {mask.dtype}; masks are bool, True where kept")
            self._packed[name] = _Packed(pack_bits(mask), mask.shape)

    @classmethod
    def from_model(cls, model: nn.Module, names: Iterable[str] | None = None) -> MaskSet:
        """The non-zeros of a model's parameters (all with two or more dimensions, or those named)."""
        parameters = dict(model.named_parameters())
        chosen = [n for n, p in parameters.items() if p.dim() > 1] if names is None else list(names)
        for name in chosen:
            if name not in parameters:
                raise UnknownNameError("parameter", name, parameters)
        return cls({name: parameters[name].detach() != 0 for name in chosen})

    def __getitem__(self, name: str) -> Tensor:
        packed = self._packed[name]
        return unpack_bits(packed.bits, packed.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self.shapes == other.shapes and self.distance(other) == 0

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} parameters, {self.total:,} weights, {self.sparsity:.4%} zero)"

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Parameter name → shape."""
        return {name: packed.shape for name, packed in self._packed.items()}

    @property
    def total(self) -> int:
        """Number of weights that the masks cover: the denominator of :attr:`sparsity`."""
        return sum(packed.shape.numel() for packed in self._packed.values())

    @property
    def kept(self) -> int:
        """Number of weights that remain."""
        return sum(count_bits(packed.bits) for packed in self._packed.values())

    @property
    def density(self) -> float:
        """Fraction that remains, of the weights that the masks cover."""
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, of the weights that the masks cover."""
        return 1 - self.density

    def layer_sparsity(self) -> dict[str, float]:
        """Parameter name → fraction of zeros."""
        return {n: 1 - count_bits(p.bits) / max(1, p.shape.numel()) for n, p in self._packed.items()}

    def with_mask(self, name: str, mask: Tensor) -> MaskSet:
        """A copy with one mask added or replaced."""
        result = MaskSet({name: mask})
        result._packed = {**self._packed, **result._packed}
        return result

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Zero in place what the masks remove. Tied parameters may be named by any of their names, and only once.

        Raises
        ------
        TargetError
            If a name or shape does not fit the model, or two names of one tied parameter carry different masks.
        """
        parameters = self._bind(model)
        for name, parameter in parameters.items():
            parameter.masked_fill_(~self[name].to(parameter.device), 0)

    def violations(self, model: nn.Module) -> dict[str, int]:
        """Parameter name → number of weights that should be zero and are not (only where there are any)."""
        found = {}
        for name, parameter in self._bind(model).items():
            count = int((parameter.detach()[~self[name].to(parameter.device)] != 0).sum())
            if count:
                found[name] = count
        return found

    def _bind(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        bound: dict[str, nn.Parameter] = {}
        owner: dict[int, str] = {}
        for name, packed in self._packed.items():
            if name not in parameters:
                raise TargetError(f"the model has no parameter {name!r}: these masks belong to another model")
            parameter = parameters[name]
            if parameter.shape != packed.shape:
                raise TargetError(
                    f"{name!r} has shape {tuple(parameter.shape)} but its mask {tuple(packed.shape)}: "
                    f"these masks belong to another model"
                )
            first = owner.setdefault(id(parameter), name)
            if first != name and not torch.equal(self._packed[first].bits, packed.bits):
                raise TargetError(f"{name!r} and {first!r} are one tied parameter, but their masks differ; keep one")
            if first == name:
                bound[name] = parameter
        return bound

    def _combine(self, other: MaskSet, operation: Callable[[Tensor, Tensor], Tensor]) -> MaskSet:
        self._check_comparable(other)
        result = MaskSet()
        result._packed = {n: p.combine(other._packed[n], operation) for n, p in self._packed.items()}
        return result

    def _check_comparable(self, other: MaskSet) -> None:
        if self.shapes != other.shapes:
            different = sorted(set(self.shapes.items()) ^ set(other.shapes.items()))
            raise TargetError(f"the mask sets cover different parameters, first {different[0][0]!r}")

    def __and__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, torch.bitwise_and)

    def __or__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, torch.bitwise_or)

    def __xor__(self, other: MaskSet) -> MaskSet:
        return self._combine(other, torch.bitwise_xor)

    def __invert__(self) -> MaskSet:
        return MaskSet({name: ~mask for name, mask in self.items()})

    def distance(self, other: MaskSet) -> int:
        """Hamming distance: number of weights on which the two sets differ."""
        return (self ^ other).kept

    def jaccard(self, other: MaskSet) -> float:
        """Kept by both over kept by either, over all parameters; 1 for two empty sets."""
        union = (self | other).kept
        return (self & other).kept / union if union else 1.0

    def cosine(self, other: MaskSet) -> float:
        """Cosine similarity of the masks as 0/1 vectors; 0 if one of them keeps nothing."""
        lengths = (self.kept * other.kept) ** 0.5
        return (self & other).kept / lengths if lengths else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which :meth:`from_state_dict` rebuilds the set: bits and shape of each parameter."""
        state = {}
        for name, packed in self._packed.items():
            state[f"{name}:bits"] = packed.bits
            state[f"{name}:shape"] = torch.tensor(packed.shape, dtype=torch.int64)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> MaskSet:
        """Rebuild a set.

        Raises
        ------
        CheckpointError
            If a part is missing, or bits and shape disagree.
        """
        result = cls()
        for key in state:
            name, _, part = key.rpartition(":")
            if part not in ("bits", "shape") or f"{name}:bits" not in state or f"{name}:shape" not in state:
                raise CheckpointError(f"{key!r} is not a complete entry of a mask set (bits and shape are both needed)")
            if part == "bits":
                shape = torch.Size(state[f"{name}:shape"].tolist())
                unpack_bits(state[key], shape)
                unused = shape.numel() % 8
                if unused and int(state[key][-1]) >> unused:
                    raise CheckpointError(f"the mask of {name!r} has bits beyond its {shape.numel()} weights")
                result._packed[name] = _Packed(state[key], shape)
        return result

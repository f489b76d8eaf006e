"""How much of a model is zero, and how many bytes it takes.

A sparsity without its denominator means nothing: half of the prunable weights of a small language model can
be a third of its parameters, because its embeddings stay dense. Every total here names what it counts.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, ModelError, TargetError, UnknownNameError

Denominator = Literal["all", "without embeddings", "prunable"]
DENOMINATORS: dict[Denominator, str] = {
    "all": "all parameters",
    "without embeddings": "all parameters but embeddings and output heads",
    "prunable": "the weights that pruning may touch",
}

Storage = Literal["dense", "bitmask", "csr16", "csr32"]
#: bytes of a column index
_INDICES = {"csr16": 2, "csr32": 4}
_ROW_POINTER = 4


@dataclass(frozen=True)
class TensorDensity:
    """Non-zeros of one parameter.

    Attributes
    ----------
    name
        Parameter name; of shared parameters the first one.
    shape
        Shape of the parameter.
    nonzeros, total
        Number of non-zero elements and of all elements.
    embedding
        Whether it belongs to an embedding or to an output head.
    prunable
        Whether pruning may touch it.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    total: int
    embedding: bool
    prunable: bool

    @property
    def density(self) -> float:
        """Share of non-zeros, in [0, 1]; 1 for an empty parameter."""
        return self.nonzeros / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]."""
        return 1.0 - self.density


@dataclass(frozen=True)
class TotalDensity:
    """Non-zeros of many parameters, with the words that say which ones were counted."""

    nonzeros: int
    total: int
    denominator: str

    @property
    def density(self) -> float:
        """Share of non-zeros, in [0, 1]; 1 if nothing was counted."""
        return self.nonzeros / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]."""
        return 1.0 - self.density

    def __str__(self) -> str:
        return f"{self.sparsity:.1%} zeros in {self.denominator} ({self.nonzeros:,} of {self.total:,} left)"


@dataclass(frozen=True)
class ModelDensity:
    """Non-zeros of every parameter of a model; shared parameters appear once."""

    layers: tuple[TensorDensity, ...]

    def total(self, of: Denominator = "all") -> TotalDensity:
        """Return the total over all parameters, those without embeddings and heads, or the prunable ones.

        Raises
        ------
        ConfigurationError
            If `of` is none of these three.
        """
        if of not in DENOMINATORS:
            raise ConfigurationError(f"of is {of!r}; it must be one of {', '.join(map(repr, DENOMINATORS))}")
        rows = [row for row in self.layers if of == "all" or (row.prunable if of == "prunable" else not row.embedding)]
        return TotalDensity(sum(r.nonzeros for r in rows), sum(r.total for r in rows), DENOMINATORS[of])


def density(model: nn.Module, prunable: Collection[str] | None = None) -> ModelDensity:
    """Count the non-zeros of every parameter.

    Parameters
    ----------
    model
        Any module whose parameters are dense tensors that hold their zeros.
    prunable
        Names of the parameters that pruning may touch; by default those of
        :func:`gossamer.core.targets.find_targets`.

    Returns
    -------
    ModelDensity

    Raises
    ------
    ModelError
        If a parameter has no data here, because it was offloaded or never loaded.
    UnknownNameError
        If `prunable` names a parameter that the model does not have.
    """
    touchable = _prunable_parameters(model, prunable)
    embeddings = _embedding_parameters(model)
    rows = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"parameter {name!r} has no data (meta device); load the model before measuring it")
        rows.append(
            TensorDensity(
                name=name,
                shape=tuple(parameter.shape),
                nonzeros=int(torch.count_nonzero(parameter.detach())),
                total=parameter.numel(),
                embedding=id(parameter) in embeddings,
                prunable=id(parameter) in touchable,
            )
        )
    return ModelDensity(tuple(rows))


def _prunable_parameters(model: nn.Module, names: Collection[str] | None) -> set[int]:
    """Return the ids of the named parameters, or of those that hold a target."""
    if names is not None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in names:
            if name not in parameters:
                raise UnknownNameError("parameter", name, parameters)
        return {id(parameters[name]) for name in names}
    try:
        return {id(target.parameter) for target in find_targets(model)}
    except TargetError:
        return set()


def _embedding_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the parameters of embeddings and, where the model names one, of its output head."""
    modules: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if isinstance(head, nn.Module):
        modules.append(head)
    return {id(parameter) for module in modules for parameter in module.parameters()}


def bytes_in_memory(model: nn.Module) -> int:
    """Return the bytes of the storages behind a model's parameters and buffers.

    A storage that several tensors share (tied embeddings, views) counts once and as a whole, as it does in
    memory. Packed tensors count with everything they hold: values, indices, bitmasks. Tensors on the meta
    device count nothing.
    """
    seen: dict[tuple[str, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _plain_parts(tensor):
            if part.is_meta:
                continue
            storage = part.untyped_storage()
            seen[str(part.device), storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def footprint(model: nn.Module, storage: Storage = "bitmask") -> int:
    """Return the bytes that a model takes where zeros are not stored, and what says where they are is.

    This is the accounting by which Zhu & Gupta, 2017, arXiv 1710.01878, compare large sparse models with small dense
    ones. Of a weight of two or more dimensions, ``(rows, columns…)``, with k non-zeros among n and v bytes a value:

    ===========  ===================================
    ``dense``    n · v
    ``bitmask``  k · v + ⌈n / 8⌉
    ``csr16``    k · (v + 2) + 4 · (rows + 1)
    ``csr32``    k · (v + 4) + 4 · (rows + 1)
    ===========  ===================================

    A weight that takes fewer bytes dense is counted dense, and so are vectors and buffers. Tied weights count once.

    Parameters
    ----------
    model
        Any module whose parameters are dense tensors that hold their zeros.
    storage
        One of the table.

    Raises
    ------
    ConfigurationError
        If there is no such storage, or a row is too long for an index of 16 bits.
    ModelError
        If a parameter has no data here.

    Examples
    --------
    >>> layer = nn.Linear(16, 4, bias=False)
    >>> with torch.no_grad():
    ...     _ = layer.weight.zero_()[0].fill_(1)
    >>> [footprint(layer, storage) for storage in ("dense", "bitmask", "csr16", "csr32")]
    [256, 72, 116, 148]
    """
    if storage not in get_args(Storage):
        known = ", ".join(map(repr, get_args(Storage)))
        raise ConfigurationError(f"storage is {storage!r}; it must be one of {known}")
    total = sum(buffer.nbytes for buffer in model.buffers())
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"parameter {name!r} has no data (meta device); load the model before measuring it")
        total += min(parameter.nbytes, _stored_bytes(name, parameter.detach(), storage))
    return total


def _stored_bytes(name: str, weight: Tensor, storage: Storage) -> int:
    if storage == "dense" or weight.dim() < 2 or not weight.numel():
        return weight.nbytes
    nonzeros, value = int(torch.count_nonzero(weight)), weight.element_size()
    if storage == "bitmask":
        return nonzeros * value + -(-weight.numel() // 8)
    rows, columns = len(weight), weight.numel() // len(weight)
    if storage == "csr16" and columns > 1 << 16:
        raise ConfigurationError(f"a row of {name} has {columns} weights, too many for 16-bit indices; use 'csr32'")
    return nonzeros * (value + _INDICES[storage]) + _ROW_POINTER * (rows + 1)


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Walk through the strided tensors of which a sparse tensor or a tensor subclass consists."""
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_parts(getattr(tensor, name))
    else:
        yield tensor


def bytes_on_disk(path: str | os.PathLike[str], suffixes: Collection[str] | None = None) -> int:
    """Return the size of a file, or of all files below a directory, in bytes.

    Parameters
    ----------
    path
        File or directory. Links are followed; a file that is reached twice counts once.
    suffixes
        Count only files whose names end so, such as ``{".safetensors"}`` for the weights alone.

    Raises
    ------
    ModelError
        If there is nothing at `path`.
    """
    root = Path(path)
    if not root.exists():
        raise ModelError(f"nothing at {str(path)!r} to measure; give a model file or directory that exists")
    files = [root] if root.is_file() else [p for p in root.rglob("*") if p.is_file()]
    if suffixes is not None:
        files = [p for p in files if p.name.endswith(tuple(suffixes))]
    stats = [p.stat() for p in files]
    return sum({(s.st_dev, s.st_ino): s.st_size for s in stats}.values())

"""A packed model as a directory: safetensors shards and ``gossamer.json``. docs/format.md has every byte.

Writing holds one shard in memory, reading one tensor. Whatever is read is checked before it is decoded: the version,
every size and checksum, and every count against every other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gossamer.core.patterns import NM
from gossamer.errors import CheckpointError, ConfigurationError, UnknownNameError
from gossamer.storage.atomic import PathLike
from gossamer.storage.index import FORMAT, INDEX_NAME, VERSION, Index, Shard, TensorEntry, read_index
from gossamer.storage.packing import DTYPES, PARTS, Kind, PackedTensor, dtype_name, encode
from gossamer.storage.shards import ShardWriter

MAX_SHARD_BYTES = 2 * 1024**3


class CheckpointWriter:
    """Writes a packed checkpoint tensor by tensor; never holds more than one shard.

    The directory is a checkpoint only once :meth:`finish` has written ``gossamer.json``. Write into an
    :func:`gossamer.storage.atomic_directory`, so that an interruption leaves nothing behind.

    Parameters
    ----------
    directory
        An existing directory without a checkpoint in it.
    max_shard_bytes
        Largest shard; a larger single tensor gets one of its own.

    Examples
    --------
    >>> with atomic_directory("sparse-model") as directory:
    ...     writer = CheckpointWriter(directory)
    ...     writer.add("weight", torch.eye(16))
    ...     writer.finish({"method": "by hand"})
    """

    def __init__(self, directory: PathLike, max_shard_bytes: int = MAX_SHARD_BYTES):
        self._directory = Path(directory)
        if is_checkpoint(directory):
            raise ConfigurationError(f"{directory} already holds a checkpoint; write into a new directory")
        self._shards = ShardWriter(directory, max_shard_bytes, {"format": FORMAT, "version": str(VERSION)})
        self._packed: dict[str, tuple[PackedTensor, int]] = {}
        self._aliases: dict[str, str] = {}

    @property
    def pending_bytes(self) -> int:
        """Packed bytes held in memory."""
        return self._shards.pending_bytes

    def add(self, name: str, tensor: Tensor, kind: Kind | None = None, pattern: NM | None = None) -> None:
        """Pack and add one tensor; see :func:`gossamer.storage.encode`.

        Raises
        ------
        ConfigurationError
            If the name was used before, or the tensor cannot be stored.
        OutputError
            If a shard cannot be written.
        """
        self._check_new(name)
        try:
            packed = encode(tensor, kind, pattern)
        except ConfigurationError as error:
            raise type(error)(f"{name}: {error}") from None
        keys = part_keys(name, packed.kind)
        number = self._shards.add({key: packed.parts[part] for part, key in keys.items()})
        # the index needs the numbers, not the values: those go with the shard
        described = PackedTensor(packed.kind, packed.shape, packed.dtype, packed.nonzeros, {}, packed.pattern)
        self._packed[name] = (described, number)

    def add_alias(self, name: str, of: str) -> None:
        """Add a second name of a tensor that was added before (tied weights).

        Raises
        ------
        ConfigurationError
            If the name was used before.
        UnknownNameError
            If there is no stored tensor `of`.
        """
        self._check_new(name)
        if of not in self._packed:
            raise UnknownNameError("stored tensor", of, self._packed)
        self._aliases[name] = of

    def finish(self, settings: Mapping[str, Any] | None = None) -> Index:
        """Write what is pending, give the shards their final names, and write the index.

        Parameters
        ----------
        settings
            How the model was made; anything that JSON can hold.

        Raises
        ------
        ConfigurationError
            If the settings hold something that JSON cannot.
        OutputError
            If a file cannot be written.
        """
        paths = self._shards.finish()
        index = Index(aliases=self._aliases, settings=dict(settings or {}))
        index.shards = {path.name: Shard(path.stat().st_size, _sha256(path)) for path in paths}
        for name, (packed, number) in self._packed.items():
            index.tensors[name] = TensorEntry(
                packed.kind, packed.shape, dtype_name(packed.dtype), packed.nonzeros, paths[number].name, packed.pattern
            )
        index.write(self._directory)
        return index

    def _check_new(self, name: str) -> None:
        if name in self._packed or name in self._aliases:
            raise ConfigurationError(f"{name!r} was added before; give every tensor a name of its own")


def part_keys(name: str, kind: str) -> dict[str, str]:
    """Part → key in the safetensors file. A dense tensor keeps its plain name, so any reader finds it."""
    return {"values": name} if kind == "dense" else {part: f"{name}:{part}" for part in PARTS[kind]}


def is_checkpoint(directory: PathLike) -> bool:
    """Whether a directory looks like a packed checkpoint, that is, has a ``gossamer.json``."""
    return (Path(directory) / INDEX_NAME).is_file()


def verify(directory: PathLike) -> Index:
    """Check everything there is to check, without decoding; return the index.

    Raises
    ------
    CheckpointError
        If anything is missing, altered, truncated or contradicts itself; names the file or tensor and the remedy.
    """
    index = read_index(directory)
    _check_shards(Path(directory), index)
    for _ in _read(Path(directory), index):
        pass
    return index


def read_model_state(directory: PathLike, verify: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Dense tensors of a checkpoint, one at a time, on the CPU.

    Parameters
    ----------
    directory
        Of the checkpoint.
    verify
        Compare the checksums of all shards first. Sizes and counts are always checked.

    Returns
    -------
    Iterator of (name, Tensor)
        In the order of writing. Aliases follow their tensor and share its memory.

    Raises
    ------
    CheckpointError
        As :func:`verify`; for checksums and files before the first tensor, for the counts of a tensor before that
        tensor.
    """
    index = read_index(directory)
    _check_shards(Path(directory), index, checksums=verify)
    return _decoded(Path(directory), index)


def read_packed(directory: PathLike, name: str, verify: bool = True) -> PackedTensor:
    """One tensor as it is stored, for kernels that work on packed weights.

    Parameters
    ----------
    directory
        Of the checkpoint.
    name
        Of a tensor or an alias.
    verify
        Compare the checksum of its shard first. Sizes and counts are always checked.

    Raises
    ------
    UnknownNameError
        If there is no such tensor.
    CheckpointError
        As :func:`verify`, for the shard of the tensor.
    """
    index = read_index(directory)
    name = index.resolve(name)
    if name not in index.tensors:
        raise UnknownNameError("tensor", name, index.names)
    shard = index.tensors[name].shard
    alone = Index(
        tensors={n: e for n, e in index.tensors.items() if e.shard == shard}, shards={shard: index.shards[shard]}
    )
    _check_shards(Path(directory), alone, checksums=verify)
    with _opened(Path(directory) / shard) as file:
        return _packed(file, name, index.tensors[name])


def read_tensor(directory: PathLike, name: str, verify: bool = True) -> Tensor:
    """One dense tensor; see :func:`read_packed` for parameters and errors."""
    return read_packed(directory, name, verify).decode()


@dataclass(frozen=True)
class TensorSize:
    """Bytes of one tensor dense and packed, and its fraction of zeros."""

    kind: Kind
    dense_bytes: int
    packed_bytes: int
    sparsity: float


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a checkpoint.

    Parameters
    ----------
    tensors
        Name → sizes; tied weights appear once.
    dense_bytes, packed_bytes
        Sums over the tensors.
    file_bytes
        Of the shards and the index on disk, with headers.
    """

    tensors: dict[str, TensorSize]
    dense_bytes: int
    packed_bytes: int
    file_bytes: int

    @property
    def ratio(self) -> float:
        """Bytes on disk over dense bytes."""
        return self.file_bytes / self.dense_bytes if self.dense_bytes else 1.0


def size_report(directory: PathLike) -> SizeReport:
    """Bytes per tensor, dense and packed, from the index alone.

    Raises
    ------
    CheckpointError
        If the index is missing or broken.
    """
    index = read_index(directory)
    tensors = {
        name: TensorSize(e.kind, e.dense_bytes, e.packed_bytes, 1 - e.nonzeros / e.elements if e.elements else 0.0)
        for name, e in index.tensors.items()
    }
    totals = index.totals
    files = sum(shard.size for shard in index.shards.values()) + (Path(directory) / INDEX_NAME).stat().st_size
    return SizeReport(tensors, totals["dense_bytes"], totals["packed_bytes"], files)


def _decoded(directory: Path, index: Index) -> Iterator[tuple[str, Tensor]]:
    second_names: dict[str, list[str]] = {}
    for alias, of in index.aliases.items():
        second_names.setdefault(of, []).append(alias)
    for name, packed in _read(directory, index):
        tensor = packed.decode()
        for each in [name, *second_names.get(name, [])]:
            yield each, tensor


def _read(directory: Path, index: Index) -> Iterator[tuple[str, PackedTensor]]:
    for shard in index.shards:
        with _opened(directory / shard) as file:
            for name, entry in index.tensors.items():
                if entry.shard == shard:
                    yield name, _packed(file, name, entry)


def _packed(file: Any, name: str, entry: TensorEntry) -> PackedTensor:
    parts = {part: file.get_tensor(key) for part, key in part_keys(name, entry.kind).items()}
    packed = PackedTensor(entry.kind, entry.shape, DTYPES[entry.dtype], entry.nonzeros, parts, entry.pattern)
    return packed.validate(repr(name))


def _check_shards(directory: Path, index: Index, checksums: bool = True) -> None:
    """Existence, size, checksum and keys of every shard, before anything is read from one."""
    for name, shard in index.shards.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; fetch or write the checkpoint again")
        if (size := path.stat().st_size) != shard.size:
            raise CheckpointError(
                f"{path} has {size:,} bytes instead of {shard.size:,} (truncated or replaced); "
                f"fetch or write the checkpoint again"
            )
    for name, shard in index.shards.items() if checksums else ():
        if _sha256(directory / name) != shard.sha256:
            raise CheckpointError(
                f"{directory / name} was altered or damaged (its SHA-256 differs from {INDEX_NAME}); "
                f"fetch or write the checkpoint again"
            )
    for name in index.shards:
        expected = {
            key
            for tensor, entry in index.tensors.items()
            if entry.shard == name
            for key in part_keys(tensor, entry.kind).values()
        }
        with _opened(directory / name) as file:
            if differing := expected ^ set(file.keys()):
                raise CheckpointError(
                    f"{directory / name} does not hold what {INDEX_NAME} says (first difference: {min(differing)!r}); "
                    f"fetch or write the checkpoint again"
                )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); fetch or write the checkpoint again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

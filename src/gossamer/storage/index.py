"""``gossamer.json``: what a packed checkpoint consists of, and the checksums of everything in it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import gossamer
from gossamer.core.patterns import NM
from gossamer.errors import CheckpointError, ConfigurationError, PatternError
from gossamer.storage.atomic import PathLike, atomic_file
from gossamer.storage.groups import Groups
from gossamer.storage.packing import DTYPES, KINDS, Kind

FORMAT = "gossamer"
VERSION = 1
INDEX_NAME = "gossamer.json"

# a name of this form cannot lead out of the directory
_SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_CHECKSUM = "0" * 64


@dataclass(frozen=True)
class TensorEntry:
    """How one tensor is stored: its encoding, dense shape and dtype, non-zeros, shard and (kind nm) pattern."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    nonzeros: int
    shard: str
    pattern: NM | None = None

    @property
    def elements(self) -> int:
        """Elements of the dense tensor."""
        return prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.elements * DTYPES[self.dtype].itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes as stored."""
        itemsize = DTYPES[self.dtype].itemsize
        if self.pattern is not None:
            return Groups(self.shape, self.pattern).nbytes(itemsize)
        return self.dense_bytes if self.kind == "dense" else -(-self.elements // 8) + self.nonzeros * itemsize

    def to_json(self) -> dict[str, Any]:
        """Entry of the index."""
        entry = {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "nonzeros": self.nonzeros,
            "shard": self.shard,
        }
        if self.pattern is not None:
            entry |= {"n": self.pattern.n, "m": self.pattern.m, "dim": self.pattern.dim}
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> TensorEntry:
        """Read an entry.

        Raises
        ------
        ValueError
            If a field is missing or has an impossible value; the message names it.
        """
        kind, shape, dtype = _get(entry, "kind", str), _get(entry, "shape", list), _get(entry, "dtype", str)
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, known are {', '.join(KINDS)}")
        if any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
            raise ValueError(f"shape is {shape}, it must hold whole numbers >= 0")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, known are {', '.join(DTYPES)}")
        nonzeros = _get(entry, "nonzeros", int)
        if not 0 <= nonzeros <= prod(shape):
            raise ValueError(f"nonzeros is {nonzeros}, allowed are 0 to {prod(shape)} in shape {shape}")
        pattern = None
        if kind == "nm":
            try:
                pattern = NM(_get(entry, "n", int), _get(entry, "m", int), _get(entry, "dim", int))
                Groups(tuple(shape), pattern)
            except PatternError as error:
                raise ValueError(str(error)) from None
        return cls(kind, tuple(shape), dtype, nonzeros, _get(entry, "shard", str), pattern)


@dataclass(frozen=True)
class Shard:
    """Size in bytes and SHA-256 (lower-case hexadecimal) of a shard."""

    size: int
    sha256: str


@dataclass
class Index:
    """Content of ``gossamer.json``.

    Parameters
    ----------
    tensors
        Name → entry, in the order of writing.
    aliases
        Name → name of the stored tensor that it shares (tied weights).
    shards
        File name → size and checksum.
    settings
        How the model was made: free, whatever JSON can hold.
    """

    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All names, stored tensors and aliases."""
        return [*self.tensors, *self.aliases]

    @property
    def totals(self) -> dict[str, Any]:
        """Elements, non-zeros, sparsity, and bytes dense and packed, of all stored tensors together."""
        entries = self.tensors.values()
        elements, nonzeros = sum(e.elements for e in entries), sum(e.nonzeros for e in entries)
        return {
            "tensors": len(self.tensors),
            "elements": elements,
            "nonzeros": nonzeros,
            "sparsity": 1 - nonzeros / elements if elements else 0.0,
            "dense_bytes": sum(e.dense_bytes for e in entries),
            "packed_bytes": sum(e.packed_bytes for e in entries),
        }

    def resolve(self, name: str) -> str:
        """Name under which a tensor is stored: its own, or the one that it is an alias of."""
        return self.aliases.get(name, name)

    def write(self, directory: PathLike) -> None:
        """Write ``gossamer.json`` atomically.

        Raises
        ------
        ConfigurationError
            If the settings hold something that JSON cannot.
        OutputError
            If the file cannot be written.
        """
        tensors: dict[str, Any] = {name: entry.to_json() for name, entry in self.tensors.items()}
        tensors |= {name: {"kind": "alias", "of": of} for name, of in self.aliases.items()}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "checksum": _NO_CHECKSUM,
            "producer": f"gossamer {gossamer.__version__}",
            "settings": self.settings,
            "totals": self.totals,
            "shards": {name: {"size": shard.size, "sha256": shard.sha256} for name, shard in self.shards.items()},
            "tensors": tensors,
        }
        try:
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
            data = f"{text}\n".encode()
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"settings cannot be stored as JSON ({error}); use text, numbers, lists") from None
        digest = hashlib.sha256(data).hexdigest()
        with atomic_file(Path(directory) / INDEX_NAME, needed=len(data)) as part:
            # the checksum is the third key, so the first run of 64 zeros is its place
            part.write_bytes(data.replace(_NO_CHECKSUM.encode(), digest.encode(), 1))


def read_index(directory: PathLike) -> Index:
    """Read and check ``gossamer.json``; no shard is touched.

    Raises
    ------
    CheckpointError
        If it is missing, not JSON, altered (its checksum disagrees), of an unknown version, or contradicts itself.
    """
    path = Path(directory) / INDEX_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); name the directory of a model that gossamer saved"
        ) from None
    try:
        content = json.loads(data)
        if type(content) is not dict or content.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        version = _get(content, "version", int)
        if version == VERSION:
            _check_checksum(data, content)
            return _parse(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is broken: {error}; fetch or write the checkpoint again") from None
    raise CheckpointError(
        f"{path} has version {version} of the format, this gossamer reads {VERSION}; upgrade gossamer"
    )


def _check_checksum(data: bytes, content: Mapping[str, Any]) -> None:
    checksum = _get(content, "checksum", str)
    if not _SHA256.fullmatch(checksum):
        raise ValueError("its checksum is not 64 hexadecimal digits")
    if hashlib.sha256(data.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)).hexdigest() != checksum:
        raise ValueError("its checksum disagrees with its content, so it was altered or damaged")


def _parse(content: Mapping[str, Any]) -> Index:
    index = Index(settings=_get(content, "settings", dict))
    for name, shard in _get(content, "shards", dict).items():
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"shard name {name!r} is not of the form model-00001-of-00002.safetensors")
        index.shards[name] = Shard(_get(shard, "size", int), _get(shard, "sha256", str))
    for name, entry in _get(content, "tensors", dict).items():
        try:
            if type(entry) is dict and entry.get("kind") == "alias":
                index.aliases[name] = _get(entry, "of", str)
            else:
                index.tensors[name] = TensorEntry.from_json(entry)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from None
    _check_references(index, _get(content, "totals", dict))
    return index


def _check_references(index: Index, totals: Mapping[str, Any]) -> None:
    for name, entry in index.tensors.items():
        if entry.shard not in index.shards:
            raise ValueError(f"tensor {name!r} lies in shard {entry.shard!r}, which is not listed")
    for name, of in index.aliases.items():
        if of not in index.tensors:
            raise ValueError(f"alias {name!r} names {of!r}, which is not stored")
    for key, value in index.totals.items():
        if type(value) is int and totals.get(key) != value:
            raise ValueError(f"totals.{key} is {totals.get(key)!r}, the tensors add up to {value}")


def _get(mapping: Any, key: str, kind: type) -> Any:
    """A field of exactly this type (True is no int)."""
    if type(mapping) is not dict:
        raise ValueError(f"{mapping!r:.60} stands where an object with {key!r} is expected")
    value = mapping.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key} is {value!r:.60}, it must be of type {kind.__name__}")
    return value

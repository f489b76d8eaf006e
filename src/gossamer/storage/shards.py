"""Safetensors files of bounded size, written one after the other."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.storage.atomic import PathLike, atomic_file


class ShardWriter:
    """Collects tensors and writes a shard whenever the next tensor would make it too large.

    At most one shard is held in memory. How many there will be is known only at the end, so the files get their
    final names in :meth:`finish`.

    Parameters
    ----------
    directory
        An existing directory; best one from :func:`gossamer.storage.atomic_directory`.
    max_bytes
        Largest size of a shard. A larger single entry gets a shard of its own.
    metadata
        Text pairs for the header of each file.
    """

    def __init__(self, directory: PathLike, max_bytes: int, metadata: dict[str, str]):
        if max_bytes < 1:
            raise ConfigurationError(f"max_shard_bytes is {max_bytes}; it must be at least 1, such as 2 * 1024**3")
        self._directory = Path(directory)
        self._max_bytes = max_bytes
        self._metadata = metadata
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._keys: set[str] = set()
        self._written: list[Path] = []

    @property
    def pending_bytes(self) -> int:
        """Bytes held in memory."""
        return self._pending_bytes

    def add(self, parts: dict[str, Tensor]) -> int:
        """Add tensors that belong into the same shard; return the number of that shard, from 0.

        Raises
        ------
        ConfigurationError
            If a key was added before.
        OutputError
            If a shard cannot be written.
        """
        if taken := self._keys & set(parts):
            raise ConfigurationError(f"{min(taken)!r} is stored twice; give every tensor a name of its own")
        size = sum(part.numel() * part.element_size() for part in parts.values())
        if self._pending and self._pending_bytes + size > self._max_bytes:
            self._flush()
        self._pending |= parts
        self._pending_bytes += size
        self._keys |= set(parts)
        return len(self._written)

    def finish(self, single: str | None = None) -> list[Path]:
        """Write what is pending, name the shards ``model-00001-of-0000N.safetensors``, and return their paths.

        Parameters
        ----------
        single
            Name to use if there is only one shard.
        """
        if self._pending:
            self._flush()
        total, final = len(self._written), []
        for number, path in enumerate(self._written, start=1):
            name = f"model-{number:05d}-of-{total:05d}.safetensors"
            final.append(path.with_name(single if single and total == 1 else name))
            os.replace(path, final[-1])
        return final

    def _flush(self) -> None:
        path = self._directory / f"shard-{len(self._written) + 1:05d}.unfinished"
        with atomic_file(path, needed=self._pending_bytes) as part:
            save_file(self._pending, part, metadata=self._metadata)
        self._written.append(path)
        self._pending, self._pending_bytes = {}, 0

"""What makes pruning resumable: every finished block goes to a file of its own before the next one starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core.masks import pack_bits, unpack_bits
from gossamer.core.targets import Target
from gossamer.errors import CheckpointError, OutputError


@dataclass(frozen=True)
class Journal:
    """Finished blocks of one pruning run. Without a directory it keeps nothing and remembers nothing."""

    directory: Path | None
    fingerprint: str = ""

    @classmethod
    def open(
        cls,
        directory: str | Path | None,
        settings: Mapping[str, Any],
        batches: Sequence[Any] | None,
        targets: Sequence[Target],
    ) -> Journal:
        """Start or continue a journal.

        Raises
        ------
        OutputError
            If the directory belongs to a run with other settings, data or model, or cannot be made.
        """
        if directory is None:
            return cls(None)
        directory = Path(directory)
        fingerprint = _fingerprint(settings, batches, targets)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot create the workspace {directory}: {error.strerror}") from error
        marker = directory / "run.json"
        if marker.exists():
            try:
                other = json.loads(marker.read_text())["fingerprint"]
            except (ValueError, KeyError) as error:
                raise CheckpointError(f"{marker} is damaged; delete the directory to start again") from error
            if other != fingerprint:
                raise OutputError(
                    f"{directory} holds an unfinished run with other settings, data or model; "
                    f"delete it or choose another directory"
                )
        else:
            _write(
                marker,
                json.dumps({"fingerprint": fingerprint, "settings": dict(settings)}, indent=1).encode(),
            )
        return cls(directory, fingerprint)

    def keep(self, name: str, entries: Mapping[Target, tuple[Tensor, dict[str, Any]]]) -> None:
        """Store the weights, masks and reports of a finished block.

        Raises
        ------
        OutputError
            If the disk is full; what was stored before stays usable.
        """
        if self.directory is None:
            return
        tensors, reports = {}, {}
        for target, (mask, report) in entries.items():
            tensors[f"{target.name}:weight"] = target.matrix().cpu().contiguous()
            tensors[f"{target.name}:mask"] = pack_bits(mask)
            reports[target.name] = report
        temporary = self._file(name).with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"reports": json.dumps(reports)})
            os.replace(temporary, self._file(name))
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OutputError(
                f"cannot store block {name!r} in {self.directory}: {error}; free some space and run again"
            ) from error

    def restore(self, name: str, targets: Sequence[Target]) -> dict[Target, tuple[Tensor, dict[str, Any]]]:
        """Put a finished block's weights back, and return its masks and reports; empty if it is not there.

        Raises
        ------
        CheckpointError
            If the stored block is damaged.
        """
        if self.directory is None or not self._file(name).exists():
            return {}
        found = {}
        try:
            with safe_open(self._file(name), framework="pt") as file:
                reports = json.loads(file.metadata()["reports"])
                for target in targets:
                    mask = unpack_bits(file.get_tensor(f"{target.name}:mask"), target.shape)
                    found[target] = (mask, reports[target.name])
                for target in targets:
                    with torch.no_grad():
                        target.matrix().copy_(file.get_tensor(f"{target.name}:weight"))
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{self._file(name)} is damaged ({error}); delete it to prune that block again"
            ) from error
        return found

    def _file(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"done-{name or 'model'}.safetensors"


def _fingerprint(settings: Mapping[str, Any], batches: Sequence[Any] | None, targets: Sequence[Target]) -> str:
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True, default=str).encode())
    for target in targets:
        digest.update(f"{target.name}{tuple(target.shape)}{target.parameter.dtype}".encode())
        if not target.parameter.is_meta:
            digest.update(_sample(target.matrix()))
    for batch in batches or ():
        for tensor in _tensors(batch):
            digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // 4096)].double().cpu().numpy().tobytes()


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return [value for value in values if isinstance(value, Tensor)]


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)

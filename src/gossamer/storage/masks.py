"""A :class:`~gossamer.core.masks.MaskSet` as one safetensors file, with a checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gossamer.core.masks import MaskSet
from gossamer.errors import CheckpointError
from gossamer.storage.atomic import PathLike, atomic_file

FORMAT = "gossamer-masks"
VERSION = "1"


def save_masks(masks: MaskSet, path: PathLike) -> None:
    """Write masks atomically, one bit a weight; an existing file is replaced.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    state = {key: part.cpu().contiguous() for key, part in masks.state_dict().items()}
    metadata = {"format": FORMAT, "version": VERSION, "sha256": _digest(state)}
    with atomic_file(path, needed=sum(part.numel() * part.element_size() for part in state.values())) as part:
        save_file(state, part, metadata=metadata)


def load_masks(path: PathLike) -> MaskSet:
    """Read masks and check their checksum.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, altered, not a mask file or of an unknown version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as masks ({error}); fetch or write the file again") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a file of masks; name one that save_masks wrote")
    if metadata.get("version") != VERSION:
        found = metadata.get("version")
        raise CheckpointError(
            f"{path} has version {found} of the format, this gossamer reads {VERSION}; upgrade gossamer"
        )
    if metadata.get("sha256") != _digest(state):
        raise CheckpointError(f"{path} was altered or damaged (its checksum differs); fetch or write the file again")
    return MaskSet.from_state_dict(state)


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the keys in sorted order, each with a zero byte and the bytes of its tensor after it."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + b"\0")
        digest.update(state[key].numpy().tobytes())
    return digest.hexdigest()

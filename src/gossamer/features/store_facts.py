"""What a store of activations says of itself, and the file in which it says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.storage.atomic import write_json

VERSION = 2
_READABLE = (1, 2)  # the first had no gradients
MANIFEST = "store.json"


@dataclass(frozen=True)
class StoreFacts:
    """What a store says of itself.

    Attributes
    ----------
    model
        Fingerprint of the model: :func:`gossamer.features.store.model_fingerprint`.
    site
        Name of the module whose output it holds.
    size
        Numbers of an activation.
    dtype
        ``float16`` or ``float32``, as stored.
    text
        Fingerprint of the token ids.
    documents
        Of the text; all of them, or of those up to which an interrupted capture came.
    done
        Documents that are in the store.
    rows
        Activations in the store.
    skipped
        First tokens of every document that are left out.
    gradients
        Whether the gradient of the model's loss is stored with every activation.
    """

    model: str
    site: str
    size: int
    dtype: str
    text: str
    documents: int
    done: int
    rows: int
    skipped: int
    gradients: bool = False


def text_fingerprint(texts: Sequence[Tensor]) -> str:
    """A short text that changes with any token id of documents ``(1, tokens)``, and with where they end."""
    found = hashlib.sha256()
    for text in texts:
        found.update(str(text.shape[1]).encode())
        found.update(text.numpy().astype(np.int32).tobytes())
    return found.hexdigest()[:16]


def write_facts(folder: Path, facts: StoreFacts) -> None:
    """Replace what the store in a directory says of itself."""
    write_json(folder / MANIFEST, {"format": "gossamer activations", "version": VERSION, **asdict(facts)})


def read_facts(folder: Path) -> StoreFacts:
    """What the store in a directory says of itself.

    Raises
    ------
    CheckpointError
        If there is no store, it is damaged, or was written by a newer version.
    """
    file = folder / MANIFEST
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no store of activations ({error}); capture one first") from error
    if not isinstance(said, dict) or said.pop("format", None) != "gossamer activations":
        raise CheckpointError(f"{file} does not describe a store of activations; capture one first")
    version = said.pop("version", None)
    if version not in _READABLE:
        raise CheckpointError(f"{file} is of version {version}, this gossamer reads up to {VERSION}; update gossamer")
    try:
        return StoreFacts(**said)
    except TypeError as error:
        raise CheckpointError(f"{file} is damaged ({error}); capture again") from error

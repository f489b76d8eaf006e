"""What a cache of latents says of itself: which model, place, autoencoder and text it is of, and how far it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import nn

from gossamer.errors import CheckpointError, ModelError
from gossamer.features.store import find_site, model_fingerprint
from gossamer.storage.atomic import write_json

VERSION = 1
MANIFEST = "latents.json"
TYPES: dict[str, type[np.floating]] = {"float32": np.float32, "float16": np.float16}
_FORMAT = "gossamer latents"


@dataclass(frozen=True)
class Shard:
    """A stretch of the corpus.

    Attributes
    ----------
    documents
        In it, one after the other.
    rows
        Tokens that have codes.
    entries
        Occurrences of features.
    """

    documents: int
    rows: int
    entries: int


@dataclass(frozen=True)
class LatentFacts:
    """What a cache says of itself.

    Attributes
    ----------
    model, site, encoder
        Fingerprint of the model, name of the module, and fingerprint of what encoded its output:
        :func:`encoder_fingerprint`.
    features
        Width of the dictionary.
    dtype
        ``float16`` or ``float32``, of values.
    text
        Fingerprint of the token ids.
    documents
        Of the text.
    skipped
        First tokens of every document that have no codes.
    shards
        What has been written so far.
    """

    model: str
    site: str
    encoder: str
    features: int
    dtype: str
    text: str
    documents: int
    skipped: int
    shards: tuple[Shard, ...] = ()

    @property
    def done(self) -> int:
        """Documents that have been written."""
        return sum(shard.documents for shard in self.shards)

    @property
    def rows(self) -> int:
        """Tokens that have codes."""
        return sum(shard.rows for shard in self.shards)

    @property
    def entries(self) -> int:
        """Occurrences of features."""
        return sum(shard.entries for shard in self.shards)


def encoder_fingerprint(encoder: nn.Module) -> str:
    """A short text that changes when a weight of an autoencoder does, its scale, or a threshold of its rule."""
    found = hashlib.sha256(model_fingerprint(encoder).encode())
    for name, buffer in encoder.named_buffers():
        flat = buffer.detach().flatten()
        found.update(name.encode() + flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy().tobytes())
    settings = getattr(encoder, "settings", None)
    found.update(json.dumps(settings() if callable(settings) else None, sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def check_origin(
    directory: Path, facts: LatentFacts, model: nn.Module | None, site: str | int | None, encoder: nn.Module | None
) -> None:
    """Refuse a cache of another model, place or autoencoder than those given.

    Raises
    ------
    ModelError
        Naming what differs.
    """
    if model is not None and facts.model != model_fingerprint(model):
        raise ModelError(f"{directory} holds latents of another model; make those of this one elsewhere")
    if encoder is not None and facts.encoder != encoder_fingerprint(encoder):
        raise ModelError(f"{directory} holds latents of another autoencoder; make those of this one elsewhere")
    if site is not None:
        wanted = site if model is None or isinstance(site, str) else find_site(model, site)[0]
        if facts.site != wanted:
            raise ModelError(f"{directory} holds latents of {facts.site!r}, not of {wanted!r}; make those elsewhere")


def write_facts(folder: Path, facts: LatentFacts) -> None:
    """Put down what a cache says of itself; whatever lies behind what this counts is not there."""
    write_json(folder / MANIFEST, {"format": _FORMAT, "version": VERSION, **asdict(facts)})


def read_facts(folder: Path) -> LatentFacts:
    """What a cache says of itself.

    Raises
    ------
    CheckpointError
        If there is none, it is damaged, or of a newer version.
    """
    file = folder / MANIFEST
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no cache of latents ({error}); make one first") from error
    if not isinstance(said, dict) or said.pop("format", None) != _FORMAT:
        raise CheckpointError(f"{file} does not describe a cache of latents; make one first")
    version = said.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{file} is of version {version}, this gossamer reads {VERSION}; update gossamer")
    try:
        facts = LatentFacts(**{**said, "shards": tuple(Shard(**shard) for shard in said["shards"])})
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); make the cache again") from error
    if facts.dtype not in TYPES:
        raise CheckpointError(f"{file} is damaged (dtype {facts.dtype!r}); make the cache again")
    return facts

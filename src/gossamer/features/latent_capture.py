"""Filling a cache of latents: a model and an autoencoder over a corpus, once, going on where it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CalibrationError, ConfigurationError, ModelError, NonFiniteError, OutputError
from gossamer.features.latent_cache import SHARD, LatentCache
from gossamer.features.latent_facts import (
    MANIFEST,
    TYPES,
    LatentFacts,
    Shard,
    encoder_fingerprint,
    read_facts,
    write_facts,
)
from gossamer.features.splicing import edited
from gossamer.features.store import ActivationStore, find_site, model_fingerprint
from gossamer.features.store_facts import text_fingerprint
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import run_batch


class Encoder(Protocol):
    """What makes sparse codes of activations: an :class:`~gossamer.features.sae.SAE`, or any module with `encode`."""

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of activations ``(tokens, size)``, a row for each."""
        ...


def cache_latents(
    model: nn.Module,
    documents: Sequence[Tensor],
    site: str | int,
    encoder: Encoder,
    directory: Path | str,
    dtype: str = "float16",
    skip_first: int = 1,
    shard: int = SHARD,
    progress: bool = True,
) -> LatentCache:
    """Run a model over documents and store which features are active at every token.

    An interrupted run goes on with the first document that is not stored; a finished cache is opened.

    Parameters
    ----------
    model
        A language model of Hugging Face, or any that is called with token ids.
    documents
        Token ids, each ``(tokens,)`` or ``(1, tokens)``; 10 million tokens in documents of 256 are usual.
    site
        Name of the module whose output is explained, or number of the block.
    encoder
        An autoencoder, or any module with its `encode`. In evaluation mode, so that tokens do not depend on each
        other.
    directory
        Where; is created.
    dtype
        Of values: ``float16`` or ``float32``.
    skip_first
        Tokens without codes at the beginning of every document, as in the store that the autoencoder was trained on.
    shard
        Tokens of a shard at most, up to 65,536: so much is done again after an interruption.
    progress
        Whether to show a progress bar.

    Raises
    ------
    UnknownNameError
        If there is no such module.
    CalibrationError
        If there is no text, or a document is longer than a shard.
    ModelError, CheckpointError, OutputError
        If the directory holds the cache of another model, place, autoencoder or text, or something else.
    NonFiniteError
        If a value is NaN or infinite, or too large for float16.
    """
    name, _ = find_site(model, site)
    texts = [document.reshape(1, -1) for document in documents]

    def activations(number: int) -> Tensor:
        found: list[Tensor] = []

        def watch(x: Tensor) -> Tensor:
            found.append(x[0, skip_first:])
            return x

        with evaluation_mode(model), edited(model, name, watch):
            run_batch(model, texts[number])
        if len(found) != 1:
            raise ModelError(f"{name} is called {len(found)} times for a text; choose a module that is called once")
        return found[0]

    return _fill(
        model_fingerprint(model), name, texts, activations, encoder, directory, dtype, skip_first, shard, progress
    )


def cache_of_store(
    store: ActivationStore,
    documents: Sequence[Tensor],
    encoder: Encoder,
    directory: Path | str,
    dtype: str = "float16",
    shard: int = SHARD,
    progress: bool = True,
) -> LatentCache:
    """The same from activations that are stored already, without running the model.

    Parameters
    ----------
    store
        Of all these documents.
    documents
        Those that the store was captured of.
    encoder, directory, dtype, shard, progress
        As in :func:`cache_latents`.

    Raises
    ------
    ModelError
        If the store is of another text, or unfinished.
    """
    texts = [document.reshape(1, -1) for document in documents]
    facts = store.facts
    if facts.text != text_fingerprint(texts) or facts.done != len(texts):
        raise ModelError(
            f"{store.directory} is not the finished store of these {len(texts)} documents; give those it was made of"
        )
    first = np.searchsorted(store.documents, np.arange(len(texts) + 1))

    def activations(number: int) -> Tensor:
        return store[slice(int(first[number]), int(first[number + 1]))]

    return _fill(facts.model, facts.site, texts, activations, encoder, directory, dtype, facts.skipped, shard, progress)


def _fill(
    model: str,
    site: str,
    texts: list[Tensor],
    activations: Callable[[int], Tensor],
    encoder: Any,
    directory: Path | str,
    dtype: str,
    skipped: int,
    shard: int,
    progress: bool,
) -> LatentCache:
    _check(texts, dtype, skipped, shard)
    folder = Path(directory)
    asked = LatentFacts(
        model, site, encoder_fingerprint(encoder), 0, dtype, text_fingerprint(texts), len(texts), skipped
    )
    facts = _begin(folder, asked, texts)
    with evaluation_mode(encoder):
        numbers = track(range(facts.done, len(texts)), "caching latents", enabled=progress)
        encoded = (_codes(encoder, activations(number), number) for number in numbers)
        for parts in _shards(encoded, shard):
            facts = _append(folder, facts, parts)
    return LatentCache(folder)


def _check(texts: list[Tensor], dtype: str, skipped: int, shard: int) -> None:
    if dtype not in TYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; it must be one of {', '.join(TYPES)}")
    if skipped < 0 or not 1 <= shard <= SHARD:
        raise ConfigurationError(
            f"skip_first is {skipped} and shard {shard}; the first must be at least 0, the second from 1 to {SHARD:,}"
        )
    if not any(text.shape[1] > skipped for text in texts):
        raise CalibrationError(f"no document has more than the {skipped} tokens that are left out; give longer ones")
    longest = max(text.shape[1] for text in texts)
    if longest - skipped > shard:
        raise CalibrationError(f"a document has {longest:,} tokens and a shard holds {shard:,}; cut it into pieces")


def _codes(encoder: Any, x: Tensor, number: int) -> SparseCodes | None:
    """Codes of a document, or None if all of its tokens are left out."""
    if not len(x):
        return None
    parameter = next(iter(encoder.parameters()), None) if isinstance(encoder, nn.Module) else None
    codes: SparseCodes = encoder.encode(x if parameter is None else x.to(parameter.device, parameter.dtype))
    if len(codes) != len(x):
        raise ModelError(f"the autoencoder makes {len(codes)} codes of {len(x)} tokens; it must make one for each")
    values = codes.values.detach().float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f"a value in document {number} is NaN or infinite; the model or the autoencoder is damaged"
        )
    return SparseCodes(codes.indices.cpu(), values, codes.starts.cpu(), codes.width)


def _shards(encoded: Iterator[SparseCodes | None], limit: int) -> Iterator[list[SparseCodes | None]]:
    """Documents together as long as they fit into a shard."""
    part: list[SparseCodes | None] = []
    rows = 0
    for codes in encoded:
        more = 0 if codes is None else len(codes)
        if rows + more > limit:
            yield part
            part, rows = [], 0
        part.append(codes)
        rows += more
    if part:
        yield part


def _begin(folder: Path, asked: LatentFacts, texts: list[Tensor]) -> LatentFacts:
    if (folder / MANIFEST).exists():
        facts = read_facts(folder)
        for key in ("model", "site", "encoder", "dtype", "text", "skipped"):
            found, wanted = getattr(facts, key), getattr(asked, key)
            if found != wanted:
                what = "autoencoder" if key == "encoder" else key
                raise ModelError(
                    f"{folder} holds latents of another {what} ({found}, not {wanted}); choose another directory"
                )
        return facts
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is not an empty directory and holds no cache; choose another directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another directory") from None
    offsets = np.cumsum([0, *(text.shape[1] for text in texts)], dtype=np.int64)
    (folder / "documents.bin").write_bytes(offsets.tobytes())
    (folder / "tokens.bin").write_bytes(np.concatenate([text[0].numpy() for text in texts]).astype(np.int32).tobytes())
    write_facts(folder, asked)
    return asked


def _append(folder: Path, facts: LatentFacts, parts: list[SparseCodes | None]) -> LatentFacts:
    codes = _together(parts, facts.features)
    kept = codes.values != 0
    features, rows, values = (part[kept].numpy() for part in (codes.indices.long(), codes.row_of, codes.values))
    order = np.argsort(features, kind="stable")
    starts = np.zeros(codes.width + 1, np.uint32)
    np.cumsum(np.bincount(features, minlength=codes.width), out=starts[1:])
    _write(folder / "starts.bin", len(facts.shards) * len(starts), starts)
    _write(folder / "rows.bin", facts.entries, rows[order].astype(np.uint16))
    _write(folder / "values.bin", facts.entries, _rounded(values[order], facts.dtype))
    shard = Shard(len(parts), len(codes), len(rows))
    facts = replace(facts, features=codes.width, shards=(*facts.shards, shard))
    write_facts(folder, facts)
    return facts


def _together(parts: list[SparseCodes | None], width: int) -> SparseCodes:
    there = [part for part in parts if part is not None]
    if not there:  # what is left behind an interruption is too short to have codes
        none = torch.zeros(0, dtype=torch.int32)
        return SparseCodes(none, none.float(), torch.zeros(1, dtype=torch.int64), width)
    codes = SparseCodes.cat(there)
    if width not in (0, codes.width):
        raise ModelError(f"codes have {codes.width} features here and {width} before; the autoencoder is damaged")
    return codes


def _write(file: Path, begin: int, numbers: np.ndarray) -> None:
    """Put numbers behind the first `begin` of a file; what an interrupted run left there is cut off."""
    with file.open("r+b" if file.exists() else "w+b") as opened:
        opened.truncate(begin * numbers.itemsize)
        opened.seek(0, 2)
        opened.write(numbers.tobytes())


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as they are stored: none becomes zero, and none infinite."""
    kind = TYPES[dtype]
    largest = float(np.abs(values).max(initial=0))
    if largest > float(np.finfo(kind).max):
        raise NonFiniteError(f"a value of {largest:.3g} is too large for {dtype}; cache with dtype='float32'")
    stored = values.astype(kind)
    least = np.finfo(kind).smallest_subnormal
    return np.where(stored == 0, np.copysign(least, values), stored).astype(kind)

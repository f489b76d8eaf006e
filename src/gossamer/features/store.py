"""Activations of one place in a model, captured once and shared by everything that is trained on them.

Capturing costs a run of the model over the text, which is most of what any study of features costs. So it is done once
into a directory, and goes on where it was interrupted. What is read back is mapped into memory and not loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    ModelError,
    NonFiniteError,
    OutputError,
    UnknownNameError,
)
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import find_stacks, run_batch
from gossamer.storage.atomic import write_json

VERSION = 1
_TYPES = {"float32": np.float32, "float16": np.float16}
_PARTS = {"tokens": np.int32, "documents": np.int32, "positions": np.int32}
_MANIFEST = "store.json"
_BLOCK = 256  # tokens that stay together when a store is shuffled


@dataclass(frozen=True)
class StoreFacts:
    """What a store says of itself.

    Attributes
    ----------
    model
        Fingerprint of the model: :func:`model_fingerprint`.
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


class ActivationStore:
    """A directory of activations, mapped into memory.

    Parameters
    ----------
    directory
        What :func:`capture` has written.
    model, site
        If given, the store must be of this model and place.

    Attributes
    ----------
    facts
        What it says of itself.
    tokens, documents, positions
        For every activation its token id, the number of its document, and its position there; int32 arrays.

    Raises
    ------
    CheckpointError
        If there is no store, it is damaged, or was written by a newer version.
    ModelError
        If it is of another model or another place.
    """

    def __init__(self, directory: Path | str, model: nn.Module | None = None, site: str | int | None = None):
        self.directory = Path(directory)
        self.facts = facts = _read_facts(self.directory)
        if model is not None and facts.model != model_fingerprint(model):
            raise ModelError(f"{directory} holds activations of another model; capture those of this one elsewhere")
        if site is not None:
            wanted = site if model is None or isinstance(site, str) else find_site(model, site)[0]
            if facts.site != wanted:
                raise ModelError(f"{directory} holds activations of {facts.site!r}, not of {wanted!r}; capture them")
        self._activations = self._map("activations", _TYPES[facts.dtype], (facts.rows, facts.size))
        self.tokens, self.documents, self.positions = (
            self._map(name, kind, (facts.rows,)) for name, kind in _PARTS.items()
        )

    def _map(self, name: str, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
        file = self.directory / f"{name}.bin"
        needed = int(np.prod(shape)) * np.dtype(kind).itemsize
        size = file.stat().st_size if file.exists() else 0
        if size < needed:
            raise CheckpointError(f"{file} has {size} bytes of {needed}; the store is damaged, capture again")
        return np.memmap(file, kind, "r", shape=shape) if needed else np.zeros(shape, kind)

    def __len__(self) -> int:
        return self.facts.rows

    def __getitem__(self, rows: slice | Tensor | np.ndarray) -> Tensor:
        """Activations ``(rows, size)``, float32."""
        chosen = rows.numpy() if isinstance(rows, Tensor) else rows
        return torch.from_numpy(np.asarray(self._activations[chosen], dtype=np.float32))

    def batches(self, size: int, seed: int = 0, begin: int = 0) -> Iterator[Tensor]:
        """Shuffled batches of activations ``(size, d)``, epoch after epoch, without end.

        Runs of 256 activations stay together while they are read and are mixed with many other runs, so that a disk is
        read in stretches. Batch number i is the same for the same seed, wherever one begins.

        Parameters
        ----------
        size
            Activations of a batch; the last few of an epoch are left out.
        seed
            Of the order.
        begin
            Number of the first batch.

        Raises
        ------
        ConfigurationError
            If the store has fewer activations than a batch.
        """
        if not 0 < size <= len(self):
            raise ConfigurationError(
                f"batch size is {size}; it must be from 1 to the {len(self)} activations there are"
            )
        each = len(self) // size
        epoch, skip = divmod(begin, each)
        while True:
            order = self._order(seed, epoch)
            for number in range(skip, each):
                yield self[np.sort(order[number * size : (number + 1) * size])]
            epoch, skip = epoch + 1, 0

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        draw = np.random.default_rng((seed, epoch))
        runs = draw.permutation(-(-len(self) // _BLOCK))
        rows = (runs[:, None] * _BLOCK + np.arange(_BLOCK)).ravel()
        rows = rows[rows < len(self)]
        mixed = max(64 * _BLOCK, 1)  # what lies within so many places of each other is mixed
        for first in range(0, len(rows), mixed):
            draw.shuffle(rows[first : first + mixed])
        return rows

    def __repr__(self) -> str:
        facts = self.facts
        return f"ActivationStore({facts.rows:,} × {facts.size} of {facts.site}, {facts.dtype}, {self.directory})"


def find_site(model: nn.Module, site: str | int) -> tuple[str, nn.Module]:
    """A module by name, or the block of a number.

    Raises
    ------
    UnknownNameError
        If there is none; suggests the nearest.
    """
    if isinstance(site, int):
        blocks = next((stack.blocks for stack in find_stacks(model)), {})
        if not 0 <= site < len(blocks):
            known = f"0 to {len(blocks) - 1}" if blocks else "none"
            raise UnknownNameError("layer", str(site), [known])
        return list(blocks.items())[site]
    modules = dict(model.named_modules())
    if site not in modules:
        raise UnknownNameError("layer", site, [name for name in modules if name])
    return site, modules[site]


def model_fingerprint(model: nn.Module) -> str:
    """A short text that changes when a weight of the model does, or its shape or name."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu().numpy()
        found.update(f"{name}{tuple(parameter.shape)}".encode())
        found.update(sample.tobytes())
    return found.hexdigest()[:16]


def capture(
    model: nn.Module,
    documents: Sequence[Tensor],
    site: str | int,
    directory: Path | str,
    dtype: str = "float16",
    skip_first: int = 1,
    progress: bool = True,
) -> ActivationStore:
    """Run a model over documents and store what a module puts out, for every token.

    An interrupted capture goes on with the first document that is not in the store yet; a finished one is opened.

    Parameters
    ----------
    model
        A language model of Hugging Face, or any that is called with token ids.
    documents
        Token ids, each ``(tokens,)`` or ``(1, tokens)``.
    site
        Name of the module, or number of the block.
    directory
        Where; is created.
    dtype
        ``float16`` or ``float32``. Activations that float16 cannot hold are refused.
    skip_first
        Tokens left out at the beginning of every document: the first is where attention goes that has nowhere to go,
        and is many times larger than all others.
    progress
        Whether to show a progress bar.

    Raises
    ------
    UnknownNameError
        If there is no such module.
    CalibrationError
        If there is no text, or no document is longer than what is skipped.
    ModelError, CheckpointError, OutputError
        If the directory holds the store of another model, place or text, or something else.
    NonFiniteError
        If an activation is NaN or infinite, or too large for float16.
    """
    if dtype not in _TYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; it must be one of {', '.join(_TYPES)}")
    if skip_first < 0:
        raise ConfigurationError(f"skip_first is {skip_first}; it must be 0 or more")
    name, module = find_site(model, site)
    texts = [document.reshape(1, -1) for document in documents]
    if not any(text.shape[1] > skip_first for text in texts):
        raise CalibrationError(f"no document has more than the {skip_first} tokens that are left out; give longer ones")
    folder = Path(directory)
    facts = _begin(folder, model_fingerprint(model), name, dtype, texts, skip_first)
    if facts.done < len(texts):
        facts = _append(folder, facts, model, module, texts, progress)
    return ActivationStore(folder)


def _begin(folder: Path, model: str, site: str, dtype: str, texts: list[Tensor], skipped: int) -> StoreFacts:
    text = _text_fingerprint(texts)
    if (folder / _MANIFEST).exists():
        facts = _read_facts(folder)
        asked = {"model": model, "site": site, "dtype": dtype, "text": text, "skipped": skipped}
        for key, value in asked.items():
            if getattr(facts, key) != value:
                raise ModelError(
                    f"{folder} holds activations of another {key} ({getattr(facts, key)}, not {value}); "
                    "choose another directory"
                )
        return facts
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty and holds no store; choose another directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another directory") from None
    return StoreFacts(model, site, 0, dtype, text, len(texts), 0, 0, skipped)


def _append(
    folder: Path, facts: StoreFacts, model: nn.Module, module: nn.Module, texts: list[Tensor], progress: bool
) -> StoreFacts:
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(keep)
    files = {name: _opened(folder / f"{name}.bin", facts, name) for name in ("activations", *_PARTS)}
    try:
        with evaluation_mode(model):
            for number in track(range(facts.done, len(texts)), "capturing activations", enabled=progress):
                outputs.clear()
                run_batch(model, texts[number])
                found = _activations(outputs, texts[number], facts)
                rows = len(found)
                parts = {
                    "activations": found,
                    "tokens": texts[number][0, facts.skipped :].numpy().astype(np.int32),
                    "documents": np.full(rows, number, np.int32),
                    "positions": np.arange(facts.skipped, facts.skipped + rows, dtype=np.int32),
                }
                for name, part in parts.items():
                    files[name].write(part.tobytes())
                    files[name].flush()
                size = found.shape[1] if rows else facts.size
                changed = {"size": size, "done": number + 1, "rows": facts.rows + rows}
                facts = StoreFacts(**{**asdict(facts), **changed})
                _write_facts(folder, facts)
    finally:
        handle.remove()
        for file in files.values():
            file.close()
    return facts


def _activations(outputs: list[Tensor], text: Tensor, facts: StoreFacts) -> np.ndarray:
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].shape[:2] != text.shape:
        shape = tuple(outputs[0].shape) if outputs and isinstance(outputs[0], Tensor) else "nothing"
        raise ModelError(
            f"{facts.site} puts out {shape} for {text.shape[1]} tokens, {len(outputs)} times; choose a module that "
            "puts out one activation for each token"
        )
    found = outputs[0][0, facts.skipped :].float().cpu()
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(f"{facts.site}: an activation is NaN or infinite; the model is damaged")
    stored = found.numpy().astype(_TYPES[facts.dtype])
    if not np.isfinite(stored).all():
        raise NonFiniteError(
            f"{facts.site}: an activation of {float(found.abs().max()):.3g} is too large for float16; "
            "capture with dtype='float32'"
        )
    return stored


def _opened(file: Path, facts: StoreFacts, name: str) -> Any:
    """A file open at the end of what the manifest counts; what an interrupted run wrote behind it is cut off."""
    width = facts.size * np.dtype(_TYPES[facts.dtype]).itemsize if name == "activations" else 4
    opened = file.open("r+b" if file.exists() else "w+b")
    opened.truncate(facts.rows * width)
    opened.seek(0, 2)
    return opened


def _text_fingerprint(texts: list[Tensor]) -> str:
    found = hashlib.sha256()
    for text in texts:
        found.update(str(text.shape[1]).encode())
        found.update(text.numpy().astype(np.int32).tobytes())
    return found.hexdigest()[:16]


def _write_facts(folder: Path, facts: StoreFacts) -> None:
    write_json(folder / _MANIFEST, {"format": "gossamer activations", "version": VERSION, **asdict(facts)})


def _read_facts(folder: Path) -> StoreFacts:
    file = folder / _MANIFEST
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no store of activations ({error}); capture one first") from error
    if not isinstance(said, dict) or said.pop("format", None) != "gossamer activations":
        raise CheckpointError(f"{file} does not describe a store of activations; capture one first")
    version = said.pop("version", None)
    if version != VERSION:
        raise CheckpointError(f"{file} is of version {version}, this gossamer reads {VERSION}; update gossamer")
    try:
        return StoreFacts(**said)
    except TypeError as error:
        raise CheckpointError(f"{file} is damaged ({error}); capture again") from error

"""Activations of one place in a model, captured once and shared by everything that is trained on them.

Capturing costs a run of the model over the text, which is most of what any study of features costs. So it is done once
into a directory, and goes on where it was interrupted. What is read back is mapped into memory and not loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
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
from gossamer.features.gradients import loss_gradient
from gossamer.features.store_facts import MANIFEST, StoreFacts, read_facts, text_fingerprint, write_facts
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import find_stacks, run_batch

_TYPES = {"float32": np.float32, "float16": np.float16}
_PARTS = {"tokens": np.int32, "documents": np.int32, "positions": np.int32}
_BLOCK = 256  # tokens that stay together when a store is shuffled


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
        self.facts = facts = read_facts(self.directory)
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
        if facts.gradients:
            self._directions = self._map("gradients", _TYPES[facts.dtype], (facts.rows, facts.size))
            self._lengths = self._map("lengths", np.float32, (facts.rows,))

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
        return torch.from_numpy(np.array(self._activations[_chosen(rows)], dtype=np.float32))

    def gradients(self, rows: slice | Tensor | np.ndarray) -> Tensor:
        """Gradients of the model's loss with respect to activations, ``(rows, size)``, float32.

        Raises
        ------
        CheckpointError
            If the store has none.
        """
        if not self.facts.gradients:
            raise CheckpointError(f"{self.directory} holds no gradients; capture with gradients=True elsewhere")
        chosen = _chosen(rows)
        directions = np.array(self._directions[chosen], dtype=np.float32)
        return torch.from_numpy(directions * self._lengths[chosen][..., None])

    def document(self, number: int) -> slice:
        """Rows of one document."""
        first, last = np.searchsorted(self.documents, (number, number + 1))
        return slice(int(first), int(last))

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
        for rows in self._batches(size, seed, begin):
            yield self[rows]

    def batches_with_gradients(self, size: int, seed: int = 0, begin: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """As :meth:`batches`, the same activations in the same order, each batch with its gradients."""
        for rows in self._batches(size, seed, begin):
            yield self[rows], self.gradients(rows)

    def _batches(self, size: int, seed: int, begin: int) -> Iterator[np.ndarray]:
        if not 0 < size <= len(self):
            raise ConfigurationError(
                f"batch size is {size}; it must be from 1 to the {len(self)} activations there are"
            )
        each = len(self) // size
        epoch, skip = divmod(begin, each)
        while True:
            order = self._order(seed, epoch)
            for number in range(skip, each):
                yield np.sort(order[number * size : (number + 1) * size])
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


def _chosen(rows: slice | Tensor | np.ndarray) -> slice | np.ndarray:
    return rows.numpy() if isinstance(rows, Tensor) else rows


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
    gradients: bool = False,
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
    gradients
        Whether to store with every activation the gradient there of the summed loss of all tokens of its document; it
        costs a pass backwards through what comes behind the module. Stored as direction and length, which float16
        cannot lose; that of a document's last token is zero.

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
    asked = StoreFacts(
        model_fingerprint(model), name, 0, dtype, text_fingerprint(texts), len(texts), 0, 0, skip_first, gradients
    )
    facts = _begin(folder, asked)
    if facts.done < len(texts):
        facts = _append(folder, facts, model, module, texts, progress)
    return ActivationStore(folder)


def _begin(folder: Path, asked: StoreFacts) -> StoreFacts:
    if (folder / MANIFEST).exists():
        facts = read_facts(folder)
        for key in ("model", "site", "dtype", "text", "skipped", "gradients"):
            found, wanted = getattr(facts, key), getattr(asked, key)
            if found != wanted:
                raise ModelError(
                    f"{folder} holds activations of another {key} ({found}, not {wanted}); choose another directory"
                )
        return facts
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty and holds no store; choose another directory")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be created ({error.strerror}); choose another directory") from None
    return asked


def _append(
    folder: Path, facts: StoreFacts, model: nn.Module, module: nn.Module, texts: list[Tensor], progress: bool
) -> StoreFacts:
    files = {name: _opened(folder / f"{name}.bin", facts, name) for name in _columns(facts)}
    begin = facts.done
    try:
        with evaluation_mode(model):
            for number in track(range(begin, len(texts)), "capturing activations", enabled=progress):
                parts = _parts(model, module, texts[number], facts, number == begin)
                rows = len(parts["activations"])
                parts |= {
                    "tokens": texts[number][0, facts.skipped :].numpy().astype(np.int32),
                    "documents": np.full(rows, number, np.int32),
                    "positions": np.arange(facts.skipped, facts.skipped + rows, dtype=np.int32),
                }
                for name, part in parts.items():
                    files[name].write(part.tobytes())
                    files[name].flush()
                size = parts["activations"].shape[1] if rows else facts.size
                facts = replace(facts, size=size, done=number + 1, rows=facts.rows + rows)
                write_facts(folder, facts)
    finally:
        for file in files.values():
            file.close()
    return facts


def _columns(facts: StoreFacts) -> list[str]:
    return ["activations", *_PARTS, *(["gradients", "lengths"] if facts.gradients else [])]


def _parts(model: nn.Module, module: nn.Module, text: Tensor, facts: StoreFacts, first: bool) -> dict[str, np.ndarray]:
    """What one document adds to the files that hold numbers of the model."""
    if not facts.gradients or text.shape[1] < 2:
        found = _stored(_checked(_run(model, module, text, whole=first), text, facts), facts)
        none = np.zeros(found.shape, found.dtype), np.zeros(len(found), np.float32)
        return {"activations": found, **({"gradients": none[0], "lengths": none[1]} if facts.gradients else {})}
    x, gradient = loss_gradient(model, module, text, facts.site)
    found = _stored(_checked([x], text, facts), facts)
    rows = gradient[0, facts.skipped :].float().cpu()
    lengths = rows.norm(dim=1)
    directions = (rows / lengths.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).numpy()
    return {"activations": found, "gradients": directions.astype(found.dtype), "lengths": lengths.numpy()}


class _Stop(Exception):
    """What comes after the module is of no interest."""


def _run(model: nn.Module, module: nn.Module, text: Tensor, whole: bool) -> list[Any]:
    """What a module puts out; the first run goes to the end, to see whether it is called again."""
    outputs: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)
        if not whole:
            raise _Stop

    handle = module.register_forward_hook(keep)
    try:
        with suppress(_Stop):
            run_batch(model, text)
    finally:
        handle.remove()
    return outputs


def _checked(outputs: list[Any], text: Tensor, facts: StoreFacts) -> Tensor:
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or outputs[0].shape[:2] != text.shape:
        shape = tuple(outputs[0].shape) if outputs and isinstance(outputs[0], Tensor) else "nothing"
        raise ModelError(
            f"{facts.site} puts out {shape} for {text.shape[1]} tokens, {len(outputs)} times; choose a module that "
            "puts out one activation for each token"
        )
    return outputs[0][0, facts.skipped :].float().cpu()


def _stored(found: Tensor, facts: StoreFacts) -> np.ndarray:
    if not bool(torch.isfinite(found).all()):
        raise NonFiniteError(f"{facts.site}: an activation is NaN or infinite; the model is damaged")
    with np.errstate(over="ignore"):
        stored = found.numpy().astype(_TYPES[facts.dtype])
    if not np.isfinite(stored).all():
        raise NonFiniteError(
            f"{facts.site}: an activation of {float(found.abs().max()):.3g} is too large for float16; "
            "capture with dtype='float32'"
        )
    return stored


def _opened(file: Path, facts: StoreFacts, name: str) -> Any:
    """A file open at the end of what the manifest counts; what an interrupted run wrote behind it is cut off."""
    wide = name in ("activations", "gradients")
    width = facts.size * np.dtype(_TYPES[facts.dtype]).itemsize if wide else 4
    opened = file.open("r+b" if file.exists() else "w+b")
    opened.truncate(facts.rows * width)
    opened.seek(0, 2)
    return opened

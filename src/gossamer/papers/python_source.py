"""Real text with real labels that every machine has: the source of Python's standard library.

It serves experiments that pretrain something small: bytes to learn from, and snippets whose package is to be named.
The source is that of the running interpreter, read from where it is installed; nothing is downloaded. (Python is
under the PSF licence.)
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import CalibrationError

PACKAGES = (
    "asyncio",
    "email",
    "xml",
    "ctypes",
    "multiprocessing",
    "unittest",
    "importlib",
    "http",
    "logging",
    "urllib",
)
_IGNORED = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__"}
_SHORTEST_PACKAGE = 60_000  # bytes
_HELD_OUT = 0.25  # the end of every file of a labelled package


@dataclass(frozen=True)
class Snippets:
    """Pieces of source with their package.

    Attributes
    ----------
    tokens
        Bytes, ``(snippets, length)`` int64.
    labels
        Index into the packages, ``(snippets,)``.
    """

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PythonSource:
    """Bytes to pretrain on and a task with labels.

    Attributes
    ----------
    text
        Bytes, ``(n,)`` int64, files in an order that follows the seed. No held-out part of a labelled package.
    training, held_out
        Snippets from the first three quarters of each file, and from the rest; equally many of each package.
    packages
        Names of the classes.
    """

    text: Tensor
    training: Snippets
    held_out: Snippets
    packages: tuple[str, ...]


def python_source(size: int, training: int, held_out: int, length: int, classes: int, seed: int) -> PythonSource:
    """Read the standard library of the running interpreter.

    Parameters
    ----------
    size
        Bytes of text.
    training, held_out
        How many snippets (rounded down to a multiple of the classes).
    length
        Bytes of a snippet.
    classes
        How many packages; the first of :data:`PACKAGES` that are installed and long enough.
    seed
        Of the order of the files and the places of the snippets.

    Raises
    ------
    CalibrationError
        If the installation holds too little source.
    """
    generator = np.random.default_rng(seed)
    labelled, others = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    chosen = [p for p in PACKAGES if sum(map(len, labelled[p])) >= _SHORTEST_PACKAGE][:classes]
    files = [split_file(file)[0] for package in chosen for file in labelled[package]]
    files += [file for package in set(PACKAGES).difference(chosen) for file in labelled[package]] + others
    files.sort()
    text = b"\n".join(files[index] for index in generator.permutation(len(files)))[:size]
    if len(chosen) < classes or len(text) < size:
        raise CalibrationError(
            f"the standard library of this Python has {len(text)} bytes of source and {len(chosen)} long packages; "
            f"{size} and {classes} are needed: install Python with its source files"
        )
    parts = {package: tuple(zip(*map(split_file, labelled[package]))) for package in chosen}
    return PythonSource(
        text=torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64)),
        training=_draw([parts[p][0] for p in chosen], training // classes, length, generator),
        held_out=_draw([parts[p][1] for p in chosen], held_out // classes, length, generator),
        packages=tuple(chosen),
    )


def read_sources(root: Path) -> tuple[dict[str, list[bytes]], list[bytes]]:
    """Files of a library: of each of the labelled packages, and all others, in alphabetical order."""
    labelled: dict[str, list[bytes]] = {package: [] for package in PACKAGES}
    others: list[bytes] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not _IGNORED.isdisjoint(parts):
            continue
        labelled.get(parts[0], others).append(path.read_bytes())
    return labelled, others


def split_file(file: bytes) -> tuple[bytes, bytes]:
    """The part of a file to learn from, and the end of it that is held out."""
    cut = int(len(file) * (1 - _HELD_OUT))
    return file[:cut], file[cut:]


def _draw(classes: list[tuple[bytes, ...]], count: int, length: int, generator: np.random.Generator) -> Snippets:
    """Snippets from random places; a file is as likely as it is long."""
    tokens, labels = [], []
    for label, files in enumerate(classes):
        long = [file for file in files if len(file) > length]
        sizes = np.array([len(file) - length for file in long], dtype=np.float64)
        for index in generator.choice(len(long), size=count, p=sizes / sizes.sum()):
            start = int(generator.integers(len(long[index]) - length))
            tokens.append(np.frombuffer(long[index][start : start + length], np.uint8).astype(np.int64))
            labels.append(label)
    return Snippets(torch.from_numpy(np.stack(tokens)), torch.tensor(labels))

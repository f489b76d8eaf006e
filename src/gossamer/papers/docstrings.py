"""Docstrings and the signatures they belong to: a small task of generation, mined from Python's own source.

What a model is trained on comes from the same text as its pretraining; what it is judged by comes from the ends of
files that no pretraining text contains (see :mod:`gossamer.papers.python_source`).
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import CalibrationError
from gossamer.papers.python_source import PACKAGES, read_sources, split_file

_FUNCTION = re.compile(
    rb'^ *(def \w+\([^\n()]*\)(?: *->[^\n:]+)?:)\n +[rRuU]?"""([^\n"]{12,}?)\s*(?:"""|\n)', re.MULTILINE
)
_IGNORED = -100  # what cross-entropy leaves out


@dataclass(frozen=True)
class Docstrings:
    """Functions and what is said about them.

    Attributes
    ----------
    tokens
        Bytes of signature and docstring, padded with newlines, ``(pairs, length)`` int64.
    labels
        The next byte where it belongs to the docstring, else −100, ``(pairs, length)``.
    starts
        Where the docstring begins, ``(pairs,)``.
    """

    tokens: Tensor
    labels: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> Docstrings:
        """Some of the pairs."""
        return Docstrings(self.tokens[index], self.labels[index], self.starts[index])


def docstrings(
    training: int, held_out: int, length: int, packages: tuple[str, ...], seed: int
) -> tuple[Docstrings, Docstrings]:
    """Pairs to learn from, and pairs to be judged by.

    Parameters
    ----------
    training, held_out
        How many at most.
    length
        Bytes of a pair; longer ones are left out.
    packages
        Whose files end in what no pretraining text contains: those of the source that is pretrained on.
    seed
        Of the choice.

    Raises
    ------
    CalibrationError
        If the installation has fewer than 20 pairs on either side.
    """
    learned, judged = _pairs(packages)
    generator = np.random.default_rng(seed)
    parts = [_pack(pairs, count, length, generator) for pairs, count in ((learned, training), (judged, held_out))]
    if min(map(len, parts)) < min(20, training, held_out):
        raise CalibrationError(
            f"the standard library of this Python has {len(parts[0])} and {len(parts[1])} short documented functions; "
            f"20 of each are needed: install Python with its source files, or allow a greater length than {length}"
        )
    return parts[0], parts[1]


@cache
def _pairs(packages: tuple[str, ...]) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Pairs from what pretraining may read, and from the rest; no pair is in both."""
    labelled, others = read_sources(Path(sysconfig.get_paths()["stdlib"]))
    halves = [split_file(file) for package in packages for file in labelled[package]]
    whole = [file for package in set(PACKAGES).difference(packages) for file in labelled[package]]
    learned = set(_find([first for first, _ in halves] + whole + others))
    judged = set(_find(second for _, second in halves))
    return tuple(sorted(learned)), tuple(sorted(judged - learned))


def _find(files: Iterable[bytes]) -> list[bytes]:
    return [b'%s\n"""%s"""' % pair for file in files for pair in _FUNCTION.findall(file)]


def _pack(pairs: tuple[bytes, ...], count: int, length: int, generator: np.random.Generator) -> Docstrings:
    short = [pair for pair in pairs if len(pair) <= length]
    chosen = [short[index] for index in generator.permutation(len(short))[:count]]
    tokens = torch.full((len(chosen), length), ord("\n"))
    labels = torch.full((len(chosen), length), _IGNORED)
    starts = torch.zeros(len(chosen), dtype=torch.long)
    for row, pair in enumerate(chosen):
        tokens[row, : len(pair)] = torch.tensor(list(pair))
        start = pair.index(b'"""') + 3
        starts[row] = start
        labels[row, start - 1 : len(pair) - 1] = tokens[row, start : len(pair)]
    return Docstrings(tokens, labels, starts)


def overlap(written: bytes, meant: bytes, longest: int = 6) -> float:
    """chrF: F₂ of the character n-grams up to a length, precision and recall averaged over lengths [Popović, 2015].

    Parameters
    ----------
    written, meant
        Bytes.
    longest
        Length of the longest n-gram.

    Returns
    -------
    float
        From 0 to 1.
    """
    precisions, recalls = [], []
    for size in range(1, longest + 1):
        ours, theirs = (Counter(text[i : i + size] for i in range(len(text) - size + 1)) for text in (written, meant))
        if not theirs:
            break
        shared = sum((ours & theirs).values())
        precisions.append(shared / max(1, sum(ours.values())))
        recalls.append(shared / sum(theirs.values()))
    precision, recall = (sum(values) / max(1, len(values)) for values in (precisions, recalls))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0

"""Explanations that can be carried out: sentences that are true or false of every token.

A predicate is one or more clauses joined by ``or``. A clause says something of a token or of the one before it::

    the token is one of ["the", "of"] or the previous token is a number

People and language models can read them as they stand, and :func:`parse` turns them into a test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.errors import ConfigurationError

Pieces = Sequence[str]
_QUOTES = "\"'“”‘’«»`"
_ENDS = ".!?"


def plain(piece: str) -> str:
    """A token's text without surrounding space, in small letters: what words are compared by."""
    return piece.strip().casefold()


def _each(test: Callable[[str], bool]) -> Callable[[Pieces], np.ndarray]:
    return lambda pieces: np.array([test(piece.strip()) for piece in pieces], bool)


def _after_end(pieces: Pieces) -> np.ndarray:
    """Words whose last visible neighbour ends a sentence; of the first token nothing is known."""
    found, open_ = np.zeros(len(pieces), bool), False
    for place, piece in enumerate(pieces):
        text = piece.strip()
        if text and any(letter.isalnum() for letter in text):
            found[place], open_ = open_, False
        open_ = open_ or text[-1:] in tuple(_ENDS)
    return found


KINDS: dict[str, Callable[[Pieces], np.ndarray]] = {
    "a number": _each(lambda text: bool(text) and any(map(str.isdigit, text)) and not any(map(str.isalpha, text))),
    "a quotation mark": _each(lambda text: bool(text) and any(letter in _QUOTES for letter in text)),
    "punctuation": _each(lambda text: bool(text) and not any(map(str.isalnum, text))),
    "capitalised": _each(lambda text: text[:1].isupper()),
    "in capitals": _each(lambda text: len(text) > 1 and text.isupper()),
    "a line break": lambda pieces: np.array(["\n" in piece for piece in pieces], bool),
    "the beginning of a sentence": _after_end,
    "a continued word": lambda pieces: np.array([piece[:1].isalpha() for piece in pieces], bool),
}
"""What a token can be, besides one of a list of words; each test gives a bool for every piece."""


@dataclass(frozen=True)
class Clause:
    """One statement about a token, or the one before it.

    Attributes
    ----------
    previous
        Whether it speaks of the token before.
    words
        The token is one of these, compared as :func:`plain`.
    kind
        Or what it is: a key of :data:`KINDS`.
    """

    previous: bool = False
    words: tuple[str, ...] = ()
    kind: str = ""

    def __post_init__(self) -> None:
        if bool(self.words) == bool(self.kind) or (self.kind and self.kind not in KINDS):
            raise ConfigurationError(
                f"a clause has words {self.words} and kind {self.kind!r}; give words, or a kind of {', '.join(KINDS)}"
            )

    def __str__(self) -> str:
        what = f"one of {json.dumps(list(self.words), ensure_ascii=False)}" if self.words else self.kind
        return f"the {'previous token' if self.previous else 'token'} is {what}"

    def holds(self, pieces: Pieces) -> np.ndarray:
        """For which tokens it is true, bool ``(tokens,)``."""
        words = set(self.words)
        true = np.array([plain(piece) in words for piece in pieces], bool) if words else KINDS[self.kind](pieces)
        return np.r_[False, true[:-1]] if self.previous else true


@dataclass(frozen=True)
class Predicate:
    """Clauses of which one must be true.

    Attributes
    ----------
    clauses
        At least one.

    Examples
    --------
    >>> parse('the previous token is one of ["the"]').holds(["The", " cat", " sat"]).tolist()
    [False, True, False]
    """

    clauses: tuple[Clause, ...]

    def __str__(self) -> str:
        return " or ".join(map(str, self.clauses))

    def holds(self, pieces: Pieces) -> np.ndarray:
        """For which tokens it is true, bool ``(tokens,)``."""
        return np.logical_or.reduce([clause.holds(pieces) for clause in self.clauses])


_LIST = r'\[\s*(?:"(?:[^"\\]|\\.)*"\s*,?\s*)+\]'
_KIND = "|".join(sorted(map(re.escape, KINDS), key=len, reverse=True))
_CLAUSE = re.compile(rf"the (?P<previous>previous )?token is (?:one of (?P<words>{_LIST})|(?P<kind>{_KIND}))", re.I)


def parse(text: str) -> Predicate | None:
    """Read a predicate; None if the text is something else."""
    clauses, place = [], 0
    text = text.strip().rstrip(".")
    while place < len(text):
        joint = re.compile(r"\s+or\s+", re.I).match(text, place) if clauses else None
        if clauses and joint is None:
            return None
        found = _CLAUSE.match(text, joint.end() if joint else place)
        if found is None:
            return None
        words = _words(found["words"])
        if words is None:
            return None
        clauses.append(Clause(bool(found["previous"]), words, (found["kind"] or "").lower()))
        place = found.end()
    return Predicate(tuple(clauses)) if clauses else None


def _words(listed: str | None) -> tuple[str, ...] | None:
    if listed is None:
        return ()
    try:
        return tuple(plain(word) for word in json.loads(re.sub(r",\s*\]$", "]", listed)))
    except ValueError:
        return None

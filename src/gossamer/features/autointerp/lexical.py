"""How much the words of an explanation speak for a token: a judge's reading without a language model.

It knows words and their endings, what is set in quotes, and a few kinds of tokens such as numbers. It knows nothing
of meaning: *fruit* speaks for "fruits", not for "apple". It is honest about that by abstaining where an explanation
has no word that it could look for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gossamer.features.autointerp.predicates import KINDS, Pieces, plain

_STEM = 0.7  # what a word of the same stem counts, where the same word counts 1
_LEAST_STEM = 4  # letters
_NOT_MEANT = frozenset(
    re.findall(
        r"\w+",
        """
    a about across all also an and any are as at be been being before after beginning but by can common contain
    containing contains context contexts denote denoting describe describes describing end ending especially etc
    example examples express expressing expression expressions feature features find finding followed following
    for form forms found from general has have having highlight highlighted how if important in include includes
    including indicate indicates indicating into is it its latent latents like mainly mention mentions more most
    of often on one or other others part particular pattern patterns phrase phrases piece preceded preceding
    precedes presence refer referring refers related relating same sentence sentences set several sequence some
    specific such term terms text texts that the their them then there these they this those to token tokens
    type typically use used uses using usually various verb verbs very was were when where which with within
    word words written
    """,
    )
)
_NAMED = {
    "number": "a number",
    "numbers": "a number",
    "numeral": "a number",
    "numerals": "a number",
    "digit": "a number",
    "digits": "a number",
    "year": "a number",
    "years": "a number",
    "punctuation": "punctuation",
    "quotation": "a quotation mark",
    "quotations": "a quotation mark",
    "capital": "capitalised",
    "capitalised": "capitalised",
    "capitalized": "capitalised",
    "newline": "a line break",
    "newlines": "a line break",
}
_SIGNS = {
    "comma": ",",
    "commas": ",",
    "period": ".",
    "periods": ".",
    "semicolon": ";",
    "semicolons": ";",
    "colon": ":",
    "hyphen": "-",
    "hyphens": "-",
    "dash": "-",
    "apostrophe": "'",
}


@lru_cache(maxsize=4096)
def terms(explanation: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """What to look for: quoted texts, words, and kinds of tokens."""
    quoted = re.findall(r"[\"“]([^\"”]{1,40})[\"”]|(?<!\w)['‘]([^'’]{1,40})['’](?!\w)", explanation)
    exact = {plain(first or second) for first, second in quoted}
    words = {word.casefold() for word in re.findall(r"[^\W\d_]+", explanation)}
    exact |= {_SIGNS[word] for word in words & _SIGNS.keys()}
    kinds = {_NAMED[word] for word in words & _NAMED.keys()}
    wanted = {word for word in words - _NOT_MEANT - _SIGNS.keys() if len(word) > 1}
    return frozenset(exact - {""}), frozenset(wanted), frozenset(kinds)


def evidence(explanation: str, pieces: Pieces) -> np.ndarray | None:
    """How much speaks for each token, from 0 to 1, float64 ``(tokens,)``; None if there is nothing to look for."""
    exact, wanted, kinds = terms(explanation)
    if not (exact or wanted or kinds):
        return None
    words = whole_words(pieces)
    found = np.zeros(len(pieces))
    for place, (piece, word) in enumerate(zip(pieces, words)):
        if plain(piece) in exact or word in exact:
            found[place] = 1.0
        elif word:
            found[place] = max((_likeness(word, term) for term in wanted), default=0.0)
    for kind in kinds:
        found = np.maximum(found, KINDS[kind](pieces))
    return np.maximum(found, _phrases([text for text in exact if " " in text], pieces))


def whole_words(pieces: Pieces) -> list[str]:
    """The word that each token is a part of, in small letters; empty where it is no part of a word."""
    text = "".join(pieces)
    owners = np.zeros(len(text), np.int64)
    words = [""]
    for number, match in enumerate(re.finditer(r"[^\W_]+", text), start=1):
        owners[match.start() : match.end()] = number
        words.append(match[0].casefold())
    return [words[number] for number in _per_piece(owners, pieces)]


def _per_piece(marks: np.ndarray, pieces: Pieces) -> list[int]:
    """The largest mark of the letters of each piece; 0 for an empty one."""
    ends = np.cumsum([len(piece) for piece in pieces])
    return [int(marks[end - len(piece) : end].max(initial=0)) for piece, end in zip(pieces, ends)]


def _phrases(phrases: Sequence[str], pieces: Pieces) -> np.ndarray:
    text = "".join(pieces).casefold()
    marks = np.zeros(len("".join(pieces)), np.int64)
    if len(text) == len(marks):  # some letters become two when made small
        for phrase in phrases:
            for match in re.finditer(re.escape(phrase), text):
                marks[match.start() : match.end()] = 1
    return np.array(_per_piece(marks, pieces), np.float64)


@lru_cache(maxsize=1 << 16)
def _likeness(word: str, term: str) -> float:
    if word == term:
        return 1.0
    same = next((i for i, (a, b) in enumerate(zip(word, term)) if a != b), min(len(word), len(term)))
    return _STEM if same >= max(_LEAST_STEM, 2 * max(len(word), len(term)) / 3) else 0.0

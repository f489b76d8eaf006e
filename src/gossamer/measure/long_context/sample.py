"""Prompts of an exact number of tokens, put together of pieces of which only filler is ever cut.

Pieces are tokenised one by one. Filler is real prose, sentence after sentence; the first sentence loses as many tokens
from its beginning as are too many, so that the prompt begins like a page torn out of a book and no needle is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.words import SMALL_WORDS, tokens_of
from gossamer.models.text import read_text, special_tokens

Filler = Callable[[int], list[list[int]]]
"""How many tokens are needed → pieces with at least so many, in reading order."""


@dataclass(frozen=True)
class Sample:
    """A prompt with its question and what would be right.

    Attributes
    ----------
    prompt
        Token ids, exactly as many as asked for.
    gold
        What the answer must contain, in the order of the question.
    answer
        A right answer, as text.
    evidence
        First token and the one behind the last of every piece that was hidden in the prompt.
    max_new_tokens
        How long an answer may be.
    """

    prompt: tuple[int, ...]
    gold: tuple[str, ...]
    answer: str
    evidence: tuple[tuple[int, int], ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Pieces:
    """Parts of a prompt.

    Attributes
    ----------
    head, tail
        Text before and behind the context; the question is in the tail.
    hidden
        Texts to hide in the context, in order.
    lead
        Beginning of the answer, which the model goes on from.
    """

    head: str
    hidden: tuple[str, ...]
    tail: str
    lead: str = ""


def assemble(
    pieces: Pieces, filler: Filler, max_tokens: int, tokenizer: Any, rng: np.random.Generator
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Token ids of a prompt of exactly `max_tokens` tokens, and where the hidden pieces lie in it.

    Hidden pieces go between pieces of filler, at places drawn at random, and keep their order.

    Raises
    ------
    ConfigurationError
        If there are fewer tokens than the pieces need without any filler.
    """
    head, tail = _ends(pieces, tokenizer)
    hidden = [tokens_of(text, tokenizer) for text in pieces.hidden]
    room = room_for(pieces, max_tokens, tokenizer)
    between = _cut_to(filler(room), room)
    gaps = np.sort(rng.integers(0, len(between) + 1, size=len(hidden)))
    ids, spans = list(head), []
    for place in range(len(between) + 1):
        for number in np.flatnonzero(gaps == place):
            spans.append((len(ids), len(ids) + len(hidden[number])))
            ids += hidden[number]
        if place < len(between):
            ids += between[place]
    return tuple(ids + tail), tuple(spans)


def room_for(pieces: Pieces, max_tokens: int, tokenizer: Any) -> int:
    """Tokens that are left for filler.

    Raises
    ------
    ConfigurationError
        If that is less than none.
    """
    needed = sum(map(len, _ends(pieces, tokenizer))) + sum(len(tokens_of(text, tokenizer)) for text in pieces.hidden)
    if needed > max_tokens:
        raise ConfigurationError(f"max_tokens is {max_tokens}; this task needs at least {needed} with this tokenizer")
    return max_tokens - needed


def _ends(pieces: Pieces, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before and behind the context."""
    before, after = framing(tokenizer)
    lead = pieces.lead.lstrip() if after else pieces.lead  # a turn of a conversation begins without a space
    head = before + tokens_of(pieces.head, tokenizer)
    return head, tokens_of(pieces.tail, tokenizer) + after + tokens_of(lead, tokenizer)


def framing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before and behind what a user says: of the chat template, or the special tokens of a text."""
    if not getattr(tokenizer, "chat_template", None):
        before, _ = special_tokens(tokenizer)
        return before.tolist(), []
    mark = "\u2297"
    message = [{"role": "user", "content": mark}]
    framed = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = framed.partition(mark)
    return tokens_of(before, tokenizer), tokens_of(after, tokenizer)


def prose(source: str, tokenizer: Any, rng: np.random.Generator) -> Filler:
    """Filler from a random place of a text; see :func:`gossamer.models.text.read_text`."""

    def take(needed: int) -> list[list[int]]:
        sentences = sentences_of(source)
        place = int(rng.integers(len(sentences)))
        found: list[list[int]] = []
        while sum(map(len, found)) < needed:
            found.insert(0, tokens_of(" " + sentences[place % len(sentences)], tokenizer))
            place -= 1
        return found

    return take


def small_talk(tokenizer: Any, rng: np.random.Generator) -> Filler:
    """Filler of single small words, for tokenizers with a word for a token."""
    ids = [tokens_of(word, tokenizer) for word in SMALL_WORDS]

    def take(needed: int) -> list[list[int]]:
        return [ids[int(number)] for number in rng.integers(len(ids), size=needed)]

    return take


@lru_cache(maxsize=8)
def sentences_of(source: str) -> tuple[str, ...]:
    """Sentences of a text, white space made single."""
    flat = re.sub(r"\s+", " ", read_text(source))
    return tuple(part.strip() for part in re.split(r"(?<=[.!?])[\"”’']?\s+(?=[\"“A-Z])", flat) if len(part) > 1)


def _cut_to(filler: Sequence[list[int]], room: int) -> list[list[int]]:
    """As many tokens as there is room for: the surplus goes from the beginning."""
    pieces = [list(piece) for piece in filler]
    surplus = sum(map(len, pieces)) - room
    while pieces and surplus >= len(pieces[0]):
        surplus -= len(pieces.pop(0))
    if surplus > 0:
        pieces[0] = pieces[0][surplus:]
    return pieces

"""Tasks whose answer is hidden in a long context: needles, chains of variables, frequent words.

After RULER [Hsieh et al., 2024, arXiv 2404.06654] in the form of Nawrot et al. [2025, arXiv 2504.17768], in real prose.
Tasks differ on two axes: *dispersion*, how hard what is needed is to find, and *scope*, how much is needed.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.sample import (
    Filler,
    Pieces,
    Sample,
    assemble,
    prose,
    room_for,
    sentences_of,
    small_talk,
)
from gossamer.measure.long_context.words import ADJECTIVES, THINGS, normalised, tokens_of

_ANSWER = "Answer:"
_REASONING = f"\nReason step by step. Then write '{_ANSWER}' and nothing but the answer."
_REASONING_TOKENS = 256

Wording = Literal["prose", "terse"]
Level = Literal["low", "high"]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A kind of prompt that can be made at any length, and how answers are judged.

    Parameters
    ----------
    wording
        ``prose``, real text and questions in English; ``terse``, the same in the words of
        :func:`~gossamer.measure.long_context.words.small_vocabulary`, for models of a few thousand weights.
    text
        Where prose is taken from; see :func:`gossamer.models.text.read_text`.
    reasoning
        Whether the model is to reason before it answers, as large ones should: the answer is not begun for it, and only
        what follows its last ``Answer:`` counts. The prompts are the same otherwise.
    """

    wording: Wording = "prose"
    text: str = "moby-dick"
    reasoning: bool = field(default=False, repr=False)  # prompts are drawn by what is shown

    name: ClassVar[str]
    dispersion: ClassVar[Level]
    scope: ClassVar[Level]

    def __post_init__(self) -> None:
        if self.wording not in ("prose", "terse"):
            raise ConfigurationError(f"wording is {self.wording!r}; it must be 'prose' or 'terse'")
        if self.reasoning and self.wording == "terse":
            raise ConfigurationError("the words of terse prompts are too few to reason in; set wording='prose'")

    @abstractmethod
    def sample(self, rng: np.random.Generator, max_tokens: int, tokenizer: Any) -> Sample:
        """A prompt of exactly `max_tokens` tokens.

        Raises
        ------
        ConfigurationError
            If that is too few.
        """

    @abstractmethod
    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """How right an answer is, from 0 to 1."""

    def judge(self, prediction: str, gold: tuple[str, ...]) -> float:
        """How right an answer is, from 0 to 1; where there is reasoning, by what follows it."""
        if not self.reasoning:
            return self.score(prediction, gold)
        _, found, answer = prediction.rpartition(_ANSWER)
        return self.score(answer, gold) if found else 0.0

    def _filler(self, tokenizer: Any, rng: np.random.Generator) -> Filler:
        return small_talk(tokenizer, rng) if self.wording == "terse" else prose(self.text, tokenizer, rng)

    def _made(
        self,
        pieces: Pieces,
        gold: tuple[str, ...],
        answer: str,
        max_tokens: int,
        tokenizer: Any,
        rng: np.random.Generator,
        filler: Filler | None = None,
    ) -> Sample:
        fill = self._filler(tokenizer, rng) if filler is None else filler
        spare = 0 if self.wording == "terse" else 8
        if self.reasoning:
            pieces = replace(pieces, tail=pieces.tail + _REASONING, lead="")
            spare += _REASONING_TOKENS
        prompt, spans = assemble(pieces, fill, max_tokens, tokenizer, rng)
        return Sample(prompt, gold, answer, spans, len(tokens_of(answer, tokenizer)) + spare)


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Find the values of some keys among many.

    Parameters
    ----------
    queries
        Keys that are asked for.
    distractors
        Other keys with values; None hides as many as fit, instead of prose.
    wording, text, reasoning
        As in :class:`Task`.
    """

    queries: int = 1
    distractors: int | None = 3

    name = "needle"
    dispersion = "low"
    scope = "low"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 1 or (self.distractors is not None and self.distractors < 0):
            raise ConfigurationError(
                f"queries is {self.queries} and distractors {self.distractors}; there must be a query, and none or "
                "more distractors"
            )

    def sample(self, rng: np.random.Generator, max_tokens: int, tokenizer: Any) -> Sample:
        """Needles at random places, asked for in random order."""
        count = self.queries + (self.distractors or 0)
        pairs = self._pairs(rng, count)
        asked = [pairs[int(number)] for number in rng.permutation(count)[: self.queries]]
        pieces = self._pieces(pairs, asked)
        if self.distractors is None:
            missing = room_for(pieces, max_tokens, tokenizer)
            pairs = self._pairs(rng, count, others=missing, avoid=pairs)
            spare = [tokens_of(self._needle(*pair), tokenizer) for pair in pairs]
            filler: Filler | None = lambda needed: _enough(spare, needed)  # noqa: E731
        else:
            filler = None
        values = tuple(value for _, value in asked)
        return self._made(pieces, values, self._answer(asked), max_tokens, tokenizer, rng, filler)

    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """Share of the values that are given, in order."""
        wanted = prediction.split() if self.wording == "terse" else re.findall(r"\d+", prediction)
        return _in_order(wanted, gold)

    def _pieces(self, pairs: list[tuple[str, str]], asked: list[tuple[str, str]]) -> Pieces:
        hidden = tuple(self._needle(*pair) for pair in pairs)
        if self.wording == "terse":
            listed = "".join(f"{key} " for key, _ in asked) + "; " if len(asked) > 1 else ""
            return Pieces("", hidden, f"? {listed}{asked[0][0]}")
        keys = ", ".join(key for key, _ in asked)
        return Pieces(
            "Code numbers of some things are hidden in the text below. You will be asked for some of them.\n\n",
            hidden,
            f"\n\nWhich code numbers do these have, in this order: {keys}?",
            f" The code number of the {asked[0][0]} is",
        )

    def _needle(self, key: str, value: str) -> str:
        return f"{key} {value}" if self.wording == "terse" else f" The code number of the {key} is {value}."

    def _answer(self, asked: list[tuple[str, str]]) -> str:
        first, *rest = asked
        if self.wording == "terse":
            return " ".join([first[1], *(part for pair in rest for part in pair)])
        return f" {first[1]}." + "".join(self._needle(*pair) for pair in rest)

    def _pairs(
        self, rng: np.random.Generator, count: int, others: int = 0, avoid: list[tuple[str, str]] | None = None
    ) -> list[tuple[str, str]]:
        """Different keys with values; `others` more than `avoid` holds instead, where needles fill the context."""
        used = {key for key, _ in avoid or []}
        wanted = count if avoid is None else max(1, others // (2 if self.wording == "terse" else 8))
        if self.wording == "terse":
            half = len(THINGS) // 2
            keys = [word for word in THINGS[:half] if word not in used]
            values = THINGS[half:]
        else:
            keys = [f"{a} {b}" for a in ADJECTIVES for b in THINGS if f"{a} {b}" not in used]
            values = tuple(str(number) for number in rng.integers(1_000_000, 9_999_999, size=wanted))
        if avoid is None and wanted > len(keys):
            raise ConfigurationError(f"{wanted} needles are wanted; there are only {len(keys)} different keys")
        order = rng.permutation(len(keys))[:wanted]
        drawn = rng.integers(len(values), size=len(order))
        return [(keys[int(key)], values[int(value)]) for key, value in zip(order, drawn)]


@dataclass(frozen=True, kw_only=True)
class VariableTracking(Task):
    """Name all variables that have a value, directly or through others.

    Parameters
    ----------
    chains, hops
        Chains of assignments, and assignments from variable to variable in each.
    wording, text, reasoning
        As in :class:`Task`.
    """

    chains: int = 2
    hops: int = 2

    name = "variable tracking"
    dispersion = "high"
    scope = "low"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chains < 1 or self.hops < 0:
            raise ConfigurationError(f"chains is {self.chains} and hops {self.hops}; at least 1 and 0")

    def sample(self, rng: np.random.Generator, max_tokens: int, tokenizer: Any) -> Sample:
        """Assignments of all chains, mixed, each chain in order."""
        each = self.hops + 1
        names = self._names(rng, self.chains * each)
        values = self._values(rng, self.chains)
        chains = [[values[c], *names[c * each : (c + 1) * each]] for c in range(self.chains)]
        turns = rng.permutation(np.repeat(np.arange(self.chains), each))
        done = [0] * self.chains
        hidden = []
        for chain in turns.tolist():
            source, target = chains[chain][done[chain] : done[chain] + 2]
            hidden.append(self._assignment(source, target, numeric=done[chain] == 0))
            done[chain] += 1
        value, *variables = chains[int(rng.integers(self.chains))]
        if self.wording == "terse":
            pieces = Pieces("", tuple(hidden), f"? {value}")
        else:
            pieces = Pieces(
                "Assignments to variables are hidden in the text below. Keep track of them.\n\n",
                tuple(hidden),
                f"\n\nWhich variables have the value {value}, directly or because they were set to another variable "
                "that has it? Name all.",
                f" The variables with the value {value} are",
            )
        answer = " ".join(variables) if self.wording == "terse" else " " + ", ".join(variables) + "."
        return self._made(pieces, tuple(variables), answer, max_tokens, tokenizer, rng)

    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """Variables named and meant, of those named or meant."""
        pattern = r"[a-z]+" if self.wording == "terse" else r"\b[A-Z]{4}\b"
        return _overlap(re.findall(pattern, prediction), gold)

    def _names(self, rng: np.random.Generator, count: int) -> list[str]:
        if self.wording == "terse":
            half = THINGS[len(THINGS) // 2 :]
            return [half[int(number)] for number in rng.permutation(len(half))[:count]]
        found: dict[str, None] = {}
        while len(found) < count:
            found["".join(chr(65 + int(number)) for number in rng.integers(26, size=4))] = None
        return list(found)

    def _values(self, rng: np.random.Generator, count: int) -> list[str]:
        if self.wording == "terse":
            return [THINGS[int(number)] for number in rng.permutation(len(THINGS) // 2)[:count]]
        return [str(number) for number in (10000 + rng.permutation(89999)[:count]).tolist()]

    def _assignment(self, source: str, target: str, numeric: bool) -> str:
        if self.wording == "terse":
            return f"{source} {target} ;"
        return f" Set {target} to {source}." if numeric else f" Set {target} to the value of {source}."


@dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
    """Name the words of a list that occur most often.

    Parameters
    ----------
    common
        How many words are common.
    share
        Of the list, what they take together.
    wording, text, reasoning
        As in :class:`Task`; in prose the words are those of the text.
    """

    common: int = 3
    share: float = 0.4

    name = "common words"
    dispersion = "low"
    scope = "high"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.common < 1 or not 0 < self.share < 1:
            raise ConfigurationError(f"common is {self.common} and share {self.share}; at least 1, and in (0, 1)")

    def sample(self, rng: np.random.Generator, max_tokens: int, tokenizer: Any) -> Sample:
        """A list in random order; rare words occur about a tenth as often as common ones."""
        pool = THINGS if self.wording == "terse" else frequent_words(self.text)
        drawn = [pool[int(number)] for number in rng.permutation(len(pool))]
        common, rare = sorted(drawn[: self.common]), drawn[self.common :]
        if self.wording == "terse":
            frame = Pieces("", (), "? common")
        else:
            frame = Pieces(
                f"Below is a list of words. {self.common} of them occur much more often than all others.\n\n",
                (),
                f"\n\nWhich {self.common} words occur most often in the list?",
                " The most common words are",
            )
        room = room_for(frame, max_tokens, tokenizer)
        often = max(2, int(self.share * room / sum(len(self._entry(word, tokenizer)) for word in common)))
        pieces = Pieces(frame.head, (), frame.tail, frame.lead)
        entries = [self._entry(word, tokenizer) for word in common for _ in range(often)]
        entries += self._rare(rare, max(1, often // 10), room - sum(map(len, entries)), tokenizer)
        mixed = [entries[int(number)] for number in rng.permutation(len(entries))]
        answer = " ".join(common) if self.wording == "terse" else " " + ", ".join(common) + "."
        return self._made(pieces, tuple(common), answer, max_tokens, tokenizer, rng, lambda needed: mixed)

    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """Words named and meant, of those named or meant; so many words as are asked for count."""
        named = [word for word in re.findall(r"[a-z\-]+", prediction.lower()) if word != "and"]
        return _overlap(list(dict.fromkeys(named))[: len(gold)], gold)

    def _rare(self, words: list[str], each: int, needed: int, tokenizer: Any) -> list[list[int]]:
        found: list[list[int]] = []
        total = 0
        while total < needed:
            for word in words:
                entry = self._entry(word, tokenizer)
                found += [entry] * each
                total += each * len(entry)
                if total >= needed:
                    break
        return found

    def _entry(self, word: str, tokenizer: Any) -> list[int]:
        return tokens_of(word if self.wording == "terse" else f" {word},", tokenizer)


@lru_cache(maxsize=4)
def frequent_words(source: str, count: int = 2000) -> tuple[str, ...]:
    """Words of four to nine letters that a text has most often."""
    counts = Counter(word for part in sentences_of(source) for word in re.findall(r"\b[a-z]{4,9}\b", part))
    return tuple(word for word, _ in counts.most_common(count))


def _enough(pieces: list[list[int]], needed: int) -> list[list[int]]:
    """Pieces over and over until there are so many tokens."""
    found: list[list[int]] = []
    total = 0
    while total < needed:
        found.append(pieces[len(found) % len(pieces)])
        total += len(found[-1])
    return found


def _in_order(given: list[str], gold: tuple[str, ...]) -> float:
    """Share of the gold answers that are given one behind the other."""
    place = hits = 0
    for wanted in gold:
        if wanted in given[place:]:
            place = given.index(wanted, place) + 1
            hits += 1
    return hits / len(gold)


def _overlap(given: list[str], gold: tuple[str, ...]) -> float:
    """Size of the intersection over that of the union."""
    return len(set(given) & set(gold)) / len(set(given) | set(gold))


def answer_words(prediction: str, gold: tuple[str, ...]) -> float:
    """Harmonic mean of precision and recall of the words of an answer; of several right answers the nearest."""
    best = 0.0
    for right in gold:
        wanted, given = Counter(normalised(right)), Counter(normalised(prediction))
        shared = (wanted & given).total()
        if shared:
            best = max(best, 2 * shared / (wanted.total() + given.total()))
    return best

"""A narrative in chapters, and what can be asked about it: who, where and what; what came before; where nothing did.

In every chapter the heroine goes to a place, meets somebody and buys something, or nothing. Between these events stand
sentences of a real book. After Nawrot et al. [2025, arXiv 2504.17768, section 3].
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.sample import Pieces, Sample, room_for
from gossamer.measure.long_context.tasks import Task, answer_words
from gossamer.measure.long_context.words import ADJECTIVES, CHAPTERS, PEOPLE, PLACES, THINGS, tokens_of

HEROINE = "Marit"
_TRAVELS = (
    "At first light {heroine} set out and came to {place}.",
    "The next coach brought {heroine} to {place}.",
    "After days on the road {heroine} reached {place}.",
)
_MEETINGS = (
    "There {person} was waiting for her.",
    "In the market she met {person}.",
    "At the inn she sat down beside {person}.",
)
_PURCHASES = (
    "Before evening she bought the {item}.",
    "She counted her coins and bought the {item}.",
    "They bargained for an hour, and she bought the {item}.",
)


@dataclass(frozen=True)
class Chapter:
    """What happens in a chapter.

    Attributes
    ----------
    number
        From 1.
    place, person, item
        Where, whom, and what is bought; None if nothing is.
    """

    number: int
    place: str
    person: str
    item: str | None

    def told(self, rng: np.random.Generator) -> str:
        """The chapter in English."""
        said = [_TRAVELS, _MEETINGS] + ([_PURCHASES] if self.item else [])
        chosen = " ".join(forms[int(rng.integers(len(forms)))] for forms in said)
        text = chosen.format(heroine=HEROINE, place=self.place, person=self.person, item=self.item)
        return f"\n\nChapter {self.number}. {text}"

    def terse(self) -> str:
        """The chapter in the small vocabulary."""
        bought = f"bought {self.item} " if self.item else ""
        return f"chapter n{self.number} went {self.place.lower()} met {self.person.lower()} {bought};"


@dataclass(frozen=True, kw_only=True)
class Story(Task):
    """A task about a narrative.

    Parameters
    ----------
    chapters
        How many; None writes as many as fill about half of the prompt.
    wording, text, reasoning
        As in :class:`~gossamer.measure.long_context.tasks.Task`.
    """

    chapters: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chapters is not None and not self._least() <= self.chapters < CHAPTERS:
            raise ConfigurationError(
                f"chapters is {self.chapters}; {self.name} needs {self._least()} to {CHAPTERS - 1}, or None"
            )

    def sample(self, rng: np.random.Generator, max_tokens: int, tokenizer: Any) -> Sample:
        """A narrative of whole chapters, in order."""
        count = self.chapters or self._fitting(rng, max_tokens, tokenizer)
        chapters = self._write(rng, count)
        question, lead, gold, answer = self._ask(rng, chapters)
        pieces = self._frame(question, lead, self._told(chapters, rng))
        return self._made(pieces, gold, answer, max_tokens, tokenizer, rng)

    @abstractmethod
    def _ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[str, str, tuple[str, ...], str]:
        """Question, beginning of the answer, what is right, and a right answer."""

    def _least(self) -> int:
        return 3

    def _write(self, rng: np.random.Generator, count: int) -> list[Chapter]:
        places, people = rng.permutation(len(PLACES)), rng.permutation(len(PEOPLE))
        items = self._items(rng, count)
        return [
            Chapter(k + 1, PLACES[places[k % len(places)]], PEOPLE[people[k % len(people)]], items[k])
            for k in range(count)
        ]

    def _items(self, rng: np.random.Generator, count: int) -> list[str | None]:
        order = rng.permutation(len(THINGS))
        if self.wording == "terse":
            return [THINGS[int(order[k % len(order)])] for k in range(count)]
        adjectives = rng.integers(len(ADJECTIVES), size=count)
        return [f"{ADJECTIVES[int(a)]} {THINGS[int(order[k % len(order)])]}" for k, a in enumerate(adjectives)]

    def _told(self, chapters: list[Chapter], rng: np.random.Generator) -> tuple[str, ...]:
        return tuple(chapter.terse() if self.wording == "terse" else chapter.told(rng) for chapter in chapters)

    def _frame(self, question: str, lead: str, hidden: tuple[str, ...]) -> Pieces:
        if self.wording == "terse":
            return Pieces("", hidden, question)
        head = f"Below is the story of {HEROINE}, in chapters. You will be asked about it.\n"
        return Pieces(head, hidden, f"\n\n{question}", lead)

    def _fitting(self, rng: np.random.Generator, max_tokens: int, tokenizer: Any) -> int:
        example = self._told(self._write(rng, 4), rng)
        each = max(len(tokens_of(text, tokenizer)) for text in example)
        room = room_for(self._frame("?" * 40, "", ()), max_tokens, tokenizer)
        largest = min(CHAPTERS - 1, len(PLACES), len(PEOPLE), room // each)
        return max(self._least(), min(largest, room // (2 * each)))


@dataclass(frozen=True, kw_only=True)
class StoryRetrieval(Story):
    """Where she went, whom she met, or what she bought in a chapter.

    Parameters
    ----------
    chapters, wording, text, reasoning
        As in :class:`Story`.
    """

    name = "story retrieval"
    dispersion = "low"
    scope = "low"

    def _ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[str, str, tuple[str, ...], str]:
        chapter = chapters[int(rng.integers(len(chapters)))]
        kind = ("went", "met", "bought")[int(rng.integers(3))]
        right = {"went": chapter.place, "met": chapter.person, "bought": str(chapter.item)}[kind]
        if self.wording == "terse":
            return f"? chapter n{chapter.number} {kind}", "", (right.lower(),), right.lower()
        asked = {"went": "Where did {h} go", "met": "Whom did {h} meet", "bought": "What did {h} buy"}[kind]
        said = {"went": "{h} went to", "met": "{h} met", "bought": "{h} bought the"}[kind]
        question = f"{asked.format(h=HEROINE)} in Chapter {chapter.number}?"
        return question, f" In Chapter {chapter.number} {said.format(h=HEROINE)}", (right,), f" {right}."

    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """1 if the first sentence of the answer has the name, else 0."""
        return float(_first(prediction) == gold[0] if self.wording == "terse" else _named(prediction, gold[0]))


@dataclass(frozen=True, kw_only=True)
class StoryMultihop(Story):
    """What she bought last before she bought something.

    Parameters
    ----------
    chapters, wording, text, reasoning
        As in :class:`Story`.
    """

    name = "story multi-hop"
    dispersion = "high"
    scope = "low"

    def _ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[str, str, tuple[str, ...], str]:
        place = int(rng.integers(1, len(chapters)))
        item, right = str(chapters[place].item), str(chapters[place - 1].item)
        if self.wording == "terse":
            return f"? before {item}", "", (right,), right
        question = f"What was the last thing that {HEROINE} bought before she bought the {item}?"
        return question, f" Before the {item}, {HEROINE} bought the", (right,), f" {right}."

    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """1 if the first sentence of the answer has the name, else 0."""
        return float(_first(prediction) == gold[0] if self.wording == "terse" else _named(prediction, gold[0]))


@dataclass(frozen=True, kw_only=True)
class StoryFiltering(Story):
    """In which chapters she bought nothing.

    Parameters
    ----------
    empty
        How many such chapters there are.
    chapters, wording, text, reasoning
        As in :class:`Story`.
    """

    empty: int = 2

    name = "story filtering"
    dispersion = "high"
    scope = "high"

    def __post_init__(self) -> None:
        if self.empty < 1:
            raise ConfigurationError(f"empty is {self.empty}; there must be a chapter to find")
        super().__post_init__()

    def _least(self) -> int:
        return self.empty + 2

    def _items(self, rng: np.random.Generator, count: int) -> list[str | None]:
        items = super()._items(rng, count)
        for place in rng.permutation(count)[: self.empty].tolist():
            items[place] = None
        return items

    def _ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[str, str, tuple[str, ...], str]:
        found = [chapter.number for chapter in chapters if chapter.item is None]
        if self.wording == "terse":
            names = tuple(f"n{number}" for number in found)
            return "? empty", "", names, " ".join(names)
        question = f"In which {len(found)} chapters did {HEROINE} buy nothing?"
        listed = ", ".join(str(number) for number in found)
        return question, f" {HEROINE} bought nothing in Chapters", tuple(map(str, found)), f" {listed}."

    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """Chapters named and meant, of those named or meant."""
        pattern = r"n\d+" if self.wording == "terse" else r"\d+"
        given = set(re.findall(pattern, _sentence(prediction)))
        return len(given & set(gold)) / len(given | set(gold))


def _first(prediction: str) -> str | None:
    words = prediction.split()
    return words[0] if words else None


def _sentence(prediction: str) -> str:
    return re.split(r"[.!?\n]", prediction.strip(), maxsplit=1)[0]


def _named(prediction: str, name: str) -> bool:
    return answer_words(_sentence(prediction), (name,)) > 0 and name.lower() in _sentence(prediction).lower()

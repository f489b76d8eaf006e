"""Questions about real documents, with the one that answers them among others.

Documents are passages of the bundled texts. Questions about the addresses to Congress follow from their headings; those
about the novel are written by hand, and each names words of the passage that answers it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.sample import Pieces, Sample, sentences_of
from gossamer.measure.long_context.tasks import Task, answer_words
from gossamer.models.text import read_text

_NOVEL = (
    ("Queequeg was a native of", "Of which island was Queequeg a native?", ("Rokovoko",)),
    ("A Sag Harbor ship visited his father's bay", "Whose ship visited the bay of Queequeg's father?", ("Sag Harbor",)),
    ("The Spouter Inn:—Peter Coffin", "Whose name stood on the sign of the Spouter Inn?", ("Peter Coffin",)),
    ("it is a sixteen dollar piece", "How many dollars was the bright coin worth?", ("sixteen", "16")),
    ("three ships up for three-years' voyages", "What were the three ships called?", ("Devil-dam, Tit-bit, Pequod",)),
    ("The third mate was Flask", "Of which place was the third mate a native?", ("Tisbury", "Martha's Vineyard")),
    ("Third among the harpooneers was", "Who was third among the harpooneers?", ("Daggoo",)),
    ("an unmixed Indian from Gay Head", "Which harpooneer came from Gay Head?", ("Tashtego",)),
    ("we'll give ye the ninetieth lay", "Which lay was Quohog promised?", ("ninetieth",)),
    ("The landlord of the Spouter-Inn had recommended", "Who was the landlord's cousin at the Try Pots?",
     ("Hosea Hussey",)),
    ("for that rare knowledge I am indebted to", "Of which place was the royal friend Tranquo king?", ("Tranque",)),
    ("duly met the ship Jungfrau", "Who was master of the ship Jungfrau?", ("Derick De Deer",)),
    ("which had just wedged in her last cask of oil", "Which ship had wedged in her last cask of oil?", ("Bachelor",)),
    ("he was dismasted off", "Off which country was he dismasted?", ("Japan",)),
    ("the begrimed, blistered old", "What was the name of the old blacksmith?", ("Perth",)),
    ("Yes, it was the famous", "Who was the famous chaplain, a favourite of the whalemen?", ("Father Mapple",)),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question, the sentence that answers it, and right answers."""

    passage: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Answer a question about one of several documents.

    Parameters
    ----------
    source
        ``addresses``, headings and first sentences of State of the Union addresses: who gave which; or ``novel``,
        passages of Moby-Dick.
    documents
        How many there are, at most.
    text, reasoning
        Where the prose between documents is from; and as in :class:`~gossamer.measure.long_context.tasks.Task`.
    """

    source: Literal["addresses", "novel"] = "addresses"
    documents: int = 6

    name = "question answering"
    dispersion = "low"
    scope = "low"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wording != "prose":
            raise ConfigurationError("question answering is about real text; its wording must be 'prose'")
        if self.source not in ("addresses", "novel") or self.documents < 1:
            raise ConfigurationError(
                f"source is {self.source!r} and documents {self.documents}; give 'addresses' or 'novel', and 1 or more"
            )

    def sample(self, rng: np.random.Generator, max_tokens: int, tokenizer: Any) -> Sample:
        """The document of a question among others, in random order, with prose between them."""
        known = questions(self.source)
        chosen = [known[int(number)] for number in rng.permutation(len(known))[: self.documents]]
        asked = chosen[int(rng.integers(len(chosen)))]
        hidden = tuple(f"\n\nDocument {number}: {one.passage}" for number, one in enumerate(chosen, 1))
        about = f"Question about document {chosen.index(asked) + 1}: " if self.source == "novel" else ""
        pieces = Pieces(
            "Read these documents. There will be a question about one of them.",
            hidden,
            f"\n\n{about}{asked.text}",
            " Answer:",
        )
        answer = f" {asked.answers[0]}."
        return self._made(pieces, asked.answers, answer, max_tokens, tokenizer, rng)

    def score(self, prediction: str, gold: tuple[str, ...]) -> float:
        """Harmonic mean of precision and recall of the words of the first line; of several answers the nearest."""
        return answer_words(prediction.strip().split("\n")[0].split(".")[0], gold)


@lru_cache(maxsize=2)
def questions(source: str) -> tuple[Question, ...]:
    """All questions of a source."""
    if source == "addresses":
        found = re.findall(r"STATE OF THE UNION, (\d{4})\. ([^\n]+?)\.\n+([^\n]+)", read_text("state-of-the-union"))
        return tuple(
            Question(
                f"STATE OF THE UNION, {year}. {speaker}. {_first_words(body)}",
                f"Who gave the State of the Union address of {year}?",
                (speaker,),
            )
            for year, speaker, body in found
        )
    sentences = sentences_of("moby-dick")
    made = []
    for words, text, answers in _NOVEL:
        passage = next(sentence for sentence in sentences if words in sentence)
        made.append(Question(passage, text, answers))
    return tuple(made)


def _first_words(body: str, count: int = 20) -> str:
    return " ".join(body.split()[:count]) + " …"

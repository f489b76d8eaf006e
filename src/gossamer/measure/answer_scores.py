"""How good short answers in words are: equal to a right one, or sharing its words.

Both measures are those of SQuAD: Rajpurkar et al., 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text",
arXiv 1606.05250. Case, punctuation, articles and spaces do not count; of several right answers the best counts.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.errors import CalibrationError, ConfigurationError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AnswerScores:
    """Means over questions, in percent.

    Attributes
    ----------
    exact
        Answers that are equal to a right one.
    f1
        Overlap of words with the right one that is nearest.
    """

    exact: float
    f1: float


def plain_answer(text: str) -> str:
    """An answer in small letters, without punctuation and articles, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_MARKS)).split())


def word_f1(given: str, right: str) -> float:
    """Harmonic mean of precision and recall of words, in [0, 1]; of empty answers both must be empty.

    Examples
    --------
    >>> word_f1("the red house", "A red barn.")
    0.5
    """
    own, other = plain_answer(given).split(), plain_answer(right).split()
    if not own or not other:
        return float(own == other)
    shared = sum((Counter(own) & Counter(other)).values())
    return 2 * shared / (len(own) + len(other))


def answer_scores(given: Sequence[str], right: Sequence[Sequence[str]]) -> AnswerScores:
    """Score answers against the right ones.

    Parameters
    ----------
    given
        An answer to each question.
    right
        The right answers to each; none means that the question has no answer, which an empty one says.

    Raises
    ------
    ConfigurationError
        If there are not as many of both.
    CalibrationError
        If there is no question.
    """
    if len(given) != len(right):
        raise ConfigurationError(f"{len(given)} answers were given to {len(right)} questions; give one to each")
    if not given:
        raise CalibrationError("there is no question; give at least one")
    pairs = [(own, list(others) or [""]) for own, others in zip(given, right)]
    exact = sum(any(plain_answer(own) == plain_answer(other) for other in others) for own, others in pairs)
    overlap = sum(max(word_f1(own, other) for other in others) for own, others in pairs)
    return AnswerScores(100 * exact / len(pairs), 100 * overlap / len(pairs))

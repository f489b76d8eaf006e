"""Who decides whether an explanation fits: a language model that is asked, or rules that need none."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.features.autointerp import prompts
from gossamer.features.autointerp.clients import Client, Conversation
from gossamer.features.autointerp.lexical import evidence
from gossamer.features.autointerp.predicates import parse
from gossamer.features.autointerp.windows import Window

Answers = list[float | None]
_STRONGEST = 10


class Judge(ABC):
    """Compares an explanation with windows, and abstains with None where it cannot."""

    @abstractmethod
    def active(self, explanation: str, windows: Sequence[Window]) -> Answers:
        """Probability that the latent is active anywhere in each window."""

    @abstractmethod
    def rightly_marked(self, explanation: str, windows: Sequence[Window], marks: Sequence[np.ndarray]) -> Answers:
        """Probability that the tokens marked in each window are those at which the latent is active."""

    @abstractmethod
    def strengths(self, explanation: str, windows: Sequence[Window]) -> list[np.ndarray | None]:
        """How active the latent is expected to be at every token of each window, from 0 to 10."""


class OfflineJudge(Judge):
    """Carries out explanations that are predicates, and looks for the words of those that are not.

    Needs no language model and never disagrees with itself. Of a predicate (:mod:`.predicates`) it knows the truth.
    Of free text it knows as much as :mod:`.lexical` says, which is no understanding: use it for predicates, for
    explanations by :class:`~gossamer.features.autointerp.explainers.TokenExplainer`, and as a floor for others.
    """

    def active(self, explanation: str, windows: Sequence[Window]) -> Answers:  # noqa: D102
        return [None if found is None else float(found.max(initial=0)) for found in self._all(explanation, windows)]

    def rightly_marked(  # noqa: D102
        self, explanation: str, windows: Sequence[Window], marks: Sequence[np.ndarray]
    ) -> Answers:
        found = self._all(explanation, windows)
        return [
            None if truth is None or not np.any(marked) else float(truth[np.asarray(marked, bool)].mean())
            for truth, marked in zip(found, marks)
        ]

    def strengths(self, explanation: str, windows: Sequence[Window]) -> list[np.ndarray | None]:  # noqa: D102
        return [None if found is None else _STRONGEST * found for found in self._all(explanation, windows)]

    def _all(self, explanation: str, windows: Sequence[Window]) -> list[np.ndarray | None]:
        predicate = parse(explanation)
        if predicate is None:
            return [evidence(explanation, window.pieces) for window in windows]
        return [predicate.holds(window.pieces).astype(np.float64) for window in windows]


class PromptedJudge(Judge):
    """Asks a language model.

    Parameters
    ----------
    client
        Who is asked.
    per_prompt
        Windows that are judged in one conversation. With 1 the answers are probabilities, and no window can be judged
        by what else is there; the paper's runs took 5, which is cheaper and gives a yes or no.
    """

    def __init__(self, client: Client, per_prompt: int = 1):
        if per_prompt < 1:
            raise ConfigurationError(f"per_prompt is {per_prompt}; it must be at least 1")
        self.client, self.per_prompt = client, per_prompt

    def active(self, explanation: str, windows: Sequence[Window]) -> Answers:  # noqa: D102
        return self._judged(prompts.DETECTION, explanation, [window.text for window in windows])

    def rightly_marked(  # noqa: D102
        self, explanation: str, windows: Sequence[Window], marks: Sequence[np.ndarray]
    ) -> Answers:
        texts = [window.highlighted(marked) for window, marked in zip(windows, marks, strict=True)]
        return self._judged(prompts.FUZZING, explanation, texts)

    def strengths(self, explanation: str, windows: Sequence[Window]) -> list[np.ndarray | None]:  # noqa: D102
        asked = [prompts.simulation(explanation, window.pieces) for window in windows]
        longest = max((len(window) for window in windows), default=0)
        replies = self.client.complete(asked, max_tokens=20 + 4 * longest)
        return [_numbers(reply, len(window)) for reply, window in zip(replies, windows)]

    def _judged(self, task: prompts.Task, explanation: str, texts: Sequence[str]) -> Answers:
        if self.per_prompt == 1:
            asked = [prompts.judged(task, explanation, [text]) for text in texts]
            return [None if found is None else found[1] for found in self.client.choose(asked, ("0", "1"))]
        parts = [texts[first : first + self.per_prompt] for first in range(0, len(texts), self.per_prompt)]
        conversations: list[Conversation] = [prompts.judged(task, explanation, part) for part in parts]
        replies = self.client.complete(conversations, max_tokens=4 * self.per_prompt + 8)
        return [answer for reply, part in zip(replies, parts) for answer in _verdicts(reply, len(part))]


def _verdicts(reply: str | None, count: int) -> Answers:
    """The first list of 0 and 1 in a reply; abstentions if there is none of the right length."""
    listed = re.search(r"\[\s*[01](?:\s*,\s*[01])*\s*\]", reply or "")
    found = json.loads(listed[0]) if listed else []
    return [float(answer) for answer in found] if len(found) == count else [None] * count


def _numbers(reply: str | None, count: int) -> np.ndarray | None:
    """The first list of so many numbers in a reply, kept from 0 to 10."""
    for listed in re.findall(r"\[[\d\s.,]+\]", reply or ""):
        try:
            found = np.array(json.loads(listed), np.float64)
        except ValueError:
            continue
        if len(found) == count:
            return np.clip(found, 0, _STRONGEST)
    return None

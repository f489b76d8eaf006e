"""Explanations of a latent from windows in which it is active: by a language model, or by counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gossamer.errors import ConfigurationError
from gossamer.features.autointerp import prompts
from gossamer.features.autointerp.clients import Client
from gossamer.features.autointerp.examples import LatentRecord
from gossamer.features.autointerp.predicates import KINDS, Clause, Predicate, plain
from gossamer.features.autointerp.windows import Window

_LEAST = 2  # activations of a word in a list


class Explainer(Protocol):
    """Says in words what a latent responds to."""

    def explain(self, record: LatentRecord) -> str | None:
        """One line; None if there is nothing to say. Only `train` and `contrast` of the record may be looked at."""
        ...


class PromptedExplainer:
    """Asks a language model [arXiv 2410.13928, section 3.2].

    Parameters
    ----------
    client
        Who is asked.
    strengths
        Whether the strength of every marked token is shown.
    step_by_step
        Whether to think aloud before answering.
    contrast
        Whether to show inactive windows as counterexamples.
    single_token
        Whether latents that are active at one token at a time are explained by a list of those tokens alone.
    threshold
        Tokens with more than this share of their window's strongest activation are marked.
    windows
        Shown, at most; fewer suit models with a short memory.
    max_tokens
        Of the answer.
    """

    def __init__(
        self,
        client: Client,
        strengths: bool = False,
        step_by_step: bool = False,
        contrast: bool = False,
        single_token: bool = False,
        threshold: float = 0.3,
        windows: int = 40,
        max_tokens: int = 200,
    ):
        if not 0 <= threshold < 1 or windows < 1 or max_tokens < 1:
            raise ConfigurationError(
                f"threshold is {threshold}, windows {windows}, max_tokens {max_tokens}; "
                "give a threshold in [0, 1), and at least one of each"
            )
        self.client, self.strengths, self.step_by_step, self.contrast = client, strengths, step_by_step, contrast
        self.single_token, self.threshold, self.windows, self.max_tokens = single_token, threshold, windows, max_tokens

    def explain(self, record: LatentRecord) -> str | None:  # noqa: D102
        shown = spread(record.train, self.windows)
        if self.single_token and all(window.marks(self.threshold).sum() == 1 for window in shown):
            words = [window.pieces[int(window.marks(self.threshold).argmax())] for window in shown]
            asked = prompts.single_token_explanation(words)
        else:
            contrast = record.contrast if self.contrast else ()
            asked = prompts.explanation(
                shown, record.maximum, contrast, self.strengths, self.step_by_step, self.threshold
            )
        return prompts.read_explanation(self.client.complete([asked], self.max_tokens)[0])


def spread(windows: Sequence[Window], count: int) -> list[Window]:
    """So many of the windows, evenly over their order, which is that of their strength."""
    if len(windows) <= count:
        return list(windows)
    return [windows[int(place)] for place in np.linspace(0, len(windows) - 1, count).round()]


class TokenExplainer:
    """Finds the predicate that tells active tokens from silent ones best. Deterministic, and needs no model.

    It tries lists of words and kinds of tokens, for the token itself and the one before it, and joins up to three of
    them as long as F1 over the tokens it may look at rises. Its explanations can be carried out by
    :class:`~gossamer.features.autointerp.judges.OfflineJudge`.

    Parameters
    ----------
    words
        In a list, at most.
    clauses
        Joined, at most.
    """

    def __init__(self, words: int = 8, clauses: int = 3):
        if words < 1 or clauses < 1:
            raise ConfigurationError(f"words is {words} and clauses {clauses}; both must be at least 1")
        self.words, self.clauses = words, clauses

    def explain(self, record: LatentRecord) -> str | None:  # noqa: D102
        windows = [*record.train, *record.contrast]
        truth = np.concatenate([window.values > 0 for window in windows]) if windows else np.zeros(0, bool)
        if not truth.any():
            return None
        offers = [(clause, _holds((clause,), windows)) for clause in self._offers(windows, truth)]
        chosen: list[Clause] = []
        said, best = np.zeros(len(truth), bool), 0.0
        while len(chosen) < self.clauses and offers:
            gains = [_f1(said | found, truth) for _, found in offers]
            place = int(np.argmax(gains))
            if gains[place] <= best + 1e-9:
                break
            best = gains[place]
            chosen.append(offers[place][0])
            said |= offers[place][1]
        return str(Predicate(tuple(chosen))) if chosen else None

    def _offers(self, windows: Sequence[Window], truth: np.ndarray) -> list[Clause]:
        pieces = [[plain(piece) for piece in window.pieces] for window in windows]
        here = [piece for part in pieces for piece in part]
        before = [piece for part in pieces for piece in ("", *part[:-1])]
        lists = [
            Clause(previous, words)
            for previous, column in ((False, here), (True, before))
            for words in self._lists(column, truth)
        ]
        return [*lists, *(Clause(previous, kind=kind) for previous in (False, True) for kind in KINDS)]

    def _lists(self, column: Sequence[str], truth: np.ndarray) -> list[tuple[str, ...]]:
        """The best list of words: those by which F1 rises, the surest first."""
        total = Counter(column)
        active = Counter(word for word, true in zip(column, truth) if true and word)
        # a word that was active once tells nothing
        active = Counter({word: count for word, count in active.items() if count >= _LEAST})
        surest = sorted(active, key=lambda word: (-active[word] / (total[word] + 1), -active[word], word))
        words: list[str] = []
        hits = said = 0
        best = 0.0
        for word in surest:
            f1 = 2 * (hits + active[word]) / (said + total[word] + int(truth.sum()))
            if f1 > best and len(words) < self.words:
                words.append(word)
                hits, said, best = hits + active[word], said + total[word], f1
        return [tuple(words)] if words else []


def _holds(clauses: tuple[Clause, ...], windows: Sequence[Window]) -> np.ndarray:
    predicate = Predicate(clauses)
    return np.concatenate([predicate.holds(window.pieces) for window in windows])


def _f1(said: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float((said & truth).sum()) / max(float(said.sum() + truth.sum()), 1.0)

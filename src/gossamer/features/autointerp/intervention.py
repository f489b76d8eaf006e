"""Scores of an explanation by what a latent does: does the model's text become more like it when the latent is steered?

Latents that act on what comes next may be active on the most different words, so that no explanation of those can be
good. Here the explanation is of the output, and it is good if a language model finds it more probable after texts in
which the latent was made stronger than after clean ones [arXiv 2410.13928, section 3.3.5].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.autointerp import prompts
from gossamer.features.autointerp.clients import Client
from gossamer.features.autointerp.examples import LatentRecord
from gossamer.features.autointerp.language_model import EndingReader
from gossamer.features.autointerp.score import Score, mean_interval
from gossamer.features.autointerp.steering import Steering, Tuned
from gossamer.features.autointerp.windows import Window
from gossamer.features.sae import SAE

_LEAST = 2  # tokens of a context: the first of a text is where attention rests, and steering it does something else


def contexts(windows: Sequence[Window], count: int) -> list[list[int]]:
    """Tokens of windows up to the first at which the latent is active, evenly over the windows."""
    ends = [(window, int(np.argmax(window.values > 0)) + 1) for window in windows if window.active]
    found = [window.tokens[:end].tolist() for window, end in ends if end >= _LEAST]
    if not found:
        raise CalibrationError(f"none of {len(windows)} windows has {_LEAST} tokens up to its activation; give others")
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[place] for place in places]


class InterventionScorer:
    """How many nats an explanation gains by steering.

    The mean over contexts of −log p(explanation | clean text) + log p(explanation | steered text).

    Parameters
    ----------
    model, tokenizer
        The model that has the latent.
    site
        Name of the module, or number of the block.
    sae
        Whose latents the records are of.
    judge, judge_tokenizer
        The language model that reads the texts. Default: the same.
    divergence
        Kullback–Leibler divergence of the next token that steering is tuned to, in nats.
    ablate
        Silence the latent instead of making it stronger.
    contexts
        Texts, at most.
    tokens
        Generated behind each.
    tries
        Strengths that may be tried.
    batch
        Texts that the judge reads at a time.
    seed
        Of what is generated.
    """

    name = "intervention"

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        site: str | int,
        sae: SAE,
        judge: nn.Module | None = None,
        judge_tokenizer: Any = None,
        divergence: float = 0.5,
        ablate: bool = False,
        contexts: int = 40,
        tokens: int = 8,
        tries: int = 10,
        batch: int = 16,
        seed: int = 0,
    ):
        if (judge is None) != (judge_tokenizer is None):
            raise ConfigurationError("judge and judge_tokenizer belong together; give both or none")
        if contexts < 1 or tokens < 1:
            raise ConfigurationError(f"contexts is {contexts} and tokens {tokens}; both must be at least 1")
        self.model, self.tokenizer, self.site, self.sae = model, tokenizer, site, sae
        self.judge, self.judge_tokenizer = judge or model, judge_tokenizer or tokenizer
        self.target, self.ablate, self.contexts, self.tokens = divergence, ablate, contexts, tokens
        self.tries, self.seed = tries, seed
        self._reader = EndingReader(self.judge, batch)
        self._tuned: dict[int, Tuned] = {}
        self._passages: dict[int, tuple[list[str], list[str]]] = {}

    def score(self, record: LatentRecord, explanation: str) -> Score:
        """Of one explanation of what the latent does."""
        tuned, (clean, steered) = self.tuned(record), self._texts(record)
        gains = self._losses(clean, explanation) - self._losses(steered, explanation)
        low, high = mean_interval(gains) or (None, None)
        facts = {"strength": tuned.strength, "divergence": tuned.divergence, "tries": tuned.tries}
        return Score(self.name, "nats", float(gains.mean()), low, high, count=len(gains), facts=facts)

    def best(self, record: LatentRecord, explanations: Sequence[str]) -> tuple[str, Score]:
        """The explanation of the highest score, as the paper reports it, and this score.

        Being the best of several it is too high by chance; compare it with the best of as many of a random direction.
        """
        if not explanations:
            raise ConfigurationError("there are no explanations to choose from; give at least one")
        scored = [(explanation, self.score(record, explanation)) for explanation in dict.fromkeys(explanations)]
        return max(scored, key=lambda pair: pair[1].value if pair[1].value is not None else -np.inf)

    def steering(self, record: LatentRecord) -> Steering:
        """The latent of a record in the model."""
        return Steering(self.model, self.site, self.sae, record.latent)

    def tuned(self, record: LatentRecord) -> Tuned:
        """The strength that has the wanted divergence on the texts to test on; found once."""
        if record.latent not in self._tuned:
            steering, before = self.steering(record), contexts(record.test, self.contexts)
            self._tuned[record.latent] = (
                steering.silenced(before) if self.ablate else steering.tuned(before, self.target, self.tries)
            )
        return self._tuned[record.latent]

    def _texts(self, record: LatentRecord) -> tuple[list[str], list[str]]:
        """Passages with clean and with steered endings; made once."""
        if record.latent not in self._passages:
            steering, before = self.steering(record), contexts(record.test, self.contexts)
            clean, steered = (
                [prompts.passage(self._text(ids), self._text(more)) for ids, more in zip(before, endings)]
                for endings in (
                    steering.continued(before, 0.0, self.tokens, self.seed),
                    steering.continued(before, self.tuned(record).strength, self.tokens, self.seed),
                )
            )
            self._passages[record.latent] = (clean, steered)
        return self._passages[record.latent]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _losses(self, passages: Sequence[str], explanation: str) -> np.ndarray:
        """−log p of the explanation behind each passage, in nats, ``(passages,)``."""
        beginning = self._ids(prompts.passage_beginning(), special=True)
        said = self._ids(f'{prompts.one_line(explanation)}"')
        endings = [self._ids(text) + said for text in passages]
        losses = self._reader.losses(beginning, endings)
        return np.array([float(loss[-len(said) :].sum()) for loss in losses])

    def _ids(self, text: str, special: bool = False) -> list[int]:
        return [int(token) for token in self.judge_tokenizer(text, add_special_tokens=special)["input_ids"]]


class OutputExplainer:
    """Explains a latent by the tokens that it makes more likely.

    Parameters
    ----------
    scorer
        Knows the model, and how strongly to steer.
    client
        Who writes the explanations. None lists the tokens that are promoted most, which needs no language model.
    candidates
        Explanations to choose from.
    contexts
        Texts that are shown, of those to explain by.
    top
        Tokens that are shown for each.
    """

    def __init__(
        self,
        scorer: InterventionScorer,
        client: Client | None = None,
        candidates: int = 5,
        contexts: int = 10,
        top: int = 5,
    ):
        if candidates < 1 or contexts < 1 or top < 1:
            raise ConfigurationError(
                f"candidates is {candidates}, contexts {contexts} and top {top}; each must be at least 1"
            )
        self.scorer, self.client, self.candidates, self.contexts, self.top = scorer, client, candidates, contexts, top

    def explanations(self, record: LatentRecord) -> list[str]:
        """Candidates, different from each other; none if no answer was usable."""
        cases = self.cases(record)
        if self.client is None:
            gains: Counter[str] = Counter()
            for _, tokens, risen in cases:
                gains.update({token.strip(): gain for token, gain in zip(tokens, risen) if token.strip()})
            words = [word for word, _ in gains.most_common(self.top)]
            return [", ".join(words[:count]) for count in range(1, min(self.candidates, len(words)) + 1)]
        asked = prompts.output_explanation(cases)
        found = [self.client.complete([asked], 40, 1.0, seed)[0] for seed in range(self.candidates)]
        return list(dict.fromkeys(said for reply in found if (said := prompts.read_explanation(reply))))

    def cases(self, record: LatentRecord) -> list[prompts.Promoted]:
        """Texts to explain by, with what is promoted behind each by the strength that is tested."""
        steering, before = self.scorer.steering(record), contexts(record.train, self.contexts)
        promoted = steering.promoted(before, self.scorer.tuned(record).strength, self.top)
        decode = self.scorer.tokenizer.decode
        return [
            (decode(ids), [decode([token]) for token, _ in risen], [gain for _, gain in risen])
            for ids, risen in zip(before, promoted)
        ]

"""Tasks of which the circuit is to be found: prompts that a model solves, and prompts like them that it cannot.

What is asked of a model is always the token after the prompt. Every prompt has a twin of the same length, minimally
different, on which the task makes no sense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.heads import by_length, evaluating, gated_heads, last_logits

Metric = Literal["logits", "probability"]

_DOCSTRING_WORDS = (
    "load size name file path time line list text data node item rows page user form test group point order cell "
    "state color frame value field index table block event input level image"
)
_WARS = "war siege conflict struggle campaign strike dispute famine voyage dynasty trial reform truce plague"


@dataclass(frozen=True, eq=False)
class CircuitTask:
    """Prompts with right and wrong answers, and their twins.

    Attributes
    ----------
    positive, negative
        Token ids, each ``(length,)``; prompts of the same number are twins, of the same length.
    right, wrong
        Tokens that would be right, and wrong, after each positive, ``(prompts, answers)`` int64; −1 where a prompt has
        fewer.
    metric
        ``logits``: mean logit of the right answers less that of the wrong ones. ``probability``: what they get in all.
    """

    positive: Sequence[Tensor]
    negative: Sequence[Tensor]
    right: Tensor
    wrong: Tensor
    metric: Metric = "logits"

    def __post_init__(self) -> None:
        counts = (len(self.positive), len(self.negative), len(self.right), len(self.wrong))
        if len(set(counts)) != 1 or not counts[0]:
            raise CalibrationError(f"positives, negatives, right and wrong answers number {counts}; give one of each")
        if any(one.numel() != other.numel() for one, other in zip(self.positive, self.negative)):
            raise CalibrationError("a prompt and its twin have different numbers of tokens; draw them again")
        if self.metric not in ("logits", "probability"):
            raise ConfigurationError(f"metric is {self.metric!r}; it must be 'logits' or 'probability'")

    def __len__(self) -> int:
        return len(self.positive)

    @property
    def prompts(self) -> list[Tensor]:
        """Positives and then negatives."""
        return [*self.positive, *self.negative]

    @property
    def labels(self) -> Tensor:
        """True for the positives among :attr:`prompts`."""
        return torch.arange(2 * len(self)) < len(self)

    def part(self, rows: Sequence[int] | Tensor) -> CircuitTask:
        """Some of the prompts with their twins."""
        chosen = torch.as_tensor(rows)
        positive, negative = ([side[int(row)] for row in chosen] for side in (self.positive, self.negative))
        return CircuitTask(positive, negative, self.right[chosen], self.wrong[chosen], self.metric)

    def score(self, logits: Tensor, rows: Tensor) -> Tensor:
        """How far the right answers are ahead, ``(rows,)``, from the logits after prompts of these numbers."""
        values = logits if self.metric == "logits" else logits.softmax(-1)
        mean = self.metric == "logits"
        return _answers(values, self.right[rows], mean) - _answers(values, self.wrong[rows], mean)

    def measure(
        self,
        model: nn.Module,
        gates: Tensor | None = None,
        means: Sequence[Tensor] | None = None,
        negative: bool = False,
    ) -> Tensor:
        """The metric of every prompt, ``(prompts,)``, without gradients.

        Parameters
        ----------
        model
            The model.
        gates, means
            Of its heads, as in :func:`~gossamer.features.heads.gated_heads`; by default all are as they are.
        negative
            Whether to ask the twins instead, for the same answers.
        """
        found = torch.empty(len(self))
        with torch.no_grad(), evaluating(model):
            for rows, tokens in by_length(self.negative if negative else self.positive):
                if gates is None:
                    found[rows] = self.score(last_logits(model, tokens), rows)
                else:
                    with gated_heads(model, gates, means):
                        found[rows] = self.score(last_logits(model, tokens), rows)
        return found

    def solved(self, model: nn.Module) -> Tensor:
        """For which prompts the right answers are ahead, bool ``(prompts,)``."""
        return self.measure(model) > 0

    def only_solved(self, model: nn.Module, least: int = 1) -> CircuitTask:
        """The prompts that the model solves: a circuit for a task that is not performed means nothing.

        Raises
        ------
        CalibrationError
            If there are fewer than `least`.
        """
        rows = self.solved(model).nonzero()[:, 0]
        if len(rows) < least:
            raise CalibrationError(
                f"the model solves {len(rows)} of {len(self)} prompts, {least} are needed; choose another task or model"
            )
        return self.part(rows)


def _answers(values: Tensor, tokens: Tensor, mean: bool) -> Tensor:
    known = tokens >= 0
    found = values.gather(-1, tokens.clamp(min=0)).masked_fill(~known, 0).sum(-1)
    return found / known.sum(-1).clamp(min=1) if mean else found


def greater_than(tokenizer: Any, count: int, seed: int = 0) -> CircuitTask:
    """The war lasted from the year 1732 to the year 17…: years above 32 are right [Hanna et al., 2023].

    In the twins the first year ends in 01, so that every year that follows is right. Tokenizers that write each digit
    by itself are asked for the tens only.

    Parameters
    ----------
    tokenizer
        Of the model.
    count, seed
        Prompts, and what they are drawn from.
    """
    rng = np.random.default_rng(seed)
    by_digits = len(_ids(tokenizer, "17")) > 1
    endings = [
        _ids(tokenizer, f"{year}" if by_digits else f"{year:02d}")[0] for year in range(10 if by_digits else 100)
    ]
    positive, negative, right, wrong = [], [], [], []
    for _ in range(count):
        century, year, war = int(rng.integers(11, 18)), int(rng.integers(12, 88)), rng.choice(_WARS.split())
        sentence = f"The {war} lasted from the year {century}{{:02d}} to the year {century}"
        positive.append(torch.tensor(_ids(tokenizer, sentence.format(year))))
        negative.append(torch.tensor(_ids(tokenizer, sentence.format(1))))
        bound = year // 10 if by_digits else year
        right.append(endings[bound + 1 :])
        # a year of the same ten may be right or wrong
        wrong.append(endings[:bound] if by_digits else endings[: bound + 1])
    return CircuitTask(positive, negative, _padded(right), _padded(wrong), "probability")


def docstring(tokenizer: Any, count: int, seed: int = 0) -> CircuitTask:
    """A Python function whose docstring names its arguments; the third one is to be named next [Heimersheim, 2023].

    In the twins the docstring names arguments that the function does not have.

    Parameters
    ----------
    tokenizer
        Of the model.
    count, seed
        Prompts, and what they are drawn from.
    """
    rng = np.random.default_rng(seed)
    words = single_tokens(tokenizer, _DOCSTRING_WORDS.split())
    if len(words) < 14:
        raise CalibrationError(f"only {len(words)} argument names are single tokens; the task needs 14")
    positive: list[Tensor] = []
    negative: list[Tensor] = []
    right, wrong = [], []
    for _ in range(count):
        drawn = [str(word) for word in rng.choice(list(words), 14, replace=False)]
        title, arguments, others, text = drawn[0], drawn[1:5], drawn[5:7], drawn[7:]
        head = f'def {title}(self, {", ".join(arguments)}):\n    """{" ".join(text[:3])}\n\n'
        for named, prompts in ((arguments[:2], positive), (others, negative)):
            lines = [f"    :param {name}: {text[3 + 2 * row]} {text[4 + 2 * row]}\n" for row, name in enumerate(named)]
            prompts.append(torch.tensor(_ids(tokenizer, head + "".join(lines) + "    :param")))
        right.append([words[arguments[2]]])
        wrong.append([words[name] for name in arguments if name != arguments[2]])
    return CircuitTask(positive, negative, _padded(right), _padded(wrong))


def single_tokens(tokenizer: Any, words: Sequence[str]) -> dict[str, int]:
    """Words that are one token after a space, and which."""
    found = {word: _ids(tokenizer, f" {word}") for word in words}
    return {word: ids[0] for word, ids in found.items() if len(ids) == 1}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _padded(answers: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, answers))
    return torch.tensor([[*tokens, *[-1] * (longest - len(tokens))] for tokens in answers])

"""Writing text with a language model: through its compiled program where there is one, else through the model itself.

Which token follows is chosen the same way for both: the most likely one, or one drawn from the most likely ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.runtime.program import DecodeProgram
from gossamer.runtime.session import Session

_MANY = 1024  # most likely tokens among which the share `top_p` is looked for before all are sorted


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes
    ----------
    temperature
        What logits are divided by; 0 always takes the most likely token.
    top_k
        Choose among so many of the most likely tokens; 0 for all.
    top_p
        Choose among the fewest tokens that together have this probability, in (0, 1].
    seed
        Equal seeds make equal choices.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigurationError(f"temperature is {self.temperature!r}; it must be a number of at least 0")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ConfigurationError(f"top_k is {self.top_k!r}; it must be an integer of at least 0 (0 for all tokens)")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p is {self.top_p!r}; it must be a probability in (0, 1]")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Choose a token.

        Parameters
        ----------
        logits
            ``(vocabulary,)``.
        generator
            Source of randomness.

        Raises
        ------
        NonFiniteError
            If a logit is NaN, or the largest is infinite.
        """
        best = int(logits.argmax())  # a NaN counts as the largest
        if not torch.isfinite(logits[best]):
            raise NonFiniteError(f"logit {best} is {float(logits[best])}; look for NaN or infinity in the weights")
        if self.temperature == 0:
            return best
        scaled = (logits.float() - logits[best].float()) / self.temperature
        count = min(self.top_k or len(scaled), len(scaled))
        if self.top_p < 1:
            return self._choose_share(scaled, count, generator)
        values, tokens = (scaled, None) if count == len(scaled) else scaled.topk(count)
        place = int(torch.multinomial(values.softmax(0), 1, generator=generator))
        return place if tokens is None else int(tokens[place])

    def _choose_share(self, scaled: Tensor, count: int, generator: torch.Generator) -> int:
        """Draw from the fewest of the `count` most likely tokens that have the share `top_p` of their probability."""
        everything = count == len(scaled)
        values, tokens = scaled.topk(min(count, _MANY) if everything else count)
        total = scaled.exp().sum() if everything else values.exp().sum()
        if len(values) < count and float(values.exp().sum() / total) < self.top_p:
            values, tokens = scaled.sort(descending=True)
        weights = values.exp()
        shares = weights / total
        before = shares.cumsum(0) - shares
        kept = before < self.top_p
        place = int(torch.multinomial(weights[kept], 1, generator=generator))
        return int(tokens[kept][place])


@dataclass(frozen=True)
class Generation:
    """What was written.

    Attributes
    ----------
    tokens
        New token ids, the one that ended the text included.
    ended
        Whether such a token came.
    prompt_seconds, decode_seconds
        Time to the first new token, and for all others.
    compiled
        Whether the compiled program wrote it.
    """

    tokens: list[int]
    ended: bool
    prompt_seconds: float
    decode_seconds: float
    compiled: bool

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 if there was none."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


class _Text(Protocol):
    """Something that takes tokens and returns the logits of the next one."""

    def feed(self, tokens: Sequence[int]) -> Tensor: ...


class _ModelText:
    """A text that the model itself reads and writes, with its own cache."""

    def __init__(self, model: nn.Module):
        self._model, self._cache = model, None
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def feed(self, tokens: Sequence[int]) -> Tensor:
        ids = torch.tensor([list(tokens)], device=self._device)
        output: Any = self._model(ids, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits[0, -1].float().cpu()


def generate(
    source: DecodeProgram | nn.Module,
    prompt: Sequence[int],
    new_tokens: int = 128,
    sampling: Sampling | None = None,
    stop: Iterable[int] = (),
    on_token: Callable[[int], Any] | None = None,
) -> Generation:
    """Write on.

    Parameters
    ----------
    source
        A compiled program, or a model that runs itself.
    prompt
        Token ids, at least one.
    new_tokens
        Most tokens to write, at least 1.
    sampling
        How tokens are chosen; by default always the most likely one.
    stop
        Ids that end the text.
    on_token
        Called with every new token as soon as it is chosen; if it returns False, the text ends there.

    Returns
    -------
    Generation

    Raises
    ------
    ConfigurationError
        If the prompt is empty, `new_tokens` is below 1, or the text would be longer than the program was made for.
    NonFiniteError
        If the model puts out NaN.
    """
    if not len(prompt):
        raise ConfigurationError("the prompt is empty; give at least one token")
    if not isinstance(new_tokens, int) or new_tokens < 1:
        raise ConfigurationError(f"new_tokens is {new_tokens!r}; it must be an integer of at least 1")
    sampling = Sampling() if sampling is None else sampling
    ends = frozenset(stop)
    # the last token is never fed
    text: _Text = (
        source.session(len(prompt) + new_tokens - 1) if isinstance(source, DecodeProgram) else _ModelText(source)
    )
    generator = torch.Generator().manual_seed(sampling.seed)
    begin = time.perf_counter()
    tokens = [_next(text, prompt, sampling, generator)]
    first = time.perf_counter()
    ended = _ends(tokens[-1], ends, on_token)
    while not ended and len(tokens) < new_tokens:
        tokens.append(_next(text, tokens[-1:], sampling, generator))
        ended = _ends(tokens[-1], ends, on_token)
    return Generation(
        tokens, tokens[-1] in ends, first - begin, time.perf_counter() - first, isinstance(source, DecodeProgram)
    )


def _next(text: _Text, tokens: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    logits = text.feed(tokens)
    if sampling.temperature == 0 and isinstance(text, Session) and torch.isfinite(logits[text.best]):
        return text.best  # found while the logits were in the cache
    return sampling.choose(logits, generator)


def _ends(token: int, ends: frozenset[int], on_token: Callable[[int], Any] | None) -> bool:
    goes_on = True if on_token is None else on_token(token)
    return token in ends or goes_on is False

"""A text that grows greedily inside of transformers' ``generate``: what its settings say about scores and endings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError

_OURS = frozenset({"use_cache", "logits_to_keep", "cache_position", "attention_mask", "past_key_values"})
_PER_TOKEN = frozenset({"position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"})


class GreedyText:
    """One sequence of tokens, with the processors and stopping criteria that ``generate`` has prepared.

    Parameters
    ----------
    input_ids
        The prompt, ``(1, tokens)``.
    processors
        ``(ids, scores) → scores``, such as a repetition penalty; None for none.
    criteria
        ``(ids, scores) → (1,)`` bool: whether the text ends with its last token.
    max_length
        Tokens that it may have, the prompt included.
    streamer
        Told of tokens as they are added, and of the end; None for nobody.
    """

    def __init__(self, input_ids: Tensor, processors: Any, criteria: Any, max_length: int, streamer: Any = None):
        self.ids = input_ids
        self._streamer = streamer
        self.prompt = input_ids.shape[1]
        self.max_length = max_length
        self._processors = processors if processors is not None and len(processors) else None
        self._criteria = criteria

    @property
    def room(self) -> int:
        """Tokens that may still come."""
        return self.max_length - self.ids.shape[1]

    @property
    def generated(self) -> int:
        """Tokens that have come."""
        return self.ids.shape[1] - self.prompt

    @property
    def is_plain(self) -> bool:
        """Whether scores are the logits, since there are no processors."""
        return self._processors is None

    def with_tokens(self, tokens: list[int]) -> Tensor:
        """The text as it would be with more tokens, ``(1, tokens)``."""
        if not tokens:
            return self.ids
        more = torch.tensor([tokens], dtype=self.ids.dtype, device=self.ids.device)
        return torch.cat([self.ids, more], dim=1)

    def scores(self, logits: Tensor, tokens: list[int]) -> Tensor:
        """What the processors make of logits ``(vocabulary,)`` that follow the text with more tokens; float32."""
        rows = logits.float().unsqueeze(0)
        return (rows if self._processors is None else self._processors(self.with_tokens(tokens), rows))[0]

    def rows(self, logits: Tensor, tokens: list[int]) -> Tensor:
        """Scores after the text with the first 0, 1, 2, … of `tokens`; ``(len(tokens) + 1, vocabulary)``."""
        if self._processors is None:
            return logits.float()
        return torch.stack([self.scores(row, tokens[:count]) for count, row in enumerate(logits)])

    def ends(self, tokens: list[int]) -> bool:
        """Whether the text with more tokens ends at the last of them."""
        ids = self.with_tokens(tokens)
        if ids.shape[1] >= self.max_length:
            return True
        return self._criteria is not None and bool(torch.as_tensor(self._criteria(ids, None)).any())

    def append(self, tokens: list[int]) -> bool:
        """Add tokens, none behind one with which the text ends; returns whether it has ended."""
        end = next((count for count in range(1, len(tokens) + 1) if self.ends(tokens[:count])), None)
        before = self.ids.shape[1]
        self.ids = self.with_tokens(tokens[:end])
        if self._streamer is not None:
            if tokens:
                self._streamer.put(self.ids[0, before:].cpu())
            if end is not None:
                self._streamer.end()
        return end is not None


def check_greedy(input_ids: Tensor, settings: Any, what: str) -> None:
    """Refuse what only a greedy search over one sequence can do.

    Raises
    ------
    ConfigurationError
        For sampling, beams, contrastive search, contrasted layers, several sequences, or a prompt without tokens.
    """
    plain = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "penalty_alpha": 0.0, "dola_layers": None}
    for name, usual in plain.items():
        value = getattr(settings, name, None)
        if value not in (usual, None):
            raise ConfigurationError(f"{name} is {value!r}; {what} is a greedy search: set {name}={usual!r}")
    if input_ids.shape[0] != 1:
        raise ConfigurationError(
            f"{what} got {input_ids.shape[0]} sequences; each would advance by another length: call it one by one"
        )
    if not input_ids.shape[1]:
        raise ConfigurationError(f"{what} got a prompt without tokens; give input_ids of one or more, no inputs_embeds")


def prompt_inputs(input_ids: Tensor, model_inputs: Mapping[str, Any], past: int) -> dict[str, Any]:
    """What goes into the first call: the tokens that the model has not read yet, without padding, and what they need.

    That is their positions, which ``generate`` has prepared (an image may have fewer positions than tokens), types of
    tokens, pixels and so on.

    Parameters
    ----------
    input_ids
        The prompt, ``(1, tokens)``.
    model_inputs
        What ``generate`` hands to a decoding loop.
    past
        Tokens in the cache already.

    Raises
    ------
    ConfigurationError
        For padding in front of which there is a cache.
    """
    mask = model_inputs.get("attention_mask")
    fresh: slice | Tensor = slice(past, None)
    if mask is not None and not bool(mask.all()):
        if past:
            raise ConfigurationError("a prompt with padding cannot go on from a cache; give it without padding")
        fresh = mask[0].bool()
    # what belongs to tokens may or may not have entries for those in the cache, but ends where they end
    length = input_ids.shape[1]
    found = {"input_ids": input_ids[:, fresh]}
    for name, value in model_inputs.items():
        if value is not None and name not in _OURS:
            found[name] = value[..., -length:][..., fresh] if name in _PER_TOKEN else value
    return found


def run_generate(model: Any, loop: Callable[..., Tensor], inputs: Mapping[str, Any]) -> Tensor:
    """Call transformers' ``generate`` with a decoding loop of our own, which gets the streamer as well.

    Raises
    ------
    ConfigurationError
        If the model has no ``generate``.
    """
    if not hasattr(model, "generate"):
        raise ConfigurationError(f"{type(model).__name__} has no generate(); give a causal language model")
    loop = functools.partial(loop, streamer=inputs.get("streamer"))
    return model.generate(**{"do_sample": False, **inputs}, custom_generate=loop)

"""A language model in this process that answers conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.features.autointerp.clients import Client, Conversation
from gossamer.features.autointerp.generation import sample
from gossamer.features.autointerp.language_model import EndingReader
from gossamer.models.prompts import end_tokens

_LEAST_MASS = 1e-4  # of all options together, below which a model had something else in mind


class LocalClient(Client):
    """Any causal language model of Hugging Face, as :func:`gossamer.models.load` reads it, GGUF files included.

    What the conversations of a call begin with, such as instructions and worked examples, is read once.

    Parameters
    ----------
    model, tokenizer
        The tokenizer's chat template is used; where there is none, messages are set one below the other.
    name
        Under which its answers are kept.
    batch
        Conversations at a time.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str = "", batch: int = 16):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self._reader = EndingReader(model, batch)
        self._name = name or getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__

    @property
    def name(self) -> str:  # noqa: D102
        return self._name

    def complete(  # noqa: D102
        self, conversations: Sequence[Conversation], max_tokens: int = 200, temperature: float = 0.0, seed: int = 0
    ) -> list[str | None]:
        ends = end_tokens(self.model, self.tokenizer)
        answers: list[str | None] = []
        for place in range(0, len(conversations), self.batch):
            ids = [self.encoded(conversation) for conversation in conversations[place : place + self.batch]]
            generator = generator_for("answers", seed)
            for found in sample(self.model, ids, max_tokens, temperature, generator, ends):
                answers.append(self.tokenizer.decode(found, skip_special_tokens=True).strip() or None)
        return answers

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[list[float] | None]:  # noqa: D102
        if not conversations:
            return []
        tokens = [self._first_tokens(option) for option in options]
        flat = [token for own in tokens for token in own]
        if len(set(flat)) < len(flat):
            raise ConfigurationError(f"options {list(options)} do not begin with different tokens; choose others")
        ids = [self.encoded(conversation) for conversation in conversations]
        found = self._reader.next_log_probabilities(ids, flat).exp()
        mass = torch.stack([part.sum(1) for part in found.split([len(own) for own in tokens], dim=1)], 1)
        total = mass.sum(1, keepdim=True)
        return [
            row if all_of_it >= _LEAST_MASS else None
            for row, all_of_it in zip((mass / total.clamp_min(1e-30)).tolist(), total[:, 0].tolist())
        ]

    def encoded(self, conversation: Conversation) -> list[int]:
        """Token ids up to where the answer begins."""
        messages = [dict(message) for message in conversation]
        if getattr(self.tokenizer, "chat_template", None):
            read = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            return [int(token) for token in read["input_ids"]]
        text = "\n\n".join(message["content"] for message in messages) + "\n\n"
        return [int(token) for token in self.tokenizer(text)["input_ids"]]

    def _first_tokens(self, option: str) -> list[int]:
        """First tokens of an option, with and without a space in front."""
        ways = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (option, f" {option}"))
        found = {int(ids[0]) for ids in ways if len(ids)}
        space = self.tokenizer(" ", add_special_tokens=False)["input_ids"]
        return sorted(found - {int(token) for token in space})

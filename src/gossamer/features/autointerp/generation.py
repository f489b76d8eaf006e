"""Continuations of several texts at a time, drawn with a generator of one's own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.measure.windows import evaluation_mode, logits_of, model_device


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    ends: Collection[int] = (),
) -> list[list[int]]:
    """Continue texts of different lengths together.

    Parameters
    ----------
    model
        A causal language model of Hugging Face.
    prompts
        Token ids, at least one each.
    tokens
        Length of a continuation, at most.
    temperature
        0 takes the likeliest token.
    generator
        On the CPU; the same seed draws the same numbers for prompt i whatever the probabilities are.
    ends
        Tokens that end a continuation; they are not part of it.

    Returns
    -------
    list of list of int
        Continuations, without the prompts.
    """
    if temperature < 0 or not prompts or any(not len(prompt) for prompt in prompts):
        raise ConfigurationError(
            f"temperature is {temperature} and prompts have {[len(p) for p in prompts]} tokens; "
            "give a temperature of at least 0, and at least one token for each prompt"
        )
    ids, mask = left_padded(prompts, model_device(model))
    found: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    cache: Any = None
    with evaluation_mode(model):
        for _ in range(tokens):
            places = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
            read = model(input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
            cache = read.past_key_values
            drawn = _drawn(logits_of(read)[:, -1].float(), temperature, generator)
            for row, token in enumerate(drawn.tolist()):
                done[row] = done[row] or token in ends
                if not done[row]:
                    found[row].append(token)
            if all(done):
                break
            ids = drawn[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return found


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask ``(prompts, longest)``; texts end at the same place, so that the last token is everyone's last."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=device)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """A token of each row ``(rows, vocabulary)``."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits / temperature).double().softmax(-1).cumsum(-1)
    numbers = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64).to(logits.device)
    return torch.searchsorted(cumulative, numbers * cumulative[:, -1:]).clamp_max(logits.shape[-1] - 1)[:, 0]

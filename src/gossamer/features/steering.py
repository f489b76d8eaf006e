"""Text that a model writes while a feature is held up: what the feature does, not only when it fires."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.features.autointerp.generation import sample
from gossamer.features.sae import SAE
from gossamer.features.splicing import edited
from gossamer.models.prompts import end_tokens

PROMPTS = ("I think that", "The first thing I noticed was", "Let me tell you about")


@dataclass(frozen=True)
class Steered:
    """A prompt with and without a feature.

    Attributes
    ----------
    prompt
        What was continued.
    plain
        The continuation of the model as it is.
    steered
        Its continuation at each strength.
    """

    prompt: str
    plain: str
    steered: tuple[str, ...]


@contextmanager
def steering(model: nn.Module, site: str | int, direction: Tensor, skip_first: int = 1) -> Iterator[None]:
    """Inside, `direction` is added to a module's output at every token but the first ones of a text.

    Parameters
    ----------
    model
        The model, also while it decodes with a cache.
    site
        Name of the module, or number of the block.
    direction
        ``(size,)``; for a feature, ``sae.decoder[i] / sae.scale`` times an activation.
    skip_first
        Tokens of a prompt that are left alone; the first is where attention rests, and is best not touched.

    Raises
    ------
    UnknownNameError
        If there is no such module.
    ConfigurationError
        If the direction is not of the size of the module's output.
    """

    def add(x: Tensor) -> Tensor:
        if direction.shape != x.shape[-1:]:
            raise ConfigurationError(f"the direction is {tuple(direction.shape)}; activations are {tuple(x.shape)}")
        added = direction.to(x.device, x.dtype).expand_as(x)
        # one token is a step of decoding: what it continues has been left alone already
        return torch.cat([x[:, :skip_first], (x + added)[:, skip_first:]], 1) if x.shape[1] > 1 else x + added

    with edited(model, site, add):
        yield


def steer(
    model: nn.Module,
    tokenizer: Any,
    site: str | int,
    sae: SAE,
    features: Sequence[int],
    maximum: Sequence[float],
    strengths: Sequence[float] = (1.0, 2.0),
    prompts: Sequence[str] = PROMPTS,
    tokens: int = 32,
    temperature: float = 0.7,
    seed: int = 0,
) -> Iterator[list[Steered]]:
    """Continue prompts with features held up, side by side with the model as it is.

    A feature is added from the last token of the prompt on, so that prompts are read alike. With and without it the
    same random numbers are drawn, so that texts differ through the feature alone.

    Parameters
    ----------
    model, tokenizer
        A causal language model of Hugging Face.
    site
        Where the autoencoder belongs.
    sae
        The autoencoder.
    features, maximum
        Their numbers, and the strongest activation of each.
    strengths
        What is added, in units of the strongest activation.
    prompts
        Texts to continue, as they are.
    tokens, temperature, seed
        Length of a continuation and how it is drawn; a temperature of 0 takes the likeliest token.

    Yields
    ------
    list of Steered
        Of one feature after the other, one for each prompt.

    Raises
    ------
    ConfigurationError
        If a feature does not exist, or no prompts or strengths are given.
    """
    bad = next((feature for feature in features if not 0 <= feature < sae.n_features), None)
    if bad is not None:
        raise ConfigurationError(f"feature is {bad}; it must be from 0 to {sae.n_features - 1}")
    if not prompts or not strengths:
        raise ConfigurationError(f"there are {len(prompts)} prompts and {len(strengths)} strengths; give one of each")
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    ends, longest = end_tokens(model, tokenizer), max(map(len, ids))

    def written() -> list[str]:
        drawn = sample(model, ids, tokens, temperature, torch.Generator().manual_seed(seed), ends)
        return [tokenizer.decode(part, skip_special_tokens=True) for part in drawn]

    plain = written()
    for feature, most in zip(features, maximum):
        direction = (sae.decoder[feature] / sae.scale).detach()
        found = []
        for strength in strengths:
            with steering(model, site, direction * (strength * most), longest - 1):
                found.append(written())
        yield [Steered(prompt, before, tuple(after)) for prompt, before, after in zip(prompts, plain, zip(*found))]

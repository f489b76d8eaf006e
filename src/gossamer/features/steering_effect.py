"""How much a model's predictions change when a feature is held up everywhere: a feature's effect, not its look."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.features.splicing import edited
from gossamer.measure.windows import evaluation_mode, logits_of, widen
from gossamer.models.blocks import run_batch


@dataclass(frozen=True, eq=False)
class SteeringEffect:
    """What each direction does to the predictions of a model.

    Attributes
    ----------
    logit_change
        Mean absolute change of the logits, less their common change, ``(directions,)``.
    divergence
        Mean Kullback–Leibler divergence from the predictions of the model as it is, in nats, ``(directions,)``.
    """

    logit_change: Tensor
    divergence: Tensor

    def share_above(self, divergence: float) -> float:
        """Share of the directions that move predictions by more than so many nats."""
        return float((self.divergence > divergence).float().mean())


def steering_effect(
    model: nn.Module,
    site: str | int,
    directions: Tensor,
    prompts: Iterable[Tensor],
    scale: float = 0.5,
    skip_first: int = 1,
    at_once: int = 8,
    progress: bool = True,
) -> SteeringEffect:
    """Add each direction to a module's output at every token of some prompts, and compare the predictions.

    Parameters
    ----------
    model
        A causal language model.
    site
        Name of the module, or number of the block.
    directions
        ``(directions, size)``; their lengths do not matter.
    prompts
        Token ids, each ``(tokens,)`` or ``(1, tokens)``, that have nothing to do with the directions.
    scale
        Length of what is added, as a share of the mean length of the module's output.
    skip_first
        Tokens at the beginning that are left alone.
    at_once
        Directions that the model is run with together.
    progress
        Whether to show a progress bar.

    Raises
    ------
    CalibrationError
        If no prompt has a token behind those that are left alone.
    ConfigurationError
        If directions are not of the module's size, or the scale is not above 0.
    """
    if not scale > 0 or at_once < 1:
        raise ConfigurationError(f"scale is {scale} and at_once {at_once}; give a share above 0, and at least 1")
    texts = [text.reshape(1, -1) for text in prompts]
    texts = [text for text in texts if text.shape[1] > skip_first]
    if not texts:
        raise CalibrationError(f"no prompt has more than the {skip_first} tokens that are left alone; give longer ones")
    unit = nn.functional.normalize(directions.detach(), dim=1)
    change, divergence = torch.zeros(2, len(unit), dtype=torch.float64)
    tokens = 0
    with evaluation_mode(model):
        length = _mean_length(model, site, texts, skip_first, unit.shape[1])
        for text in track(texts, "steering", enabled=progress):
            plain = _logits(model, text, skip_first)
            log = plain.log_softmax(-1)
            tokens += plain.shape[1]
            for first in range(0, len(unit), at_once):
                part = unit[first : first + at_once]
                added = (part * (scale * length))[:, None]
                with edited(model, site, lambda x, added=added: x + added.to(x), skip_first):
                    steered = _logits(model, text.expand(len(part), -1), skip_first)
                moved = steered - plain
                moved = moved - moved.mean(-1, keepdim=True)
                places = slice(first, first + len(part))
                change[places] += moved.abs().mean(-1).sum(1).double().cpu()
                apart = log.exp() * (log - steered.log_softmax(-1))
                divergence[places] += apart.sum(-1).sum(1).double().cpu()
    return SteeringEffect((change / tokens).float(), (divergence / tokens).float())


def _mean_length(model: nn.Module, site: str | int, texts: list[Tensor], skip: int, size: int) -> float:
    lengths: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        if x.shape[-1] != size:
            raise ConfigurationError(f"directions have {size} numbers, activations {x.shape[-1]}; they must agree")
        lengths.append(x[:, skip:].norm(dim=-1).flatten())
        return x

    for text in texts:
        with edited(model, site, look):
            run_batch(model, text)
    return float(torch.cat(lengths).mean())


def _logits(model: nn.Module, text: Tensor, skip: int) -> Tensor:
    return widen(logits_of(run_batch(model, text)))[:, skip:]

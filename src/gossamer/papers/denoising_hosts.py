"""Denoising models that learn from real data in a minute or two: a byte-level writer, and painters of digits and clips.

They are the hosts of experiments on sparse attention over denoising steps. The writer learns Python's source, and to
repeat a fact that stands somewhere in its prompt; the painters learn handwritten digits, still and moving ones before
photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.models.diffusion_transformer import DiffusionTransformer, diffusion_loss
from gossamer.models.masked_diffusion import MaskedDiffusionLM, masked_loss
from gossamer.papers.byte_language import BYTES, run_steps
from gossamer.papers.digits import digits
from gossamer.papers.moving_digits import moving_clips
from gossamer.papers.python_source import python_source
from gossamer.papers.textures import textures

FIRST_SIGN, SIGNS = 128, 26  # bytes that source hardly holds; a fact is one of them
FACT = 8  # times it is said
_SIDE = 32


@dataclass(frozen=True)
class Writer:
    """A masked-diffusion language model, and text that it has not seen.

    Attributes
    ----------
    model
        In evaluation mode.
    loss
        Mean training loss over the last tenth of the steps, in nats a byte.
    training, held_out
        Bytes, ``(n,)``.
    """

    model: MaskedDiffusionLM
    loss: float
    training: Tensor
    held_out: Tensor


def train_writer(own: dict[str, Any], seed: int) -> Writer:
    """Learn to fill in the last part of passages of source, some of which hold a fact that is asked for.

    Parameters
    ----------
    own
        ``size`` (bytes of text), ``prompt`` and ``written`` (bytes of a passage), ``layers``, ``width``, ``heads``,
        ``steps``, ``batch``, ``learning_rate``, ``asked`` (share of passages with a fact).
    seed
        Of weights, passages and facts.
    """
    text = python_source(own["size"], 1, 1, 1, 1, seed).text
    cut = len(text) * 9 // 10
    training, held_out = text[:cut], text[cut:]
    torch.manual_seed(seed)
    length = own["prompt"] + own["written"]
    model = MaskedDiffusionLM(BYTES, own["layers"], own["width"], own["heads"], length)
    generator = generator_for("writer", seed)
    hideable = torch.arange(length) >= own["prompt"]
    losses: list[float] = []

    def loss(step: int) -> Tensor:
        half = round(own["batch"] * own["asked"])
        tokens = passages(training, own["batch"], length, generator)
        tokens[:half] = with_facts(tokens[:half], own["prompt"], generator)[0]
        # plain passages are hidden anywhere, which teaches language faster
        where = hideable.expand(own["batch"], length).clone()
        where[half:] = True
        found = masked_loss(model, tokens, generator, where)
        losses.append(float(found.detach()))
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=own["learning_rate"], betas=(0.9, 0.98), fused=True)
    model.train()
    run_steps(optimizer, own["steps"], own["learning_rate"], loss)
    last = losses[-max(1, own["steps"] // 10) :]
    return Writer(model.eval(), sum(last) / len(last), training, held_out)


def passages(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Passages from random places, ``(count, length)``."""
    places = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[places + torch.arange(length)]


def with_facts(tokens: Tensor, prompt: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Passages whose prompt says a sign somewhere in its first three quarters, and which go on with it.

    Returns
    -------
    passages, facts
        ``(count, length)``, where the sign follows the prompt, and the signs ``(count, times)``.
    """
    tokens = tokens.clone()
    count = len(tokens)
    facts = FIRST_SIGN + torch.randint(SIGNS, (count, 1), generator=generator).expand(count, FACT)
    places = torch.randint(prompt * 3 // 4, (count, 1), generator=generator)
    tokens.scatter_(1, places + torch.arange(FACT), facts)
    tokens[:, prompt : prompt + FACT] = facts
    return tokens, facts


@dataclass(frozen=True)
class Painter:
    """A diffusion transformer, and the pictures it has not seen.

    Attributes
    ----------
    model
        In evaluation mode.
    loss
        Mean training loss over the last tenth of the steps.
    training, held_out
        Pictures of deviation about 1, and their labels.
    """

    model: DiffusionTransformer
    loss: float
    training: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def train_painter(own: dict[str, Any], seed: int) -> Painter:
    """Learn to draw handwritten digits in a frame of 32 × 32 pixels or, if ``frames`` is given, clips of moving ones.

    Parameters
    ----------
    own
        ``frames`` (or None), ``patch``, ``layers``, ``width``, ``heads``, ``text`` (tokens), ``steps``, ``batch``,
        ``learning_rate``.
    seed
        Of weights, pictures and noise.
    """
    parts = _clips(own["frames"], seed) if own["frames"] else _stills(seed)
    pictures, labels = parts[0]
    size = (*([own["frames"]] if own["frames"] else []), *pictures.shape[-2:])
    torch.manual_seed(seed)
    model = DiffusionTransformer(
        size, own["patch"], 1, own["layers"], own["width"], own["heads"], int(labels.max()) + 1, own["text"]
    )
    generator = generator_for("painter", seed)
    losses: list[float] = []

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(labels), (own["batch"],), generator=generator)
        found = diffusion_loss(model, pictures[rows], labels[rows], generator)
        losses.append(float(found.detach()))
        return found

    optimizer = torch.optim.AdamW(model.parameters(), lr=own["learning_rate"], betas=(0.9, 0.98), fused=True)
    model.train()
    run_steps(optimizer, own["steps"], own["learning_rate"], loss)
    last = losses[-max(1, own["steps"] // 10) :]
    return Painter(model.eval(), sum(last) / len(last), *parts)


def _stills(seed: int) -> list[tuple[Tensor, Tensor]]:
    margin = (_SIDE - 28) // 2
    parts = digits().split(400, seed)
    return [(torch.nn.functional.pad(2 * part.images - 0.5, (margin,) * 4, value=-0.5), part.labels) for part in parts]


def _clips(frames: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    photographs = textures().split(30, 30, seed)
    generator = generator_for("clips", seed)
    found = []
    for part, crops, count in zip(digits().split(400, seed), photographs, (2000, 200)):
        clips = moving_clips(part, crops.images, count, frames, generator, noise=0.02)
        found.append((clips.frames, clips.labels))
    return found

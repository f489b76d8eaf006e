"""Prompts of which a part may be dropped, with an answer to be judged by, and every way to choose that part.

The part is pages of books or patches of a picture. Tokens are chosen by neurons that match, by attention (with and
without the angle between outputs), by norm, by place, or by chance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.core_sets import CoreTokens, projection_importance
from gossamer.activations.corematching import CoreMatchingGenerator, CorePrompt
from gossamer.measure.windows import evaluation_mode


@dataclass(frozen=True)
class Quiz:
    """A prompt and what should follow.

    Attributes
    ----------
    prompt
        ``(1, n)``: a first token, what may be dropped, and a question.
    answer
        ``(1, m)``: what follows.
    droppable, relevant
        ``(n,)`` bool: tokens that may be dropped, and those of them on which the answer rests.
    inputs
        What else the model is given with the prompt, such as pixels.
    """

    prompt: Tensor
    answer: Tensor
    droppable: Tensor
    relevant: Tensor
    inputs: Mapping[str, Any] = field(default_factory=dict)


@torch.no_grad()
def token_scores(
    matching: CoreMatchingGenerator, quiz: Quiz, generator: torch.Generator, late: int = -5
) -> dict[str, Tensor]:
    """By what each way chooses at the layer, ``(tokens,)`` each; the larger the sooner kept.

    Parameters
    ----------
    matching
        Whose layer chooses.
    quiz
        Whose prompt is read.
    generator
        Of what chance chooses.
    late
        Place of the token of the question with which others are compared; the fifth from last in the released code.
    """
    model: Any = matching.model
    layer, seen = matching.layers[matching.layer], {}

    def look(module: nn.Module, args: tuple) -> None:
        seen["middle"] = args[0][0]

    handle = layer.down.module.register_forward_pre_hook(look)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that says how it attends
    try:
        with evaluation_mode(model):
            out = model(
                input_ids=quiz.prompt,
                output_attentions=True,
                output_hidden_states=True,
                use_cache=False,
                **quiz.inputs,
            )
    finally:
        handle.remove()
        model.set_attn_implementation(before)
    attention = out.attentions[matching.layer][0, :, -1].mean(0)
    states = out.hidden_states[matching.layer + 1][0]
    neurons = matching.settings.neurons
    return {
        "core": CoreTokens().scores(seen["middle"], neurons),
        "core of a late token": CoreTokens(reference=late).scores(seen["middle"], neurons),
        "attention": attention,
        "attention and angle": projection_importance(attention, states).float(),
        "norm": states.norm(dim=1),
        "last": torch.arange(len(states)).float(),
        "random": torch.rand(len(states), generator=generator),
    }


def judged(matching: CoreMatchingGenerator, quiz: Quiz, kept: Tensor) -> dict[str, float]:
    """Loss on the answer, and whether its first token is the likeliest, when these tokens of the prompt are kept."""
    read = matching.read(quiz.prompt, quiz.droppable, kept=kept, neurons=False, **quiz.inputs)
    free = kept[quiz.droppable[kept]]
    return {
        "right": float(read.logits.argmax() == quiz.answer[0, 0]),
        "loss": answer_loss(matching, read, quiz.answer),
        "relevant": float(quiz.relevant[free].float().mean()) if len(free) else 0.0,
        "kept": len(kept),
    }


def answer_loss(matching: CoreMatchingGenerator, read: CorePrompt, answer: Tensor) -> float:
    """Mean loss of the answer's tokens, in nats."""
    logits = read.logits[None]
    if answer.shape[1] > 1:
        logits = torch.cat([logits, matching.extend(read, answer)[:-1]])
    return float(nn.functional.cross_entropy(logits.float(), answer[0]))

"""A byte-level transformer that is pretrained in minutes, and the two ways in which experiments judge it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.papers.experiment import Track
from gossamer.papers.python_source import PythonSource

CHECKPOINTS = 20


class Classifier(nn.Module):
    """A transformer body with a linear head on its mean state.

    Parameters
    ----------
    body
        Returns ``last_hidden_state`` of shape ``(batch, length, width)``.
    width, classes
        Of the head.
    """

    def __init__(self, body: nn.Module, width: int, classes: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of bytes ``(batch, length)``."""
        return self.head(self.body(input_ids=tokens).last_hidden_state.mean(1))


@dataclass(frozen=True)
class PackageTask:
    """Naming the package of a snippet: fine-tuning and evaluation, the same for every method.

    Attributes
    ----------
    source
        Snippets to train on, and others to be judged by.
    steps, batch, learning_rate
        Of fine-tuning.
    """

    source: PythonSource
    steps: int
    batch: int
    learning_rate: float

    def finetune(self, model: nn.Module, masks: MaskSet | None = None) -> None:
        """Train all the weights of a classifier in place, on snippets drawn by torch's generator."""
        data = self.source.training
        order = torch.randint(len(data.labels), (self.steps, self.batch))
        batches = ((data.tokens[rows], data.labels[rows]) for rows in order)

        def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

        train(model, batches, loss, self.steps, self.learning_rate)

    def accuracy(self, model: nn.Module) -> float:
        """Share of the held-out snippets that the classifier gets right."""
        data = self.source.held_out
        with torch.inference_mode():
            hits = [model(x).argmax(1) == y for x, y in zip(data.tokens.split(256), data.labels.split(256))]
        return float(torch.cat(hits).float().mean())


def spread(tokens: Tensor, count: int) -> Tensor:
    """Equally spaced rows, since snippets are sorted by their package."""
    return tokens[torch.linspace(0, len(tokens) - 1, min(count, len(tokens))).long()]


def next_byte_accuracy(sequences: Tensor) -> Callable[[nn.Module], float]:
    """Return the function that says how often a language model's first guess is the next byte.

    Parameters
    ----------
    sequences
        Bytes, ``(sequences, length)``.
    """

    def evaluate(model: nn.Module) -> float:
        with torch.inference_mode():
            hits = [model(input_ids=x).logits[:, :-1].argmax(-1) == x[:, 1:] for x in sequences.split(128)]
        return float(torch.cat(hits).float().mean())

    return evaluate


def train(
    model: nn.Module,
    batches: Iterator[Any],
    loss: Callable[[Any], Tensor],
    steps: int,
    learning_rate: float,
    each: Callable[[int], None] = lambda step: None,
) -> None:
    """Train with AdamW (decay 0.1), warming up for a tenth of the steps and cooling down to zero along a cosine.

    `each` is called after every step.
    """
    warm = max(1, steps // 10)

    def cycle(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2

    # fused: on a CPU the separate operations of a step would take longer than the gradients of a small model
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cycle)
    for step, batch in enumerate(batches):
        optimiser.zero_grad()
        loss(batch).backward()
        optimiser.step()
        schedule.step()
        each(step)


def pretrain(
    text: Tensor,
    *,
    layers: int,
    width: int,
    length: int,
    batch: int,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Track,
) -> tuple[Any, dict[float, dict[str, Tensor]]]:
    """Train a causal language model from nothing.

    Parameters
    ----------
    text
        Bytes, ``(n,)``.
    layers, width
        Of the transformer (Llama's block, 4 heads).
    length, batch, steps, learning_rate
        Of training.
    seed
        Of the weights and of the order of the text.
    progress
        Wraps the steps.

    Returns
    -------
    tuple
        The model, whose body is ``.model``, and step → state dict of the body, 20 times over the run.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 8 * 8,  # a multiple of 8, so that 4:8 fits
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=length,
        use_cache=False,
        attention_dropout=0.0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(shape)
    checkpoints: dict[float, dict[str, Tensor]] = {}

    def batches() -> Iterator[Tensor]:
        for _ in progress(range(steps), f"pretraining on {len(text):,} bytes"):
            starts = torch.randint(len(text) - length, (batch,))
            yield text[starts.unsqueeze(1) + torch.arange(length)]

    def keep(step: int) -> None:
        if (step + 1) * CHECKPOINTS // steps > step * CHECKPOINTS // steps:
            checkpoints[step + 1] = {n: v.clone() for n, v in model.model.state_dict().items()}

    train(model, batches(), lambda x: model(input_ids=x, labels=x).loss, steps, learning_rate, keep)
    return model.eval(), checkpoints

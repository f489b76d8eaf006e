"""Chains of modular arithmetic, x → (a x + b) mod m: the truth is known, and one wrong number spoils all that follow.

The data are made, and not found, because the point is a text whose every token is right or wrong. A prompt names a and
b and shows the beginning of a chain; a small transformer, trained on the spot, goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.papers.byte_model import train
from gossamer.papers.experiment import Track


@dataclass(frozen=True)
class Chains:
    """The task; a token is a number, or the name of an a or of a b.

    Attributes
    ----------
    modulus
        M.
    factors, summands
        a is one of `factors`, b from 1 to `summands`. Multiplying by 1 and by 3 leads through (nearly) all numbers
        modulo 31 before a chain repeats itself; with 2, say, it would after five, and could be copied.
    shown, asked
        Numbers of the chain in the prompt, and behind it.
    """

    modulus: int = 31
    factors: tuple[int, ...] = (1, 3)
    summands: int = 8
    shown: int = 16
    asked: int = 48

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.modulus + len(self.factors) + self.summands

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return 2 + self.shown

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Whole texts, ``(count, prompt + asked)`` int64."""
        which = torch.randint(len(self.factors), (count,), generator=generator)
        a = torch.tensor(self.factors)[which]
        b = torch.randint(1, self.summands + 1, (count,), generator=generator)
        columns = [self.modulus + which, self.modulus + len(self.factors) + b - 1]
        x = torch.randint(self.modulus, (count,), generator=generator)
        for _ in range(self.shown + self.asked):
            columns.append(x)
            x = (a * x + b) % self.modulus
        return torch.stack(columns, dim=1)

    def right(self, texts: Tensor, truth: Tensor) -> dict[str, float]:
        """Shares of answers that are right as a whole, and of right tokens."""
        hits = (texts == truth)[:, self.prompt :]
        return {"exact": float(hits.all(1).float().mean()), "tokens": float(hits.float().mean())}


def learn_chains(
    chains: Chains,
    *,
    layers: int,
    width: int,
    middle: int,
    steps: int,
    batch: int,
    learning_rate: float,
    seed: int,
    progress: Track,
) -> Any:
    """Train a transformer with Llama's block on chains.

    Parameters
    ----------
    chains
        The task.
    layers, width, middle
        Of the transformer; `middle` is that of its feed-forward layers.
    steps, batch, learning_rate
        Of training.
    seed
        Of weights and texts.
    progress
        Wraps the steps.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    shape = LlamaConfig(
        vocab_size=chains.vocabulary,
        hidden_size=width,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=chains.prompt + chains.asked,
        **ends,
    )
    model = LlamaForCausalLM(shape)

    def texts() -> Iterator[Tensor]:
        for _ in progress(range(steps), "learning arithmetic"):
            yield chains.draw(batch, generator)

    def loss(ids: Tensor) -> Tensor:
        labels = ids.clone()
        labels[:, :3] = -100  # chance
        return model(input_ids=ids, labels=labels).loss

    train(model, texts(), loss, steps, learning_rate)
    return model.eval()

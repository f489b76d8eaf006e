"""A small byte-level GPT that is quick on a processor, and its training with or without a sparse method.

Experiments on pretraining make dozens of runs. Here a run is as cheap as torch allows: one fused product for queries,
keys and values, and nothing that a model of a few thousand weights does not need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.masks import MaskSet
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import ConfigurationError
from gossamer.measure.training_cost import TrainingCost
from gossamer.measure.training_flops import TrainingFlops
from gossamer.measure.training_ledger import TrainingLedger

BYTES = 256

#: of the spread that keeps variances. Chosen for dense models: larger blocks drown the embeddings at first, which masks
#: would then seem to cure by being masks
_INITIAL = 0.25


class _Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.up = nn.Linear(width, 4 * inner, bias=False)
        self.down = nn.Linear(4 * inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ByteGPT(nn.Module):
    """A causal transformer on bytes.

    Parameters
    ----------
    layers, width, heads
        Of the transformer.
    length
        Longest sequence.
    inner
        Width of all heads together, and a quarter of that of the feed-forward layers; by default the width. It alone
        makes the blocks larger or smaller while embeddings and head, which dominate a small model, stay as they are.
    """

    def __init__(self, layers: int, width: int, heads: int, length: int, inner: int | None = None):
        super().__init__()
        self.layers, self.width, self.length = layers, width, length
        self.inner = width if inner is None else inner
        self.embedding = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, self.inner, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif module is self.head:
                nn.init.normal_(module.weight, std=width**-0.5)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INITIAL * module.in_features**-0.5)
        for block in self.blocks:  # residual branches start small, as in GPT-2
            for layer in (block.out, block.down):
                layer.weight.data.div_(math.sqrt(2 * layers))

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which stays dense."""
        return self.head

    def states(self, tokens: Tensor) -> Tensor:
        """What the blocks make of bytes ``(batch, length)``: ``(batch, length, width)``."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, length, 256)``."""
        return self.head(self.states(tokens))

    def flops(self, density: float = 1.0) -> TrainingFlops:
        """Operations for a byte, in a sequence of full length."""
        weights = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        attention = 4 * self.layers * self.length * self.inner
        return TrainingFlops(2 * weights, attention, 2 * BYTES * self.width, density)


@dataclass
class Pretrained:
    """What pretraining made.

    Attributes
    ----------
    model
        In training mode; what was masked is zero.
    loss
        Mean loss of the held-out text, in nats a byte.
    cost
        Of the run; parameters without embeddings and head.
    training
        The sparse run, not finalized; None for a dense one.
    """

    model: ByteGPT
    loss: float
    cost: TrainingCost
    training: SparseTraining | None = field(repr=False)

    @property
    def masks(self) -> MaskSet | None:
        """What is left, of a sparse run."""
        return None if self.training is None else self.training.masks


def pretrain(
    model: ByteGPT,
    text: Tensor,
    held_out: Tensor,
    steps: int,
    batch: int,
    learning_rate: float,
    method: Sparsifier | None = None,
    seed: int = 0,
) -> Pretrained:
    """Train with AdamW (decay 0.1), warming up for a tenth of the steps and cooling down to zero along a cosine.

    Parameters
    ----------
    model
        Changed in place.
    text
        Bytes, ``(n,)``.
    held_out
        Sequences by which it is judged, ``(sequences, length)``.
    steps, batch, learning_rate
        Of training; sequences are as long as the model allows.
    method
        What becomes zero meanwhile; None trains dense.
    seed
        Of the places of the text: equal seeds read the same text in the same order.

    Raises
    ------
    ConfigurationError
        If the text is shorter than a sequence.
    """
    if len(text) <= model.length:
        raise ConfigurationError(f"the text has {len(text)} bytes, but a sequence {model.length}; give a longer text")
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(len(text) - model.length, (steps, batch, 1), generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    training = None if method is None else method.attach(model, optimizer)
    offsets = torch.arange(model.length)
    model.train()
    with TrainingLedger(model, optimizer, text[places[0] + offsets], training, of="without embeddings") as ledger:
        run_steps(optimizer, steps, learning_rate, lambda step: next_byte_loss(model, text[places[step] + offsets]))
    return Pretrained(model, evaluate(model, held_out), ledger.cost, training)


def run_steps(
    optimizer: torch.optim.Optimizer, steps: int, learning_rate: float, loss: Callable[[int], Tensor]
) -> None:
    """Make steps: warm-up over a tenth of them, then a cosine to zero; gradients are clipped at norm 1."""
    warm = max(1, steps // 10)
    parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        cooled = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * ((step + 1) / warm if step < warm else cooled)
        optimizer.zero_grad()
        loss(step).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def next_byte_loss(model: ByteGPT, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    return functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: ByteGPT, sequences: Tensor) -> float:
    """Mean loss of held-out sequences ``(sequences, length)``, in nats a byte."""
    losses = [float(next_byte_loss(model, part)) * len(part) for part in sequences.split(64)]
    return sum(losses) / len(sequences)

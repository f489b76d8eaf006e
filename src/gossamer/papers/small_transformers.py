"""Small transformers that learn made-up languages in a minute.

Blocks are those of any pre-norm decoder, with matrices of their own for queries, keys and values, so that whatever
looks for heads finds them. Without feed-forward layers attention has to do everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.randomness import generator_for
from gossamer.papers.byte_language import run_steps

IGNORED = -100


class Attention(nn.Module):
    """Causal attention.

    Parameters
    ----------
    width, heads
        Of what it reads and writes, and how many.
    size
        Of a head.
    """

    def __init__(self, width: int, heads: int, size: int):
        super().__init__()
        self.num_heads = heads
        inner = heads * size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, width)`` → the same."""
        parts = (made(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for made in self._inputs)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    @property
    def _inputs(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, feed_forward: bool):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads, width // heads)
        self.feed_forward = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            if feed_forward
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x if self.feed_forward is None else x + self.feed_forward(x)


class SmallTransformer(nn.Module):
    """A causal transformer.

    Parameters
    ----------
    vocabulary, length
        Tokens that there are, and longest sequence.
    width, heads, layers
        Of the transformer.
    feed_forward
        Whether blocks have feed-forward layers.
    seed
        Of its weights.
    """

    def __init__(
        self, vocabulary: int, length: int, width: int, heads: int, layers: int, feed_forward: bool, seed: int
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, feed_forward) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, tokens, vocabulary)``."""
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def get_output_embeddings(self) -> nn.Module:
        """The matrix that makes logits."""
        return self.head


Lesson = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Draws tokens and targets, ``(batch, length)`` each; targets are −100 where nothing is asked."""


def teach(model: nn.Module, lesson: Lesson, steps: int, learning_rate: float, seed: int) -> None:
    """Train a model by AdamW; changed in place."""
    generator = generator_for("lessons", seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()

    def loss(step: int) -> Tensor:
        tokens, targets = lesson(generator)
        return functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    run_steps(optimizer, steps, learning_rate, loss)
    model.eval()

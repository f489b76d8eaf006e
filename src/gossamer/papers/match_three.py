"""A task that is about triples: does a token find two others with which it adds up to nothing?

Sequences hold numbers modulo M. A token is positive if there are places j and l, its own included, with
``x_i + x_j + x_l = 0 mod M`` [Sanford, Hsu & Telgarsky, 2023, arXiv 2306.02896, Match3]. So that about as many tokens
are positive as not, every sequence is made of few different numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.attention.kronecker_attention import TensorSelfAttention


@dataclass(frozen=True)
class MatchThree:
    """Draws sequences and answers.

    Attributes
    ----------
    length
        Tokens of a sequence.
    modulus
        M.
    values
        Different numbers that a sequence is made of; at most M.
    """

    length: int
    modulus: int
    values: int

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sequences ``(count, length)`` int64 and answers ``(count, length)`` bool."""
        chosen = torch.rand(count, self.modulus, generator=generator).argsort(1)[:, : self.values]
        tokens = chosen.gather(1, torch.randint(self.values, (count, self.length), generator=generator))
        there = torch.zeros(count, self.modulus, dtype=torch.float64).scatter_(1, tokens, 1.0)
        spectrum = torch.fft.rfft(there)
        sums = torch.fft.irfft(spectrum * spectrum, n=self.modulus) > 0.5  # which j + l there are
        return tokens, sums.gather(1, (-tokens) % self.modulus)


class TripleNetwork(nn.Module):
    """Embedding, attention layers of some order with feed-forward layers between them, and a head for every token.

    Parameters
    ----------
    modulus, width, heads, hidden
        Sizes.
    order
        Of attention; 2 is common attention, at its own scale ``1/√d``.
    layers
        Attention layers.
    """

    def __init__(self, modulus: int, width: int, heads: int, hidden: int, order: int, layers: int):
        super().__init__()
        scale = (width // heads) ** -0.5 if order == 2 else 1.0
        self.embedding = nn.Embedding(modulus, width)
        self.attention = nn.ModuleList(
            TensorSelfAttention(width, heads, order=order, scale=scale) for _ in range(layers)
        )
        self.between = nn.ModuleList(_perceptron(width, hidden, width) for _ in range(layers - 1))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers))
        self.head = _perceptron(width, hidden, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, length)``."""
        x = self.embedding(tokens)
        for layer, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * layer](x))
            if layer < len(self.between):
                x = x + self.between[layer](self.norms[2 * layer + 1](x))
        return self.head(self.norms[-1](x)).squeeze(-1)


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def parameters_of(model: nn.Module) -> int:
    """Number of trained numbers."""
    return sum(p.numel() for p in model.parameters())


def widest_within(budget: int, modulus: int, heads: int, hidden: int, order: int, layers: int) -> TripleNetwork:
    """The widest network that has no more parameters than a budget."""
    width = heads
    with torch.device("meta"):
        while parameters_of(TripleNetwork(modulus, width + heads, heads, hidden, order, layers)) <= budget:
            width += heads
    return TripleNetwork(modulus, width, heads, hidden, order, layers)

"""Small networks with ReLU as a module of its own: perceptrons, transformers of patches and of bytes, a mixer.

They serve experiments that read or exchange activations, in every architecture with the same few lines.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.papers.digits import SIDE

BYTES = 256
MEAN, DEVIATION = 0.13, 0.31  # of the pixels of handwritten digits


class _Standardised(nn.Module):
    """Pixels with the mean 0 and the deviation 1."""

    def forward(self, images: Tensor) -> Tensor:
        return (images - MEAN) / DEVIATION


def perceptron(width: int, depth: int = 1, classes: int = 10, dropout: float = 0.0) -> nn.Sequential:
    """A perceptron on images ``(n, 1, 28, 28)`` at half resolution.

    Parameters
    ----------
    width, depth
        Of the hidden layers, and how many.
    classes
        Of the images.
    dropout
        Share of the hidden units that are left out in training.
    """
    layers: list[nn.Module] = [_Standardised(), nn.AvgPool2d(2), nn.Flatten()]
    for before, after in pairwise([(SIDE // 2) ** 2, *[width] * depth]):
        layers += [nn.Linear(before, after), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(width, classes))


class _FeedForward(nn.Sequential):
    def __init__(self, width: int, inner: int):
        super().__init__(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))


class _Attending(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = _FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed_forward(self.norm2(x))


class _Mixing(nn.Module):
    """Tolstikhin et al., 2021, "MLP-Mixer", arXiv 2105.01601, with ReLU."""

    def __init__(self, width: int, tokens: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across, self.within = _FeedForward(tokens, 2 * tokens), _FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class PatchNetwork(nn.Module):
    """A vision transformer or a mixer on images ``(n, 1, 28, 28)``; the mean of its tokens is classified.

    Parameters
    ----------
    kind
        ``transformer`` or ``mixer``.
    layers, width, heads
        Of the network.
    patch
        Side of a patch, which divides 28.
    classes
        Of the images.
    """

    def __init__(
        self,
        kind: Literal["transformer", "mixer"],
        layers: int,
        width: int,
        heads: int = 2,
        patch: int = 7,
        classes: int = 10,
    ):
        super().__init__()
        tokens = (SIDE // patch) ** 2
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, width)
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.Sequential(
            *(_Mixing(width, tokens) if kind == "mixer" else _Attending(width, heads, False) for _ in range(layers))
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(n, classes)``."""
        patches = functional.unfold((images - MEAN) / DEVIATION, self.patch, stride=self.patch).transpose(1, 2)
        return self.head(self.norm(self.blocks(self.embedding(patches) + self.places)).mean(1))


class ByteNetwork(nn.Module):
    """A transformer on bytes, from left to right or in both directions.

    Parameters
    ----------
    causal
        Whether a byte sees only those before it (a decoder), or all (an encoder).
    layers, width, heads
        Of the transformer.
    length
        Longest sequence.
    """

    def __init__(self, causal: bool, layers: int, width: int, heads: int, length: int):
        super().__init__()
        self.embedding = nn.Embedding(BYTES + 1, width)  # the last one hides a byte
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(_Attending(width, heads, causal) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, length, 256)`` of bytes ``(batch, length)``, of which 256 is hidden."""
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.places[: tokens.shape[1]])))


def impulse_noise(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Images of which a share of the pixels is black or white."""
    drawn = torch.rand(images.shape, generator=generator)
    return images.masked_fill(drawn < share / 2, 0.0).masked_fill(drawn > 1 - share / 2, 1.0)


def shot_noise(images: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Images as so many photons a white pixel would show them."""
    return (torch.poisson(images * photons, generator=generator) / photons).clamp(0, 1)

"""What features are compared with: neurons of which only the strongest count, and directions drawn by lot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError, ModelError, UnknownNameError
from gossamer.features.activation_rules import TopK
from gossamer.features.sae import SAE


class TopKNeurons(nn.Module):
    """The neurons of a feed-forward layer as if they were latents: the strongest of each token, the rest silent.

    Parameters
    ----------
    feedforward
        The layer; it is called with the activations that are to be encoded.
    k
        Neurons of a token, at most: those that are not positive are left out.
    last
        Name of its last linear layer, whose inputs the neurons are.
    rotated
        Seed of a random rotation of the neurons, which takes their basis away. Default: none.

    Raises
    ------
    UnknownNameError
        If there is no such linear layer.
    ConfigurationError
        If k is not from 1 to the number of neurons.
    """

    rotation: Tensor | None

    def __init__(self, feedforward: nn.Module, k: int, last: str = "down_proj", rotated: int | None = None):
        super().__init__()
        linear = dict(feedforward.named_modules()).get(last)
        if not isinstance(linear, nn.Linear):
            known = [name for name, part in feedforward.named_modules() if isinstance(part, nn.Linear)]
            raise UnknownNameError("linear layer", last, known)
        if not 1 <= k <= linear.in_features:
            raise ConfigurationError(f"k is {k}; it must be from 1 to the {linear.in_features} neurons there are")
        self.feedforward, self.k, self.last = feedforward, k, last
        rotation = None
        if rotated is not None:
            noise = torch.randn(linear.in_features, linear.in_features, generator=generator_for("rotation", rotated))
            rotation = torch.linalg.qr(noise).Q
        self.register_buffer("rotation", rotation)

    @property
    def width(self) -> int:
        """Number of neurons."""
        return int(self.feedforward.get_submodule(self.last).in_features)

    def settings(self) -> dict[str, Any]:
        """Plain values that say what this is."""
        return {"neurons": self.width, "k": self.k, "rotated": self.rotation is not None}

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCodes:
        """The strongest neurons of every token ``(tokens, size)``."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught.append(args[0])

        handle = self.feedforward.get_submodule(self.last).register_forward_pre_hook(catch)
        try:
            self.feedforward(x)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ModelError(f"{self.last} is called {len(caught)} times for an activation; choose a layer of one call")
        neurons = caught[0].reshape(-1, self.width).float()
        neurons = neurons if self.rotation is None else neurons @ self.rotation
        values, indices = neurons.topk(self.k, dim=1)
        kept = torch.zeros_like(neurons, dtype=torch.bool).scatter_(1, indices, values > 0)
        return SparseCodes.from_mask(neurons, kept)


def random_directions(like: SAE, k: int, seed: int = 0) -> SAE:
    """An autoencoder of random directions, as many as another has and of the same scale and centre."""
    drawn = SAE(like.d_in, like.n_features, TopK(k), seed).to(like.decoder)
    with torch.no_grad():
        drawn.scale.copy_(like.scale)
        drawn.bias.copy_(like.bias)
    return drawn.eval()

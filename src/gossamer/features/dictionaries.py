"""Dictionaries of any kind, seen alike: directions, and how much of each an activation has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.features.sae import SAE


@dataclass(frozen=True, eq=False)
class Dictionary:
    """``x̂ = offset + codes(x) · vectors`` with codes that are not negative.

    Attributes
    ----------
    vectors
        Directions in units of the activations, ``(features, d)``.
    offset
        ``(d,)``.
    encode
        Activations ``(n, d)`` → codes ``(n, features)``, without gradients.
    """

    vectors: Tensor
    offset: Tensor
    encode: Callable[[Tensor], Tensor]

    @classmethod
    def of_sae(cls, sae: SAE) -> Dictionary:
        """An autoencoder; its scale is undone, so that edits are in the units of the activations."""
        vectors, offset = (part.detach() / sae.scale for part in (sae.decoder, sae.bias))

        @torch.no_grad()
        def encode(x: Tensor) -> Tensor:
            return sae.encode(x).to_dense()

        return cls(vectors, offset, encode)

    @classmethod
    def principal(cls, x: Tensor, components: int, k: int | None = None) -> Dictionary:
        """Principal components of activations ``(n, d)``, each with a feature for either sign.

        Parameters
        ----------
        x
            Activations.
        components
            How many.
        k
            How many of the largest codes of an activation are kept; None for all.
        """
        if not 0 < components <= min(x.shape):
            raise ConfigurationError(f"components is {components}; it must be from 1 to {min(x.shape)}")
        mean = x.mean(0)
        basis = torch.linalg.svd(x - mean, full_matrices=False)[2][:components]
        vectors = torch.cat([basis, -basis])
        return cls(vectors, mean, lambda y: _largest(((y - mean) @ vectors.t()).relu(), k))

    @classmethod
    def random(cls, x: Tensor, features: int, k: int, seed: int = 0) -> Dictionary:
        """Random directions, of which an activation has its k best, each as far as it reaches."""
        directions = torch.randn(features, x.shape[1], generator=generator_for("random dictionary", seed))
        vectors = torch.nn.functional.normalize(directions, dim=1)
        mean = x.mean(0)
        return cls(vectors, mean, lambda y: _largest(((y - mean) @ vectors.t()).relu(), k))

    def reconstruct(self, x: Tensor) -> Tensor:
        """Activations as the dictionary explains them, ``(n, d)``."""
        return self.encode(x) @ self.vectors + self.offset

    def weights(self, codes: Tensor) -> Tensor:
        """Each feature's share of a reconstruction, ``wⱼ = fⱼ dⱼ · (x̂ − b) / ‖x̂ − b‖²``, ``(n, features)``.

        The shares of an activation sum up to one; that of a feature which works against the others is negative.
        """
        centred = codes @ self.vectors
        size = centred.square().sum(1, keepdim=True)
        return codes * (centred @ self.vectors.t()) / size.clamp(min=torch.finfo(codes.dtype).tiny)


def _largest(codes: Tensor, k: int | None) -> Tensor:
    if k is None or k >= codes.shape[1]:
        return codes
    best = codes.topk(k, dim=1)
    return torch.zeros_like(codes).scatter(1, best.indices, best.values)

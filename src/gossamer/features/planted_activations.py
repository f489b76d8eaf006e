"""Activations of which is known what an autoencoder could not explain, and why.

An activation is a sum of sparse features and of a dense part, ``x = Σ aᵢ vᵢ + Dense(x)``. An autoencoder that knows the
first of the features only, and shrinks what it finds, leaves three kinds of error: features that are *absent* from its
dictionary, the *dense* part, and what it *introduces* itself [Engels et al., 2024, arXiv 2410.14670, section 3]. Since
all moments of the construction are known, so is how much of the error the best linear map would explain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.features.sae import SAE


@dataclass(frozen=True, eq=False)
class PlantedError:
    """Planted activations, and all that is wrong with their reconstruction.

    Attributes
    ----------
    x
        Activations ``(tokens, d)``.
    absent, dense, introduced
        What features that the dictionary lacks, the dense part, and the autoencoder itself add to the error
        ``x − x̂``, ``(tokens, d)`` each.
    """

    x: Tensor
    absent: Tensor
    dense: Tensor
    introduced: Tensor

    @property
    def error(self) -> Tensor:
        """``x − x̂``."""
        return self.absent + self.dense + self.introduced

    @property
    def x_hat(self) -> Tensor:
        """The reconstruction."""
        return self.x - self.error


@dataclass(frozen=True)
class PlantedActivations:
    """A law by which activations with a known error are drawn.

    Feature i is active with probability p, with a value that is exponentially distributed around 1. The autoencoder
    knows the first features with their true values less `shrinkage`, or nothing of a value below that: an error that
    depends on the activation, and not linearly.

    Parameters
    ----------
    d
        Size of an activation.
    features, known
        How many there are, and how many the dictionary has.
    probability
        p.
    rank, dense_size
        Of the dense part, and its standard deviation along each of its directions.
    shrinkage
        From 0 up, in units of a feature's mean value.
    seed
        Of all directions.
    """

    d: int = 64
    features: int = 512
    known: int = 256
    probability: float = 0.02
    rank: int = 8
    dense_size: float = 0.5
    shrinkage: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.d < 1 or not 0 <= self.known <= self.features or not 0 <= self.rank <= self.d:
            raise ConfigurationError(
                f"d is {self.d}, known {self.known} of {self.features} features, rank {self.rank}; no part can exceed "
                "the whole"
            )
        if not 0 < self.probability <= 1 or self.dense_size < 0 or self.shrinkage < 0:
            raise ConfigurationError(
                f"probability is {self.probability}, dense_size {self.dense_size}, shrinkage {self.shrinkage}; give "
                "one in (0, 1], the others from 0 up"
            )

    @property
    def directions(self) -> tuple[Tensor, Tensor]:
        """Of the features ``(features, d)``, length one, and of the dense part ``(rank, d)``, orthonormal."""
        generator = generator_for("planted directions", self.seed)
        drawn = torch.randn(self.features, self.d, generator=generator, dtype=torch.float64)
        dense = torch.linalg.qr(torch.randn(self.d, self.d, generator=generator, dtype=torch.float64)).Q[: self.rank]
        return nn.functional.normalize(drawn, dim=1), dense

    def draw(self, tokens: int, seed: int = 0) -> PlantedError:
        """Draw activations with their errors, float64."""
        generator = generator_for("planted activations", seed)
        atoms, dense = self.directions
        shape = (tokens, self.features)
        active = torch.rand(shape, generator=generator, dtype=torch.float64) < self.probability
        value = -torch.log1p(-torch.rand(shape, generator=generator, dtype=torch.float64)) * active
        away = torch.randn(tokens, self.rank, generator=generator, dtype=torch.float64) * self.dense_size @ dense
        lost = value[:, : self.known].clamp(max=self.shrinkage)
        absent = value[:, self.known :] @ atoms[self.known :]
        return PlantedError(value @ atoms + away, absent, away, lost @ atoms[: self.known])

    def linear_share(self) -> float:
        """R² of the best linear map from x to the error, pooled over dimensions, exactly.

        From the moments of one feature, where ``s = min(a, τ)`` is what it loses of its value a: ``E[a] = p``,
        ``E[a²] = 2p``, ``E[s] = p (1 − e^−τ)``, ``E[s²] = 2p (1 − e^−τ (1 + τ))``, ``E[a s] = p (2 − e^−τ (2 + τ))``.
        """
        atoms, dense = self.directions
        p, tau = self.probability, self.shrinkage
        left = math.exp(-tau)
        lost = torch.ones(self.features, dtype=torch.float64)
        lost_square, product = torch.full((2, self.features), 2.0, dtype=torch.float64)
        lost[: self.known] = 1 - left
        lost_square[: self.known] = 2 * (1 - left * (1 + tau))
        product[: self.known] = 2 - left * (2 + tau)
        mean_x, mean_e = p * atoms.sum(0), p * (lost[:, None] * atoms).sum(0)
        away = self.dense_size**2 * dense.t() @ dense
        xx = (2 * p - p**2) * atoms.t() @ atoms + torch.outer(mean_x, mean_x) + away
        xe = (p * product - p**2 * lost)[:, None] * atoms
        cross = atoms.t() @ xe + torch.outer(mean_x, mean_e) + away
        ee = atoms.t() @ ((p * lost_square - p**2 * lost**2)[:, None] * atoms) + away
        second = ee + torch.outer(mean_e, mean_e)
        unexplained = second.trace() - (cross * torch.linalg.lstsq(xx, cross).solution).sum()
        return float(1 - unexplained / ee.trace())


@torch.no_grad()
def planted_in(
    sae: SAE, x: Tensor, dropped: float, dense_noise: float = 0.0, introduced_noise: float = 0.0, seed: int = 0
) -> PlantedError:
    """Real activations made planted ones: what an autoencoder sees in them counts as the truth.

    With its own reconstruction for an activation, leaving the least important features out makes their error absent;
    noise added to the activation counts as dense, and noise taken from the reconstruction as introduced.

    Parameters
    ----------
    sae
        Whose reconstruction is the truth.
    x
        Activations ``(tokens, d)``.
    dropped
        Share of the features that are left out, those with the lowest sums of values.
    dense_noise, introduced_noise
        Standard deviation of either noise in every dimension, as a share of the reconstruction's.
    seed
        Of the noise.
    """
    if not 0 <= dropped <= 1 or min(dense_noise, introduced_noise) < 0:
        raise ConfigurationError(
            f"dropped is {dropped}, noise {dense_noise} and {introduced_noise}; give a share, and from 0 up"
        )
    generator = generator_for("planted noise", seed)
    codes = sae.encode(x)
    whole = sae.decode(codes)
    order = torch.zeros(codes.width).index_add(0, codes.indices.long(), codes.values).argsort()
    out = torch.zeros(codes.width, dtype=torch.bool)
    out[order[: round(dropped * codes.width)]] = True
    masked = codes.values.masked_fill(~out[codes.indices.long()], 0)
    absent = sae.decode(type(codes)(codes.indices, masked, codes.starts, codes.width)) - sae.bias / sae.scale
    spread = whole.std(0, correction=0).mean()
    dense, introduced = (
        torch.randn(whole.shape, generator=generator) * spread * size for size in (dense_noise, introduced_noise)
    )
    return PlantedError(whole + dense, absent, dense, introduced)

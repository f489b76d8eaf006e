"""Activations made from known features, for which rules of selection should differ, and controls for which not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.features.allocation import zipf_budgets


@dataclass(frozen=True)
class HeavyTailed:
    """Activations with few features mostly and many now and then, features with frequencies that fall as Zipf's law.

    The number of features of an activation is log-normal, cut to its range; with a spread of 0 all have the same: the
    control, for which no rule has anything to gain from spending more on some than on others.

    Parameters
    ----------
    d, features
        Size of an activation, and how many true features.
    mean, most
        Features of an activation in the mean and at most; at least one.
    spread
        Standard deviation of the logarithm of their number.
    exponent
        Of the law of Zipf.
    seed
        Of the directions.
    """

    d: int = 128
    features: int = 1024
    mean: float = 16.0
    most: int = 64
    spread: float = 0.8
    exponent: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= self.most <= self.features or self.d < 1 or self.spread < 0 or self.exponent < 0:
            raise ConfigurationError(
                f"mean is {self.mean}, most {self.most}, features {self.features}, d {self.d}, spread {self.spread}, "
                f"exponent {self.exponent}; give 1 ≤ mean ≤ most ≤ features, and the others from 0 up"
            )

    def directions(self) -> Tensor:
        """Of the true features, the most common first, ``(features, d)``."""
        drawn = torch.randn(self.features, self.d, generator=generator_for("planted dictionary", self.seed))
        return normalize(drawn, dim=1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw activations ``(count, d)``, and the values of all features in them ``(count, features)``."""
        wanted = self._counts(count, generator)
        chances = zipf_budgets(self.features, 1.0, self.exponent).float().log()
        # the highest of chances with Gumbel noise are a draw without replacement
        noise = -torch.log(-torch.log(torch.rand(count, self.features, generator=generator).clamp(1e-12, 1 - 1e-7)))
        order = (chances + noise).topk(self.most, dim=1).indices
        active = torch.arange(self.most) < wanted[:, None]
        drawn = 0.5 + torch.rand(count, self.most, generator=generator)
        values = torch.zeros(count, self.features).scatter(1, order, active * drawn)
        return values @ self.directions(), values

    def _counts(self, count: int, generator: torch.Generator) -> Tensor:
        if not self.spread:
            return torch.full((count,), round(self.mean))
        draw = torch.randn(count, generator=generator) * self.spread
        return (draw.exp() * self._location()).round().clamp(1, self.most)

    def _location(self) -> float:
        """The median for which the mean, after the cut, is as wanted."""
        quantiles = torch.special.ndtri((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
        shape = (quantiles * self.spread).exp()
        low, high = 1e-3, float(self.most)
        for _ in range(60):
            middle = (low + high) / 2
            found = float((shape * middle).round().clamp(1, self.most).mean())
            low, high = (middle, high) if found < self.mean else (low, middle)
        return low


@dataclass(frozen=True)
class CausalFeatures:
    """Large features that the output does not depend on, and small ones that are all it depends on.

    Features are orthonormal. What comes downstream reads the small ones, ``y = U x``, and its loss is ``½ ‖y‖²``, so
    that the gradient ``Uᵀ U x`` is known exactly.

    Parameters
    ----------
    idle, causal
        How many features of each kind; together the size of an activation.
    idle_size, causal_size
        Mean values.
    active
        Features of each kind in an activation.
    seed
        Of the directions.
    """

    idle: int = 256
    causal: int = 256
    idle_size: float = 3.0
    causal_size: float = 0.3
    active: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.active <= min(self.idle, self.causal) or not min(self.idle_size, self.causal_size) > 0:
            raise ConfigurationError(
                f"active is {self.active} of {self.idle} and {self.causal} features, sizes {self.idle_size} and "
                f"{self.causal_size}; give from 1 to the smaller number, and sizes above 0"
            )

    def directions(self) -> Tensor:
        """``(idle + causal, idle + causal)``: the idle ones first."""
        size = self.idle + self.causal
        drawn = torch.randn(size, size, generator=generator_for("causal features", self.seed), dtype=torch.float64)
        return torch.linalg.qr(drawn).Q.float()

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw activations, gradients of the loss with respect to them, and the values of all features."""
        parts = []
        for features, size in ((self.idle, self.idle_size), (self.causal, self.causal_size)):
            active = torch.rand(count, features, generator=generator).argsort(1) < self.active
            parts.append(active * size * (0.75 + 0.5 * torch.rand(count, features, generator=generator)))
        values, directions = torch.cat(parts, 1), self.directions()
        return values @ directions, parts[1] @ directions[self.idle :], values

    def downstream(self, x: Tensor) -> Tensor:
        """What is read of activations: ``(count, causal)``."""
        return x @ self.directions()[self.idle :].t()


@dataclass(frozen=True)
class TwoModalities:
    """Inputs of two kinds, such as images and captions, in one space: some concepts are shared, some of one kind.

    The two kinds lie apart by a constant, as the embeddings of contrastive models do.

    Parameters
    ----------
    d
        Size of an embedding.
    shared, own
        Concepts of both kinds, and of each kind alone.
    active
        Shared concepts of an input, and as many of its own.
    gap
        Length of what separates the kinds; values are around 1.
    seed
        Of the directions.
    """

    d: int = 64
    shared: int = 24
    own: int = 24
    active: int = 2
    gap: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.d < 1 or not 1 <= self.active <= min(self.shared, self.own) or self.gap < 0:
            raise ConfigurationError(
                f"d is {self.d}, active {self.active} of {self.shared} shared and {self.own} own concepts, gap "
                f"{self.gap}; give from 1 to the smaller number, and the others from 0 up"
            )

    def directions(self) -> Tensor:
        """The shared concepts, then those of the first and of the second kind, ``(shared + 2 · own, d)``."""
        drawn = torch.randn(self.shared + 2 * self.own, self.d, generator=generator_for("two modalities", self.seed))
        return normalize(drawn, dim=1)

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw embeddings ``(count, d)``, and which are of the first kind, bool ``(count,)``: every second one."""
        is_first = torch.arange(count) % 2 == 0
        values = torch.zeros(count, self.shared + 2 * self.own)
        for begin, concepts, allowed in (
            (0, self.shared, torch.ones(count, dtype=torch.bool)),
            (self.shared, self.own, is_first),
            (self.shared + self.own, self.own, ~is_first),
        ):
            active = torch.rand(count, concepts, generator=generator).argsort(1) < self.active
            drawn = 0.5 + torch.rand(count, concepts, generator=generator)
            values[:, begin : begin + concepts] = active * drawn * allowed[:, None]
        apart = normalize(torch.randn(self.d, generator=generator_for("modality gap", self.seed)), dim=0)
        sides = torch.where(is_first, 0.5, -0.5)[:, None] * self.gap * apart
        return values @ self.directions() + sides, is_first

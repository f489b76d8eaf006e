"""Units whose outputs are drawn and mostly zero, each with the way in which it is trained.

What they have in common is what a gate must know of itself: how likely it is to be anything but zero, what it is on
average, and what it decides when nothing may be left to chance.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gossamer.core.gates import (
    Baseline,
    Noise,
    Reinforce,
    bernoulli_st,
    gate_probability,
    gumbel_sigmoid,
    noisy_rectifier,
    stochastic_times_smooth,
)
from gossamer.core.selection import keep_highest
from gossamer.errors import ConfigurationError, UnknownNameError


class StochasticUnit(nn.Module, ABC):
    """From logits ``(…, units)`` to outputs of the same shape."""

    @abstractmethod
    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw the outputs."""

    @abstractmethod
    def rate(self, logits: Tensor) -> Tensor:
        """Probability of an output that is not zero, which can be differentiated."""

    @abstractmethod
    def threshold(self, logits: Tensor) -> Tensor:
        """The decision without chance: active where that is likelier than not."""

    @abstractmethod
    def mean(self, logits: Tensor) -> Tensor:
        """Expected output."""

    def bias(self, rate: float) -> float:
        """The logit at which the unit has this rate."""
        return math.log(rate / (1 - rate))

    def opened(self, rate: float) -> float:
        """Mean output of a unit of this rate when it is not zero."""
        logit = torch.tensor([self.bias(rate)], dtype=torch.float64)
        return float(self.mean(logit)) / rate


class BinaryUnit(StochasticUnit):
    """Zeros and ones, ``h = 1[z < sigm(a)]``, trained straight through; see :func:`gossamer.core.gates.bernoulli_st`.

    Parameters
    ----------
    temper
        Whether the gradient is multiplied by ``sigm′(a)``.
    """

    def __init__(self, temper: bool = False):
        super().__init__()
        self.temper = temper

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return bernoulli_st(logits, self.temper, generator)

    def rate(self, logits: Tensor) -> Tensor:  # noqa: D102
        return gate_probability(logits)

    def threshold(self, logits: Tensor) -> Tensor:  # noqa: D102
        return (logits > 0).to(logits.dtype)

    def mean(self, logits: Tensor) -> Tensor:  # noqa: D102
        return gate_probability(logits)


class ReinforceUnit(BinaryUnit):
    """Zeros and ones that learn from the loss of each sample alone; see :class:`gossamer.core.gates.Reinforce`."""

    def __init__(self, baseline: Baseline = "optimal", decay: float = 0.99):
        super().__init__()
        self.estimator = Reinforce(baseline, decay)

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return self.estimator(logits, generator)


class GumbelUnit(BinaryUnit):
    """Zeros and ones with the gradient of the relaxed coin ``sigm((a + n) / τ)``."""

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return gumbel_sigmoid(logits, self.temperature, hard=True, generator=generator)


class STSUnit(StochasticUnit):
    """``h = b √p`` with ``b ~ Bernoulli(√p)``; see :func:`gossamer.core.gates.stochastic_times_smooth`."""

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return stochastic_times_smooth(logits, generator)

    def rate(self, logits: Tensor) -> Tensor:
        """√p."""
        return gate_probability(logits).sqrt()

    def threshold(self, logits: Tensor) -> Tensor:  # noqa: D102
        rate = self.rate(logits)
        return rate * (rate > 0.5).to(rate.dtype)

    def mean(self, logits: Tensor) -> Tensor:  # noqa: D102
        return gate_probability(logits)

    def bias(self, rate: float) -> float:  # noqa: D102
        return super().bias(rate * rate)


class NoisyRectifier(StochasticUnit):
    """``h = max(0, a + n)``, differentiated as it stands; see :func:`gossamer.core.gates.noisy_rectifier`.

    Parameters
    ----------
    noise
        ``"logistic"`` or ``"normal"``, of scale 1.
    """

    def __init__(self, noise: Noise = "logistic"):
        super().__init__()
        if noise not in ("logistic", "normal"):
            raise UnknownNameError("noise", noise, ("logistic", "normal"))
        self.noise: Noise = noise

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return noisy_rectifier(logits, self.noise, generator=generator)

    def rate(self, logits: Tensor) -> Tensor:
        """``sigm(a)`` or ``Φ(a)``."""
        return gate_probability(logits) if self.noise == "logistic" else torch.special.ndtr(logits)

    def threshold(self, logits: Tensor) -> Tensor:  # noqa: D102
        return torch.relu(logits)

    def mean(self, logits: Tensor) -> Tensor:
        """``log(1 + eᵃ)``, or ``a Φ(a) + φ(a)``."""
        if self.noise == "logistic":
            return nn.functional.softplus(logits)
        density = torch.exp(-0.5 * logits.square()) / math.sqrt(2 * math.pi)
        return logits * torch.special.ndtr(logits) + density

    def bias(self, rate: float) -> float:  # noqa: D102
        if self.noise == "logistic":
            return super().bias(rate)
        return float(torch.special.ndtri(torch.tensor(rate, dtype=torch.float64)))


class TopKUnit(StochasticUnit):
    """No chance at all: ``sigm(a)`` where a is among the highest of a sample, else zero. A baseline.

    Parameters
    ----------
    share
        Of the units that are kept, in (0, 1]; at least one is.
    """

    def __init__(self, share: float):
        super().__init__()
        if not 0 < share <= 1:
            raise ConfigurationError(f"share is {share}; it must lie in (0, 1], such as 0.1")
        self.share = share

    def forward(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:  # noqa: D102
        return gate_probability(logits) * self.rate(logits)

    def rate(self, logits: Tensor) -> Tensor:
        """Zeros and ones, for it is known."""
        units = logits.shape[-1]
        kept = keep_highest(logits.detach().reshape(-1, units), units - max(1, round(self.share * units)))
        return kept.view(logits.shape).to(logits.dtype)

    def threshold(self, logits: Tensor) -> Tensor:  # noqa: D102
        return self(logits)

    def mean(self, logits: Tensor) -> Tensor:  # noqa: D102
        return self(logits)

    def opened(self, rate: float) -> float:
        """Taken as 1, for its logits may be anything."""
        return 1.0


ESTIMATORS: dict[str, Callable[[float], StochasticUnit]] = {
    "st": lambda rate: BinaryUnit(),
    "st-tempered": lambda rate: BinaryUnit(temper=True),
    "sts": lambda rate: STSUnit(),
    "noisy-rectifier": lambda rate: NoisyRectifier(),
    "reinforce": lambda rate: ReinforceUnit(),
    "gumbel": lambda rate: GumbelUnit(),
    "top-k": TopKUnit,
}
"""Name → what makes a unit for a target rate."""


def make_unit(estimator: str, rate: float) -> StochasticUnit:
    """The unit that an estimator trains.

    Raises
    ------
    UnknownNameError
        If there is no such estimator.
    """
    if estimator not in ESTIMATORS:
        raise UnknownNameError("estimator", estimator, ESTIMATORS)
    return ESTIMATORS[estimator](rate)

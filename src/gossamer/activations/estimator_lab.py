"""A stochastic network so small that its expected loss has an exact gradient, to hold estimators against.

With n coins there are 2ⁿ things that can happen, each with a probability that is known, so the expected loss is a sum
that can be differentiated. What an estimator gives on average should be that gradient, and its variance says how many
samples that takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.activations.stochastic_units import ReinforceUnit, StochasticUnit
from gossamer.core.gates import gate_probability
from gossamer.errors import ConfigurationError

Law = Literal["binary", "sts", "noisy-rectifier"]
_MOST_COINS = 16
_MOST_NOISES = 3
_BATCH = 100  # samples between two updates of a baseline


@dataclass
class StochasticNetwork:
    """Layers of stochastic units in double precision, and a loss of what the last of them gives.

    ``a¹ = b¹ + W¹ x``, ``aˡ = bˡ + Wˡ hˡ⁻¹``, and ``L = ½ |R hᴸ − y|² + offset``.

    Attributes
    ----------
    drive
        ``W¹ x``, ``(units of the first layer,)``.
    weights
        Of the later layers, each ``(units, units before)``.
    biases
        Of all layers, to which gradients are taken.
    readout, wanted
        R ``(outputs, units of the last layer)``, and y.
    offset
        Added to the loss; no gradient depends on it, but the variance of estimates does.
    """

    drive: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    readout: Tensor
    wanted: Tensor
    offset: float = 0.0

    @classmethod
    def draw(cls, widths: Sequence[int], generator: torch.Generator, offset: float = 1.0) -> StochasticNetwork:
        """A network with normal weights, and as many outputs as it has units in its last layer.

        Parameters
        ----------
        widths
            Units of each layer.
        generator
            On the CPU.
        offset
            Of the loss.
        """

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        weights = [2 * normal(after, before) / math.sqrt(before) for before, after in itertools.pairwise(widths)]
        biases = [0.5 * normal(width) for width in widths]
        return cls(normal(widths[0]), weights, biases, normal(widths[-1], widths[-1]), normal(widths[-1]), offset)

    @property
    def units(self) -> int:
        """Of all layers."""
        return sum(len(bias) for bias in self.biases)

    def loss(self, last: Tensor) -> Tensor:
        """``(batch,)`` of outputs of the last layer ``(batch, units)``."""
        return 0.5 * (last @ self.readout.mT - self.wanted).square().sum(1) + self.offset

    def logits(self, layer: int, before: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """Pre-activations of a layer from the outputs of the one before; the first has none, and takes the drive."""
        driven = before @ self.weights[layer - 1].mT if layer else self.drive
        return driven + biases[layer]


def exact_gradient(network: StochasticNetwork, law: Law = "binary") -> Tensor:
    """``∂E[L] / ∂b``, layer after layer, ``(units,)`` float64.

    Parameters
    ----------
    network
        Of at most 16 units, or 3 for the noisy rectifier.
    law
        What units are: coins, coins times √p with the probability √p, or rectifiers with logistic noise. The first
        two are summed over all states; the last is a midpoint rule over quantiles of the noise.

    Raises
    ------
    ConfigurationError
        If there are more units.
    """
    most = _MOST_NOISES if law == "noisy-rectifier" else _MOST_COINS
    if network.units > most:
        raise ConfigurationError(f"the network has {network.units} units; {most} can be enumerated for {law!r}")
    biases = [bias.clone().requires_grad_() for bias in network.biases]
    if law == "noisy-rectifier":
        points = round(2e6 ** (1 / network.units)) if network.units > 1 else 20000
        quantiles = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        chances = torch.cartesian_prod(*[quantiles] * network.units).view(-1, network.units)
    else:
        chances = torch.tensor(list(itertools.product((0.0, 1.0), repeat=network.units)), dtype=torch.float64)
    expected = _expected_loss(network, biases, chances.split([len(bias) for bias in biases], dim=1), law)
    return torch.cat(torch.autograd.grad(expected, biases))


def _expected_loss(network: StochasticNetwork, biases: list[Tensor], chances: Sequence[Tensor], law: Law) -> Tensor:
    output = network.drive
    probability = torch.ones(len(chances[0]), dtype=torch.float64)
    for layer, chance in enumerate(chances):
        logits = network.logits(layer, output, biases)
        if law == "noisy-rectifier":
            output = torch.relu(logits + torch.logit(chance))
            continue
        p = gate_probability(logits)
        rate = p.sqrt() if law == "sts" else p
        probability = probability * torch.where(chance > 0, rate, 1 - rate).prod(1)
        output = chance * rate if law == "sts" else chance
    losses = network.loss(output)
    return losses.mean() if law == "noisy-rectifier" else (probability * losses).sum()


def sampled_gradients(
    network: StochasticNetwork, unit: StochasticUnit, samples: int, generator: torch.Generator
) -> Tensor:
    """Estimates of :func:`exact_gradient`, one from each sample, ``(samples, units)`` float64.

    Parameters
    ----------
    network
        Of any size.
    unit
        Whose estimator is used; every layer has one of its own.
    samples
        Rounded up to whole batches of 100, between which baselines are updated.
    generator
        Of the draws.
    """
    estimators = [unit] + [_another(unit) for _ in network.biases[1:]]
    parts = []
    for _ in range(-(-samples // _BATCH)):
        biases = [bias.expand(_BATCH, -1).clone().requires_grad_() for bias in network.biases]
        output = network.drive
        for layer, estimator in enumerate(estimators):
            output = estimator(network.logits(layer, output, biases), generator)
        losses = network.loss(output)
        if isinstance(unit, ReinforceUnit):
            scored = [e.estimator.surrogate(losses) for e in estimators if isinstance(e, ReinforceUnit)]
            total = _BATCH * torch.stack(scored).sum()
        else:
            total = losses.sum()
        parts.append(torch.cat(torch.autograd.grad(total, biases), 1))
    return torch.cat(parts)


def _another(unit: StochasticUnit) -> StochasticUnit:
    if isinstance(unit, ReinforceUnit):
        return ReinforceUnit(unit.estimator.baseline_kind, unit.estimator.decay)  # type: ignore[arg-type]
    return unit


@dataclass(frozen=True)
class EstimatorQuality:
    """How estimates of a gradient relate to the exact one.

    Attributes
    ----------
    cosine
        Between the mean estimate and the exact gradient.
    bias
        Length of their difference, relative to the exact gradient.
    bias_without_scale
        The same after the mean has been multiplied by the number that serves it best: what a learning rate cannot mend.
    variance
        Sum of the variances of a single sample's components.
    deviation
        Squared difference in units of its standard error, per component: about 1 for an unbiased estimator.
    """

    cosine: float
    bias: float
    bias_without_scale: float
    variance: float
    deviation: float


def estimator_quality(estimates: Tensor, exact: Tensor) -> EstimatorQuality:
    """Compare the estimates of single samples ``(samples, units)`` with the exact gradient ``(units,)``."""
    mean, variance = estimates.mean(0), estimates.var(0)
    error = (variance / len(estimates)).clamp(min=1e-300)
    scale = (mean @ exact) / (mean @ mean)
    return EstimatorQuality(
        cosine=float((mean @ exact) / (mean.norm() * exact.norm())),
        bias=float((mean - exact).norm() / exact.norm()),
        bias_without_scale=float((scale * mean - exact).norm() / exact.norm()),
        variance=float(variance.sum()),
        deviation=float(((mean - exact).square() / error).mean()),
    )

"""The entropy of what an activation gives, the activation that makes it highest, and the step away from that.

An activation changes the distribution of what passes through it. If its output has a high entropy, the argument goes,
classes lie on top of each other. Among increasing functions onto a given range the entropy is highest for the one whose
output is uniform, which is the cumulative distribution function itself: a sigmoid, for data that are nearly normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError

Function = Callable[[Tensor], Tensor]


def derivative(function: Function, x: Tensor) -> Tensor:
    """``f′`` at every entry of a tensor, by automatic differentiation; it can be differentiated again."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = function(x)
        if not y.requires_grad:  # a constant
            return torch.zeros_like(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return slope


# -------------------------------------------------------------------------------------------------------- entropy


def activation_entropy(
    activation: Function,
    pdf: Function | None = None,
    samples: Tensor | None = None,
    low: float = -12.0,
    high: float = 12.0,
    points: int = 20_001,
) -> float:
    """Differential entropy of ``f(X)`` in nats, for an increasing activation f.

    With a density: ``−∫ p(x) log(p(x) / f′(x)) dx``, by the trapezoidal rule. With samples: that of Vasicek, from the
    spacings of the sorted values of f(x), which needs no width of bins.

    Parameters
    ----------
    activation
        f, which acts on every entry of a tensor.
    pdf
        p, likewise; it is normalised over [low, high].
    samples
        Draws of X instead, at least 10.
    low, high, points
        Where the density is integrated, and in how many points. For a ReLU, whose output has no density for x < 0,
        take a `low` just above 0.

    Raises
    ------
    ConfigurationError
        If not exactly one of `pdf` and `samples` is given, or f does not increase where p is not zero.
    CalibrationError
        If there are too few samples.
    """
    if (pdf is None) == (samples is None):
        raise ConfigurationError("give either pdf or samples, and not both")
    if samples is not None:
        return _spacing_entropy(activation(samples.detach().double()).flatten())
    x = torch.linspace(low, high, points, dtype=torch.float64)
    slope = derivative(activation, x).detach()
    weight = _checked_density(pdf, x)  # type: ignore[arg-type]
    if bool(((slope <= 0) & (weight > 1e-12)).any()):
        place = float(x[(slope <= 0) & (weight > 1e-12)][0])
        raise ConfigurationError(
            f"the activation does not increase at {place:.4g}, so its output has no density; narrow low and high"
        )
    integrand = torch.where(weight > 0, weight * (weight.clamp(min=1e-300) / slope.clamp(min=1e-300)).log(), 0.0)
    return -float(torch.trapezoid(integrand, x))


def _checked_density(pdf: Function, x: Tensor) -> Tensor:
    weight = pdf(x).detach().double()
    total = float(torch.trapezoid(weight, x))
    if not (total > 0 and bool((weight >= 0).all())):
        raise ConfigurationError(
            f"the density integrates to {total} over [{float(x[0])}, {float(x[-1])}] or is negative"
        )
    return weight / total


def _spacing_entropy(values: Tensor) -> float:
    count = len(values)
    if count < 10:
        raise CalibrationError(f"{count} samples are too few for an entropy; give 10 or more")
    reach = max(1, round(math.sqrt(count) / 2))
    ordered = values.sort().values
    place = torch.arange(count)
    gaps = ordered[(place + reach).clamp(max=count - 1)] - ordered[(place - reach).clamp(min=0)]
    # spacings at both ends are cut off, which the true number of steps makes up for
    steps = (place + reach).clamp(max=count - 1) - (place - reach).clamp(min=0)
    if bool((gaps <= 0).any()):
        raise ConfigurationError("the activation gives equal values, so its output has no density; narrow the samples")
    return float((gaps * count / steps).log().mean())


def worst_activation(cdf: Function, low: float = 0.0, high: float = 1.0) -> Function:
    """The increasing function onto [low, high] of highest output entropy: ``low + (high − low) · CDF(x)``.

    Its output is uniform, the entropy ``log(high − low)``: the worst activation function with boundary conditions.

    Raises
    ------
    ConfigurationError
        If the range is empty.
    """
    if not low < high:
        raise ConfigurationError(f"the range is [{low}, {high}]; low must be below high")
    return lambda x: low + (high - low) * cdf(x)


def eafo_correction(inverse: Function, pdf: Function) -> Function:
    """``h(x) = −(p′(y) y′ + p(y) y″ / y′)`` of the inverse activation y(x): the step that lowers the entropy.

    Sun et al., 2024, "A Method on Searching Better Activation Functions", arXiv 2405.12954: to first order
    ``H[y + ε h] − H[y] = −ε ∫ h²``, so the corrected *inverse* is ``y + ε h``, and the forward function changes by
    ``−ε h(f(x)) f′(x)``.

    Parameters
    ----------
    inverse
        y, increasing, differentiable twice by torch.
    pdf
        p of what enters the activation, differentiable once.
    """

    def correction(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = inverse(x)
        slope = derivative(inverse, x)
        if slope.requires_grad:
            (bend,) = torch.autograd.grad(slope.sum(), x, allow_unused=True, materialize_grads=True)
        else:
            bend = torch.zeros_like(x)
        tilt = derivative(pdf, y.detach()).detach()
        slope = slope.detach()
        return -(tilt * slope + pdf(y.detach()).detach() * bend / slope)

    return correction


def inverse_entropy(inverse: Function, pdf: Function, low: float, high: float, points: int = 20_001) -> float:
    """``H[y] = −∫ p(y) y′ log(p(y) y′) dx`` over outputs x in [low, high], for the inverse y of an activation."""
    x = torch.linspace(low, high, points, dtype=torch.float64)
    density = (pdf(inverse(x)) * derivative(inverse, x)).detach()
    safe = density.clamp(min=1e-300)
    return -float(torch.trapezoid(torch.where(density > 0, density * safe.log(), 0.0), x))


def first_variation(
    inverse: Function, direction: Function, pdf: Function, low: float, high: float, points: int = 20_001
) -> float:
    """``∫ η (p′(y) y′ + p(y) y″ / y′) dx``: how fast H[y + t η] rises with t at 0, for η that ends within [low, high].

    Where y′ jumps, as that of a leaky ReLU does, the formula has no y″ and leaves out what η is worth there.
    """
    x = torch.linspace(low, high, points, dtype=torch.float64)
    return -float(torch.trapezoid(direction(x) * eafo_correction(inverse, pdf)(x), x))


def forward_correction(base: str, p: Tensor, tilt: Tensor, x: Tensor) -> Tensor:
    """``c(x) = h(f(x)) f′(x) = p(x) f″ / f′ − p′(x)``: the correction of the inverse, carried over to f.

    Where f is flat the quotient is taken as zero, which is how ReLU's correction extends below zero. To first order the
    entropy changes by ``+ε ∫ c² / f′`` when ``ε c`` is added to f, so that it falls for negative ε.

    Parameters
    ----------
    base
        A key of :data:`BASES`.
    p, tilt
        Density of the pre-activations at x, and its derivative.
    x
        Pre-activations.
    """
    return p * BASES[base].curvature(x) - tilt


# ---------------------------------------------------------------------------------------------------------- search


@dataclass(frozen=True)
class Base:
    """An activation to start from.

    Attributes
    ----------
    function
        f.
    curvature
        ``f″ / f′``, zero where f is flat.
    low
        Where f begins to increase; it has an inverse above.
    """

    function: Function
    curvature: Function
    low: float = -math.inf


BASES: dict[str, Base] = {
    "relu": Base(torch.relu, torch.zeros_like, 0.0),
    "leaky-relu": Base(lambda x: nn.functional.leaky_relu(x, 0.01), torch.zeros_like),
    "identity": Base(lambda x: x, torch.zeros_like),
    "elu": Base(nn.functional.elu, lambda x: (x < 0).to(x.dtype)),
    "softplus": Base(nn.functional.softplus, lambda x: torch.sigmoid(-x)),
    "sigmoid": Base(torch.sigmoid, lambda x: 1 - 2 * torch.sigmoid(x)),
    "tanh": Base(torch.tanh, lambda x: -2 * torch.tanh(x)),
}
"""Increasing activations by name."""


@dataclass(frozen=True)
class Candidate:
    """What the search found for one activation.

    Attributes
    ----------
    base
        Its name.
    entropy
        Of its output, in nats, over the part where it increases.
    slope
        Derivative of the entropy with the factor ε of the correction, at ε = 0.
    epsilon, corrected
        The factor with the lowest entropy, and that.
    """

    base: str
    entropy: float
    slope: float
    epsilon: float
    corrected: float


def search_activations(
    pdf: Function, bases: tuple[str, ...] = tuple(BASES), largest: float = 2.0, trials: int = 81
) -> list[Candidate]:
    """Correct every activation by the factor in ±`largest` that lowers the entropy of its output most.

    Factors with which a function would no longer increase are passed over: it would have no inverse, and no entropy by
    this formula.

    Parameters
    ----------
    pdf
        Of the pre-activations, differentiable.
    bases
        Keys of :data:`BASES`.
    largest, trials
        Range of the factors, and how many are tried: of both signs, down to a ten-thousandth, and none at all.

    Returns
    -------
    list of Candidate
        Lowest corrected entropy first. Entropies of bounded and unbounded functions, or of different supports, compare
        scales as much as shapes.
    """
    found = []
    for name in bases:
        if name not in BASES:
            raise UnknownNameError("activation", name, BASES)
        found.append(_searched(name, pdf, largest, trials))
    return sorted(found, key=lambda candidate: candidate.corrected)


def _searched(name: str, pdf: Function, largest: float, trials: int) -> Candidate:
    base = BASES[name]
    low = max(-8.0, base.low + 1e-9)  # at the very kink the slope is that of the flat side

    def corrected(x: Tensor, epsilon: float) -> Tensor:
        return base.function(x) + epsilon * forward_correction(name, pdf(x), derivative(pdf, x), x)

    def entropy(epsilon: float) -> float | None:
        try:
            return activation_entropy(lambda x: corrected(x, epsilon), pdf, low=low, high=8.0, points=4001)
        except ConfigurationError:
            return None

    start, near = entropy(0.0), 1e-4
    above, below = entropy(near), entropy(-near)
    if start is None or above is None or below is None:
        raise ConfigurationError(f"{name} does not increase over [{low}, 8]; it has no entropy to correct")
    # on a scale of logarithms, for where the slope is small a small factor already turns the function
    sizes = torch.logspace(-4, 0, trials // 2, dtype=torch.float64) * largest
    tried = {sign * float(size): entropy(sign * float(size)) for size in sizes for sign in (1, -1)}
    best = min((value, e) for e, value in {0.0: start, **tried}.items() if value is not None)
    return Candidate(name, start, (above - below) / (2 * near), best[1], best[0])

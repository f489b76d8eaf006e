"""Why there is a barrier, and what predicts its height: curvature along the line between two solutions.

With ``Δ = θ_B − θ_A`` and ``G(α, t) = min(α, t)(1 − max(α, t))`` the barrier is exactly

    B(α) = −∫₀¹ G(α, t) · Δᵀ H(θ(t)) Δ dt,

so that there is one if and only if negative curvature along Δ prevails; it follows from integrating the second
derivative of the loss along the line by parts. Where the curvature sits in the kinks of ReLU, which no Hessian shows,
the form with first derivatives holds all the same:

    B(α) = ∫₀^α gᵀΔ dt − α ∫₀¹ gᵀΔ dt.

After Singh et al., 2024, arXiv 2406.16300, of whose theory only the abstract was at hand: the identities and the
predictions are derived here and checked, and may be written differently there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.measure.loss_surface import LossSurface, Point, between, difference, dot
from gossamer.measure.mode_connectivity import linear_path

Prediction = Literal["midpoint", "fork", "endpoints", "trace"]


@dataclass(frozen=True)
class BarrierCurvature:
    """What the identity says about one point of a line.

    Attributes
    ----------
    alpha
        α.
    barrier
        B(α), integrated.
    nodes
        t at which derivatives were taken, increasing.
    derivatives
        ``Δᵀ H(θ(t)) Δ``, or ``gᵀΔ`` for the first order.
    """

    alpha: float
    barrier: float
    nodes: tuple[float, ...]
    derivatives: tuple[float, ...]

    @property
    def negative_share(self) -> float:
        """Share of the nodes at which the derivative is negative."""
        return sum(value < 0 for value in self.derivatives) / len(self.derivatives)


def barrier_curvature(
    surface: LossSurface,
    a: nn.Module | Point,
    b: nn.Module | Point,
    *,
    alpha: float = 0.5,
    nodes: int = 32,
    order: Literal[1, 2] = 2,
) -> BarrierCurvature:
    """Integrate the barrier from derivatives along the line, with Gauss and Legendre's rule on both sides of α.

    The kernel has its kink at α, and a rule across it would converge slowly: half the nodes go to each side.

    Parameters
    ----------
    surface
        The loss. With batch norm, derivatives are those under the statistics of each batch.
    a, b
        The ends.
    alpha
        In (0, 1).
    nodes
        Q: even, at least 2.
    order
        2 for the identity with Hessian-vector products, 1 for the form with gradients, which ReLU needs.

    Raises
    ------
    ConfigurationError
        If a number is out of range or the models differ in shape.
    """
    if not 0 < alpha < 1 or nodes < 2 or nodes % 2 or order not in (1, 2):
        raise ConfigurationError(
            f"alpha, nodes and order are {alpha}, {nodes} and {order}; alpha in (0, 1), an even number of nodes and "
            f"order 1 or 2 are needed"
        )
    linear_path(a, b)
    first, second = surface.point(a), surface.point(b)
    direction = difference(first, second)
    derivative = surface.curvature if order == 2 else surface.slope
    total, places, values = 0.0, [], []
    for t, weight in _split_rule(alpha, nodes // 2):
        value = derivative(between(first, second, t), direction)
        # of the first order: (1 − α) before α and −α behind it, which is ∂G/∂t
        kernel = -min(alpha, t) * (1 - max(alpha, t)) if order == 2 else float(t < alpha) - alpha
        total += weight * kernel * value
        places.append(t)
        values.append(value)
    return BarrierCurvature(alpha, total, tuple(places), tuple(values))


def _split_rule(alpha: float, half: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, α] and on [α, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(half)
    left = [(alpha * (x + 1) / 2, alpha * w / 2) for x, w in zip(nodes, weights)]
    right = [(alpha + (1 - alpha) * (x + 1) / 2, (1 - alpha) * w / 2) for x, w in zip(nodes, weights)]
    return [(float(t), float(w)) for t, w in left + right]


def predict_barrier(
    surface: LossSurface,
    a: nn.Module | Point,
    b: nn.Module | Point,
    kind: Prediction = "midpoint",
    *,
    fork: nn.Module | Point | None = None,
    samples: int = 16,
    seed: int = 0,
) -> float:
    """Estimate B(½) from derivatives at one or two points.

    ``"midpoint"`` and ``"fork"``: −⅛ Δᵀ H Δ, with H half-way or where the two runs parted. ``"endpoints"``:
    ¼ (g_A − g_B)ᵀΔ + 1/16 Δᵀ (H_A + H_B) Δ, a Taylor series from each end. ``"trace"``: the same for a Hessian that
    curves alike in all P directions, ‖Δ‖² (tr H_A + tr H_B) / (16 P).

    Parameters
    ----------
    surface
        The loss.
    a, b
        The ends.
    kind
        Which estimate.
    fork
        Point at which the runs parted, for ``"fork"``.
    samples, seed
        Of the traces.

    Raises
    ------
    ConfigurationError
        If there is no such estimate, or the fork is missing.
    """
    linear_path(a, b)
    first, second = surface.point(a), surface.point(b)
    direction = difference(first, second)
    if kind == "midpoint":
        return -surface.curvature(between(first, second, 0.5), direction) / 8
    if kind == "fork":
        if fork is None:
            raise ConfigurationError("a prediction from the fork needs the point at which the runs parted; give fork")
        return -surface.curvature(surface.point(fork), direction) / 8
    if kind == "endpoints":
        slopes = surface.slope(first, direction) - surface.slope(second, direction)
        return slopes / 4 + (surface.curvature(first, direction) + surface.curvature(second, direction)) / 16
    if kind == "trace":
        traces = surface.trace(first, samples, seed) + surface.trace(second, samples, seed)
        count = math.fsum(part.numel() for part in direction.values())
        return dot(direction, direction) * traces / (16 * count)
    raise ConfigurationError(f"kind is {kind!r}; use midpoint, fork, endpoints or trace")

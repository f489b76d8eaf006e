"""The smallest network that can be rich or lazy: two linear layers, whose tangent kernel is known in closed form.

``f(x) = w₂ᵀ W₁ x`` has the tangent kernel ``K(x, x') = xᵀ (‖w₂‖² I + W₁ᵀ W₁) x'``. Learning a direction β from small
first weights on whitened data ends with ``K ∝ I + β βᵀ/‖β‖²`` whatever the first weights were, so that the alignment
with the first kernel can be told beforehand. Averaged over random directions it is proportional to
``tr K₀ / ‖K₀‖``, which at a given norm of W₁ is largest where all directions share alike: full rank stays lazy. For one
given direction it is largest where W₁ has that direction alone.

Liu et al., 2024, arXiv 2310.08513, sections 3 and appendix (theorem 1 and proposition on aligned initial weights); the
closed forms here are derived from the setting, as the paper's own statement holds up to its assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, NonFiniteError


def feature_kernel(w1: Tensor, w2: Tensor) -> Tensor:
    """``‖w₂‖² I + W₁ᵀ W₁``, ``(d, d)``, for ``W₁ (h, d)`` and ``w₂ (h,)``."""
    return w2.square().sum() * torch.eye(w1.shape[1], dtype=w1.dtype) + w1.t() @ w1


def linear_ntk(w1: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    """Tangent kernel on samples ``(n, d)``: ``X (‖w₂‖² I + W₁ᵀ W₁) Xᵀ``."""
    return x @ feature_kernel(w1, w2) @ x.t()


def final_kernel(direction: Tensor) -> Tensor:
    """``‖β‖ (I + β βᵀ/‖β‖²)``: the kernel after learning β from small weights, where both layers have norm ``√‖β‖``."""
    size = direction.norm()
    unit = direction / size
    return size * (torch.eye(len(unit), dtype=unit.dtype) + torch.outer(unit, unit))


def predicted_alignment(w1: Tensor, w2: Tensor, direction: Tensor) -> float:
    """Kernel alignment after learning one direction from small weights on whitened data.

    ``(tr K₀ + uᵀ K₀ u) / (‖K₀‖ √(d + 3))`` with ``u = β/‖β‖``; 1 for ``W₁ ∝ a uᵀ`` with ``‖W₁‖ = ‖w₂‖``.

    Parameters
    ----------
    w1, w2
        First weights, ``(h, d)`` and ``(h,)``; small beside what is learnt.
    direction
        β, ``(d,)``, such that the labels are ``βᵀx``.
    """
    kernel = feature_kernel(w1, w2)
    unit = direction / direction.norm()
    return float((kernel.trace() + unit @ kernel @ unit) / (kernel.norm() * math.sqrt(len(unit) + 3)))


def expected_alignment(w1: Tensor, w2: Tensor) -> float:
    """The mean of :func:`predicted_alignment` over uniformly random directions.

    ``(1 + 1/d) · tr K₀ / (‖K₀‖ √(d + 3))``: it depends on W₁ through the participation ratio of the kernel alone.
    """
    kernel = feature_kernel(w1, w2)
    d = len(kernel)
    return float((1 + 1 / d) * kernel.trace() / (kernel.norm() * math.sqrt(d + 3)))


@dataclass(frozen=True)
class LinearRun:
    """What :func:`train_two_layer` leaves.

    Attributes
    ----------
    w1, w2
        The weights.
    loss
        Half the mean squared error.
    steps
        Made.
    """

    w1: Tensor
    w2: Tensor
    loss: float
    steps: int


def train_two_layer(
    w1: Tensor,
    w2: Tensor,
    x: Tensor,
    y: Tensor,
    learning_rate: float | None = None,
    tolerance: float = 1e-6,
    steps: int = 20000,
) -> LinearRun:
    """Gradient descent on half the mean squared error of ``w₂ᵀ W₁ x``.

    Parameters
    ----------
    w1, w2
        First weights, ``(h, d)`` and ``(h,)``; they are not changed.
    x, y
        ``(n, d)`` and ``(n,)``.
    learning_rate
        Default: ``0.2 / max(‖W₁‖₂², 1)``, because weights of low rank and equal norm have a large spectral norm.
    tolerance
        Loss at which training ends, as a share of that of predicting 0.
    steps
        At most.

    Raises
    ------
    ConfigurationError
        If shapes do not fit.
    NonFiniteError
        If training diverges.
    """
    if w1.shape != (len(w2), x.shape[1]) or len(x) != len(y):
        raise ConfigurationError(
            f"w1 is {tuple(w1.shape)}, w2 {tuple(w2.shape)}, x {tuple(x.shape)} and y {tuple(y.shape)}; "
            "(h, d), (h,), (n, d) and (n,) are needed"
        )
    rate = learning_rate or 0.2 / max(float(torch.linalg.matrix_norm(w1, 2)) ** 2, 1.0)
    covariance, target = x.t() @ x / len(x), x.t() @ y / len(x)
    power = float(y.square().mean() / 2)
    w1, w2 = w1.clone(), w2.clone()
    for step in range(steps + 1):
        slope = w2 @ w1
        gradient = slope @ covariance - target
        loss = float(power + slope @ (gradient - target) / 2)
        if not math.isfinite(loss):
            raise NonFiniteError(f"training diverged at step {step}; take a learning rate below {rate:g}")
        if loss <= tolerance * power or step == steps:
            break
        w1, w2 = w1 - rate * torch.outer(w2, gradient), w2 - rate * (w1 @ gradient)
    return LinearRun(w1, w2, max(loss, 0.0), step)

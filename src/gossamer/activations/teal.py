"""TEAL: one threshold on the magnitude of every layer's input."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.activations.base import ActivationSparsifier
from gossamer.core.registry import register


@register(
    "teal",
    paper="teal",
    when="at inference",
    granularity="activations",
    criterion=("activation",),
    allocation="measured",
)
@dataclass(kw_only=True)
class Teal(ActivationSparsifier):
    """Skip the input channels of every linear layer that are small for a token [Liu et al., 2024, arXiv 2408.14690].

    A calibration pass fills a histogram of |x| for each of the four inputs of a block, and the threshold of a layer is
    the quantile of its sparsity: S_t(x) = x · 1[|x| > t], y = W S_t(x). The paper inverts the distribution function of
    x at ½ + p/2, which is the same for a symmetric one; inputs behind an activation function are not symmetric.

    Parameters are those of :class:`~gossamer.activations.base.ActivationSparsifier`.
    """

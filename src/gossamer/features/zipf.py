"""How often features are active: the law that their densities follow, and which fall short of it.

Sorted by how common they are, features of a trained dictionary follow the law of Zipf and Mandelbrot, except for the
rarest, which fall below it: they are dying [Ayonrinde, 2024, arXiv 2411.02124].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class ZipfFit:
    """The law of Zipf and Mandelbrot, ``f(r) = C · (r + q)⁻ˢ`` for the feature of rank r.

    Attributes
    ----------
    exponent, shift, constant
        s, q and C.
    """

    exponent: float
    shift: float
    constant: float

    def at(self, rank: Tensor) -> Tensor:
        """Density that the law expects at ranks from 1 on."""
        return self.constant * (rank.double() + self.shift) ** -self.exponent


def fit_zipf(density: Tensor, upper: float = 0.75) -> ZipfFit:
    """Fit densities of features, sorted, by least squares of their logarithms.

    Parameters
    ----------
    density
        Share of the tokens in which each feature is active, ``(features,)``.
    upper
        Share of the features that is fitted, the most common ones: at the low end densities fall below any such law.

    Raises
    ------
    ConfigurationError
        If fewer than three features are ever active, or `upper` is outside (0, 1].
    """
    if not 0 < upper <= 1:
        raise ConfigurationError(f"upper is {upper}; it must be in (0, 1]")
    ordered = np.sort(density.detach().double().cpu().numpy())[::-1]
    ordered = ordered[ordered > 0]
    ordered = ordered[: max(3, int(np.ceil(upper * len(ordered))))]
    if len(ordered) < 3:
        raise ConfigurationError(f"{len(ordered)} features are ever active; a law of three numbers needs at least 3")
    rank, wanted = np.arange(1, len(ordered) + 1), np.log(ordered)

    def miss(law: np.ndarray) -> np.ndarray:
        return law[2] - law[0] * np.log(rank + law[1]) - wanted

    start = np.array([1.0, 1.0, wanted[0] + np.log(2.0)])
    found = least_squares(miss, start, bounds=([0.0, -0.99, -np.inf], [10.0, float(10 * len(rank)), np.inf]))
    return ZipfFit(float(found.x[0]), float(found.x[1]), float(np.exp(found.x[2])))


def underuse(density: Tensor, law: ZipfFit, margin: float = 0.5) -> Tensor:
    """How far features fall short of what the law expects at their rank, ``(features,)`` from 0 to 1.

    What falls short by less than the margin counts as 0, a dead feature as 1.
    """
    order = density.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(1, len(order) + 1, device=order.device)
    short = (1 - density.double() / law.at(rank)).clamp(0, 1)
    return torch.where(short > margin, short, 0).to(density.dtype)

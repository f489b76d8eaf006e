"""What sparse autoencoders are trained for besides reconstruction: sparsity, and features that stay alive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError
from gossamer.features.sae import SAE, Explained
from gossamer.kernels.codes import decode


def reconstruction_loss(output: Tensor, x: Tensor) -> Tensor:
    """Mean over tokens of the squared distance, ``‖x − x̂‖²``."""
    return (output - x).square().sum(-1).mean()


def unexplained_variance(output: Tensor, x: Tensor) -> Tensor:
    """Fraction of the variance of activations ``(tokens, d)`` that a reconstruction leaves, the FVU."""
    return (output - x).square().sum() / (x - x.mean(0)).square().sum()


def l1_penalty(codes: SparseCodes, decoder: Tensor) -> Tensor:
    """Mean over tokens of the values' sum, each times the length of its feature's direction.

    The lengths keep a dictionary from growing while its values shrink.
    """
    lengths = decoder.norm(dim=1)
    return (codes.values * lengths[codes.indices.long()]).sum() / max(len(codes), 1)


def auxiliary_loss(sae: SAE, x: Tensor, explained: Explained, weight: Tensor, k: int) -> Tensor:
    """How badly features that are used too little explain what is left over, from 0 up.

    Of the affinities, each times its feature's weight, the k highest of every token are decoded and compared with the
    residual: ``‖e − ê‖² / ‖e‖²``. With weights of 0 and 1 for features alive and dead this is the aux-k loss of Gao et
    al. [2024, arXiv 2406.04093, section A.2]; with weights in between the aux-zipf loss of Ayonrinde [2024, arXiv
    2411.02124].

    Parameters
    ----------
    sae
        The autoencoder.
    x
        Activations ``(tokens, d_in)``.
    explained
        What it made of them.
    weight
        ``(features,)`` from 0 up; features of weight 0 take no part.
    k
        How many of a token take part.

    Returns
    -------
    Tensor
        0 where no feature has a weight.
    """
    if k < 1:
        raise ConfigurationError(f"k is {k}; the auxiliary loss needs at least one feature of a token")
    some = (weight > 0).nonzero()[:, 0]
    if not len(some):
        return x.new_zeros(())
    residual = ((x - explained.output) * sae.scale).detach()
    with torch.no_grad():
        # in the order of the dying among themselves; an affinity of zero still learns, for it is what they suffer from
        centred = x * sae.scale - sae.bias
        before = torch.addmm(sae.encoder_bias[some], centred, sae.encoder[some].t())
        ranked = before.relu() * weight[some] + torch.finfo(before.dtype).tiny * before
        best = some[ranked.topk(min(k, len(some)), dim=1).indices]
    rows = SparseCodes.from_rows(best, torch.zeros_like(best, dtype=x.dtype), sae.n_features)
    values = sae.preactivation(x, rows.indices, rows.starts).relu()
    guess = decode(SparseCodes(rows.indices, values, rows.starts, sae.n_features), sae.decoder)
    return (residual - guess).square().sum() / residual.square().sum().clamp(min=torch.finfo(x.dtype).tiny)


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

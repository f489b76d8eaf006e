"""Lower bounds on the number of samples, made explicit: how many tasks there are, and how alike their samples look.

Among M tasks of which any two are clearly different, one has to be told from the others. If a sample says at most K
nats about which one it is, then fewer than ``(log M − log 2) / K`` samples leave the answer open (Fano's inequality;
it holds for algorithms that draw random numbers, and the tasks need no distance between them). Constants and
logarithms of the proofs are lost on the way: these are floors, not predictions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError


def log_packing(coordinates: int, distance: float = 0.25) -> float:
    """Logarithm of a number of sign patterns that exist and differ from each other in a share of their places.

    The bound of Gilbert and Varshamov: patterns are chosen greedily, each of which rules out a Hamming ball.

    Parameters
    ----------
    coordinates
        Length D of a pattern.
    distance
        Any two differ in at least this share of the places, in (0, 1/2).

    Returns
    -------
    float
        In nats: ``D log 2 − log |ball|``, at least 0.

    Raises
    ------
    ConfigurationError
        If an argument is out of range.
    """
    if coordinates < 1 or not 0 < distance < 0.5:
        raise ConfigurationError(
            f"coordinates and distance are {coordinates} and {distance}; give at least 1, and a share in (0, 1/2)"
        )
    radius = math.ceil(distance * coordinates) - 1
    logs = [
        math.lgamma(coordinates + 1) - math.lgamma(j + 1) - math.lgamma(coordinates - j + 1) for j in range(radius + 1)
    ]
    top = max(logs)
    ball = top + math.log(math.fsum(math.exp(each - top) for each in logs))
    return max(0.0, coordinates * math.log(2) - ball)


def mixture_kl(
    means: Tensor, others: Tensor, sigma: float, samples: int = 4096, generator: torch.Generator | None = None
) -> tuple[float, float]:
    """Monte-Carlo estimate of the KL divergence between two even mixtures of Gaussians ``N(mean, σ² I)``.

    Parameters
    ----------
    means, others
        Centres of the first and of the second mixture, ``(k, D)``.
    sigma
        Positive.
    samples
        From the first mixture, in pairs that mirror the noise.
    generator
        On the CPU.

    Returns
    -------
    kl, error
        In nats, with its standard error. Never below 0 in truth; the estimate may be, by its error.

    Raises
    ------
    ConfigurationError
        If the centres do not fit, or a number is out of range.
    """
    if means.dim() != 2 or means.shape[1] != others.shape[-1] or samples < 4 or not sigma > 0:
        raise ConfigurationError(
            f"centres are {tuple(means.shape)} and {tuple(others.shape)}, sigma {sigma}, samples {samples}; "
            "two matrices of equal width, a positive sigma and at least 4 samples are needed"
        )
    means, others = means.double(), others.double()
    half = samples // 2
    chosen = means[torch.arange(half) % len(means)]
    noise = torch.randn(half, means.shape[1], generator=generator, dtype=torch.float64) * sigma
    draws = torch.stack([chosen + noise, chosen - noise])
    ratio = (_log_mixture(draws, means, sigma) - _log_mixture(draws, others, sigma)).mean(0)
    return float(ratio.mean()), float(ratio.std() / math.sqrt(half))


def _log_mixture(x: Tensor, means: Tensor, sigma: float) -> Tensor:
    """Log density up to a term that all mixtures share: the norm of x."""
    exponent = (x @ means.t() - means.square().sum(1) / 2) / sigma**2
    return exponent.logsumexp(-1) - math.log(len(means))


def fano_samples(log_tasks: float, kl: float, failure: float = 0.0) -> float:
    """Number of samples below which no algorithm finds the task with less than a probability of failure.

    ``n ≥ ((1 − failure) log M − log 2) / KL``.

    Parameters
    ----------
    log_tasks
        Logarithm of how many tasks there are.
    kl
        Mean divergence between the sample distributions of two of them, positive.
    failure
        Probability that is allowed, in [0, 1).

    Raises
    ------
    ConfigurationError
        If an argument is out of range.
    """
    if not kl > 0 or not 0 <= failure < 1:
        raise ConfigurationError(f"kl and failure are {kl} and {failure}; give a positive one, and one in [0, 1)")
    return max(0.0, ((1 - failure) * log_tasks - math.log(2)) / kl)

"""Floors under the number of samples that the three networks of the dynamic signal distribution need.

A learner that does not care about rotations of a group is as bad on one task as on the average over all its rotations.
The orbit of the task under all rotations of an image has ``≈ k²d`` free coordinates, under rotations of each patch
``≈ kd``, under one rotation for all ``≈ d``; with Fano's inequality each coordinate costs a constant share of
``σ²`` samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.measure.fano import fano_samples, log_packing, mixture_kl

KINDS = ("fcn", "lcn", "cnn")


@dataclass(frozen=True)
class SampleBound:
    """A floor for one kind of network.

    Attributes
    ----------
    coordinates
        Free coordinates of the orbit.
    log_tasks
        Logarithm of the size of a packing in it.
    kl, kl_error
        Mean divergence of a sample between two members, with its standard error, by Monte Carlo.
    n
        Fewer samples cannot tell the members apart. A floor and no prediction: constants and logarithms are lost.
    """

    coordinates: int
    log_tasks: float
    kl: float
    kl_error: float
    n: float


def orbit_coordinates(k: int, d: int, kind: str) -> int:
    """Free directions in which the k signal vectors of a task move under the rotations a network does not notice."""
    counts = {"fcn": k * (k * d - k), "lcn": k * (d - 1), "cnn": d - 1}
    if kind not in counts:
        raise UnknownNameError("patch network", kind, counts)
    return counts[kind]


def orbit_member(k: int, d: int, kind: str, radius: float, generator: torch.Generator | None = None) -> Tensor:
    """The k signal vectors of a rotated task, ``(k, kd)``, orthonormal.

    The plain task has the signal ``e_1`` in each patch. Its member is ``e_1 + radius · v`` made orthonormal, where v
    has random signs of norm 1 in the free directions: those of all patches, of the own one, or the same in all.
    """
    orbit_coordinates(k, d, kind)
    if d < 2 or not radius > 0:
        raise ConfigurationError(f"d and radius are {d} and {radius}; d >= 2 and a positive radius are needed")
    axes = torch.zeros(k, k, d, dtype=torch.float64)
    axes[range(k), range(k), 0] = 1
    rows = {"fcn": (k, k), "lcn": (k, 1), "cnn": (1, 1)}[kind]
    signs = 1 - 2 * torch.randint(2, (*rows, d - 1), generator=generator).double()
    signs = signs / math.sqrt(rows[1] * (d - 1))
    moved = axes.clone()
    if kind == "fcn":
        moved[:, :, 1:] += radius * signs
    else:
        moved[range(k), range(k), 1:] += radius * signs[:, 0].expand(k, d - 1)
    matrix = moved.flatten(1)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


def dsd_bounds(
    k: int,
    d: int,
    sigma: float,
    radius: float = 1.0,
    distance: float = 0.25,
    pairs: int = 4,
    samples: int = 4096,
    failure: float = 0.0,
    seed: int = 0,
) -> dict[str, SampleBound]:
    """Explicit lower bounds for the three networks.

    After Lahoti et al., 2024, arXiv 2403.15707 (Ω(σ²k²d) for fully connected and Ω(σ²kd) for locally connected ones);
    packings and constants are this module's own.

    Parameters
    ----------
    k, d, sigma
        Of the distribution; see :func:`gossamer.training.dynamic_signal_distribution.make_dsd`.
    radius
        How far members lie from the plain task.
    distance
        Share of coordinates in which two members differ at least; see :func:`gossamer.measure.fano.log_packing`.
    pairs
        Pairs of members over which the divergence is averaged.
    samples
        Of each Monte-Carlo estimate.
    failure
        See :func:`gossamer.measure.fano.fano_samples`.
    seed
        Of what is drawn.

    Returns
    -------
    dict of str to SampleBound
        ``"fcn"``, ``"lcn"`` and ``"cnn"``.

    Raises
    ------
    ConfigurationError
        If an argument is out of range.
    """
    if pairs < 1:
        raise ConfigurationError(f"pairs is {pairs}; it must be at least 1")
    generator = generator_for("bounds", seed)
    bounds = {}
    for kind in KINDS:
        estimates = []
        for _ in range(pairs):
            one, other = (orbit_member(k, d, kind, radius, generator) for _ in range(2))
            estimates.append(mixture_kl(one, other, sigma, samples, generator))
        kl = sum(value for value, _ in estimates) / pairs
        error = math.sqrt(sum(each**2 for _, each in estimates)) / pairs
        coordinates = orbit_coordinates(k, d, kind)
        tasks = log_packing(coordinates, distance)
        # raised by its error: an estimate that chance brings near zero would give a bound that is too good
        floor = fano_samples(tasks, max(kl, 0.0) + 2 * error, failure)
        bounds[kind] = SampleBound(coordinates, tasks, kl, error, floor)
    return bounds

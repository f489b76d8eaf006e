"""Two ways in which dictionaries fail, on data of which the truth is known.

*Occlusion*: of two variables, the one with the somewhat smaller vectors is not learned while there is room for the
other. *Over-splitting*: a feature that is on or off is spread over many [Makelov et al., 2024, arXiv 2405.08366].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError
from gossamer.features.dictionaries import Dictionary
from gossamer.features.latent_scores import latent_f1

Factory = Callable[[Tensor], Dictionary]
"""Activations ``(n, d)`` → a dictionary trained on them."""


@dataclass(frozen=True)
class Occlusion:
    """Which variables a dictionary has learned.

    Attributes
    ----------
    ratio
        Length of the one variable's vectors over that of the other's.
    larger, smaller
        Mean over the values of a variable of the best F1 of any feature.
    """

    ratio: float
    larger: float
    smaller: float


def two_variables(
    ratio: float, values: int = 10, width: int = 32, count: int = 4000, noise: float = 0.05, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums of two independent variables' vectors, random and of length `ratio` and 1, and some noise.

    Returns
    -------
    Tensor, dict
        Activations ``(count, width)``, and the values of ``larger`` and ``smaller``.
    """
    if ratio < 1 or values < 2:
        raise ConfigurationError(f"ratio is {ratio} and values {values}; give at least 1, and at least 2")
    generator = generator_for("two variables", seed)
    vectors = torch.nn.functional.normalize(torch.randn(2, values, width, generator=generator), dim=2)
    drawn = torch.randint(values, (2, count), generator=generator)
    x = ratio * vectors[0, drawn[0]] + vectors[1, drawn[1]]
    x = x + noise * torch.randn(x.shape, generator=generator)
    return x, {"larger": drawn[0], "smaller": drawn[1]}


def occlusion_curve(
    factory: Factory,
    ratios: Sequence[float] = (1.0, 1.1, 1.25, 1.5, 2.0),
    values: int = 10,
    width: int = 32,
    count: int = 4000,
    noise: float = 0.05,
    seed: int = 0,
) -> list[Occlusion]:
    """How well each variable is recovered as the one outgrows the other.

    Parameters
    ----------
    factory
        Trains a dictionary, with the same capacity for all ratios.
    ratios
        Of the lengths of the vectors.
    values, width, count, noise, seed
        Of the data; see :func:`two_variables`.
    """
    points = []
    for ratio in ratios:
        x, labels = two_variables(ratio, values, width, count, noise, seed)
        found = latent_f1(factory(x).encode(x) > 0, labels, max_group=1)
        best = {name: float(table.amax(0).mean()) for name, table in found.table.items()}
        points.append(Occlusion(ratio, best["larger"], best["smaller"]))
    return points


def two_modes(
    separation: float = 4.0, width: int = 16, count: int = 4000, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """A mixture of two Gaussians of unit variance whose means lie so far apart, and which mode each comes from."""
    generator = generator_for("two modes", seed)
    mode = torch.randint(2, (count,), generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)
    x = separation * (mode - 0.5)[:, None] * direction + torch.randn(count, width, generator=generator)
    return x, {"mode": mode}


def splits(dictionary: Dictionary, x: Tensor, mode: Tensor, precision: float = 0.9, least: float = 0.001) -> float:
    """Features for each mode: those of whose activations nearly all lie in one of them, mean over modes.

    Parameters
    ----------
    dictionary, x, mode
        The dictionary, activations, and the mode of each.
    precision
        Share of a feature's activations that must lie in the mode.
    least
        Share of the activations on which a feature must be active to count.
    """
    active = (dictionary.encode(x) > 0).double()
    times = active.sum(0)
    within = active.t() @ torch.nn.functional.one_hot(mode).double() / times.clamp(min=1)[:, None]
    counted = (within >= precision) & (times >= least * len(x))[:, None]
    return float(counted.sum(0).double().mean())

"""What a learnt model says of points: their most probable states, and how probable each cause is.

A point whose most probable state has as many causes as states may have would perhaps take more. Such points are looked
at again with one more candidate and one more active cause, until the state no longer fills what is allowed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.coding.latent_models import LatentModel, Parameters
from gossamer.coding.state_sets import LARGEST, count_combinations, state_set
from gossamer.coding.truncated_em import checked, posteriors
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class Inference:
    """Posteriors of points, on the states that were considered.

    Attributes
    ----------
    states
        ``(points, top_k, H)``: values of the causes, the most probable state first. Causes of a spike-and-slab model
        are 0 or 1 here.
    probabilities
        ``(points, top_k)``: of these states; 0 where fewer were considered.
    marginals
        ``(points, H)``: probability that a cause is active.
    h_prime, gamma
        ``(points,)`` int64: candidates and most active causes with which a point was looked at in the end.
    """

    states: Tensor
    probabilities: Tensor
    marginals: Tensor
    h_prime: Tensor
    gamma: Tensor

    @property
    def most_probable(self) -> Tensor:
        """``(points, H)``: the most probable state."""
        return self.states[:, 0]


@torch.no_grad()
def infer(
    model: LatentModel,
    parameters: Parameters,
    x: Tensor,
    top_k: int = 10,
    adaptive: bool = True,
    h_prime_max: int | None = None,
    gamma_max: int | None = None,
) -> Inference:
    """Posteriors of points.

    Parameters
    ----------
    model, parameters
        What was learnt.
    x
        ``(points, D)``.
    top_k
        States that are reported of each point.
    adaptive
        Whether points whose most probable state has γ active causes are looked at again with a larger γ and H'.
    h_prime_max, gamma_max
        How far these may grow; by default to all causes, as far as the states can be enumerated.

    Raises
    ------
    ConfigurationError
        If `top_k` is below 1, or a limit is below what the model has already or above the number of causes.
    CalibrationError, NonFiniteError
        If x does not fit, or is not finite.
    """
    limits = _limits(model, h_prime_max, gamma_max)
    if top_k < 1:
        raise ConfigurationError(f"top_k is {top_k}; ask for at least one state")
    x = checked(x, parameters["components"].shape[1])
    found = _once(model, parameters, x, top_k)
    while adaptive:
        full = ((found.most_probable != 0).sum(1) >= found.gamma) & (found.gamma == model.gamma)
        larger = _larger(model, limits)
        if larger is None or not bool(full.any()):
            break
        model = larger
        again = _once(model, parameters, x[full], top_k)
        for name in ("states", "probabilities", "marginals", "h_prime", "gamma"):
            getattr(found, name)[full] = getattr(again, name)
    return found


def _limits(model: LatentModel, h_prime_max: int | None, gamma_max: int | None) -> tuple[int, int]:
    limits = []
    for name, limit, least in (("h_prime_max", h_prime_max, model.h_prime), ("gamma_max", gamma_max, model.gamma)):
        limit = model.n_components if limit is None else limit
        if not least <= limit <= model.n_components:
            raise ConfigurationError(f"{name} is {limit}; it must lie in [{least}, {model.n_components}]")
        limits.append(limit)
    return limits[0], limits[1]


def _larger(model: LatentModel, limits: tuple[int, int]) -> LatentModel | None:
    """The model with one more candidate and active cause, as far as that is allowed; None where nothing is."""
    h_prime = min(model.h_prime + 1, limits[0])
    gamma = min(model.gamma + 1, limits[1], h_prime)
    if gamma == model.gamma or count_combinations(h_prime, gamma, len(model.values)) > LARGEST:
        return None
    larger = copy.copy(model)
    larger.h_prime, larger.gamma = h_prime, gamma
    larger.table = state_set(h_prime, gamma, model.values)
    return larger


def _once(model: LatentModel, parameters: Parameters, x: Tensor, top_k: int) -> Inference:
    states, probabilities, marginals = [], [], []
    for block, q, _ in posteriors(model, model.prepare(parameters, 1.0), x):
        k = min(top_k, model.n_states)
        best, columns = q.topk(k, dim=1)
        missing = top_k - k
        states.append(torch.nn.functional.pad(model.decode(block, columns), (0, 0, 0, missing)))
        probabilities.append(torch.nn.functional.pad(best, (0, missing)))
        marginals.append(model.marginals(block, q))
    of_all = torch.ones(len(x), dtype=torch.int64, device=x.device)
    return Inference(
        torch.cat(states),
        torch.cat(probabilities),
        torch.cat(marginals),
        model.h_prime * of_all,
        model.gamma * of_all,
    )


@torch.no_grad()
def draw(model: LatentModel, parameters: Parameters, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points ``(count, D)`` of a model, and their causes ``(count, H)``; any number of these can be active.

    Raises
    ------
    ConfigurationError
        If `count` is below 1.
    """
    if count < 1:
        raise ConfigurationError(f"{count} points were asked for; draw at least one")
    generator = generator_for("samples of a latent model", seed)
    codes = model.draw(parameters, count, generator)
    components, noise = parameters["components"].cpu(), parameters["noise"].cpu()
    drawn = torch.randn(count, components.shape[1], generator=generator, dtype=torch.float64)
    drawn = drawn @ torch.linalg.cholesky(noise).T if noise.dim() == 2 else drawn * noise.sqrt()
    return model.combine(codes, components) + drawn, codes

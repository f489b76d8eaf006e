"""What the engine of truncated expectation maximization needs to know of a generative model.

A model explains a point y by a state of H latent causes, of which few are active, and noise. It names the candidates of
a point, gives the log-joint of the states that are considered, adds up what its M-step needs, and solves the M-step.
All of it is done for a block of points at a time, in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Any

import torch
from torch import Tensor

from gossamer.coding.state_sets import StateSet, state_set
from gossamer.errors import ConfigurationError

Parameters = dict[str, Tensor]
"""Name → value: ``components`` ``(H, D)``, ``prior``, ``noise`` (a variance), and what else a model has."""

NOISE_FLOOR = 1e-8
"""Smallest variance of the noise."""
PRIOR_FLOOR = 1e-5
"""Prior probabilities keep this distance from 0 and 1."""


@dataclass
class Block:
    """Points that are treated together.

    Attributes
    ----------
    x
        ``(points, D)``.
    square
        ``(points,)``: squared lengths; for a model with a covariance of the noise, in its metric.
    projection
        ``(points, H)``: what they have in common with the components, where the model uses it.
    candidates
        ``(points, H')``, rising.
    extra
        What a model computes for the log-joint and needs again for its statistics.
    """

    x: Tensor
    square: Tensor
    projection: Tensor
    candidates: Tensor
    extra: Any = field(default=None)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each dimension of the data of all processes, from which parameters start."""

    mean: Tensor
    variance: Tensor


class LatentModel(ABC):
    """A generative model with sparse causes.

    Parameters
    ----------
    n_components
        Causes H.
    h_prime, gamma
        Candidates of a point, and the most causes that are active together.
    values
        What an active cause can be.
    learn
        Names of the parameters that are learnt.
    anneal_prior
        Whether the temperature divides the log-prior as well.

    Raises
    ------
    ConfigurationError
        If sizes do not satisfy 1 ≤ γ ≤ H' ≤ H, there are too many states, or a name in `learn` is unknown.
    """

    names: tuple[str, ...] = ("components", "prior", "noise")

    def __init__(
        self,
        n_components: int,
        h_prime: int,
        gamma: int,
        values: tuple[float, ...] = (1.0,),
        learn: Sequence[str] | None = None,
        anneal_prior: bool = False,
    ):
        if not 1 <= gamma <= h_prime <= n_components:
            raise ConfigurationError(
                f"gamma is {gamma}, h_prime {h_prime} and n_components {n_components}; they must satisfy "
                "1 ≤ gamma ≤ h_prime ≤ n_components"
            )
        unknown = [name for name in learn or () if name not in self.names]
        if unknown:
            raise ConfigurationError(f"learn names {unknown[0]!r}; it can name {', '.join(self.names)}")
        self.n_components, self.h_prime, self.gamma, self.values = n_components, h_prime, gamma, values
        self.learn = self.names if learn is None else tuple(learn)
        self.anneal_prior = anneal_prior
        self.table: StateSet = state_set(h_prime, gamma, values)

    @property
    def n_states(self) -> int:
        """Columns of a log-joint: no cause, single causes, combinations of candidates."""
        return 1 + len(self.values) * self.n_components + len(self.table.states)

    @property
    def floats_a_point(self) -> int:
        """Roughly how many numbers are held for a point at a time."""
        return 2 * self.n_states

    @abstractmethod
    def initial(self, moments: Moments, generator: torch.Generator) -> Parameters:
        """Parameters to start from."""

    @abstractmethod
    def prepare(self, parameters: Parameters, temperature: float) -> Any:
        """What depends on the parameters only."""

    @abstractmethod
    def observe(self, prepared: Any, x: Tensor) -> Block:
        """Points with their candidates."""

    @abstractmethod
    def log_joint(self, prepared: Any, block: Block) -> Tensor:
        """Annealed log-joint of all states, ``(points, n_states)``; at temperature one it is normalised."""

    @abstractmethod
    def statistics(self, prepared: Any, block: Block, q: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Sums over the points that the M-step needs.

        Parameters
        ----------
        q
            ``(points, n_states)``: posterior probabilities, 0 throughout for points that are left out.
        weight
            ``(points,)``: 0 for those, and 1 for all others.
        """

    @abstractmethod
    def maximise(self, parameters: Parameters, totals: dict[str, Tensor], temperature: float) -> Parameters:
        """New parameters from the sums over all points."""

    @abstractmethod
    def activity(self, parameters: Parameters) -> Tensor:
        """Prior probability of every cause to be active, ``(H,)``."""

    @abstractmethod
    def means(self, prepared: Any, block: Block, q: Tensor) -> Tensor:
        """Posterior means of the causes, ``(points, H)``."""

    @abstractmethod
    def combine(self, codes: Tensor, components: Tensor) -> Tensor:
        """What causes of given values make together, ``(points, D)``."""

    @abstractmethod
    def draw(self, parameters: Parameters, count: int, generator: torch.Generator) -> Tensor:
        """Values of the causes from the prior, ``(count, H)``."""

    def coverage(self, parameters: Parameters) -> float:
        """A: prior probability of at most γ active causes."""
        sizes = torch.zeros(self.n_components + 1, dtype=torch.float64)
        sizes[0] = 1.0
        for p in self.activity(parameters).tolist():  # one cause after the other: the Poisson binomial law
            sizes[1:] = sizes[1:] * (1 - p) + sizes[:-1] * p
            sizes[0] *= 1 - p
        return min(1.0, float(sizes[: self.gamma + 1].sum()))

    def jitter(self, parameters: Parameters, deviations: dict[str, float], generator: torch.Generator) -> Parameters:
        """Parameters with Gaussian noise of given deviations; that of the noise is on its standard deviation."""
        found = dict(parameters)
        for name, deviation in deviations.items():
            if not deviation:
                continue
            value = found[name].diagonal() if name == "noise" and found[name].dim() == 2 else found[name]
            value = value.sqrt() if name == "noise" else value
            moved = value + deviation * torch.randn(value.shape, generator=generator, dtype=value.dtype).to(
                value.device
            )
            if name == "noise" and found[name].dim() == 2:
                found[name] = found[name] + torch.diag(moved.square() - value.square())
            else:
                found[name] = moved.square() if name == "noise" else moved
        return self.bounded(found)

    def bounded(self, parameters: Parameters) -> Parameters:
        """Parameters within their ranges."""
        prior = parameters["prior"].clamp(PRIOR_FLOOR, 1 - PRIOR_FLOOR)
        prior = prior * min(1.0, (1 - PRIOR_FLOOR) / float(prior.sum())) if len(self.values) > 1 else prior
        noise = parameters["noise"]
        noise = noise.clamp(min=NOISE_FLOOR) if noise.dim() < 2 else noise
        return {**parameters, "prior": prior, "noise": noise}

    # ------------------------------------------------------------------------------------------- states

    def split(self, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Columns of a log-joint or posterior: empty state, single causes ``(points, values, H)``, combinations."""
        singles = len(self.values) * self.n_components
        alone = columns[:, 1 : 1 + singles].view(len(columns), len(self.values), self.n_components)
        return columns[:, 0], alone, columns[:, 1 + singles :]

    def marginals(self, block: Block, q: Tensor) -> Tensor:
        """Posterior probability that a cause is active, ``(points, H)``."""
        _, alone, together = self.split(q)
        return alone.sum(1).scatter_add_(1, block.candidates, together @ self.table.active.to(q))

    def decode(self, block: Block, columns: Tensor) -> Tensor:
        """States of chosen columns ``(points, k)``: the value of every cause, ``(points, k, H)``."""
        points, k = columns.shape
        singles = len(self.values) * self.n_components
        states = block.x.new_zeros(points, k, self.n_components)
        values = torch.tensor(self.values, dtype=states.dtype, device=states.device)
        single = (columns >= 1) & (columns <= singles)
        where = (columns - 1).clamp(0, singles - 1)
        alone = torch.where(single, values[where // self.n_components], 0.0)
        states.scatter_(2, (where % self.n_components)[..., None], alone[..., None])
        if len(self.table.states):
            together = columns > singles
            chosen = self.table.states.to(states)[(columns - 1 - singles).clamp(min=0)] * together[..., None]
            states.scatter_add_(2, block.candidates[:, None].expand(-1, k, -1), chosen)
        return states


def truncated_binomial(p: float, count: int, gamma: int) -> tuple[float, float]:
    """Mass A and mean B of a binomial law below γ: ``Σ_{g ≤ γ} C(H, g) p^g (1 − p)^{H − g}``, with a factor g for B."""
    masses = [comb(count, g) * p**g * (1 - p) ** (count - g) for g in range(gamma + 1)]
    return sum(masses), sum(g * mass for g, mass in enumerate(masses))


def start_components(moments: Moments, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean of the data plus noise of a quarter of its deviation, ``(count, D)``, and that deviation, averaged."""
    deviation = moments.variance.sqrt().mean()
    noise = torch.randn(count, len(moments.mean), generator=generator, dtype=torch.float64).to(moments.mean.device)
    return moments.mean + deviation / 4 * noise, deviation


def equal_rows(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Sets of candidates that occur, ``(sets, H')``, and which of them each point has, ``(points,)``.

    What :func:`torch.unique` gives for rows, from one sort a column: it compares rows one by one.
    """
    member = torch.zeros(len(candidates), dtype=torch.int64, device=candidates.device)
    width = int(candidates.max()) + 1
    for column in candidates.T:
        _, member = torch.unique(member * width + column, return_inverse=True)
    sets = candidates.new_empty(int(member.max()) + 1, candidates.shape[1])
    sets[member] = candidates
    return sets, member

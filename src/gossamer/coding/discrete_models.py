"""Linear models with discrete causes: what a point shows is the sum of its active components, and noise.

Binary causes are absent or present (BSC, Henniges et al., 2010), ternary ones also subtract (TSC, Exarchakis et al.,
2012), discrete ones take any values of a given alphabet, each with a probability of its own (DSC, Exarchakis and
Lücke, 2017). All three are one model: binary has the alphabet {1}, ternary {−1, 1} with equal probabilities.

No image of a state is ever formed. The energy ``‖y − W s‖² = ‖y‖² − 2 sᵀ(Wᵀy) + sᵀ(WᵀW) s`` needs products of a point
with the components and of components with each other, so that all states of all points are one product of matrices of
``points × (H' + pairs)`` and ``(H' + pairs) × states``, whatever the number of dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.coding.latent_models import (
    PRIOR_FLOOR,
    Block,
    LatentModel,
    Moments,
    Parameters,
    start_components,
    truncated_binomial,
)
from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class _Prepared:
    components: Tensor
    gram: Tensor
    precision: Tensor  # of the noise
    beta: float  # of the likelihood
    log_values: Tensor  # log-prior of each value, less that of zero, annealed if asked for
    constant: Tensor  # of every log-joint


class DiscreteModel(LatentModel):
    """``y = W s + noise`` with causes from an alphabet.

    Parameters
    ----------
    n_components, h_prime, gamma, learn, anneal_prior
        As :class:`LatentModel`.
    values
        The alphabet without zero.
    tied
        Whether all values that are not zero are equally probable, as in TSC.
    selection
        Candidates by the ``"cosine"`` of a component with the point, as in BSC, or by the log-joint of the best state
        in which it is ``"alone"``.

    Notes
    -----
    Parameters: ``components`` ``(H, D)``, ``prior`` ``(values,)`` the probability of each, ``noise`` the variance.
    """

    def __init__(
        self,
        n_components: int,
        h_prime: int = 8,
        gamma: int = 5,
        values: tuple[float, ...] = (1.0,),
        tied: bool = False,
        selection: str = "alone",
        learn: Sequence[str] | None = None,
        anneal_prior: bool = False,
    ):
        if not values or 0 in values or len(set(values)) != len(values) or not all(map(math.isfinite, values)):
            raise ConfigurationError(f"values is {values}; give different finite numbers other than zero")
        if selection not in ("cosine", "alone"):
            raise ConfigurationError(f"selection is {selection!r}; it must be cosine or alone")
        super().__init__(n_components, h_prime, gamma, tuple(map(float, values)), learn, anneal_prior)
        self.tied, self.selection = tied, selection

    def initial(self, moments: Moments, generator: torch.Generator) -> Parameters:
        """Components around the mean, noise of the deviation of the data, one active cause to be expected."""
        components, deviation = start_components(moments, self.n_components, generator)
        shares = torch.rand(len(self.values), generator=generator, dtype=torch.float64).to(components.device)
        shares = torch.ones_like(shares) if self.tied else shares + 1e-3
        prior = shares / shares.sum() / max(2, self.n_components)
        return {"components": components, "prior": prior, "noise": deviation.square()}

    def activity(self, parameters: Parameters) -> Tensor:
        """The same probability for all causes."""
        return parameters["prior"].sum().expand(self.n_components)

    def prepare(self, parameters: Parameters, temperature: float) -> _Prepared:
        """Products of components, and the prior."""
        components, prior, noise = (parameters[name] for name in ("components", "prior", "noise"))
        beta = 1 / temperature
        of_prior = beta if self.anneal_prior else 1.0
        zero = torch.log1p(-prior.sum())
        constant = of_prior * self.n_components * zero - beta / 2 * components.shape[1] * torch.log(2 * math.pi * noise)
        log_values = of_prior * (prior.log() - zero)
        return _Prepared(components, components @ components.T, 1 / noise, beta, log_values, constant)

    def observe(self, prepared: _Prepared, x: Tensor) -> Block:
        """Candidates by what each component explains alone."""
        projection = x @ prepared.components.T
        length = prepared.gram.diagonal()
        if self.selection == "cosine":
            score = projection * length.clamp(min=torch.finfo(x.dtype).tiny).rsqrt()
        else:
            score = self._alone(prepared, projection, 1.0).amax(1)
        candidates = score.topk(self.h_prime, sorted=False).indices.sort(1).values
        return Block(x, x.square().sum(1), projection, candidates)

    def _alone(self, prepared: _Prepared, projection: Tensor, beta: float) -> Tensor:
        """Log-joint of single causes less that of none, ``(points, values, H)``."""
        values = projection.new_tensor(self.values)[:, None]
        fit = projection[:, None] * values - prepared.gram.diagonal() * values.square() / 2
        return fit.mul_(prepared.precision * beta).add_(prepared.log_values[:, None])

    def log_joint(self, prepared: _Prepared, block: Block) -> Tensor:
        """All states: one product with their moments."""
        table, candidates = self.table, block.candidates
        strength = prepared.precision * prepared.beta
        found = block.x.new_empty(len(block.x), self.n_states)
        base = prepared.constant - strength / 2 * block.square
        _, alone, together = self.split(found)
        found[:, 0] = base
        alone.copy_(self._alone(prepared, block.projection, prepared.beta)).add_(base[:, None, None])
        if len(table.states):
            first, second = table.pairs
            pairs = prepared.gram.view(-1)[candidates[:, first] * self.n_components + candidates[:, second]]
            pairs.mul_(-torch.where(first == second, 0.5, 1.0).to(pairs))
            energy = torch.cat([block.projection.gather(1, candidates), pairs], 1)
            log_prior = table.value_counts.to(found) @ prepared.log_values
            moments = table.moments.to(found)
            together.copy_(torch.addmm(log_prior, energy.mul_(strength), moments.T)).add_(base[:, None])
        return found

    def statistics(self, prepared: _Prepared, block: Block, q: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """First and second moments of the causes, and how often they have each value."""
        table, h = self.table, self.n_components
        _, alone, together = self.split(q)
        values = q.new_tensor(self.values)
        each = alone.sum(0)
        counts = each.sum(1)
        means = torch.einsum("nkh,k->nh", alone, values)
        second = torch.diag(values.square() @ each)
        if len(table.states):
            moments = together @ table.moments.to(q)
            means = means.scatter_add(1, block.candidates, moments[:, : self.h_prime])
            first, other = table.pairs
            place = block.candidates[:, first] * h + block.candidates[:, other]
            upper = q.new_zeros(h * h).index_add_(0, place.flatten(), moments[:, self.h_prime :].flatten()).view(h, h)
            second = second + upper + upper.triu(1).T
            counts = counts + together.sum(0) @ table.value_counts.to(q)
        square = (block.square * weight).sum()
        return {"x s": means.T @ block.x, "s s": second, "counts": counts, "square": square}

    def maximise(self, parameters: Parameters, totals: dict[str, Tensor], temperature: float) -> Parameters:
        """Least squares for the components, what they leave for the noise, counts for the prior."""
        components, points = parameters["components"], totals["points"]
        if "components" in self.learn:
            components = solve_components(components, totals["x s"], totals["s s"])
        left = (
            totals["square"]
            - 2 * (components * totals["x s"]).sum()
            + (components @ components.T * totals["s s"]).sum()
        )
        noise = left / (points * components.shape[1])
        prior = parameters["prior"]
        p = float(prior.sum())
        mass, mean = truncated_binomial(p, self.n_components, self.gamma)
        total = mass / max(mean, PRIOR_FLOOR) * p * totals["counts"].sum() / points
        shares = torch.ones_like(prior) if self.tied else totals["counts"].clamp(min=torch.finfo(prior.dtype).tiny)
        return {"components": components, "prior": total * shares / shares.sum(), "noise": noise}

    def means(self, prepared: _Prepared, block: Block, q: Tensor) -> Tensor:
        """Posterior means."""
        _, alone, together = self.split(q)
        means = torch.einsum("nkh,k->nh", alone, q.new_tensor(self.values))
        return means.scatter_add_(1, block.candidates, together @ self.table.states.to(q))

    def combine(self, codes: Tensor, components: Tensor) -> Tensor:
        """Their sum."""
        return codes @ components

    def draw(self, parameters: Parameters, count: int, generator: torch.Generator) -> Tensor:
        """Independent values."""
        prior = parameters["prior"].cpu()
        law = torch.cat([1 - prior.sum().reshape(1), prior]).clamp(min=0)
        chosen = torch.multinomial(law, count * self.n_components, replacement=True, generator=generator)
        return torch.tensor((0.0, *self.values), dtype=torch.float64)[chosen].view(count, self.n_components)


def solve_components(components: Tensor, with_data: Tensor, second: Tensor) -> Tensor:
    """Components that solve ``second · W = with_data``; of all solutions the one nearest to the components so far.

    A cause that is never active so keeps its component.
    """
    left = with_data - second @ components
    return components + torch.linalg.pinv(second, hermitian=True) @ left

"""Gaussian sparse coding: causes that are on or off, and when on have a Gaussian strength.

The strength is integrated out, so that a state is again only which causes are on, and its posterior mean and covariance
are known. Everything happens among the at most γ causes of a state, through products of components in the metric of the
noise; the number of dimensions does not enter. [Sheikh, Shelton and Lücke, 2014, A truncated EM approach for
spike-and-slab sparse coding, Journal of Machine Learning Research 15:2653]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.coding.discrete_models import solve_components
from gossamer.coding.latent_models import (
    NOISE_FLOOR,
    Block,
    LatentModel,
    Moments,
    Parameters,
    equal_rows,
    start_components,
)
from gossamer.errors import ConfigurationError

_KINDS = ("scalar", "diagonal", "full")
_SLAB_FLOOR = 1e-5


@dataclass(frozen=True)
class _Prepared:
    weighted: Tensor  # Σ⁻¹ W, as (H, D)
    precision: Tensor  # Σ⁻¹: a number, a diagonal, or a matrix
    gram: Tensor  # Wᵀ Σ⁻¹ W
    mean: Tensor  # of the slab
    covariance: Tensor
    log_odds: Tensor
    beta: float
    of_prior: float
    constant: Tensor
    log_zero: Tensor


@dataclass(frozen=True)
class _Supports:
    """States of one size: which causes, and the posterior of their strengths.

    `causes` ``(sets, states, size)`` and `covariance` ``(sets, states, size, size)`` belong to sets of candidates,
    `member` says which set is a point's, `means` ``(points, states, size)`` are its own.
    """

    causes: Tensor
    covariance: Tensor
    member: Tensor
    means: Tensor
    columns: slice


class SpikeSlabModel(LatentModel):
    """``y = W (s ∘ z) + noise``, s Bernoulli and z Gaussian.

    Parameters
    ----------
    n_components, h_prime, gamma, learn, anneal_prior
        As :class:`LatentModel`.
    noise
        Covariance of the noise: ``"scalar"``, ``"diagonal"`` or ``"full"``.
    slab
        Covariance of z: ``"full"``, whose elements are the second moments of pairs of causes that are on together,
        made positive definite, or ``"diagonal"``, for which that is the exact M-step, so that without truncation the
        likelihood never falls.

    Notes
    -----
    Parameters: ``components`` ``(H, D)``, ``prior`` ``(H,)``, ``noise`` a variance, ``(D,)`` or ``(D, D)``,
    ``slab_mean`` ``(H,)``, ``slab_covariance`` ``(H, H)``.
    """

    names = ("components", "prior", "noise", "slab_mean", "slab_covariance")

    def __init__(
        self,
        n_components: int,
        h_prime: int = 7,
        gamma: int = 4,
        noise: str = "scalar",
        slab: str = "full",
        learn: Sequence[str] | None = None,
        anneal_prior: bool = True,
    ):
        if noise not in _KINDS or slab not in _KINDS[1:]:
            raise ConfigurationError(
                f"noise is {noise!r} and slab {slab!r}; noise is scalar, diagonal or full, slab diagonal or full"
            )
        super().__init__(n_components, h_prime, gamma, (1.0,), learn, anneal_prior)
        self.noise, self.slab = noise, slab

    @property
    def floats_a_point(self) -> int:
        """Means and covariances of the strengths come on top."""
        return self.n_states * (2 + 2 * self.gamma**2)

    def initial(self, moments: Moments, generator: torch.Generator) -> Parameters:
        """Components around the mean of the data, and slabs of random mean and width for causes of random frequency."""
        components, _ = start_components(moments, self.n_components, generator)

        def uniform() -> Tensor:
            return torch.rand(self.n_components, generator=generator, dtype=torch.float64).to(components.device)

        prior = (0.95 * uniform()).clamp(min=0.05)
        variance = moments.variance + 1e-3
        noise = {"scalar": variance.mean(), "diagonal": variance, "full": torch.diag(variance)}[self.noise]
        mean = torch.zeros_like(prior)
        if "slab_mean" in self.learn:
            mean = torch.randn(self.n_components, generator=generator, dtype=torch.float64).to(components.device)
        width = torch.ones_like(prior)
        if "slab_covariance" in self.learn:
            width = (2 * uniform()).clamp(min=0.05)
        return {
            "components": components,
            "prior": prior,
            "noise": noise,
            "slab_mean": mean,
            "slab_covariance": torch.diag(width),
        }

    def bounded(self, parameters: Parameters) -> Parameters:
        """Also keeps covariances positive definite."""
        found = super().bounded(parameters)
        found["slab_covariance"] = _positive(found["slab_covariance"], _SLAB_FLOOR)
        if self.noise == "full":
            found["noise"] = _positive(found["noise"], NOISE_FLOOR)
        return found

    def activity(self, parameters: Parameters) -> Tensor:
        """Of each cause."""
        return parameters["prior"]

    def prepare(self, parameters: Parameters, temperature: float) -> _Prepared:
        """Components in the metric of the noise."""
        components, prior, noise = (parameters[name] for name in ("components", "prior", "noise"))
        dimensions = components.shape[1]
        if self.noise == "full":
            precision = torch.cholesky_inverse(torch.linalg.cholesky(noise))
            log_determinant, weighted = torch.logdet(noise), components @ precision
        else:
            precision = 1 / noise
            log_determinant = noise.log().sum() * (dimensions if self.noise == "scalar" else 1)
            weighted = components * precision
        beta = 1 / temperature
        of_prior = beta if self.anneal_prior else 1.0
        zero = torch.log1p(-prior)
        return _Prepared(
            weighted=weighted,
            precision=precision,
            gram=weighted @ components.T,
            mean=parameters["slab_mean"],
            covariance=parameters["slab_covariance"],
            log_odds=prior.log() - zero,
            beta=beta,
            of_prior=of_prior,
            constant=-(dimensions * math.log(2 * math.pi) + log_determinant) / 2,
            log_zero=zero.sum(),
        )

    def observe(self, prepared: _Prepared, x: Tensor) -> Block:
        """Candidates by the log-joint of the state in which a cause is on alone."""
        metric = x @ prepared.precision if self.noise == "full" else x * prepared.precision
        block = Block(x, (metric * x).sum(1), x @ prepared.weighted.T, torch.empty(0))
        every = torch.arange(self.n_components, device=x.device)
        nobody = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        alone, fit = self._supports(prepared, block, every.view(1, -1, 1), nobody, slice(1, 1 + self.n_components))
        score = fit + prepared.log_odds
        block.candidates = score.topk(self.h_prime, sorted=False).indices.sort(1).values
        block.extra = [(alone, fit)]
        if self.gamma > 1:
            sets, member = equal_rows(block.candidates)
            begin = 1 + self.n_components
            for size in range(2, self.gamma + 1):
                causes = sets[:, self.table.supports(size).to(sets.device)]
                columns = slice(begin, begin + causes.shape[1])
                block.extra.append(self._supports(prepared, block, causes, member, columns))
                begin = columns.stop
        return block

    def _supports(
        self, prepared: _Prepared, block: Block, causes: Tensor, member: Tensor, columns: slice
    ) -> tuple[_Supports, Tensor]:
        """Posterior of the strengths in states of one size, and what they add to the log-likelihood of none.

        With ``b = Wᵀ Σ⁻¹ y`` and everything restricted to the state: ``Λ = WᵀΣ⁻¹W + Ψ⁻¹``,
        ``κ = μ + Λ⁻¹ (b − WᵀΣ⁻¹W μ) = Λ⁻¹ (b + Ψ⁻¹ μ)``, and the gain is
        ``½ (κᵀ Λ κ − μᵀ Ψ⁻¹ μ − log |Ψ| − log |Λ|)``.
        """
        pairs = (causes[..., :, None], causes[..., None, :])
        slab, of_slab = _inverse(prepared.covariance[pairs])
        covariance, of_posterior = _inverse(prepared.gram[pairs] + slab)
        mean = prepared.mean[causes]
        pull = (slab @ mean[..., None])[..., 0]
        gain = -((pull * mean).sum(-1) + of_slab + of_posterior) / 2
        place = causes[member]
        force = block.projection.gather(1, place.flatten(1)).view(place.shape) + pull[member]
        means = (covariance[member] * force[..., None, :]).sum(-1)
        fit = (means * force).sum(-1) / 2 + gain[member]
        return _Supports(causes, covariance, member, means, columns), fit

    def log_joint(self, prepared: _Prepared, block: Block) -> Tensor:
        """States by their size."""
        found = block.x.new_empty(len(block.x), self.n_states)
        found[:, 0] = 0.0
        for supports, fit in block.extra:
            odds = prepared.log_odds[supports.causes].sum(-1)
            found[:, supports.columns] = prepared.beta * fit + prepared.of_prior * odds[supports.member]
        null = prepared.beta * (prepared.constant - block.square / 2) + prepared.of_prior * prepared.log_zero
        return found.add_(null[:, None])

    def statistics(self, prepared: _Prepared, block: Block, q: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Moments of causes and strengths."""
        h = self.n_components
        on, strength, both, mixed = q.new_zeros(h, h), q.new_zeros(len(q), h), q.new_zeros(h, h), q.new_zeros(h, h)
        for supports, _ in block.extra:
            of_state = q[:, supports.columns]
            weighted = of_state[..., None] * supports.means
            _add_to_points(strength, supports, weighted)
            sets = len(supports.causes)
            mass = _by_set(of_state, supports.member, sets)
            first = _by_set(weighted, supports.member, sets)
            second = _by_set(weighted[..., :, None] * supports.means[..., None, :], supports.member, sets)
            second = second + mass[..., None, None] * supports.covariance
            rows, columns = supports.causes[..., :, None], supports.causes[..., None, :]
            place = (rows * h + columns).flatten()
            for total, value in ((on, mass[..., None, None]), (mixed, first[..., :, None]), (both, second)):
                total.view(-1).index_add_(0, place, value.expand_as(second).flatten())
        data = block.x * weight[:, None]
        square = data.T @ block.x if self.noise == "full" else (data * block.x).sum(0)
        return {"x sz": strength.T @ block.x, "sz sz": both, "s s": on, "sz s": mixed, "x x": square}

    def maximise(self, parameters: Parameters, totals: dict[str, Tensor], temperature: float) -> Parameters:
        """Least squares for the components, what they leave for the noise, moments for prior and slab."""
        points, components, on = totals["points"], parameters["components"], totals["s s"]
        if "components" in self.learn:
            components = solve_components(components, totals["x sz"], totals["sz sz"])
        tiny = torch.finfo(on.dtype).tiny
        used, together = on.diagonal() > tiny, on > tiny
        mean = torch.where(used, totals["sz s"].diagonal() / on.diagonal().clamp(min=tiny), parameters["slab_mean"])
        mean = mean if "slab_mean" in self.learn else parameters["slab_mean"]
        # Σ⟨s_i s_j (z_i − μ_i)(z_j − μ_j)⟩ over the causes that are on together
        crossed = totals["sz s"] * mean
        centred = totals["sz sz"] - crossed - crossed.T + on * torch.outer(mean, mean)
        slab = torch.where(together, centred / on.clamp(min=tiny), parameters["slab_covariance"])
        slab = torch.diag(slab.diagonal()) if self.slab == "diagonal" else slab
        return {
            "components": components,
            "prior": on.diagonal() / points,
            "noise": self._noise(components, totals, points),
            "slab_mean": mean,
            "slab_covariance": slab,
        }

    def _noise(self, components: Tensor, totals: dict[str, Tensor], points: Tensor) -> Tensor:
        """Covariance of what is left, ``⟨(y − W sz)(y − W sz)ᵀ⟩``, or its diagonal, or the mean of that."""
        if self.noise == "full":
            crossed = components.T @ totals["x sz"]
            return (totals["x x"] - crossed - crossed.T + components.T @ totals["sz sz"] @ components) / points
        crossed = (components * totals["x sz"]).sum(0)
        explained = (components * (totals["sz sz"] @ components)).sum(0)
        left = (totals["x x"] - 2 * crossed + explained) / points
        return left.mean() if self.noise == "scalar" else left

    def means(self, prepared: _Prepared, block: Block, q: Tensor) -> Tensor:
        """Posterior means of s ∘ z."""
        strength = q.new_zeros(len(q), self.n_components)
        for supports, _ in block.extra:
            _add_to_points(strength, supports, q[:, supports.columns, None] * supports.means)
        return strength

    def combine(self, codes: Tensor, components: Tensor) -> Tensor:
        """Their sum."""
        return codes @ components

    def draw(self, parameters: Parameters, count: int, generator: torch.Generator) -> Tensor:
        """Causes that are on, times their strengths."""
        drawn = torch.rand(count, self.n_components, generator=generator, dtype=torch.float64)
        z = torch.randn(count, self.n_components, generator=generator, dtype=torch.float64)
        z = parameters["slab_mean"].cpu() + z @ torch.linalg.cholesky(parameters["slab_covariance"].cpu()).T
        return (drawn < parameters["prior"].cpu()) * z


def _by_set(values: Tensor, member: Tensor, sets: int) -> Tensor:
    """Sums over the points of each set of candidates."""
    return values.new_zeros(sets, *values.shape[1:]).index_add_(0, member, values)


def _add_to_points(totals: Tensor, supports: _Supports, values: Tensor) -> None:
    """Add values of states ``(points, states, size)`` to the causes they belong to, ``(points, H)``."""
    causes = supports.causes[supports.member]
    totals.scatter_add_(1, causes.flatten(1), values.flatten(1))


def _inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses and log-determinants of many small positive definite matrices, ``(…, size, size)``.

    Gauss-Jordan elimination in place, in which every operation is one on all matrices; libraries factor small matrices
    one by one.
    """
    size = matrices.shape[-1]
    found = matrices.movedim((-2, -1), (0, 1)).contiguous()
    log_determinant = torch.zeros_like(found[0, 0])
    for k in range(size):
        pivot = found[k, k].clone()
        log_determinant += pivot.log()
        row = found[k] / pivot
        column = found[:, k].clone()
        found -= column[:, None] * row[None]
        found[:, k] = -column / pivot
        found[k] = row
        found[k, k] = 1 / pivot
    return found.movedim((0, 1), (-2, -1)), log_determinant


def _positive(matrix: Tensor, floor: float) -> Tensor:
    """The nearest symmetric matrix without eigenvalues below a floor."""
    matrix = (matrix + matrix.T) / 2
    values, vectors = torch.linalg.eigh(matrix)
    if bool(values[0] >= floor):
        return matrix
    return (vectors * values.clamp(min=floor)) @ vectors.T

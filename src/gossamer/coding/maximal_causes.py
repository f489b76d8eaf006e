"""Causes that hide each other: in every dimension a point shows the strongest of its active components.

In maximal causes analysis (MCA, Lücke and Sahani, 2008) that is the largest value, as of log-spectra or occluding
bright things; in maximal magnitude causes analysis (MMCA, Bornschein et al., 2013) the one of largest magnitude, with
its sign. The maximum is replaced by a power mean ``(Σ s_h W_hd^ρ)^{1/ρ}``, which is smooth while the temperature is
high and close to the maximum in the end.

Points with the same candidates share the images of all states. They are treated as a group: images are formed once,
and distances and sums over points are products of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.coding.latent_models import (
    Block,
    LatentModel,
    Moments,
    Parameters,
    equal_rows,
    start_components,
    truncated_binomial,
)

SMALLEST = 1e-4
"""Magnitude that every element of a component has at least, since powers of zero have no logarithm."""
_INERTIA = 2.5  # expected uses of an element at which a step of MMCA moves it almost all the way
_SLOWEST = 0.2


@dataclass(frozen=True)
class _Prepared:
    components: Tensor
    scale: Tensor  # largest magnitude: powers are taken of elements relative to it
    powers: Tensor  # signed, relative
    rho: float
    precision: Tensor
    beta: float
    log_odds: Tensor  # annealed as the prior is
    constant: Tensor


@dataclass(frozen=True)
class _Group:
    rows: Tensor
    causes: Tensor
    images: Tensor


class MaximalModel(LatentModel):
    """``y_d = the strongest of s_h W_hd`` with binary causes, and noise.

    Parameters
    ----------
    n_components, h_prime, gamma, learn, anneal_prior
        As :class:`LatentModel`.
    signed
        Whether strength is magnitude, with the sign kept (MMCA); otherwise components are positive and the largest
        value shows (MCA).

    Notes
    -----
    Parameters as of :class:`~gossamer.coding.discrete_models.DiscreteModel` with one value. The M-step of the
    components is a fixed point of the derivative and not its exact solution, so that the likelihood need not rise in
    every step.
    """

    def __init__(
        self,
        n_components: int,
        h_prime: int = 8,
        gamma: int = 5,
        signed: bool = False,
        learn: Sequence[str] | None = None,
        anneal_prior: bool = True,
    ):
        super().__init__(n_components, h_prime, gamma, (1.0,), learn, anneal_prior)
        self.signed = signed

    def rho(self, temperature: float) -> float:
        """Exponent of the mean: ``1 / (1 − 1/T)``, up to 21 for MCA and 6 for MMCA."""
        return 1 / (1 - 1 / max(temperature, 1.2 if self.signed else 1.05))

    def initial(self, moments: Moments, generator: torch.Generator) -> Parameters:
        """Components around the mean, noise of the deviation of the data, one active cause to be expected."""
        components, deviation = start_components(moments, self.n_components, generator)
        prior = components.new_full((1,), 1 / max(2, self.n_components))
        return {"components": components, "prior": prior, "noise": deviation.square()}

    def bounded(self, parameters: Parameters) -> Parameters:
        """Also keeps components away from zero."""
        found = super().bounded(parameters)
        components = found["components"]
        if self.signed:
            sign = torch.where(components < 0, -1.0, 1.0).to(components)
            found["components"] = sign * components.abs().clamp(min=SMALLEST)
        else:
            found["components"] = components.clamp(min=SMALLEST)
        return found

    def activity(self, parameters: Parameters) -> Tensor:
        """The same probability for all causes."""
        return parameters["prior"].expand(self.n_components)

    def prepare(self, parameters: Parameters, temperature: float) -> _Prepared:
        """Powers of the components, and the prior."""
        components, prior, noise = (parameters[name] for name in ("components", "prior", "noise"))
        rho, beta, scale = self.rho(temperature), 1 / temperature, components.abs().max()
        of_prior = beta if self.anneal_prior else 1.0
        zero = torch.log1p(-prior.sum())
        constant = of_prior * self.n_components * zero - beta / 2 * components.shape[1] * torch.log(2 * math.pi * noise)
        powers = components.sign() * (components.abs() / scale).pow(rho)
        log_odds = of_prior * (prior.sum().log() - zero)
        return _Prepared(components, scale, powers, rho, 1 / noise, beta, log_odds, constant)

    def observe(self, prepared: _Prepared, x: Tensor) -> Block:
        """Candidates that stick out least from the point, or for MMCA that are nearest to it."""
        components = prepared.components
        square, projection = x.square().sum(1), x @ components.T
        if self.signed:
            distance = components.square().sum(1) - 2 * projection
        else:
            distance = torch.stack([(component - x).clamp_(min=0).sum(1) for component in components], 1)
        candidates = distance.topk(self.h_prime, largest=False, sorted=False).indices.sort(1).values
        block = Block(x, square, projection, candidates)
        block.extra = list(self._groups(prepared, candidates)) if len(self.table.states) else []
        return block

    def _groups(self, prepared: _Prepared, candidates: Tensor) -> Iterator[_Group]:
        """Points with the same candidates, and the images of all their states."""
        sets, member = equal_rows(candidates)
        order, sizes = member.argsort(stable=True), torch.bincount(member)
        states = self.table.states.to(prepared.components)
        for causes, rows in zip(sets, order.split(sizes.tolist()), strict=True):
            total = states @ prepared.powers[causes]
            images = total.sign() * total.abs().pow(1 / prepared.rho) * prepared.scale
            yield _Group(rows, causes, images)

    def log_joint(self, prepared: _Prepared, block: Block) -> Tensor:
        """Distances to the images of all states."""
        strength = prepared.precision * prepared.beta
        found = block.x.new_empty(len(block.x), self.n_states)
        base = prepared.constant - strength / 2 * block.square
        _, alone, together = self.split(found)
        found[:, 0] = base
        fit = block.projection - prepared.components.square().sum(1) / 2
        alone[:, 0] = base[:, None] + strength * fit + prepared.log_odds
        log_prior = prepared.log_odds * self.table.states.sum(1).to(found)
        for group in block.extra:
            fit = block.x[group.rows] @ group.images.T - group.images.square().sum(1) / 2
            together[group.rows] = base[group.rows, None] + strength * fit + log_prior
        return found

    def statistics(self, prepared: _Prepared, block: Block, q: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """For each element how much of it shows, with the data and without; distances; active causes."""
        _, alone, together = self.split(q)
        alone = alone[:, 0]
        shown = alone.sum(0)[:, None].expand_as(prepared.components).clone()
        with_data = alone.T @ block.x
        lengths = prepared.components.square().sum(1)
        left = (block.square * weight).sum() - 2 * (alone * block.projection).sum() + alone.sum(0) @ lengths
        active = alone.sum() + together.sum(0) @ self.table.states.sum(1).to(q)
        for group in block.extra:
            q_group = together[group.rows]
            mass, data = q_group.sum(0), q_group.T @ block.x[group.rows]
            left = left - 2 * (data * group.images).sum() + mass @ group.images.square().sum(1)
            of_mass, of_data = self._shown(prepared, group, mass, data)
            shown[group.causes] += of_mass
            with_data[group.causes] += of_data
        return {"shown": shown, "x shown": with_data, "left": left, "counts": active}

    def _shown(self, prepared: _Prepared, group: _Group, mass: Tensor, data: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over states with ``A_shd``, how much of an element shows: of their mass, and of the data in them.

        A is the derivative of the mean, ``s_h (W_hd / ȳ_sd)^{ρ − 1}``; with signs it is at most one. Without, it is a
        product of powers, and the sums are products of matrices.
        """
        states = self.table.states.to(prepared.components)
        elements = prepared.components[group.causes].abs() / prepared.scale
        images = (group.images.abs() / prepared.scale).clamp(min=torch.finfo(elements.dtype).tiny)
        if self.signed:
            share = (elements / images[:, None]).clamp(max=1.0).pow(prepared.rho - 1).mul_(states[:, :, None])
            return torch.einsum("s,shd->hd", mass, share), torch.einsum("sd,shd->hd", data, share)
        inverse, powers = images.pow(1 - prepared.rho), elements.pow(prepared.rho - 1)
        return powers * ((states * mass[:, None]).T @ inverse), powers * (states.T @ (data * inverse))

    def maximise(self, parameters: Parameters, totals: dict[str, Tensor], temperature: float) -> Parameters:
        """Mean of the data where an element shows."""
        components, points, shown = parameters["components"], totals["points"], totals["shown"]
        if self.signed:
            fresh = totals["x shown"] / shown.clamp(min=SMALLEST)
            step = (1 - torch.exp(-shown / _INERTIA)).clamp(min=_SLOWEST)
            fresh = step * fresh + (1 - step) * components
        else:
            used = shown > torch.finfo(shown.dtype).tiny
            fresh = torch.where(used, totals["x shown"] / torch.where(used, shown, 1.0), components)
        p = float(parameters["prior"])
        mass, mean = truncated_binomial(p, self.n_components, self.gamma)
        prior = (mass / mean * p * totals["counts"] / points).reshape(1)
        return {"components": fresh, "prior": prior, "noise": totals["left"] / (points * components.shape[1])}

    def means(self, prepared: _Prepared, block: Block, q: Tensor) -> Tensor:
        """Posterior probabilities of the causes."""
        return self.marginals(block, q)

    def combine(self, codes: Tensor, components: Tensor) -> Tensor:
        """In every dimension the strongest ``s_h W_hd``; zero without a cause."""
        shown = codes.new_zeros(len(codes), components.shape[1])
        for code, component in zip(codes.T, components, strict=True):
            one = code[:, None] * component
            shown = torch.where(one.abs() > shown.abs(), one, shown) if self.signed else torch.maximum(shown, one)
        return shown

    def draw(self, parameters: Parameters, count: int, generator: torch.Generator) -> Tensor:
        """Independent causes."""
        drawn = torch.rand(count, self.n_components, generator=generator, dtype=torch.float64)
        return (drawn < parameters["prior"].cpu()).to(torch.float64)

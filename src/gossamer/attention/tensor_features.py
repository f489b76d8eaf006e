"""Attention over tuples of tokens in nearly linear time: weights as sums of products of features of single tokens.

If the weight of a pair is ``Σ_m φ(q)_m ψ(a)_m ψ(b)_m``, sums over all pairs are products of sums over tokens, feature
by feature: ``(Ψ₁ ⊘ Ψ₂)ᵀ (V₁ ⊘ V₂) = (Ψ₁ᵀ V₁) ∘ (Ψ₂ᵀ V₂)``. Monomials make the weights those of a polynomial of the
score, to any precision; random products make them right on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gossamer.attention.tensor_polynomial import (
    Basis,
    feature_count,
    monomial_features,
    monomial_weights,
    relative_error,
    required_degree,
    truncated_exp,
)
from gossamer.errors import ConfigurationError

_AT_ONCE = 1 << 21  # numbers held for a chunk of tokens


@dataclass(frozen=True, eq=False)
class PolynomialPlan:
    """The polynomial that will stand in for exp, and what is known of it beforehand.

    Attributes
    ----------
    bound
        No score is larger in size.
    degree, features
        g, and r, the number of monomials.
    error
        Largest relative error of a weight.
    coefficients
        ``p_0 … p_g``.
    """

    bound: float
    degree: int
    features: int
    error: float
    coefficients: np.ndarray

    def output_error(self, values: Sequence[Tensor]) -> float:
        """No entry of the output is further than this from the exact one: ``2ε / (1 − ε) · Π max|V|``.

        Alman & Song, 2024, arXiv 2310.04064, with the constant that relative errors of numerator and denominator give.
        Infinite where weights are not sure to be positive.
        """
        if self.error >= 1:
            return math.inf
        return 2 * self.error / (1 - self.error) * math.prod(float(value.abs().max()) for value in values)


def score_bound(q: Tensor, keys: Sequence[Tensor], scale: float) -> float:
    """A number that no ``|score|`` exceeds: ``scale · Σ_c Π max|x_c|``, at most ``B^k`` for entries up to B at 1/d."""
    product = torch.ones_like(q[..., 0, :], dtype=torch.float64)
    for table in (q, *keys):
        product = product * table.detach().double().abs().amax(-2)
    return abs(scale) * float(product.sum(-1).max())


def plan_polynomial(
    q: Tensor,
    keys: Sequence[Tensor],
    scale: float,
    degree: int | Literal["auto"] = "auto",
    eps: float = 1e-2,
    basis: Basis = "chebyshev",
) -> PolynomialPlan:
    """Choose a polynomial for these queries and keys; see :func:`~.kronecker_attention.tensor_attention`."""
    bound = score_bound(q, keys, scale)
    if not math.isfinite(bound):
        raise ConfigurationError("queries or keys hold NaN or infinity, so that no polynomial fits their scores")
    wanted = required_degree(bound, eps, basis) if degree == "auto" else degree
    if wanted < 0:
        raise ConfigurationError(f"degree is {degree}; it must be at least 0, or 'auto'")
    coefficients = truncated_exp(bound, wanted, basis)
    features = feature_count(q.shape[-1], wanted)
    return PolynomialPlan(bound, wanted, features, relative_error(coefficients, bound), coefficients)


def polynomial_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float,
    causal: bool,
    key_mask: Tensor | None,
    plan: PolynomialPlan,
    memory_limit: int,
) -> Tensor:
    """Attention with the weights of a polynomial: time ``n r e``, in double precision since its terms cancel.

    Raises
    ------
    ConfigurationError
        If the features would take more than `memory_limit` bytes, or a denominator is not positive.
    """
    width = q.shape[-1]
    lots = max(q.shape[:-2].numel(), 1)
    needed = 8 * lots * plan.features * (len(keys) + 1) * (values[0].shape[-1] + 2)
    if needed > memory_limit:
        raise ConfigurationError(
            f"width {width} and degree {plan.degree} (for scores up to {plan.bound:.3g}) make {plan.features} "
            f"features, which take {needed / 2**20:,.0f} MiB, above the limit of {memory_limit / 2**20:,.0f}; "
            f"make entries or width smaller, allow a larger eps, or use method='exact'"
        )
    weights = torch.from_numpy(monomial_weights(plan.coefficients, width, scale)).to(q.device)

    def features(x: Tensor) -> Tensor:
        return monomial_features(x.double(), plan.degree)

    widened = [_with_ones(value) for value in values]
    run = _causal_sums if causal else _sums
    sums = run(q, keys, widened, key_mask, features, weights)
    return _divided(sums, q, causal, key_mask, plan)


def _with_ones(value: Tensor) -> Tensor:
    """A column of ones behind the values: what it sums to is the denominator."""
    return torch.nn.functional.pad(value.double(), (0, 1), value=1.0)


def _sums(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_mask: Tensor | None,
    features: Callable[[Tensor], Tensor],
    weights: Tensor,
) -> Tensor:
    """Numerators and denominators ``(…, m, e + 1)``, all tuples."""
    count = len(weights)
    mixed = weights.unsqueeze(-1)
    for key, value in zip(keys, values, strict=True):
        state = value.new_zeros(())
        for part in _pieces(key.shape[-2], key[..., 0, 0].numel() * count):
            rows = features(key[..., part, :])
            if key_mask is not None:
                rows = rows * key_mask[:, None, part, None]
            state = state + rows.transpose(-1, -2) @ value[..., part, :]
        mixed = mixed * state
    parts = [features(q[..., part, :]) @ mixed for part in _pieces(q.shape[-2], q[..., 0, 0].numel() * count)]
    return torch.cat(parts, -2)


def _causal_sums(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_mask: Tensor | None,
    features: Callable[[Tensor], Tensor],
    weights: Tensor,
) -> Tensor:
    """The same for tuples of which no member is later than the query: prefix sums of each factor multiply."""
    size = q[..., 0, 0].numel() * len(weights) * values[0].shape[-1] * len(keys)
    states, found = [values[0].new_zeros(())] * len(keys), []
    for part in _pieces(q.shape[-2], size):
        mixed = weights.unsqueeze(-1)
        for place, (key, value) in enumerate(zip(keys, values, strict=True)):
            rows = features(key[..., part, :])
            if key_mask is not None:
                rows = rows * key_mask[:, None, part, None]
            prefix = (rows.unsqueeze(-1) * value[..., part, :].unsqueeze(-2)).cumsum(-3) + states[place]
            states[place] = prefix[..., -1:, :, :]
            mixed = mixed * prefix
        found.append((features(q[..., part, :]).unsqueeze(-2) @ mixed).squeeze(-2))
    return torch.cat(found, -2)


def _pieces(length: int, size: int) -> list[slice]:
    step = max(1, _AT_ONCE // max(1, size))
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def _divided(sums: Tensor, q: Tensor, causal: bool, key_mask: Tensor | None, plan: PolynomialPlan) -> Tensor:
    above, below = sums[..., :-1], sums[..., -1:]
    seen = torch.ones_like(below, dtype=torch.bool)
    if key_mask is not None:
        any_key = key_mask.cummax(-1).values if causal else key_mask.any(-1, keepdim=True).expand(-1, q.shape[-2])
        seen = any_key[:, None, :, None].expand_as(below)
    wrong = int((seen & ~(below > 0)).sum())
    if wrong:
        raise ConfigurationError(
            f"the denominator of {wrong} queries is not positive: a polynomial of degree {plan.degree} has a relative "
            f"error of {plan.error:.3g} for scores up to {plan.bound:.3g}; take a higher degree or degree='auto'"
        )
    return torch.where(seen, above / below.masked_fill(~seen, 1.0), torch.zeros_like(above)).to(q.dtype)


def random_feature_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    features: int,
    scale: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attention with an unbiased random estimate of its weights, from as many features as one pays for.

    Random Maclaurin features [Kar & Karnick, 2012, arXiv 1201.6530], for products of k vectors: a power t is drawn
    with probability ``2^{−t−1}``, and t random vectors of k-th roots of unity, for which ``E Π_x ⟨ω, x⟩ = Σ_c Π_x x_c``
    over the k vectors. Estimates of denominators are raised to what a denominator is at least, ``n^{k−1} e^{−bound}``.

    Parameters
    ----------
    q, keys, values, scale
        See :func:`~.kronecker_attention.tensor_attention`.
    features
        r.
    generator
        Of powers and roots, which are drawn on its device; by default torch's own on the CPU.
    """
    if features < 1:
        raise ConfigurationError(f"features is {features}; it must be at least 1")
    width, order = q.shape[-1], len(keys) + 1
    scale = 1 / width if scale is None else scale
    drawn_on = None if generator is None else generator.device
    uniform = torch.rand(features, generator=generator, dtype=torch.float64, device=drawn_on).clamp_min(2.0**-40)
    powers = (-torch.log2(uniform)).floor().long().to(q.device)
    shape = (int(powers.max()), width, features)
    roots = torch.randint(order, shape, generator=generator, device=drawn_on).to(q.device)
    angles = 2 * math.pi * roots.double() / order
    turned = torch.polar(torch.ones_like(angles), angles)
    shares = [scale**t / math.factorial(t) * 2.0 ** (t + 1) for t in powers.tolist()]
    factor = torch.tensor(shares, dtype=torch.float64, device=q.device)

    def drawn(x: Tensor) -> Tensor:
        found = torch.ones(*x.shape[:-1], features, dtype=torch.complex128, device=x.device)
        for t, vectors in enumerate(turned):
            found = torch.where(powers > t, found * (x.to(torch.complex128) @ vectors), found)
        return found

    mixed = torch.ones((), dtype=torch.complex128, device=q.device)
    for key, value in zip(keys, values, strict=True):
        mixed = mixed * (drawn(key).transpose(-1, -2) @ _with_ones(value).to(torch.complex128))
    sums = ((drawn(q) * factor) @ mixed).real
    least = keys[0].shape[-2] ** len(keys) * math.exp(-score_bound(q, keys, scale)) * features
    return (sums[..., :-1] / sums[..., -1:].clamp_min(least)).to(q.dtype)

"""How many zeros, and where: from one sparsity for the model to one for each layer.

An allocation is a pure function from what is known about the layers to ``{name: sparsity}``; the weighted mean of the
result is the requested sparsity. Where a layer would get more than all or less than none of its weights, it is
clamped and the others make up for it. :func:`exact_counts` turns fractions into integers with an exact total.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from gossamer.core.selection import Sparsity, dropped_count, keep_highest_jointly
from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError, check_sparsity

Shapes = Mapping[str, tuple[int, ...]]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same sparsity for every layer."""
    check_sparsity(sparsity)
    return dict.fromkeys(shapes, sparsity)


def erdos_renyi(shapes: Shapes, sparsity: float, *, kernel: bool = False, power: float = 1.0) -> dict[str, float]:
    """Density in proportion to (out + in) / (out · in) [Mocanu et al., 2018; Evci et al., 2020, arXiv 1911.11134].

    Parameters
    ----------
    shapes
        Name → shape of the weight, ``(out, in, kernel…)``.
    sparsity
        Of all the layers together.
    kernel
        Whether kernel sizes count in both sums (ERK).
    power
        Of that ratio: 1 in the papers, 0 the same density everywhere.
    """

    def raw_density(shape: tuple[int, ...]) -> float:
        dimensions = shape if kernel else shape[:2]
        return (sum(dimensions) / math.prod(dimensions)) ** power

    return proportional({name: raw_density(shape) for name, shape in shapes.items()}, shapes, sparsity)


def proportional(raw_density: Mapping[str, float], shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Densities in proportion to given numbers, scaled to a total; layers that would exceed 1 stay dense.

    Raises
    ------
    ConfigurationError
        If a number is negative, not finite, or all are zero.
    """
    check_sparsity(sparsity)
    for name, value in raw_density.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigurationError(f"the weight of {name} in the allocation is {value}; it must be finite and ≥ 0")
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    budget = (1 - sparsity) * sum(sizes.values())
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        mass = sum(raw_density[name] * sizes[name] for name in free)
        if free and mass <= 0:
            raise ConfigurationError("an allocation needs at least one layer with a weight above zero")
        scale = (budget - sum(sizes[name] for name in dense)) / mass if free else 0.0
        full = {name for name in free if raw_density[name] * scale > 1}
        if not full:
            return {name: 0.0 if name in dense else 1 - raw_density[name] * scale for name in shapes}
        dense |= full


def around(
    fixed: Mapping[str, float], shapes: Shapes, sparsity: float, rule: Callable[[Shapes, float], dict[str, float]]
) -> dict[str, float]:
    """Give some layers a sparsity of their own, and spread what is left of the budget over the others by a rule.

    Parameters
    ----------
    fixed
        Name → sparsity in [0, 1).
    shapes
        Name → shape of the weight.
    sparsity
        Of all the layers together.
    rule
        From shapes and a sparsity to an allocation, such as :func:`uniform`.

    Raises
    ------
    SparsityError
        If the layers of their own take more than the budget, or less than the others can make up for.
    """
    check_sparsity(sparsity)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    others = {name: shape for name, shape in shapes.items() if name not in fixed}
    room = sum(sizes[name] for name in others)
    zeros = sparsity * sum(sizes.values()) - sum(sizes[name] * fixed[name] for name in fixed)
    if not 0 <= zeros < max(room, 1):
        raise SparsityError(
            f"sparsity {sparsity:g} leaves {zeros:.0f} of {room} weights of the other layers to remove once "
            f"{', '.join(fixed)} have theirs; ask for another sparsity, or exclude those layers"
        )
    spread = rule(others, zeros / room) if room else {}
    return {name: fixed[name] if name in fixed else spread[name] for name in shapes}


def uniform_plus(shapes: Shapes, sparsity: float, *, last_density: float = 0.2) -> dict[str, float]:
    """The same sparsity for all but the first layer, which stays dense, and the last, which keeps at least a fifth.

    Gale et al., 2019, arXiv 1902.09574; the first and the last are those of `shapes`.
    """
    first, last = next(iter(shapes)), list(shapes)[-1]
    fixed = {first: 0.0}
    if 1 - sparsity < last_density and last != first:
        fixed[last] = 1 - last_density
    return around(fixed, shapes, sparsity, uniform)


def erdos_renyi_kernel_plus(shapes: Shapes, sparsity: float, *, last_density: float = 1.0) -> dict[str, float]:
    """ERK for all but the last layer, which has a density of its own [Liu et al., 2022, arXiv 2202.02643]."""
    return around({list(shapes)[-1]: 1 - last_density}, shapes, sparsity, ALLOCATIONS["erdos-renyi-kernel"])


def shares_of_highest(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """How many zeros each layer would have if the highest scores of the whole model were kept.

    With the scores of SNIP or GraSP this is all that Liu et al., 2022, arXiv 2202.02643, keep of those methods.
    """
    total = sum(values.numel() for values in scores.values())
    kept = keep_highest_jointly(scores, dropped_count(total, sparsity))
    return {name: 1 - float(mask.double().mean()) for name, mask in kept.items()}


def outlier_weighted(
    outlier_ratios: Mapping[str, float], shapes: Shapes, sparsity: float, *, span: float = 0.08
) -> dict[str, float]:
    """Fewer zeros where more scores are outliers: OWL [Yin et al., 2024, arXiv 2310.05175].

    Parameters
    ----------
    outlier_ratios
        Name → share of scores above M times the layer's mean (:func:`outlier_ratio`).
    shapes
        Name → shape of the weight.
    sparsity
        Of all the layers together.
    span
        λ: how far a layer may lie from the mean, in sparsity.
    """
    check_sparsity(sparsity)
    if span < 0:
        raise ConfigurationError(f"span is {span}; it must be ≥ 0, such as 0.08")
    lowest, highest = min(outlier_ratios.values()), max(outlier_ratios.values())
    width = (highest - lowest) or 1.0
    density = {name: 2 * span * (ratio - lowest) / width for name, ratio in outlier_ratios.items()}
    return shifted({name: -value for name, value in density.items()}, shapes, sparsity)


def outlier_ratio(scores: Tensor, multiple: float = 5.0) -> float:
    """Share of scores above `multiple` times their mean (OWL's M, 5 to 7)."""
    return float((scores > multiple * scores.mean()).float().mean())


def sensitivity_weighted(
    sensitivities: Mapping[str, float], shapes: Shapes, sparsity: float, *, span: float = 0.1
) -> dict[str, float]:
    """Fewer zeros where pruning hurts more; sensitivities enter by their rank, within ± `span` of the mean.

    Parameters
    ----------
    sensitivities
        Name → any measure of damage (such as the layer's relative error when pruned alone).
    shapes
        Name → shape of the weight.
    sparsity
        Of all the layers together.
    span
        Largest distance from the mean, in sparsity.
    """
    check_sparsity(sparsity)
    order = sorted(sensitivities, key=lambda name: (sensitivities[name], name))
    steps = max(1, len(order) - 1)
    return shifted({name: span * (1 - 2 * rank / steps) for rank, name in enumerate(order)}, shapes, sparsity)


def shifted(offsets: Mapping[str, float], shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Sparsities ``offset + c`` clamped to [0, 1), with the constant that gives the requested total.

    Raises
    ------
    SparsityError
        If no constant does (never for a sparsity in [0, 1)).
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = sparsity * sum(sizes.values())
    low, high = -1 - max(offsets.values()), 1 - min(offsets.values())
    ceiling = math.nextafter(1.0, 0.0)

    def clamped(constant: float) -> dict[str, float]:
        return {name: min(max(offsets[name] + constant, 0.0), ceiling) for name in shapes}

    for _ in range(200):
        middle = (low + high) / 2
        reached = sum(sizes[name] * value for name, value in clamped(middle).items())
        low, high = (middle, high) if reached < wanted else (low, middle)
    result = clamped(high)
    if abs(sum(sizes[n] * v for n, v in result.items()) - wanted) > 1e-6 * sum(sizes.values()) + 1e-9:
        raise SparsityError(f"no allocation with these offsets reaches sparsity {sparsity}")
    return result


STEEPNESS = 128 * 1024 / 1e4
"""CFSP sums the angle over 128 × 1024 tokens and divides by 1e4: this is its factor on the mean angle of a token."""


def logistic_shares(importance: Mapping[str, float], *, steepness: float = STEEPNESS) -> dict[str, float]:
    """``σ(steepness · (I − mean I))`` of each importance, divided by its mean: shares of a budget, 1 on average.

    Parameters
    ----------
    importance
        Name → importance, in any unit; must be finite.
    steepness
        Factor on the centred importance, in units of the importance itself.

    Raises
    ------
    ConfigurationError
        If there is nothing to share between, or an importance is not finite.
    """
    for name, value in importance.items():
        if not math.isfinite(value):
            raise ConfigurationError(f"the importance of {name} is {value}; it must be finite")
    if not importance:
        raise ConfigurationError("shares of a budget need at least one name with its importance")
    mean = sum(importance.values()) / len(importance)
    # tanh saturates where exp overflows, which importances without an upper limit (squared errors) do reach
    raw = {n: (1 + math.tanh(steepness * (value - mean) / 2)) / 2 for n, value in importance.items()}
    centre = sum(raw.values()) / len(raw)
    return {name: value / centre for name, value in raw.items()}


def sigmoid(importance: Mapping[str, float], sparsity: float, *, steepness: float = STEEPNESS) -> dict[str, float]:
    """Density in proportion to the logistic function of centred importance [CFSP, Wang et al., 2024, arXiv 2409.13199].

    Parameters
    ----------
    importance
        Block → importance, such as the mean angular distance between its input and output.
    sparsity
        Mean over the blocks (which are taken as equally large).
    steepness
        Factor on the centred importance, in units of the importance itself.

    Returns
    -------
    dict of str to float
        Block → sparsity. Where a block would keep all it has or more, all are pulled towards the mean, so far that
        the highest stays 1/1.05 of the way from the mean to dense.
    """
    check_sparsity(sparsity)
    density = 1 - sparsity
    shares = logistic_shares(importance, steepness=steepness)
    highest = max(shares.values())
    if density * highest >= 1 and highest > 1:
        shrink = (1 / density - 1) / (highest - 1) / 1.05
        shares = {name: 1 + (share - 1) * shrink for name, share in shares.items()}
    return {name: max(0.0, 1 - density * share) for name, share in shares.items()}


def exact_counts(sparsities: Mapping[str, Sparsity], shapes: Shapes, sparsity: Sparsity) -> dict[str, Fraction]:
    """Round an allocation to whole weights with exactly ⌊sparsity · total⌋ zeros (largest remainders first).

    Returns
    -------
    dict of str to Fraction
        Name → zeros / size, which patterns take as an exact count.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    wanted = dropped_count(sum(sizes.values()), sparsity)
    ideal = {name: float(sparsities[name]) * sizes[name] for name in shapes}
    counts = {name: min(int(value), sizes[name]) for name, value in ideal.items()}
    order = sorted(shapes, key=lambda name: counts[name] - ideal[name])
    missing = wanted - sum(counts.values())
    while missing:
        step = 1 if missing > 0 else -1
        for name in order if step > 0 else reversed(order):
            if missing and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return {name: Fraction(counts[name], sizes[name]) for name in shapes}


ALLOCATIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {
    "uniform": uniform,
    "erdos-renyi": erdos_renyi,
    "erdos-renyi-kernel": lambda shapes, sparsity: erdos_renyi(shapes, sparsity, kernel=True),
    "uniform-plus": uniform_plus,
    "erdos-renyi-kernel-plus": erdos_renyi_kernel_plus,
}
"""Allocations that need to know nothing but shapes."""


def allocate(allocation: str | Mapping[str, float], shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Sparsities of the layers by the name of an allocation, or as given for each layer.

    Raises
    ------
    UnknownNameError
        If there is no such allocation, or a given one misses a layer.
    """
    if isinstance(allocation, Mapping):
        for name in shapes:
            if name not in allocation:
                raise UnknownNameError("layer of the allocation", name, allocation)
            check_sparsity(allocation[name], f"sparsity of {name}")
        return {name: allocation[name] for name in shapes}
    if allocation not in ALLOCATIONS:
        raise UnknownNameError("allocation", allocation, [*ALLOCATIONS, "outliers"])
    return ALLOCATIONS[allocation](shapes, sparsity)


def total_sparsity(sparsities: Mapping[str, Sparsity], shapes: Shapes) -> float:
    """Weighted mean of an allocation: what it makes of the whole."""
    sizes = torch.tensor([math.prod(shapes[name]) for name in shapes], dtype=torch.float64)
    values = torch.tensor([float(sparsities[name]) for name in shapes], dtype=torch.float64)
    return float((sizes * values).sum() / sizes.sum())

"""Masks in one shot: a score, a scope in which the scores compete, and a sparsity. Nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.allocation import allocate, exact_counts
from gossamer.core.masking import LazyScores, parameter_masks
from gossamer.core.masks import MaskSet
from gossamer.core.patterns import Pattern, Unstructured
from gossamer.core.selection import Sparsity, keep_highest
from gossamer.core.targets import Target, find_targets
from gossamer.errors import ConfigurationError, ModelError, SparsityError, UnknownNameError
from gossamer.pruning.magnitude import hash_seed

Score = str | Callable[[Target], Tensor]
"""``"magnitude"``, ``"random"``, or a function of a target that returns scores of its shape, higher = kept."""

_SCOPES = {"global": "model", "layer": "layer", "row": "row"}
_ALLOCATED = ("erdos-renyi", "erdos-renyi-kernel")


def one_shot_masks(
    model: nn.Module,
    sparsity: Sparsity | None,
    *,
    score: Score = "magnitude",
    scope: str = "global",
    pattern: Pattern | str | None = None,
    min_density: float = 0.0,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    heads: bool = False,
) -> MaskSet:
    """Choose the weights to remove from a model, and leave it as it is.

    Parameters
    ----------
    model
        Any module.
    sparsity
        Fraction of zeros in [0, 1), of all targets together; None where an N:M pattern fixes it.
    score
        ``"magnitude"``, ``"random"``, or a function of a :class:`~gossamer.core.targets.Target`.
    scope
        What competes: ``"global"`` (all weights), ``"layer"``, ``"row"``, or layers whose shares follow from their
        shapes, ``"erdos-renyi"`` and ``"erdos-renyi-kernel"``.
    pattern
        Shape of the zeros, as object or text; takes the place of the scope.
    min_density
        Share of its weights that every layer keeps (rounded down) under global competition, in [0, 1 − sparsity].
    seed
        Of random scores.
    include, exclude, heads
        Which layers; see :func:`gossamer.core.targets.find_targets`.

    Raises
    ------
    UnknownNameError
        If there is no such score, scope or pattern.
    SparsityError, PatternError, NonFiniteError, TargetError, ConfigurationError
        If a value is out of range, a layer does not fit, or holds NaN.
    ModelError
        If a weight is on the meta device.
    """
    targets = find_targets(model, include, exclude, heads=heads)
    for target in targets:
        if target.parameter.is_meta:
            raise ModelError(f"{target.name} is on the meta device; load its weights before choosing among them")
        target.check_finite()
    function = _score_function(score, seed)
    if pattern is None and scope in _ALLOCATED:
        if min_density:
            raise ConfigurationError(f"min_density {min_density} needs the scope 'global', not {scope!r}")
        return parameter_masks(targets, _allocated(LazyScores(targets, function), scope, sparsity))
    chosen = Pattern.parse(pattern) if pattern is not None else _unstructured(scope)
    if min_density:
        check_floor(chosen, min_density, float(chosen.resolve(sparsity)))
        values = LazyScores(targets, lambda target: protect(function(target), min_density))
    else:
        values = LazyScores(targets, function)
    return parameter_masks(targets, chosen.select_jointly(values, sparsity))


def protect(values: Tensor, min_density: float) -> Tensor:
    """Raise the highest ⌊min_density · n⌋ scores to infinity, so that no competition removes them."""
    protected = int(Fraction(repr(float(min_density))) * values.numel())
    kept = keep_highest(values.reshape(1, -1), values.numel() - protected).view(values.shape)
    return values.masked_fill(kept, torch.inf)


def check_floor(pattern: Pattern, min_density: float, sparsity: float) -> None:
    """Check that a floor under every layer's density makes sense and leaves room for the sparsity.

    Raises
    ------
    ConfigurationError
        If the layers do not compete with each other.
    SparsityError
        If it lies outside [0, 1 − sparsity].
    """
    if not isinstance(pattern, Unstructured) or pattern.scope != "model":
        raise ConfigurationError(
            f"min_density {min_density} needs the pattern 'unstructured:model', in which layers compete, not {pattern}"
        )
    if not 0 <= min_density <= 1 - sparsity + 1e-12:
        raise SparsityError(
            f"min_density is {min_density}; at sparsity {sparsity:g} it must lie in [0, {1 - sparsity:g}]"
        )


def _score_function(score: Score, seed: int) -> Callable[[Target], Tensor]:
    if callable(score):
        return lambda target: _checked(score(target), target)
    if score == "magnitude":
        return lambda target: scores.magnitude(target.matrix())
    if score == "random":
        return lambda target: scores.random(
            target.matrix(), torch.Generator().manual_seed(hash_seed(seed, target.name))
        )
    raise UnknownNameError("score", score, ["magnitude", "random"])


def _checked(values: Tensor, target: Target) -> Tensor:
    shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if shape != tuple(target.shape):
        raise ConfigurationError(
            f"the score of {target.name} is {shape}; it must be a tensor of the weight's shape {tuple(target.shape)}"
        )
    return values


def _unstructured(scope: str) -> Unstructured:
    if scope not in _SCOPES:
        raise UnknownNameError("scope", scope, [*_SCOPES, *_ALLOCATED])
    return Unstructured(_SCOPES[scope])  # type: ignore[arg-type]


def _allocated(values: LazyScores, allocation: str, sparsity: Sparsity | None) -> dict[str, Tensor]:
    if sparsity is None:
        raise SparsityError(f"the scope {allocation!r} leaves the sparsity open: give one in [0, 1)")
    shapes = {name: tuple(target.shape) for name, target in values.targets.items()}
    shares = allocate(allocation, shapes, float(sparsity))
    counts: Mapping[str, Fraction] = exact_counts(shares, shapes, sparsity)
    layer = Unstructured("layer")
    # a layer may lose all of its weights, which no pattern's sparsity below 1 can say
    return {
        name: layer.select(values[name], share, name) if share < 1 else torch.zeros(shapes[name], dtype=torch.bool)
        for name, share in counts.items()
    }

"""Linear mode connectivity: is there a ridge between two solutions, how high is it, and in which layer?

On the straight line ``θ(α) = (1 − α) θ_A + α θ_B`` the barrier ``B(α)`` is how far the loss rises above the chord
between both ends. Frankle et al., 2020, arXiv 1912.05671; Singh et al., 2024, "Landscaping Linear Mode Connectivity",
arXiv 2406.16300; layer by layer: Adilova et al., 2024, arXiv 2307.06966.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.rank_correlation import rank_correlation as rank_correlation
from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.measure.loss_surface import Loss, LossSurface, Point, between, difference

_GOLDEN = (5**0.5 - 1) / 2


def error_rate(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of wrong answers: a loss for barriers, with no slope of use."""
    return (outputs.argmax(-1) != targets).to(outputs.dtype).mean()


def linear_path(a: nn.Module | Point, b: nn.Module | Point) -> Callable[[float], dict[str, Tensor]]:
    """The straight line between two models: a share α → parameters ``(1 − α) θ_A + α θ_B``.

    Parameters
    ----------
    a, b
        Modules, or parameters by name.

    Raises
    ------
    ConfigurationError
        If the parameters differ in name or shape.
    """
    first, second = _parameters(a), _parameters(b)
    wrong = sorted(n for n in first.keys() | second.keys() if _shape(first, n) != _shape(second, n))
    if wrong:
        name = wrong[0]
        raise ConfigurationError(
            f"no line joins models of different shapes: {name!r} is {_shape(first, name)} and {_shape(second, name)}"
        )
    return lambda share: between(first, second, share)


@dataclass(frozen=True)
class BarrierResult:
    """The loss along a line.

    Attributes
    ----------
    alphas, losses
        Where it was measured, increasing from 0 to 1, and the loss there.
    barriers
        B(α): the loss above the chord between its ends.
    height
        ``max(0, max B)``.
    argmax
        α of the largest barrier.
    lowest
        The smallest barrier, at most 0: how deep the line sags where the valley is convex.
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]
    barriers: tuple[float, ...]
    height: float
    argmax: float
    lowest: float

    def at(self, alpha: float) -> float:
        """B(α) where it was measured.

        Raises
        ------
        ConfigurationError
            If it was not.
        """
        for found, barrier_there in zip(self.alphas, self.barriers):
            if abs(found - alpha) < 1e-12:
                return barrier_there
        raise ConfigurationError(f"the barrier was not measured at {alpha}; an odd n of points includes 0.5")


def barrier(
    model: nn.Module,
    a: nn.Module | Point,
    b: nn.Module | Point,
    loss: Loss,
    batches: Sequence[tuple[Tensor, Tensor]],
    n: int = 25,
    *,
    refine: int = 8,
    recalibrate_bn: bool = True,
    dtype: torch.dtype = torch.float64,
) -> BarrierResult:
    """Measure the loss on the line between two models.

    Parameters
    ----------
    model
        Gives the shape; it stays as it is.
    a, b
        The ends: modules, or parameters by name.
    loss
        ``loss(outputs, targets)``, a mean over the batch; :func:`error_rate` measures the barrier of the error.
    batches
        Pairs of inputs and targets, the same at every point.
    n
        Equally spaced points, both ends included; at least 3.
    refine
        Further points around the highest one, by golden section.
    recalibrate_bn
        Whether batch norm is measured anew at every point, both ends included.
    dtype
        In which everything is computed.

    Raises
    ------
    ConfigurationError
        If the models differ in shape or there are too few points.
    """
    surface = LossSurface(model, loss, batches, statistics="recalibrate" if recalibrate_bn else "running", dtype=dtype)
    linear_path(a, b)  # raises where they do not fit
    first, second = surface.point(a), surface.point(b)
    return barrier_on(lambda share: surface.value(between(first, second, share)), n, refine)


def barrier_on(loss: Callable[[float], float], n: int = 25, refine: int = 8) -> BarrierResult:
    """Barrier of any function of α on [0, 1]; parameters are those of :func:`barrier`."""
    if n < 3 or refine < 0:
        raise ConfigurationError(f"n and refine are {n} and {refine}; at least 3 points and no fewer than 0 are needed")
    found = {float(alpha): loss(float(alpha)) for alpha in np.linspace(0, 1, n)}

    def above(alpha: float) -> float:
        if alpha not in found:
            found[alpha] = loss(alpha)
        return found[alpha] - ((1 - alpha) * found[0.0] + alpha * found[1.0])

    grid = sorted(found)
    top = max(range(n), key=lambda place: above(grid[place]))
    low, high = grid[max(top - 1, 0)], grid[min(top + 1, n - 1)]
    for _ in range(refine):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if above(left) > above(right) else (left, high)
    alphas = sorted(found)
    barriers = [above(alpha) for alpha in alphas]
    best = int(np.argmax(barriers))
    return BarrierResult(
        alphas=tuple(alphas),
        losses=tuple(found[alpha] for alpha in alphas),
        barriers=tuple(barriers),
        height=max(0.0, barriers[best]),
        argmax=alphas[best],
        lowest=min(barriers),
    )


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """Layer → names of its parameters; a normalisation belongs to the layer before it."""
    layers: dict[str, list[str]] = {}
    last = ""
    for name, module in model.named_modules():
        own = [f"{name}.{part}" if name else part for part, _ in module.named_parameters(recurse=False)]
        if not own:
            continue
        normalises = isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm)
        last = last if normalises and last else name
        layers.setdefault(last, []).extend(own)
    return layers


def layerwise_barrier(
    model: nn.Module,
    a: nn.Module | Point,
    b: nn.Module | Point,
    loss: Loss,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    rest: Literal["a", "b", "mean"] = "a",
    cumulative: bool = False,
    layers: Mapping[str, Sequence[str]] | None = None,
    n: int = 11,
    refine: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[dict[str, Any]]:
    """Move one layer at a time from A to B, and predict the barrier from the curvature of that block alone.

    Batch norm normalises by the statistics of each batch here, so that barrier and curvature are of one function.

    Parameters
    ----------
    model, a, b, loss, batches, n, refine, dtype
        As for :func:`barrier`.
    rest
        Where the other layers are meanwhile: at A, at B, or half-way.
    cumulative
        Whether all layers before it move as well.
    layers
        Layer → names of its parameters; by default those of :func:`layers_of`.

    Returns
    -------
    list of dict
        A row for each layer: ``layer``, ``barrier`` (height), ``middle`` (B(½)), ``distance`` ‖Δ_l‖, ``curvature``
        Δ_lᵀ H_ll Δ_l half-way, and predictions of B(½): ``midpoint`` = −⅛ of that, ``endpoints`` = ¼ (g_0 − g_1)ᵀΔ_l +
        1/16 Δ_lᵀ (H_0 + H_1) Δ_l at the ends of this layer's way, and ``start`` = ⅛ Δ_lᵀ H_ll Δ_l at its beginning.
        ``pandas.DataFrame(rows)`` makes a table of them.

    Raises
    ------
    ConfigurationError
        If the models differ in shape or a setting is out of range.
    UnknownNameError
        If a layer has a parameter that the model does not have.
    """
    if rest not in ("a", "b", "mean"):
        raise ConfigurationError(f"rest is {rest!r}; use a, b or mean")
    surface = LossSurface(model, loss, batches, statistics="batch", dtype=dtype)
    linear_path(a, b)
    first, second = surface.point(a), surface.point(b)
    others = between(first, second, {"a": 0.0, "b": 1.0, "mean": 0.5}[rest])
    moving: list[str] = []
    rows = []
    for layer, names in (layers_of(model) if layers is None else layers).items():
        for name in names:
            if name not in first:
                raise UnknownNameError("parameter", name, first)
        moving = [*moving, *names] if cumulative else list(names)
        start = {**others, **{name: first[name] for name in moving}}
        end = {**others, **{name: second[name] for name in moving}}
        rows.append({"layer": layer, **_layer_row(surface, start, end, n, refine)})
    return rows


def _layer_row(surface: LossSurface, start: Point, end: Point, n: int, refine: int) -> dict[str, float]:
    direction = difference(start, end)
    found = barrier_on(lambda share: surface.value(between(start, end, share)), n, refine)
    middle = between(start, end, 0.5)
    curvatures = [surface.curvature(point, direction) for point in (start, middle, end)]
    slopes = [surface.slope(point, direction) for point in (start, end)]
    height = surface.value(middle) - (found.losses[0] + found.losses[-1]) / 2
    return {
        "barrier": found.height,
        "middle": height,
        "distance": sum(float(part.square().sum()) for part in direction.values()) ** 0.5,
        "curvature": curvatures[1],
        "midpoint": -curvatures[1] / 8,
        "endpoints": (slopes[0] - slopes[1]) / 4 + (curvatures[0] + curvatures[2]) / 16,
        "start": curvatures[0] / 8,
    }


def _parameters(model: nn.Module | Point) -> dict[str, Tensor]:
    found = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    return {name: tensor.detach() for name, tensor in found.items()}


def _shape(point: Point, name: str) -> tuple[int, ...] | None:
    return tuple(point[name].shape) if name in point else None

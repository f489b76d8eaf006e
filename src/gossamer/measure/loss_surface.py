"""The loss as a function of the weights alone: its value, slope and curvature at any point, on fixed batches.

What is random or remembers (dropout, the data, running statistics) is fixed, so that small differences between
nearby points are differences of the surface and not of a draw.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.core.averaging import recalibrate_batch_norm
from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, TargetError

Point: TypeAlias = Mapping[str, Tensor]
"""Parameter name → value."""
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Statistics = Literal["recalibrate", "batch", "running"]


class LossSurface:
    """Mean loss of a model over fixed batches, at any values of its parameters.

    Parameters
    ----------
    model
        Gives the shape; it is copied and stays as it is. Everything but batch norm is in evaluation mode.
    loss
        ``loss(outputs, targets)``, a mean over the batch.
    batches
        Pairs of inputs and targets; always the same.
    statistics
        What batch norm normalises by: ``"recalibrate"``: means over all batches, measured anew at every point;
        ``"batch"``: each batch's own, which makes the loss a smooth function of the weights; ``"running"``: those that
        the model has. Slopes and curvatures take ``"batch"`` for ``"recalibrate"``.
    dtype
        In which everything is computed; float64 by default.

    Raises
    ------
    CalibrationError
        If there is no batch.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        statistics: Statistics = "recalibrate",
        dtype: torch.dtype = torch.float64,
    ):
        if not batches:
            raise CalibrationError(
                "there is no batch to measure a loss on; give at least one pair of inputs and targets"
            )
        if statistics not in ("recalibrate", "batch", "running"):
            raise ConfigurationError(f"statistics is {statistics!r}; use recalibrate, batch or running")
        self.model = copy.deepcopy(model).eval().to(dtype)
        self.loss, self.statistics, self.dtype = loss, statistics, dtype
        self.batches = [(_cast(inputs, dtype), _cast(targets, dtype)) for inputs, targets in batches]
        self.examples = sum(len(inputs) for inputs, _ in self.batches)
        self._norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]

    def point(self, model: nn.Module | Point) -> dict[str, Tensor]:
        """Parameters of a model, or those of a state, in the dtype of the surface.

        Raises
        ------
        TargetError
            If a parameter is missing or of another shape.
        """
        given = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
        found = {}
        for name, parameter in self.model.named_parameters():
            if name not in given or given[name].shape != parameter.shape:
                there = tuple(given[name].shape) if name in given else "missing"
                raise TargetError(f"{name!r} is {there} and should be {tuple(parameter.shape)}: it is another model")
            found[name] = given[name].detach().to(parameter.device, self.dtype, copy=True)
        return found

    @torch.no_grad()
    def value(self, point: Point) -> float:
        """Loss at a point.

        Raises
        ------
        NonFiniteError
            If it is NaN or infinite.
        """
        if self.statistics == "batch" or not self._norms:
            found = float(self._mean(point))
        else:
            for name, parameter in self.model.named_parameters():
                parameter.copy_(point[name])
            if self.statistics == "recalibrate":
                recalibrate_batch_norm(self.model, self.batches)
            total = sum(len(inputs) * float(self.loss(self.model(inputs), targets)) for inputs, targets in self.batches)
            found = total / self.examples
        if not abs(found) < float("inf"):
            raise NonFiniteError(f"the loss is {found}; the weights have diverged")
        return found

    def gradient(self, point: Point) -> dict[str, Tensor]:
        """Gradient at a point, by parameter."""
        return self._summed(point, lambda leaves, loss: _gradients(loss, leaves))

    def slope(self, point: Point, direction: Point) -> float:
        """``gᵀv``: first derivative along a direction."""
        return dot(self.gradient(point), direction)

    def times_hessian(self, point: Point, direction: Point) -> dict[str, Tensor]:
        """``H v``: the gradient of ``gᵀv``.

        For piecewise linear activations the curvature that sits in their kinks is not in it.
        """
        size = max(float(part.abs().max()) for part in direction.values()) or 1.0

        def product(leaves: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
            slopes = _gradients(loss, leaves, create_graph=True)
            along = torch.stack([(slopes[name] * direction[name] / size).sum() for name in leaves]).sum()
            return {name: size * part for name, part in _gradients(along, leaves).items()}

        return self._summed(point, product)

    def curvature(self, point: Point, direction: Point) -> float:
        """``vᵀ H v``: second derivative along a direction."""
        return dot(self.times_hessian(point, direction), direction)

    def trace(self, point: Point, samples: int = 16, seed: int = 0) -> float:
        """Trace of the Hessian, estimated with random signs [Hutchinson, 1990].

        Raises
        ------
        ConfigurationError
            If there are no samples.
        """
        if samples < 1:
            raise ConfigurationError(f"samples is {samples}; at least 1 is needed")
        generator = generator_for("trace of the Hessian", seed)
        found = 0.0
        for _ in range(samples):
            signs = {n: torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1 for n, p in point.items()}
            found += self.curvature(point, signs)
        return found / samples

    def _summed(
        self, point: Point, each: Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        leaves = {name: part.detach().requires_grad_() for name, part in point.items()}
        total = {name: torch.zeros_like(part) for name, part in point.items()}
        with self._by_batch(), torch.enable_grad():
            for batch in self.batches:
                for name, part in each(leaves, self._one(leaves, batch)).items():
                    total[name] += part.detach() * (len(batch[0]) / self.examples)
        return total

    def _mean(self, point: Point) -> float:
        with self._by_batch():
            return sum(len(batch[0]) * float(self._one(dict(point), batch)) for batch in self.batches) / self.examples

    def _one(self, point: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(functional_call(self.model, point, (batch[0],)), batch[1])

    def _by_batch(self) -> Any:
        return _own_statistics(self._norms if self.statistics != "running" else [])


class _own_statistics:
    """Let normalisations use the statistics of the batch, and remember nothing."""

    def __init__(self, layers: Sequence[_BatchNorm]):
        self.layers = layers

    def __enter__(self) -> None:
        self.kept = [(layer.running_mean, layer.running_var) for layer in self.layers]
        for layer in self.layers:
            layer.running_mean = layer.running_var = None

    def __exit__(self, *_: object) -> None:
        for layer, (mean, variance) in zip(self.layers, self.kept):
            layer.running_mean, layer.running_var = mean, variance


def _gradients(value: Tensor, leaves: Mapping[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    """Gradient by leaf; zero where the value does not depend on it."""
    if not value.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, materialize_grads=True)
    return dict(zip(leaves, found))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def dot(a: Point, b: Point) -> float:
    """Sum of products over the parameters that `a` has."""
    return float(sum(float((part * b[name]).sum()) for name, part in a.items()))


def difference(a: Point, b: Point) -> dict[str, Tensor]:
    """``b − a``, by parameter."""
    return {name: b[name] - part for name, part in a.items()}


def between(a: Point, b: Point, share: float) -> dict[str, Tensor]:
    """``(1 − share) a + share b``, by parameter."""
    return {name: torch.lerp(part, b[name], share) for name, part in a.items()}

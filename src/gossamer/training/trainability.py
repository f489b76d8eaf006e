"""How well a sparse network can be trained, seen from outside: its gradients, and how restless its structure is.

Wang et al., 2023, arXiv 2303.09650, section 4: the norm, mean and spread of each layer's gradient over the steps, and
the share of weights that change sides between two looks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.core.masks import pack_bits, unpack_bits
from gossamer.core.sparse_training import SparseTraining
from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class GradientRow:
    """The gradient of one layer at one step.

    Attributes
    ----------
    step
        Counted from 1.
    layer
        Name of the weight.
    norm
        Euclidean.
    mean, deviation
        Of the absolute values.
    """

    step: int
    layer: str
    norm: float
    mean: float
    deviation: float


@dataclass
class Trainability:
    """What :func:`watch` has seen.

    Attributes
    ----------
    gradients
        A row for each layer and look.
    flips
        Layer → for each look but the first, ``(step, share)`` of weights that are kept now and were not, or reverse.
    """

    gradients: list[GradientRow] = field(default_factory=list)
    flips: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list, repr=False)

    def unsteadiness(self) -> float:
        """Variance over time of the gradient norm over its squared mean, the median of the layers.

        Raises
        ------
        ConfigurationError
            If there are fewer than two looks.
        """
        norms: dict[str, list[float]] = {}
        for row in self.gradients:
            norms.setdefault(row.layer, []).append(row.norm)
        if not norms or min(map(len, norms.values())) < 2:
            raise ConfigurationError("the spread of gradients over time needs at least two looks; watch for longer")
        ratios = [statistics.variance(values) / (statistics.fmean(values) ** 2 or 1.0) for values in norms.values()]
        return statistics.median(ratios)

    def close(self) -> None:
        """Stop looking."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def watch(
    training: SparseTraining, every: int = 1, kept: Callable[[SparseTraining], dict[str, Tensor]] | None = None
) -> Trainability:
    """Look at gradients right before, and at the structure right after, every so many steps.

    Parameters
    ----------
    training
        The run.
    every
        Steps between two looks.
    kept
        Name → bool mask of what counts as kept; by default the masks of the run. For soft shrinkage its own choice:
        ``training.method.kept``.

    Raises
    ------
    ConfigurationError
        If `every` is below 1.
    """
    if every < 1:
        raise ConfigurationError(f"every is {every}; it counts steps, at least 1")
    seen = Trainability()
    before: dict[str, tuple[Tensor, torch.Size]] = {}

    def look_at_gradients(*_: Any) -> None:
        step = training.step + 1
        if step % every == 0:
            for name, target in training.targets.items():
                if target.parameter.grad is not None:
                    seen.gradients.append(_row(step, name, target.parameter.grad))

    def look_at_structure(*_: Any) -> None:
        if training.step % every:
            return
        masks = {n: training.mask(n) for n in training.targets} if kept is None else kept(training)
        for name, mask in masks.items():
            if name in before:
                changed = float((unpack_bits(*before[name]) != mask.cpu()).double().mean())
                seen.flips.setdefault(name, []).append((training.step, changed))
            before[name] = (pack_bits(mask.cpu()), mask.shape)

    optimizer = training.optimizer
    seen._handles = [
        optimizer.register_step_pre_hook(look_at_gradients),
        optimizer.register_step_post_hook(look_at_structure),
    ]
    return seen


def _row(step: int, name: str, gradient: Tensor) -> GradientRow:
    sizes = gradient.detach().abs().float()
    return GradientRow(step, name, float(sizes.norm()), float(sizes.mean()), float(sizes.std(correction=0)))

"""A model under one mask after the other: the loop of every sweep, which leaves the model as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from gossamer.core.masking import static_masks, zeroed
from gossamer.core.masks import MaskSet
from gossamer.errors import ConfigurationError, NonFiniteError, SparsityError, check_sparsity

Evaluate = Callable[[nn.Module], float]
FineTune = Callable[[nn.Module, MaskSet], nn.Module | None]


@dataclass
class Point:
    """What was measured at one sparsity: achieved sparsity, quality of each seed, parameter name → sparsity."""

    sparsity: float
    quality: list[float]
    layers: dict[str, float]


@dataclass
class Trial:
    """Evaluates a model under masks, seed by seed, and leaves it as it was.

    Attributes
    ----------
    model
        Pruned only while it is evaluated; if there is fine-tuning, a copy is.
    evaluate
        Module → finite number, higher is better.
    finetune
        Trains a copy in place under static masks, or returns another module; None evaluates as it is.
    seeds
        Of torch's generator around both.
    varies
        Whether the masks depend on the seed.
    """

    model: nn.Module
    evaluate: Evaluate
    finetune: FineTune | None
    seeds: list[int]
    varies: bool

    def measure(self, name: str, choose: Callable[[int], MaskSet]) -> Point:
        """Quality under the masks that `choose` makes from a seed; `name` is for error messages.

        Raises
        ------
        NonFiniteError
            If a quality is NaN or infinite.
        ConfigurationError
            If it is no number.
        """
        masks = choose(self.seeds[0])
        first = masks
        quality = []
        for seed in self.seeds:
            if self.varies and seed != self.seeds[0]:
                masks = choose(seed)
            quality.append(self._quality(name, masks, seed))
        return Point(first.sparsity, quality, first.layer_sparsity())

    def _quality(self, name: str, masks: MaskSet, seed: int) -> float:
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            if self.finetune is None:
                with zeroed(self.model, masks):
                    value = _number(self.evaluate(self.model))
            else:
                pruned = copy.deepcopy(self.model)
                with static_masks(pruned, masks):
                    trained = self.finetune(pruned, masks)
                value = _number(self.evaluate(pruned if trained is None else trained))
        if not math.isfinite(value):
            raise NonFiniteError(
                f"evaluate returned {value} at {name}, seed {seed}; return a finite number where higher is better, "
                f"such as a clipped negative loss"
            )
        return value


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"evaluate returned {type(value).__name__}; it must return one number, where higher is better"
        ) from None


def check_grid(sparsities: Sequence[float]) -> list[float]:
    """Return the sparsities with 0 in front.

    Raises
    ------
    SparsityError
        If there is none above 0, or they are not strictly increasing in [0, 1).
    """
    grid = [float(check_sparsity(s, f"sparsities[{i}]")) for i, s in enumerate(sparsities)]
    for before, after in pairwise(grid):
        if after <= before:
            raise SparsityError(f"sparsities must increase strictly, but {after:g} follows {before:g}; sort them")
    grid = grid if grid and grid[0] == 0 else [0.0, *grid]
    if len(grid) < 2:
        raise SparsityError("sparsities holds nothing above 0; give some in (0, 1), such as (0.2, 0.4, 0.6, 0.8)")
    return grid


def check_seeds(seeds: int | Sequence[int]) -> list[int]:
    """Return the list of seeds: 0 … n − 1 for a number, or those given.

    Raises
    ------
    ConfigurationError
        If there is none, or one repeats.
    """
    try:
        chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    except TypeError:
        chosen = []
    whole = all(isinstance(seed, int) for seed in chosen)
    if not chosen or not whole or len(set(chosen)) < len(chosen):
        raise ConfigurationError(f"seeds is {seeds!r}; give a positive number, or different integers")
    return chosen

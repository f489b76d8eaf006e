"""GraNet: prune gradually, and at every step of the way let a part of what is left grow back elsewhere.

A network recovers from pruning the better the earlier it is pruned; Liu et al. call that pruning plasticity (measured
by :mod:`gossamer.training.plasticity`), and find that it rises when connections are regrown where the gradient is
large. So every update does both: it prunes to the sparsity of a cubic ramp, then removes some of the smallest weights
that remain and grows as many others. The gradient is at hand anyway, hence "zero-cost neuroregeneration".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from gossamer.core.allocation import Shapes, around, exact_counts, uniform
from gossamer.core.registry import register
from gossamer.core.schedules import Cosine, Cubic, Linear
from gossamer.core.selection import Sparsity
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps
from gossamer.core.topology import GROWTHS, Scores, Topology
from gossamer.errors import ConfigurationError, check_sparsity

CLASSIFIER_FROM = 0.8
"""Sparsity from which on a uniform GraNet spares the last layer."""
DECAYS = ("cosine", "linear", "constant")


@register(
    "granet",
    paper="granet",
    when="during training",
    needs_data=False,
    path=("sparse-to-sparse", "dense-to-sparse"),
    topology="dynamic",
    criterion=("magnitude", "gradient"),
    allocation="global",
)
@dataclass(kw_only=True)
class GraNet(Sparsifier):
    """Gradual pruning with neuroregeneration, from a dense or from a sparse start.

    Liu et al., 2021, arXiv 2106.10404, algorithm 1. After the steps ``begin + every, begin + 2 every, …``: (a) up to
    `ramp_end`, keep the largest weights of the model up to the sparsity of the ramp
    ``s_t = s_f + (s_i − s_f)(1 − (t − t₀)/(t_f − t₀))³``; (b) up to `end`, in each layer with k weights left remove
    the ⌈ρ_t · k⌉ smallest, and grow as many of its zeros, those just removed among them. Without (a) this is RigL,
    without (b) gradual magnitude pruning, and with random growth alone SET.

    Parameters
    ----------
    sparsity
        s_f; reached at `ramp_end` to the weight.
    initial_sparsity
        s_i. 0.5 is the paper's sparse-to-sparse mode, which starts from a random mask; 0 its dense-to-sparse mode.
    begin, end
        Steps between which topology changes: `end` is the length of the training.
    ramp_end
        Last step of the ramp; None is 11/16 of the way, the paper's epoch 110 of 160 (for ImageNet it takes 30 of 100).
    multiplier
        Stretches `begin`, `ramp_end` and `end`, for longer training.
    every
        Steps between two updates; the paper takes 1000 (ImageNet: 4000).
    exchange, last_exchange, decay
        ρ at the beginning and at `end`, and its way between them: ``cosine``, ``linear``, or ``constant`` at the first.
    growth
        What the highest of grows: ``gradient``, ``random``, ``momentum``, or scores of one's own. Momentum is a running
        mean of the gradients of all weights, zeros included, which takes a dense gradient at every step.
    momentum
        Decay of that mean.
    scope
        ``model``: one threshold for all layers; ``layer``: the same sparsity for all (the authors' GraNet_uniform).
    classifier_density
        What the last layer keeps at least with the scope ``layer``, from 80 % sparsity on; the others make up for it.
    allocation
        How many weights each layer has in a sparse start.
    heads
        Whether the last layer counts: it does in the paper.
    """

    heads: bool = True
    initial_sparsity: float = 0.5
    begin: int = 0
    end: int = 16_000
    ramp_end: int | None = None
    multiplier: float = 1.0
    every: int = 1000
    exchange: float = 0.5
    last_exchange: float = 0.005
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    growth: Literal["gradient", "random", "momentum"] | Scores = "gradient"
    momentum: float = 0.9
    scope: Literal["model", "layer"] = "model"
    classifier_density: float = 0.2
    allocation: str = "erdos-renyi-kernel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.begin, self.end, self.every)
        check_sparsity(self.initial_sparsity, "initial_sparsity")
        if self.initial_sparsity > self.sparsity:
            raise ConfigurationError(
                f"initial_sparsity is {self.initial_sparsity}; it must not exceed sparsity = {self.sparsity}"
            )
        if self.ramp_end is not None and not self.begin < self.ramp_end <= self.end:
            raise ConfigurationError(
                f"ramp_end is {self.ramp_end}; it must lie after begin = {self.begin} and not after end = {self.end}"
            )
        if not self.multiplier > 0:
            raise ConfigurationError(f"multiplier is {self.multiplier}; it must be above 0, such as 1")
        if not 0 <= self.last_exchange <= self.exchange <= 1:
            raise ConfigurationError(
                f"exchange falls from {self.exchange} to {self.last_exchange}; 0 <= last <= first <= 1 is needed"
            )
        for name, value in {"momentum": self.momentum, "classifier_density": self.classifier_density}.items():
            if not 0 <= value < 1:
                raise ConfigurationError(f"{name} is {value}; it must be a number in [0, 1)")
        known = (*GROWTHS, "momentum")
        choices = {"decay": DECAYS, "scope": ("model", "layer")} | ({} if callable(self.growth) else {"growth": known})
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; use {', '.join(allowed)}")

    # ------------------------------------------------------------------------------------------ when

    @property
    def steps(self) -> tuple[int, int, int]:
        """First step, last step of the ramp, and last step, all stretched."""
        ramp_end = self.begin + (self.end - self.begin) * 11 / 16 if self.ramp_end is None else self.ramp_end
        begin, ramp, end = (round(step * self.multiplier) for step in (self.begin, ramp_end, self.end))
        return begin, max(ramp, begin + 1), max(end, begin + 1)

    def prunes(self, step: int) -> bool:
        """Whether weights are pruned after a step."""
        begin, ramp_end, _ = self.steps
        return begin < step <= ramp_end and ((step - begin) % self.every == 0 or step == ramp_end)

    def exchanges(self, step: int) -> bool:
        """Whether weights are exchanged after a step."""
        begin, ramp_end, end = self.steps
        return begin < step < end and ((step - begin) % self.every == 0 or step == ramp_end)

    def wants_gradient(self, step: int) -> bool:  # noqa: D102
        if self.growth == "random":
            return False
        return step < self.steps[2] if self.growth == "momentum" else self.exchanges(step)

    def sparsity_at(self, step: int) -> float:
        """What the ramp asks for after a number of steps."""
        begin, ramp_end, _ = self.steps
        return Cubic(self.sparsity, ramp_end, initial=self.initial_sparsity, begin=begin)(step)

    def share_at(self, step: int) -> float:
        """ρ after a number of steps."""
        begin, _, end = self.steps
        decays = {"cosine": Cosine, "linear": Linear}
        if self.decay == "constant":
            return self.exchange
        return decays[self.decay](self.last_exchange, end, initial=self.exchange, begin=begin)(step)

    # ------------------------------------------------------------------------------------------ what

    def start(self, training: SparseTraining) -> None:
        """Draw the first mask; a dense start needs none."""
        if self.initial_sparsity > 0:
            training.start_at_random(self.initial_sparsity, self.allocation)

    def change(self, training: SparseTraining) -> None:
        """Prune, then regenerate, if it is time."""
        step = training.step
        if self.growth == "momentum" and self.wants_gradient(step):
            self._remember(training)
        if self.prunes(step):
            self._prune(training, self.sparsity_at(step))
        if self.exchanges(step):
            share = self.share_at(step)
            counts = {name: math.ceil(share * training.active(name)) for name in training.targets}
            training.exchange(counts, running_gradient if self.growth == "momentum" else self.growth)

    def finish(self, training: SparseTraining) -> None:
        """Prune to the full sparsity, if training has ended before the ramp."""
        if training.step < self.steps[1]:
            self._prune(training, self.sparsity)

    def _prune(self, training: SparseTraining, sparsity: float) -> None:
        if self.scope == "model":
            training.prune(sparsity, "model")
        else:
            training.prune(self._layer_sparsities(training, sparsity))

    def _layer_sparsities(self, training: SparseTraining, sparsity: float) -> Mapping[str, Sparsity]:
        shapes: Shapes = {name: tuple(target.shape) for name, target in training.targets.items()}
        last, fixed = list(shapes)[-1], 1 - self.classifier_density
        if sparsity < max(CLASSIFIER_FROM, fixed) or len(shapes) == 1:
            return exact_counts(uniform(shapes, sparsity), shapes, sparsity)
        return exact_counts(around({last: fixed}, shapes, sparsity, uniform), shapes, sparsity)

    def _remember(self, training: SparseTraining) -> None:
        for name in training.targets:
            fresh = training.gradient(name).float()
            old = training.extra.get(_mean_of(name))
            # never in place: a saved state shares this tensor
            training.extra[_mean_of(name)] = fresh.clone() if old is None else old * self.momentum + fresh

    def phase(self, step: int) -> Phase:  # noqa: D102
        begin, ramp_end, end = self.steps
        if step < begin:
            return "warm-up"
        return "ramp" if step < ramp_end else "explore" if step < end else "frozen"


def running_gradient(topology: Topology, name: str) -> torch.Tensor:
    """Absolute running mean of the gradient of a target, zeros included."""
    return topology.extra[_mean_of(name)].abs()  # type: ignore[attr-defined]


def _mean_of(name: str) -> str:
    return f"mean gradient of {name}"

"""Mountainside and ridge: two runs that part, and what rises between them.

Two copies of one run that go on with different data walk down the same mountainside at first. If a ridge comes up
between them they end in different valleys; if it was passed before they parted, they stay in one. What is logged along
both ways shows when that is decided: the loss at the running mean of the pair against the loss of both, how far and in
which directions they went, and the curvature along the line between them, whose sign turns when a ridge forms. Singh
et al., 2024, arXiv 2406.16300.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.measure.loss_surface import LossSurface, Point, between, difference, dot

_ASIDE = 0.1  # of the line, to either side of its middle

Train: TypeAlias = Callable[[nn.Module, int, int, int, Any], Any]
"""``train(model, first, last, order, memory)`` trains in place from step `first` to before `last`, with data in order
number `order`, going on from what it returned the time before (None at the start), such as the optimiser's state."""


@dataclass(frozen=True)
class ForkRecord:
    """One look at a pair.

    Attributes
    ----------
    step
        Since the beginning of training.
    loss_a, loss_b, loss_mean
        At both, and half-way between them.
    ridge
        Height of the middle above the mountainsides: ``L(mean) − ½ (L_a + L_b)``.
    distance
        ‖Δ‖.
    angle
        Between both displacements since the fork, in degrees.
    curvature
        ``Δᵀ H Δ / ‖Δ‖²`` half-way; negative on a ridge.
    bend
        The same from losses a tenth of Δ to both sides, so that kinks of ReLU, which no Hessian shows, count too.
    """

    step: int
    loss_a: float
    loss_b: float
    loss_mean: float
    ridge: float
    distance: float
    angle: float
    curvature: float
    bend: float


@dataclass(frozen=True)
class Fork:
    """Two runs that parted at one step.

    Attributes
    ----------
    step
        Where.
    parent, a, b
        Parameters at the fork, and of both in the end.
    models
        Both in the end, with their buffers.
    records
        What was seen on the way.
    """

    step: int
    parent: dict[str, Tensor] = field(repr=False)
    a: dict[str, Tensor] = field(repr=False)
    b: dict[str, Tensor] = field(repr=False)
    models: tuple[nn.Module, nn.Module] = field(repr=False)
    records: list[ForkRecord]

    @property
    def ridge_step(self) -> int | None:
        """First step at which the loss along the line bent down half-way."""
        return next((record.step for record in self.records if record.bend < 0), None)

    @property
    def barrier_step(self) -> int | None:
        """First step from which on the middle lay above the mountainsides to the end; None if it does not there."""
        found = None
        for record in self.records:
            found = (record.step if found is None else found) if record.ridge > 0 else None
        return found


def fork_experiment(
    model: nn.Module,
    train: Train,
    steps: int,
    forks: Iterable[int],
    surface: LossSurface | Callable[[nn.Module], LossSurface],
    *,
    looks: int = 8,
    pair: int = 0,
) -> list[Fork]:
    """Train, part at several steps, and follow every pair to the end.

    Parameters
    ----------
    model
        Before the first step; it stays as it is.
    train
        See :data:`Train`. The common part has order ``3 · pair``, both branches have the two after it.
    steps
        Of the whole training.
    forks
        Steps at which pairs part, in [0, steps).
    surface
        The loss that is logged.
    looks
        How many times a pair is looked at, at steps that are twice as far apart each time, the end included.
    pair
        Number of the experiment: other data for all.

    Raises
    ------
    ConfigurationError
        If a fork is not within the training, or numbers are out of range.
    """
    places = sorted(set(forks))
    if looks < 1 or not places or not 0 <= places[0] <= places[-1] < steps:
        raise ConfigurationError(
            f"forks are {places} of {steps} steps with {looks} looks; forks must lie in [0, {steps}), and be looked at"
        )
    common, memory, done = copy.deepcopy(model), None, 0
    seen = surface if isinstance(surface, LossSurface) else surface(model)
    found = []
    for place in places:
        if place > done:
            memory = train(common, done, place, 3 * pair, memory)
            done = place
        found.append(_follow(common, memory, place, train, steps, seen, looks, 3 * pair))
    return found


def _follow(
    common: nn.Module,
    memory: Any,
    place: int,
    train: Train,
    steps: int,
    surface: LossSurface,
    looks: int,
    order: int,
) -> Fork:
    models = (copy.deepcopy(common), copy.deepcopy(common))
    memories = [copy.deepcopy(memory), copy.deepcopy(memory)]
    parent = surface.point(common)
    records, at = [], place
    for stop in look_steps(place, steps, looks):
        for number in (0, 1):
            memories[number] = train(models[number], at, stop, order + 1 + number, memories[number])
        at = stop
        records.append(look(surface, stop, parent, surface.point(models[0]), surface.point(models[1])))
    return Fork(place, parent, surface.point(models[0]), surface.point(models[1]), models, records)


def look_steps(first: int, last: int, looks: int) -> list[int]:
    """Steps after `first`, up to and with `last`, each about twice as far from the first as the one before."""
    length = last - first
    return sorted({first + max(1, math.ceil(length / 2**back)) for back in range(looks)})


def look(surface: LossSurface, step: int, parent: Point, a: Point, b: Point) -> ForkRecord:
    """What a pair looks like at one time."""
    direction = difference(a, b)
    middle = between(a, b, 0.5)
    losses = [surface.value(point) for point in (a, b, middle)]
    beside = [surface.value(between(a, b, 0.5 + side)) for side in (-_ASIDE, _ASIDE)]
    squared = dot(direction, direction)
    ways = [difference(parent, point) for point in (a, b)]
    lengths = [math.sqrt(dot(way, way)) for way in ways]
    cosine = dot(*ways) / math.prod(lengths) if all(lengths) else 1.0
    return ForkRecord(
        step=step,
        loss_a=losses[0],
        loss_b=losses[1],
        loss_mean=losses[2],
        ridge=losses[2] - (losses[0] + losses[1]) / 2,
        distance=math.sqrt(squared),
        angle=math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
        curvature=surface.curvature(middle, direction) / squared if squared else 0.0,
        bend=(sum(beside) - 2 * losses[2]) / (_ASIDE**2 * squared) if squared else 0.0,
    )


@dataclass(frozen=True)
class RidgeProfile:
    """Loss on the plane through the fork and both ends.

    Attributes
    ----------
    along
        Shares β of the way from the fork (0) to the mean of the ends (1).
    across
        Shares γ of ½ Δ to either side, at a right angle to that way.
    losses
        ``[i][j]`` at ``along[i]`` and ``across[j]``.
    """

    along: tuple[float, ...]
    across: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]

    def curvature(self) -> list[float]:
        """Second difference across the middle, at each place of the way; needs −γ, 0 and γ: negative on a ridge."""
        middle = self.across.index(0.0)
        step = self.across[middle + 1]
        return [(row[middle - 1] + row[middle + 1] - 2 * row[middle]) / step**2 for row in self.losses]


def ridge_profile(
    surface: LossSurface,
    fork: Fork,
    along: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    across: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0),
) -> RidgeProfile:
    """Slices of the loss from the fork to the mean of both ends, and across that way.

    Across is the part of ½ Δ that stands at a right angle to the way.

    Raises
    ------
    ConfigurationError
        If `across` does not have 0 between two others.
    """
    inner = list(across)[1:-1]
    if 0.0 not in inner:
        raise ConfigurationError(f"across is {tuple(across)}; it needs 0 with places on both sides of it")
    way = difference(fork.parent, between(fork.a, fork.b, 0.5))
    side = {name: part / 2 for name, part in difference(fork.a, fork.b).items()}
    share = dot(side, way) / dot(way, way) if dot(way, way) else 0.0
    side = {name: part - share * way[name] for name, part in side.items()}

    def loss(beta: float, gamma: float) -> float:
        return surface.value({n: part + beta * way[n] + gamma * side[n] for n, part in fork.parent.items()})

    rows = tuple(tuple(loss(beta, gamma) for gamma in across) for beta in along)
    return RidgeProfile(tuple(along), tuple(across), rows)


def connected_from(heights: Mapping[int, float], tolerance: float) -> int | None:
    """k*: the first fork from which on no pair has a barrier above the tolerance; None if there is none.

    Parameters
    ----------
    heights
        Step of the fork → height of the barrier between both ends.
    tolerance
        Up to which a barrier counts as none.
    """
    found = None
    for place in sorted(heights, reverse=True):
        if heights[place] > tolerance:
            break
        found = place
    return found


class SplittingValley(nn.Module):
    """The toy on which a ridge can be calculated: ``L(x, y) = ¼ x⁴ − ½ y x² + ½ (y − 1)²``.

    For y < 0 there is one valley, x = 0; at y = 0 it splits into x = ±√y, and the smallest push decides on which side a
    run ends: at (±√2, 2), with a barrier of exactly 1 between the sides. A quartic of our own choice; the paper's toy
    may be another.

    Parameters
    ----------
    x, y
        Where to start.
    """

    def __init__(self, x: float = 0.0, y: float = -2.0):
        super().__init__()
        self.place = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        """The loss, ``(n,)``, whatever the inputs."""
        x, y = self.place
        return (x**4 / 4 - y * x**2 / 2 + (y - 1) ** 2 / 2).expand(len(inputs))

    def surface(self) -> LossSurface:
        """Its loss surface."""
        nothing = torch.zeros(1, 1, dtype=torch.float64)
        return LossSurface(self, lambda outputs, targets: outputs.mean(), [(nothing, nothing)])


def roll(model: nn.Module, first: int, last: int, order: int, memory: Any, rate: float = 0.1) -> None:
    """Gradient descent on :class:`SplittingValley` with a push to one side in each step: a :data:`Train`.

    Odd orders are pushed to the right, even ones to the left, so that branches of a pair are pushed apart; from step
    100 on nothing pushes any more.
    """
    assert isinstance(model, SplittingValley)
    push = torch.tensor([1e-4 if order % 2 else -1e-4, 0.0], dtype=torch.float64)
    for step in range(first, last):
        (gradient,) = torch.autograd.grad(model(torch.zeros(1, 1)).sum(), model.place)
        with torch.no_grad():
            model.place.add_(push * (step < 100) - gradient, alpha=rate)

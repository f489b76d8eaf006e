"""A model, in cycles, of an accelerator that trains with N:M-sparse weights: a systolic array, a sorter, a schedule.

Fang et al., 2023, "Efficient N:M Sparse DNN Training Using Algorithm, Architecture, and Dataflow Co-Design", arXiv
2309.13015, describe such a machine and measured it on an FPGA. This is a model of one, not a measurement: **its cycles
are never times**. What it assumes:

- An array of R × C elements does one multiplication each in a cycle. In its sparse mode an element holds n of every m
  weights with their places and picks the inputs they belong to, so a reduction over q takes q · n / m cycles.
- *Output-stationary*: each element forms one output. A sum waits for the adder, `adder_latency` cycles, before its next
  term, unless other sums are interleaved meanwhile, which takes that many tiles of outputs. *Weight-stationary*:
  weights lie still and partial sums wander through the array, so that no sum waits; a tile is filled once for all.
- What is read and written goes over one memory bus while the array computes: a stage takes the longer of both.
- A sorter turns groups of m weights into n values and their places, and takes `sorted_weights` in a cycle. Without
  *pre-generation* it does so each time a stage needs weights, before that stage, and dense weights are read; with it
  both sparse copies are written once, while weights are updated, and stages read those.
- The vector unit updates `updated_weights` in a cycle: gradient, momentum and weight are read, two of them written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.patterns import NM
from gossamer.errors import ConfigurationError, TargetError

Stage = Literal["forward", "backward", "weights", "update"]
Stationary = Literal["output-stationary", "weight-stationary"]
Technique = Literal["interleave", "pre-generation", "schedule"]
TECHNIQUES: tuple[Technique, ...] = ("interleave", "pre-generation", "schedule")


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """The machine that is modelled.

    Attributes
    ----------
    rows, columns
        Of the array.
    adder_latency
        Cycles from one term of a sum to the next.
    fill
        Cycles before the first result of a tile leaves the array; None is ``rows + columns``.
    bandwidth
        Bytes of memory traffic in a cycle.
    sorted_weights
        That the sorter takes in a cycle: one for each row of the array.
    updated_weights
        That the vector unit takes in a cycle.
    value_bytes, master_bytes
        Of a number in a product, and of a weight, its gradient and its momentum in the update.
    multiplication_energy, byte_energy
        In picojoules; the defaults are of the size of 16-bit arithmetic and off-chip memory.
    """

    rows: int = 32
    columns: int = 32
    adder_latency: int = 8
    fill: int | None = None
    bandwidth: float = 128.0
    sorted_weights: float = 32
    updated_weights: float = 32
    value_bytes: int = 2
    master_bytes: int = 4
    multiplication_energy: float = 1.5
    byte_energy: float = 80.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is None:
                continue
            lowest = 0 if name in ("fill", "multiplication_energy", "byte_energy") else 1
            if not value >= lowest:
                raise ConfigurationError(f"{name} is {value}; it must be at least {lowest}")

    @property
    def latency(self) -> int:
        """Cycles to fill the array."""
        return self.rows + self.columns if self.fill is None else self.fill


@dataclass(frozen=True)
class Product:
    """A layer as a matrix product: ``(positions × inputs) · (inputs × outputs)``.

    Attributes
    ----------
    name
        Of the layer.
    positions, inputs, outputs
        Sizes; a convolution's inputs count the places of its kernel.
    first
        Whether nobody asks for the gradient of its input.
    channels
        Along which backward groups run; `outputs`, but for grouped convolutions, which have none.
    """

    name: str
    positions: int
    inputs: int
    outputs: int
    first: bool = False
    channels: int | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class StageCost:
    """What one stage of one layer takes.

    Attributes
    ----------
    layer, stage
        Which.
    mapping, sparse
        How it runs; an update has no mapping.
    cycles
        Of the slower of computing and memory, and of sorting where that comes before it.
    multiplications
        That are done.
    utilisation
        Share of the array's multiplications that are.
    bytes
        Moved.
    energy
        Picojoules.
    """

    layer: str
    stage: Stage
    mapping: Stationary | None
    sparse: bool
    cycles: float
    multiplications: float
    utilisation: float
    bytes: float
    energy: float


@dataclass(frozen=True)
class Simulation:
    """Cost of one step of training, stage by stage."""

    stages: tuple[StageCost, ...]

    @property
    def cycles(self) -> float:
        """Of all stages."""
        return sum(stage.cycles for stage in self.stages)

    @property
    def multiplications(self) -> float:
        """Of all stages."""
        return sum(stage.multiplications for stage in self.stages)

    @property
    def energy(self) -> float:
        """Picojoules of all stages."""
        return sum(stage.energy for stage in self.stages)

    def rows(self) -> list[dict[str, Any]]:
        """Plain values, for a table or a data frame."""
        return [asdict(stage) for stage in self.stages]


def products_of(model: nn.Module, inputs: Tensor | Sequence[Any]) -> list[Product]:
    """Every linear layer and convolution as a matrix product, in the order in which they run.

    Raises
    ------
    TargetError
        If the model has none.
    """
    found: list[Product] = []

    def note(name: str, layer: nn.Module, output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            found.append(Product(name, output.numel() // layer.out_features, layer.in_features, layer.out_features))
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            inner, outer = layer.weight[0].numel(), layer.out_channels
            channels = None if layer.groups == 1 else 0
            found.append(Product(name, output.numel() // outer, inner, outer, channels=channels))

    handles = [
        layer.register_forward_hook(lambda layer, _, output, name=name: note(name, layer, output))
        for name, layer in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(inputs) if isinstance(inputs, Tensor) else model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise TargetError("the model has no linear layer and no convolution; there is nothing to simulate")
    return [replace(found[0], first=True), *found[1:]]


def simulate_training(
    products: Sequence[Product],
    pattern: NM | None = None,
    accelerator: Accelerator | None = None,
    techniques: Sequence[Technique] = TECHNIQUES,
) -> Simulation:
    """One step of training: forward, backward, gradient of the weights, and update.

    Parameters
    ----------
    products
        :func:`products_of` a model.
    pattern
        Of the weights in forward and backward products; None trains dense.
    accelerator
        The machine.
    techniques
        Which of its dataflow techniques are on.

    Raises
    ------
    ConfigurationError
        If a technique is unknown.
    """
    for technique in techniques:
        if technique not in TECHNIQUES:
            raise ConfigurationError(f"technique {technique!r} is unknown; it must be one of {', '.join(TECHNIQUES)}")
    machine = accelerator or Accelerator()
    stages = [stage for each in products for stage in _stages(each, pattern, machine, frozenset(techniques))]
    return Simulation(tuple(stages))


def _stages(layer: Product, pattern: NM | None, machine: Accelerator, on: frozenset[str]) -> list[StageCost]:
    p, q, r = layer.positions, layer.inputs, layer.outputs
    backward = r if layer.channels is None else layer.channels
    found = [_product(layer, "forward", (p, q, r), q, pattern, machine, on)]
    if not layer.first:
        found.append(_product(layer, "backward", (p, r, q), backward, pattern, machine, on))
    found.append(_product(layer, "weights", (r, p, q), 0, None, machine, on))
    return [*found, _update(layer, pattern, machine, on)]


def _product(
    layer: Product,
    stage: Stage,
    sizes: tuple[int, int, int],
    grouped: int,
    pattern: NM | None,
    machine: Accelerator,
    on: frozenset[str],
) -> StageCost:
    """A product ``(p × q) · (q × r)`` whose second factor is sparse along q, if groups of m divide `grouped`."""
    can = pattern is not None and grouped > 0 and grouped % pattern.m == 0
    mappings: tuple[Stationary, ...] = ("output-stationary", "weight-stationary")
    choices = list(product(mappings, (True, False) if can else (False,)))
    if "schedule" not in on:
        choices = [(mappings[0], can)]
    costs = [
        _mapped(layer, stage, sizes, mapping, pattern if sparse else None, machine, on) for mapping, sparse in choices
    ]
    return min(costs, key=lambda cost: cost.cycles)


def _mapped(
    layer: Product,
    stage: Stage,
    sizes: tuple[int, int, int],
    mapping: Stationary,
    pattern: NM | None,
    machine: Accelerator,
    on: frozenset[str],
) -> StageCost:
    p, q, r = sizes
    kept = q if pattern is None else q * pattern.n / pattern.m
    if mapping == "output-stationary":
        tiles = math.ceil(p / machine.rows) * math.ceil(r / machine.columns)
        interleaved = min(machine.adder_latency, tiles) if "interleave" in on else 1
        computing = tiles * (kept * machine.adder_latency / interleaved + machine.latency)
    else:
        tiles = math.ceil(kept / machine.rows) * math.ceil(r / machine.columns)
        computing = tiles * (p + machine.latency)
    weights, sorting = q * r * machine.value_bytes, 0.0
    if pattern is not None and "pre-generation" in on:
        weights = stored_bytes(q * r, pattern, machine)
    elif pattern is not None:
        sorting = q * r / machine.sorted_weights
    moved = machine.value_bytes * (p * q + p * r) + weights
    multiplications = p * kept * r
    cycles = max(computing, moved / machine.bandwidth) + sorting
    return StageCost(
        layer=layer.name,
        stage=stage,
        mapping=mapping,
        sparse=pattern is not None,
        cycles=cycles,
        multiplications=multiplications,
        utilisation=multiplications / (machine.rows * machine.columns * cycles),
        bytes=moved,
        energy=multiplications * machine.multiplication_energy + moved * machine.byte_energy,
    )


def _update(layer: Product, pattern: NM | None, machine: Accelerator, on: frozenset[str]) -> StageCost:
    moved = 5.0 * layer.weights * machine.master_bytes
    computing = layer.weights / machine.updated_weights
    if pattern is not None and "pre-generation" in on:
        copies = 1 if layer.first else 2
        moved += copies * stored_bytes(layer.weights, pattern, machine)
        computing = max(computing, copies * layer.weights / machine.sorted_weights)
    cycles = max(computing, moved / machine.bandwidth)
    return StageCost(layer.name, "update", None, False, cycles, 0.0, 0.0, moved, moved * machine.byte_energy)


def stored_bytes(weights: int, pattern: NM, machine: Accelerator) -> float:
    """Bytes of a sparse copy: n of m values, each with its place in log₂ m bits."""
    return weights * pattern.n / pattern.m * (machine.value_bytes + math.log2(pattern.m) / 8)

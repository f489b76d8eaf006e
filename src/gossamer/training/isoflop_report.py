"""The bill of a sparse iso-FLOP transformation: operations, weights, masks to choose from, and what it really takes."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.measure.flops import count_flops
from gossamer.measure.windows import evaluation_mode
from gossamer.training.sparse_ift import IsoFlop

Example = Tensor | Sequence[Any] | Mapping[str, Any]


def log2_choices(size: int, chosen: int) -> float:
    """``log2 C(size, chosen)``: bits that it takes to name one mask with so many weights.

    Raises
    ------
    ConfigurationError
        If not 0 <= chosen <= size.
    """
    if not 0 <= chosen <= size:
        raise ConfigurationError(f"{chosen} of {size} weights cannot be chosen; 0 <= chosen <= size is needed")
    log = math.lgamma(size + 1) - math.lgamma(chosen + 1) - math.lgamma(size - chosen + 1)
    return log / math.log(2)


@dataclass(frozen=True)
class LayerBill:
    """One layer of the dense model and what has taken its place.

    Attributes
    ----------
    name
        Of the layer.
    dense_flops, flops
        Operations of a forward pass before, and after with zeros left out.
    dense_weights, stored, kept
        Weights before, and after: with zeros, and without.
    log2_masks
        Bits of the choice between masks; 0 where all is dense.
    """

    name: str
    dense_flops: int
    flops: int
    dense_weights: int
    stored: int
    kept: int
    log2_masks: float


@dataclass(frozen=True)
class IsoFlopReport:
    """What a transformation costs; printing it gives a table.

    Attributes
    ----------
    layers
        In the order of the dense model.
    dense_other, other
        Operations outside of layers, such as attention.
    computed
        Operations of the transformed model if zeros are computed too.
    dense_seconds, seconds
        Median time of a forward pass of either as torch runs it, zeros computed.
    """

    layers: tuple[LayerBill, ...]
    dense_other: int
    other: int
    computed: int
    dense_seconds: float
    seconds: float

    @property
    def dense_flops(self) -> int:
        """Operations of the dense model."""
        return sum(row.dense_flops for row in self.layers) + self.dense_other

    @property
    def flops(self) -> int:
        """Operations of the transformed model, zeros left out."""
        return sum(row.flops for row in self.layers) + self.other

    @property
    def ratio(self) -> float:
        """Operations after over before."""
        return self.flops / self.dense_flops

    @property
    def log2_masks(self) -> float:
        """Bits of the choice between masks, all layers together."""
        return sum(row.log2_masks for row in self.layers)

    def training_ratio(self, every: int | None = None) -> float:
        """Operations of a training step after over before, on average.

        Parameters
        ----------
        every
            Steps between two dense gradients of RigL, ``(3 f ΔT + 2 f + F) / (ΔT + 1)`` for f operations with zeros
            left out and F with all of them [Evci et al., 2020, arXiv 1911.11134, appendix]. By default there is none.
        """
        step = 3 * self.flops
        if every is not None:
            step = (3 * self.flops * every + 2 * self.flops + self.computed) / (every + 1)
        return step / (3 * self.dense_flops)

    def __str__(self) -> str:
        head = f"{'layer':32} {'FLOPs before':>14} {'after':>14}"
        head += "".join(f" {title:>12}" for title in ("weights", "stored", "kept", "log2 masks"))
        rows = [
            f"{row.name[-32:]:32} {row.dense_flops:14,} {row.flops:14,} {row.dense_weights:12,} {row.stored:12,} "
            f"{row.kept:12,} {row.log2_masks:12,.0f}"
            for row in self.layers
        ]
        tail = (
            f"all: {self.dense_flops:,} → {self.flops:,} operations ({self.ratio:.4f} times), zeros left out; "
            f"{1e3 * self.dense_seconds:.3g} → {1e3 * self.seconds:.3g} ms, zeros computed"
        )
        return "\n".join([head, *rows, tail])


def isoflop_report(dense: nn.Module, transformed: IsoFlop, example: Example, repeats: int = 5) -> IsoFlopReport:
    """Compare a transformed model with the one it was made from.

    Parameters
    ----------
    dense
        The model before.
    transformed
        What :func:`~gossamer.training.sparse_ift.sparse_ift` returned; its weights need not be sparse yet.
    example
        An input; see :func:`gossamer.measure.flops.count_flops`.
    repeats
        Forward passes that are timed, of either in turn.

    Raises
    ------
    ConfigurationError
        If `repeats` is below 1.
    """
    if repeats < 1:
        raise ConfigurationError(f"repeats is {repeats}; at least one forward pass has to be timed")
    before, after = count_flops(dense, example), count_flops(transformed.model, example)
    rows = []
    flops = {row.name: row for row in after.layers}
    for row in before.layers:
        parts = [name for name in flops if name == row.name or name.startswith(f"{row.name}.")]
        costs, stored, kept, bits = 0, 0, 0, 0.0
        for part in parts:
            size = transformed.model.get_submodule(part).weight.numel()
            left = size - round(transformed.sparsities.get(f"{part}.weight", 0) * size)
            costs += flops[part].dense // size * left
            stored, kept, bits = stored + size, kept + left, bits + log2_choices(size, left)
        weights = dense.get_submodule(row.name).weight.numel()
        rows.append(LayerBill(row.name, row.dense, costs, weights, stored, kept, bits))
    times = _times([dense, transformed.model], example, repeats)
    return IsoFlopReport(tuple(rows), before.other, after.other, after.dense, *times)


def _times(models: Sequence[nn.Module], example: Example, repeats: int) -> list[float]:
    """Median seconds of a forward pass, models in turn."""
    found: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, times in zip(models, found):
            with evaluation_mode(model), torch.no_grad():
                start = time.perf_counter()
                _call(model, example)
                times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in found]  # the first pass warms up


def _call(model: nn.Module, example: Example) -> None:
    if isinstance(example, Tensor):
        model(example)
    elif isinstance(example, Mapping):
        model(**example)
    else:
        model(*example)

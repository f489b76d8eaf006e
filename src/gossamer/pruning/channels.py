"""What pruners of feed-forward channels share, and the three that need no idea of their own.

A channel in the middle of a feed-forward layer is a row of each widening matrix and a column of the one that maps
back. It goes as a whole, so the layer that is left is a smaller dense layer: nothing sparse has to be stored, and any
hardware is faster with it. :class:`ChannelPruner` reads the dense model once, block by block, asks the method for a
score of each channel and a share for each layer, and then takes the channels out.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.alignment import aligned_widths
from gossamer.core.calibration import InputNorm, InputSample, Statistic, Statistics, observe
from gossamer.core.masks import MaskSet
from gossamer.core.progress import track
from gossamer.core.registry import register
from gossamer.core.selection import keep_highest
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError, check_sparsity
from gossamer.models.blocks import Batch, Stage, find_stacks, stages, whole_model
from gossamer.models.feedforward import FeedForward, record_widths
from gossamer.models.feedforward_search import choose_feed_forwards, find_feed_forwards
from gossamer.models.offload import onloaded
from gossamer.pruning.base import LayerReport, PruningResult, _name, _plain
from gossamer.pruning.magnitude import hash_seed


@dataclass(repr=False)
class ChannelPruningResult(PruningResult):
    """What a pruner of channels returns.

    The masks, and the shapes of the layer reports, are those *before* pruning: they say which rows and columns of the
    original matrices the smaller ones are made of.

    Attributes
    ----------
    widths
        Feed-forward layer → channels before and after.
    importance
        Block → how much it changes its input, where the method measures that; else empty.
    """

    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)


@dataclass
class ChannelPruner:
    """Base of the pruners that take whole channels out of feed-forward layers.

    Parameters
    ----------
    sparsity
        Fraction in [0, 1) of all feed-forward channels of the model that goes.
    allocation
        How that is spread over the layers: ``"uniform"``, or feed-forward layer → sparsity.
    align
        Widths become multiples of this (or stay whole), at least one. By default 128 where a layer has 1024 channels
        or more, which is what matrix units like, and 1 where it has fewer.
        :func:`gossamer.core.alignment.aligned_widths` says how the total
        is met.
    physical
        True takes the channels out; False only zeroes them, and every shape stays.
    include, exclude
        Globs on the names of feed-forward layers, such as ``"model.layers.0.*"``.
    """

    sparsity: float = 0.5
    _: dataclasses.KW_ONLY
    allocation: str | Mapping[str, float] = "uniform"
    align: int | None = None
    physical: bool = True
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    statistics: ClassVar[tuple[type[Statistic], ...]] = ()
    """What must be known about the input of the matrix that maps back; none means that the method needs no data."""

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.align is not None and (not isinstance(self.align, int) or self.align < 1):
            raise ConfigurationError(f"align is {self.align!r}; it must be a positive integer such as 128, or None")

    def score(self, layer: FeedForward, stats: Statistics | None) -> Tensor:
        """Score of each channel, ``(m,)``, higher = more worth keeping."""
        raise ConfigurationError(f"{type(self).__name__} defines no score")

    def distance(self, before: Tensor, after: Tensor) -> Tensor | None:
        """How far a block moves its input, ``(batch, tokens, d)`` → ``(batch, tokens)``; None if it does not matter."""
        return None

    def sparsities(self, layers: Sequence[FeedForward], reading: Reading) -> Mapping[str, float]:
        """Share of its channels that each layer is to lose."""
        if isinstance(self.allocation, Mapping):
            for layer in layers:
                if layer.name not in self.allocation:
                    raise UnknownNameError("layer of the allocation", layer.name, self.allocation)
                check_sparsity(self.allocation[layer.name], f"sparsity of {layer.name}")
            return self.allocation
        if self.allocation != "uniform":
            raise UnknownNameError("allocation", self.allocation, ["uniform"])
        return {layer.name: self.sparsity for layer in layers}

    def compensation(self, layer: FeedForward, keep: Tensor, stats: Statistics | None) -> Tensor | None:
        """What is added to the output in place of the channels that go, ``(d,)``; None for nothing."""
        return None

    @torch.no_grad()
    def prune(
        self,
        model: nn.Module,
        data: Iterable[Batch] | None = None,
        *,
        device: torch.device | str | None = None,
        workspace: str | Path | None = None,
        progress: bool = True,
    ) -> ChannelPruningResult:
        """Prune a model in place.

        Parameters
        ----------
        model
            Any module with feed-forward layers. If accelerate keeps it elsewhere, one block at a time is brought in.
        data
            Calibration batches, for methods that need them.
        device
            Where to run blocks; by default where they are.
        workspace
            Directory for the new weights of a model that accelerate keeps on disk. Nothing else is kept: it is one
            pass over the data, and the model is changed only after that.
        progress
            Whether to show a bar.

        Raises
        ------
        TargetError, NonFiniteError, ConfigurationError
            Before anything is changed, naming the layer.
        CalibrationError
            If data is needed and there is none.
        """
        started = time.perf_counter()
        batches = self._check_data(data)
        every = find_feed_forwards(model)
        layers = choose_feed_forwards(model, every, self.include, self.exclude)
        for target in (target for layer in layers for target in layer.targets):
            if not target.parameter.is_meta:
                target.check_finite()
        run = _Run(self, model, layers, device, workspace, progress)
        reading = run.read_with_data(batches) if batches else run.read()
        before = {layer.name: layer.width for layer in layers}
        total = self.allocated_sparsity(before)
        after = aligned_widths(self.sparsities(layers, reading), before, total, self.align)
        masks, reports = run.take_out(reading, after)
        if self.physical:
            record_widths(model, {layer.name: before.get(layer.name, layer.width) for layer in every}, every)
        seconds = {**run.seconds, "total": time.perf_counter() - started}
        widths = {name: (before[name], after[name]) for name in before}
        return ChannelPruningResult(MaskSet(masks), reports, seconds, self.settings(), widths, reading.importance)

    def allocated_sparsity(self, widths: Mapping[str, int]) -> float:
        """Of the whole: the one asked for, or what a given allocation makes of it."""
        if not isinstance(self.allocation, Mapping):
            return self.sparsity
        gone = sum(width * self.allocation.get(name, self.sparsity) for name, width in widths.items())
        return gone / sum(widths.values())

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters as plain values, for reports and checkpoints."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"method": _name(type(self)), **{k: _plain(v) for k, v in values.items()}}

    def _check_data(self, data: Iterable[Batch] | None) -> list[Batch] | None:
        if data is None:
            if self.statistics:
                raise CalibrationError(f"{_name(type(self))} needs calibration data: pass batches of token ids")
            return None
        batches = list(data)
        if not batches:
            raise CalibrationError("the calibration data is empty: at least one batch is needed")
        return batches


@dataclass
class Reading:
    """What one pass of the dense model tells.

    Attributes
    ----------
    scores
        Feed-forward layer → score of each channel, ``(m,)``, on the CPU.
    statistics
        Feed-forward layer → statistics of the input of the matrix that maps back.
    importance
        Block → mean distance between its input and its output.
    """

    scores: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)


@dataclass
class _Run:
    """One walk of a pruner through a model to read it, and one to change it."""

    pruner: ChannelPruner
    model: nn.Module
    layers: list[FeedForward]
    device: torch.device | str | None
    workspace: str | Path | None
    progress: bool
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "statistics": 0.0, "selection": 0.0})

    def read(self) -> Reading:
        """Score without data."""
        reading = Reading()
        for layers in self._by_block("reading", self.device):
            for layer in layers:
                self._score(layer, None, reading)
        return reading

    def read_with_data(self, batches: list[Batch]) -> Reading:
        """Score with the statistics of the dense model, and measure how far each block moves its input."""
        reading = Reading()
        count = sum(len(stack.blocks) for stack in find_stacks(self.model)) or 1
        walk = stages(self.model, batches, device=self.device, workspace=self.workspace)
        for stage in track(walk, f"reading: {_name(type(self.pruner))}", count, self.progress):
            self._read_stage(stage, reading)
        if len(reading.scores) < len(self.layers):
            self._read_stage(whole_model(self.model, batches, self.device), reading)
        return reading

    def take_out(self, reading: Reading, widths: Mapping[str, int]) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """Take the channels out, or silence them, until every layer has its width."""
        masks: dict[str, Tensor] = {}
        reports: dict[str, list[LayerReport]] = {}
        for layers in self._by_block("pruning", None):
            for layer in layers:
                started = time.perf_counter()
                scores = reading.scores[layer.name].unsqueeze(0)
                keep = keep_highest(scores, layer.width - widths[layer.name], layer.name)[0]
                masks |= layer.masks(keep)
                reports[layer.name] = self._change(layer, keep, reading.statistics.get(layer.name), started)
        return masks, [report for layer in self.layers for report in reports[layer.name]]

    def _read_stage(self, stage: Stage, reading: Reading) -> None:
        here = [x for x in self.layers if x.name not in reading.scores and stage.owns(x.down.module_name)]
        moved: list[tuple[float, int]] = []

        def visit(before: Tensor, after: Tensor) -> None:
            distance = self.pruner.distance(before, after) if before.numel() else None
            if distance is not None:
                moved.append((float(distance.sum(dtype=torch.float64)), distance.numel()))

        kinds = (*self.pruner.statistics, InputSample)
        with self._timed("forward"), observe([layer.down for layer in here], kinds) as observation:
            stage.forward(visit, store=bool(stage.name))
        self.seconds["statistics"] += observation.seconds
        self.seconds["forward"] -= observation.seconds
        if moved and here:
            reading.importance[stage.name] = sum(far for far, _ in moved) / sum(n for _, n in moved)
        for layer in here:
            self._score(layer, observation.get(layer.down.name), reading)

    def _score(self, layer: FeedForward, stats: Statistics | None, reading: Reading) -> None:
        if stats is not None:
            stats.check_finite(layer.down.name)
            reading.statistics[layer.name] = stats
        with self._timed("selection"):
            reading.scores[layer.name] = self.pruner.score(layer, stats).double().cpu()

    def _change(self, layer: FeedForward, keep: Tensor, stats: Statistics | None, started: float) -> list[LayerReport]:
        down, gone = layer.down, ~keep
        shapes = {target.name: tuple(target.shape) for target in layer.targets}
        added = self.pruner.compensation(layer, keep, stats)
        error = _output_error(down.matrix(), gone, added, stats)
        (layer.shrink_ if self.pruner.physical else layer.zero_)(keep)
        if added is not None and gone.any():
            layer.add_bias_(added)
        seconds = time.perf_counter() - started
        self.seconds["selection"] += seconds
        share = float(gone.double().mean())
        return [
            LayerReport(
                target.name,
                shapes[target.name],
                share,
                error if target is down else None,
                seconds / len(layer.targets),
            )
            for target in layer.targets
        ]

    def _by_block(self, what: str, device: torch.device | str | None) -> Iterator[list[FeedForward]]:
        blocks = {name: block for stack in find_stacks(self.model) for name, block in stack.blocks.items()}
        groups: dict[str, list[FeedForward]] = {}
        for layer in self.layers:
            groups.setdefault(layer.block, []).append(layer)
        description = f"{what}: {_name(type(self.pruner))}"
        for name, layers in track(groups.items(), description, enabled=self.progress):
            with onloaded(blocks.get(name, layers[0].module), device, self.workspace):
                yield layers

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started


def _output_error(down: Tensor, gone: Tensor, added: Tensor | None, stats: Statistics | None) -> float | None:
    """Relative Frobenius error of the layer's output on the sampled rows."""
    if stats is None or InputSample not in stats or not len(stats[InputSample].rows):
        return None
    rows, weight = stats[InputSample].rows.to(down.device), down.float()
    gone = gone.to(down.device)
    lost = rows[:, gone] @ weight[:, gone].t()
    if added is not None:
        lost = lost - added.float()
    norm = float((rows @ weight.t()).norm())
    return float(lost.norm()) / norm if norm > 0 and math.isfinite(norm) else None


@register(
    "magnitude-sp",
    paper="cfsp",
    when="after training",
    granularity="channels",
    needs_data=False,
    criterion=("magnitude",),
    patterns=("channels",),
)
@dataclass
class MagnitudeChannels(ChannelPruner):
    """Take out the feed-forward channels whose column of the matrix that maps back is shortest.

    The structured form of magnitude pruning that CFSP compares with ("Magnitude-SP").
    """

    def score(self, layer: FeedForward, stats: Statistics | None) -> Tensor:
        """``‖W_down,:j‖₂``."""
        return layer.down.matrix().float().norm(dim=0)


@register(
    "wanda-sp",
    paper="cfsp",
    when="after training",
    granularity="channels",
    criterion=("magnitude", "activation"),
    patterns=("channels",),
)
@dataclass
class WandaChannels(ChannelPruner):
    """Take out the feed-forward channels with the least |W| times norm of the input, averaged over their column.

    The structured form of Wanda that FLAP and CFSP compare with ("Wanda-SP") [An et al., 2024, arXiv 2312.11983].
    """

    statistics: ClassVar[tuple[type[Statistic], ...]] = (InputNorm,)

    def score(self, layer: FeedForward, stats: Statistics | None) -> Tensor:
        """``mean_i |W_down,ij| · ‖h_j‖₂``; without the norm for a layer that no calibration token reached."""
        magnitude = layer.down.matrix().abs().float().mean(0)
        return magnitude if stats is None else magnitude * stats[InputNorm].norm


@register(
    "random-channels",
    paper="cfsp",
    when="after training",
    granularity="channels",
    needs_data=False,
    criterion=("random",),
    patterns=("channels",),
)
@dataclass
class RandomChannels(ChannelPruner):
    """Take out feed-forward channels at random: the control.

    Parameters
    ----------
    seed
        Of the draw; together with the layer's name it decides, whatever the order of the layers.
    """

    seed: int = 0

    def score(self, layer: FeedForward, stats: Statistics | None) -> Tensor:
        """Uniform noise."""
        generator = torch.Generator().manual_seed(hash_seed(self.seed, layer.name))
        return torch.rand(layer.width, generator=generator)

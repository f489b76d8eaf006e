"""What all pruners of trained weights share: the walk through the model, the counting and the reporting.

A pruner is a dataclass of hyper-parameters that says which statistics of its inputs a layer needs and how they turn
into scores. :class:`LayerwisePruner` does the rest: it visits the model block by block, gathers the statistics with
the blocks before it already pruned, selects, zeroes, and measures what each layer lost.
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

from gossamer.core.allocation import allocate, outlier_ratio, outlier_weighted
from gossamer.core.calibration import InputSample, Statistic, Statistics, observe
from gossamer.core.masks import MaskSet
from gossamer.core.patterns import Pattern, Unstructured
from gossamer.core.progress import track
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target, find_targets
from gossamer.errors import CalibrationError, ConfigurationError, check_sparsity
from gossamer.models.blocks import Batch, Stage, find_stacks, stages, whole_model
from gossamer.models.offload import onloaded
from gossamer.pruning.journal import Journal


@dataclass
class LayerReport:
    """What happened to one layer.

    Attributes
    ----------
    name
        Parameter name (with an expert's index).
    shape
        Of the weight as a matrix.
    sparsity
        Achieved: zeros of the mask over all weights.
    error
        ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ (Frobenius) on a sample of its inputs; None where no data was seen.
    seconds
        Spent on scoring, selecting and updating.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    error: float | None
    seconds: float


@dataclass
class PruningResult:
    """What a pruner returns; the model itself was changed in place.

    Attributes
    ----------
    masks
        Which weights remain.
    layers
        A report for each layer, in order.
    seconds
        Phase → seconds: ``forward`` (running blocks), ``statistics``, ``selection``, ``total``.
    settings
        Everything needed to repeat it.
    """

    masks: MaskSet
    layers: list[LayerReport]
    seconds: dict[str, float]
    settings: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Zeros over weights, of the layers that were pruned."""
        return self.masks.sparsity

    def __repr__(self) -> str:
        return (
            f"PruningResult({self.settings.get('method')}, {len(self.layers)} layers, "
            f"{self.sparsity:.2%} of {self.masks.total:,} weights zero, {self.seconds.get('total', 0):.1f} s)"
        )


@dataclass
class LayerwisePruner:
    """Base of the pruners that treat one layer after the other.

    Parameters
    ----------
    sparsity
        Fraction of zeros in [0, 1), of the weights of all targets. Default 0.5, or what an N:M pattern fixes.
    pattern
        Shape of the zeros, as an object or as text such as ``"2:4"``.
    allocation
        How the zeros are spread over the layers: ``"uniform"``, ``"erdos-renyi"``, ``"erdos-renyi-kernel"``,
        ``"outliers"`` (OWL), or parameter name → sparsity.
    include, exclude
        Globs on module names; see :func:`gossamer.core.targets.find_targets`.
    heads
        Whether output heads are pruned too.
    """

    sparsity: float | None = None
    pattern: Pattern | str = Unstructured("layer")
    _: dataclasses.KW_ONLY
    allocation: str | Mapping[str, float] = "uniform"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    heads: bool = False

    statistics: ClassVar[tuple[type[Statistic], ...]] = ()
    """What one calibration pass must collect for each layer; none means that the method needs no data."""

    def __post_init__(self) -> None:
        self.pattern = Pattern.parse(self.pattern)
        if self.sparsity is None and self.pattern.sparsity is None:
            self.sparsity = 0.5
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        self.sparsity = float(self.pattern.resolve(self.sparsity))
        if self.pattern.sparsity is not None and self.allocation != "uniform":
            raise ConfigurationError(
                f"the pattern {self.pattern} fixes every layer's sparsity; allocation must be uniform"
            )

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """Scores of the shape of the weight, higher = more worth keeping."""
        raise ConfigurationError(f"{type(self).__name__} defines no score")

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:
        """Prune one layer in place and return its mask. Methods that also update weights override this."""
        mask = self.pattern.select(self.score(target, stats), sparsity, target.name)
        target.matrix().masked_fill_(~mask, 0)
        return mask

    def prune(
        self,
        model: nn.Module,
        data: Iterable[Batch] | None = None,
        *,
        device: torch.device | str | None = None,
        workspace: str | Path | None = None,
        progress: bool = True,
    ) -> PruningResult:
        """Prune a model in place.

        Parameters
        ----------
        model
            Any module. If accelerate keeps it on the CPU or on disk, one block at a time is brought in.
        data
            Calibration batches, for methods that need them.
        device
            Where to run blocks; by default where they are.
        workspace
            Directory in which each finished block is kept, so that an interrupted run goes on where it stopped.
        progress
            Whether to show a bar.

        Raises
        ------
        TargetError, PatternError, NonFiniteError
            Before anything is changed, naming the layer.
        CalibrationError
            If data is needed and there is none.
        """
        started = time.perf_counter()
        batches = self._check_data(data)
        targets = find_targets(model, self.include, self.exclude, heads=self.heads)
        for target in targets:
            self.pattern.check_shape(target.shape, target.name)
            if not target.parameter.is_meta:
                target.check_finite()
        run = _Run(
            self,
            model,
            batches,
            targets,
            device,
            Journal.open(workspace, self.settings(), batches, targets),
            progress,
        )
        if isinstance(self.pattern, Unstructured) and self.pattern.scope == "model":
            run.jointly()
        else:
            run.layer_by_layer(self._allocate(run, targets))
        run.seconds["total"] = time.perf_counter() - started
        return PruningResult(MaskSet(run.masks()), run.reports(), dict(run.seconds), self.settings())

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters as plain values, for reports and checkpoints."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"method": _name(type(self)), **{k: _plain(v) for k, v in values.items()}}

    def _check_data(self, data: Iterable[Batch] | None) -> list[Batch] | None:
        if data is not None:
            batches = list(data)
            if not batches:
                raise CalibrationError("the calibration data is empty: at least one batch is needed")
            return batches
        if self.statistics or self.allocation == "outliers":
            raise CalibrationError(f"{_name(type(self))} needs calibration data: pass batches of token ids")
        return None

    def _allocate(self, run: _Run, targets: list[Target]) -> dict[str, Sparsity]:
        shapes = {target.name: tuple(target.shape) for target in targets}
        assert self.sparsity is not None
        if self.allocation != "outliers":
            return dict(allocate(self.allocation, shapes, self.sparsity))
        return dict(outlier_weighted(run.outlier_ratios(), shapes, self.sparsity))


def _name(kind: type) -> str:
    from gossamer.core.registry import REGISTER

    return next((name for name, spec in REGISTER.items() if spec.factory is kind), kind.__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, LayerwisePruner):
        return value.settings()
    return str(value)


class _LazyScores(Mapping[str, Tensor]):
    """Scores of all layers, computed when they are asked for and never held together."""

    def __init__(self, pruner: LayerwisePruner, targets: list[Target], stats: Mapping[str, Statistics]):
        self._pruner, self._stats = pruner, stats
        self._targets = {target.name: target for target in targets}

    def __getitem__(self, name: str) -> Tensor:
        return self._pruner.score(self._targets[name], self._stats.get(name)).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


@dataclass
class _Run:
    """One walk of a pruner through a model."""

    pruner: LayerwisePruner
    model: nn.Module
    batches: list[Batch] | None
    targets: list[Target]
    device: torch.device | str | None
    journal: Journal
    progress: bool
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "statistics": 0.0, "selection": 0.0})
    _masks: dict[str, Tensor] = field(default_factory=dict)
    _reports: dict[str, LayerReport] = field(default_factory=dict)

    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, of the shape of the parameter; stacked experts are put together again."""
        by_parameter: dict[str, Tensor] = {}
        for target in self.targets:
            mask = self._masks[target.name]
            mask = mask.transpose(0, 1) if target.transposed else mask
            if target.index is None:
                by_parameter[target.parameter_name] = mask
            else:
                whole = by_parameter.setdefault(
                    target.parameter_name, torch.ones(target.parameter.shape, dtype=torch.bool)
                )
                whole[target.index] = mask
        return by_parameter

    def reports(self) -> list[LayerReport]:
        return [self._reports[target.name] for target in self.targets]

    def layer_by_layer(self, sparsities: Mapping[str, Sparsity]) -> None:
        """Prune block after block; each block's statistics see the pruned blocks before it."""
        if self.batches is None:
            self._without_data(sparsities)
            return
        done: set[str] = set()
        for stage in self._stages():
            here = [target for target in self.targets if stage.owns(target.module_name)]
            if here and not self._restore(stage.name, here):
                self._prune_stage(stage, here, sparsities)
            done.update(target.name for target in here)
            if stage.name:
                with self._timed("forward"):
                    stage.forward(store=True)
        rest = [target for target in self.targets if target.name not in done]
        if rest and not self._restore("rest", rest):
            self._prune_stage(whole_model(self.model, self.batches, self.device), rest, sparsities)

    def jointly(self) -> None:
        """Prune with one ranking over all layers; the statistics are those of the dense model."""
        stats = self._dense_statistics(self.pruner.statistics) if self.batches else {}
        with self._timed("selection"):
            scores = _LazyScores(self.pruner, self.targets, stats)
            masks = self.pruner.pattern.select_jointly(scores, self.pruner.sparsity)
        for target in self.targets:
            mask = masks[target.name].to(target.parameter.device)
            dense = target.matrix().clone()
            target.matrix().masked_fill_(~mask, 0)
            self._report(target, mask, _output_error(target, dense, stats.get(target.name)), 0.0)

    def outlier_ratios(self) -> dict[str, float]:
        """Share of outlying scores of each block, told to every layer in it (OWL's measure on Wanda's scores)."""
        from gossamer.core.calibration import InputNorm, per_weight
        from gossamer.core.scores import input_weighted

        stats = self._dense_statistics((InputNorm,))
        blocks: dict[str, list[Tensor]] = {}
        owner = {}
        names = [name for stack in find_stacks(self.model) for name in stack.blocks]
        for target in self.targets:
            owner[target.name] = next((n for n in names if target.module_name.startswith(f"{n}.")), target.name)
            if target.name in stats:
                norm = per_weight(target, stats[target.name][InputNorm].norm)
                score = input_weighted(target.matrix(), norm).flatten()
                blocks.setdefault(owner[target.name], []).append(score)
        ratios = {name: outlier_ratio(torch.cat(scores)) for name, scores in blocks.items()}
        mean = sum(ratios.values()) / max(1, len(ratios))
        return {target.name: ratios.get(owner[target.name], mean) for target in self.targets}

    def _dense_statistics(self, kinds: tuple[type[Statistic], ...]) -> dict[str, Statistics]:
        assert self.batches is not None
        collected: dict[str, Statistics] = {}
        for stage in self._stages("reading"):
            here = [target for target in self.targets if stage.owns(target.module_name)]
            with self._timed("forward"), observe(here, (*kinds, InputSample)) as observation:
                stage.forward(store=bool(stage.name))
            collected.update(observation)
        return collected

    def _stages(self, description: str = "pruning") -> Iterator[Stage]:
        assert self.batches is not None
        count = sum(len(stack.blocks) for stack in find_stacks(self.model)) or 1
        walk = stages(self.model, self.batches, device=self.device, workspace=self.journal.directory)
        return track(walk, f"{description}: {_name(type(self.pruner))}", count, self.progress)

    def _without_data(self, sparsities: Mapping[str, Sparsity]) -> None:
        groups: dict[str, list[Target]] = {}
        names = {n: block for stack in find_stacks(self.model) for n, block in stack.blocks.items()}
        for target in self.targets:
            owner = next((n for n in names if target.module_name.startswith(f"{n}.")), target.module_name)
            groups.setdefault(owner, []).append(target)
        for owner, group in track(groups.items(), f"pruning: {_name(type(self.pruner))}", enabled=self.progress):
            with onloaded(names.get(owner, group[0].module), self.device, self.journal.directory):
                if not self._restore(owner, group):
                    for target in group:
                        self._prune_target(target, None, sparsities[target.name])
                    self._keep(owner, group)

    def _prune_stage(self, stage: Stage, targets: list[Target], sparsities: Mapping[str, Sparsity]) -> None:
        with self._timed("forward"), observe(targets, (*self.pruner.statistics, InputSample)) as observation:
            stage.forward()
        self.seconds["statistics"] += observation.seconds
        self.seconds["forward"] -= observation.seconds
        for target in targets:
            stats = observation.get(target.name)
            if stats is not None:
                stats.check_finite(target.name)
            self._prune_target(target, stats, sparsities[target.name])
        self._keep(stage.name or "rest", targets)

    def _prune_target(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> None:
        target.check_finite()
        dense = target.matrix().clone()
        started = time.perf_counter()
        mask = self.pruner.prune_layer(target, stats, sparsity)
        seconds = time.perf_counter() - started
        self.seconds["selection"] += seconds
        self._report(target, mask, _output_error(target, dense, stats), seconds)

    def _report(self, target: Target, mask: Tensor, error: float | None, seconds: float) -> None:
        self._masks[target.name] = mask.cpu()
        zeros = 1 - float(mask.float().mean(dtype=torch.float64))
        self._reports[target.name] = LayerReport(target.name, tuple(target.shape), zeros, error, seconds)

    def _restore(self, name: str, targets: list[Target]) -> bool:
        entries = self.journal.restore(name, targets)
        for target, (mask, report) in entries.items():
            self._masks[target.name] = mask
            self._reports[target.name] = LayerReport(**{**report, "shape": tuple(report["shape"])})
        return bool(entries)

    def _keep(self, name: str, targets: list[Target]) -> None:
        self.journal.keep(name, {t: (self._masks[t.name], dataclasses.asdict(self._reports[t.name])) for t in targets})

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started


def _output_error(target: Target, dense: Tensor, stats: Statistics | None) -> float | None:
    """Relative Frobenius error of the layer's output on the sampled rows."""
    if stats is None or InputSample not in stats or getattr(target.module, "groups", 1) != 1:
        return None
    rows = stats[InputSample].rows
    if not len(rows):
        return None
    before = dense.flatten(1).float()
    change = before - target.matrix().flatten(1).float()
    norm = float((rows @ before.t()).norm())
    return float((rows @ change.t()).norm()) / norm if norm > 0 and math.isfinite(norm) else None


def prune(
    model: nn.Module,
    method: str | LayerwisePruner = "wanda",
    *,
    calibration: Iterable[Batch] | None = None,
    device: torch.device | str | None = None,
    workspace: str | Path | None = None,
    progress: bool = True,
    **parameters: Any,
) -> PruningResult:
    """Prune a model in place with a method given by name or as an object.

    Parameters
    ----------
    model
        Any module, Hugging Face or plain.
    method
        Name of a registered pruner, or a pruner.
    calibration
        Batches for the methods that need data.
    device, workspace, progress
        See :meth:`LayerwisePruner.prune`.
    **parameters
        Hyper-parameters of a method given by name.

    Examples
    --------
    >>> import torch, gossamer
    >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> gossamer.prune(layer, "magnitude", sparsity=0.5, progress=False).sparsity
    0.5
    """
    if isinstance(method, str):
        from gossamer.methods import create
        from gossamer.methods import method as specification

        spec = specification(method)
        if spec.when != "after training":
            raise ConfigurationError(f"{method!r} acts {spec.when}; prune takes methods that act after training")
        method = create(method, **parameters)
    elif parameters:
        raise ConfigurationError(f"{sorted(parameters)} are given beside a ready-made pruner; set them on it")
    return method.prune(model, calibration, device=device, workspace=workspace, progress=progress)

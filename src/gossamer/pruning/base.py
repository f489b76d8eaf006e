"""What all pruners of trained weights share: the walk through the model, the counting and the reporting.

A pruner is a dataclass of hyper-parameters that says which statistics of its inputs a layer needs and how they turn
into scores. :class:`LayerwisePruner` does the rest: it visits the model block by block, gathers the statistics with
the blocks before it already pruned, selects, zeroes, and measures what each layer lost.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.allocation import allocate, outlier_weighted
from gossamer.core.calibration import Statistic, Statistics
from gossamer.core.patterns import Pattern, Unstructured
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target, find_targets
from gossamer.errors import CalibrationError, ConfigurationError, check_sparsity
from gossamer.models.blocks import Batch
from gossamer.pruning.journal import Journal
from gossamer.pruning.result import LayerReport, PruningResult
from gossamer.pruning.walk import Walk

__all__ = ["LayerReport", "LayerwisePruner", "PruningResult", "prune"]


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

    @property
    def needs_data(self) -> bool:
        """Whether there is no pruning without calibration data; where there is, data is only measured on."""
        return bool(self.statistics) or self.allocation == "outliers"

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """Scores of the shape of the weight, higher = more worth keeping."""
        raise ConfigurationError(f"{type(self).__name__} defines no score")

    def prepare_layers(
        self, targets: Sequence[Target], stats: Statistics | None, sparsities: Sequence[Sparsity]
    ) -> None:
        """Look at the layers that share an input before :meth:`prune_layer` is called for each of them in turn.

        A method that can do work once for all of them keeps what it found in ``stats.derived``. The base does nothing.
        """

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
        run = Walk(
            self,
            model,
            batches,
            targets,
            device,
            Journal.open(workspace, self.settings(), batches, targets),
            progress,
            _name(type(self)),
        )
        if isinstance(self.pattern, Unstructured) and self.pattern.scope == "model":
            run.jointly()
        else:
            run.layer_by_layer(self._allocate(run, targets))
        run.seconds["total"] = time.perf_counter() - started
        return PruningResult(run.masks(), run.reports(), dict(run.seconds), self.settings())

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
        if self.needs_data:
            raise CalibrationError(f"{_name(type(self))} needs calibration data: pass batches of token ids")
        return None

    def _allocate(self, run: Walk, targets: list[Target]) -> dict[str, Sparsity]:
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

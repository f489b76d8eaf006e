"""What methods that refine a mask share: they let another pruner choose first, then exchange pruned and kept weights.

A refinement needs a value for every weight, also for those that are zero now: a weight that stays keeps what the
initial method made of it, a weight that comes back takes its dense value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.calibration import Statistic, Statistics
from gossamer.core.patterns import NM, Pattern, Unstructured
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target, find_targets
from gossamer.errors import CheckpointError, ConfigurationError, TargetError, UnknownNameError
from gossamer.models.blocks import Batch
from gossamer.pruning.base import LayerwisePruner, PruningResult
from gossamer.storage.atomic import write_json

CURRENT = "current"


@dataclass(frozen=True)
class Refinement:
    """A refined mask of one matrix, and what it took, row by row.

    Attributes
    ----------
    mask
        ``(out, in)`` bool, True where kept; every row keeps as many as before.
    swaps
        ``(out,)`` int64.
    error_before, error_after
        ``(out,)`` float64; which error, the method says.
    """

    mask: Tensor
    swaps: Tensor
    error_before: Tensor
    error_after: Tensor

    @staticmethod
    def stack(parts: Sequence[Refinement]) -> Refinement:
        """Put refinements of successive rows together."""
        names = [f.name for f in dataclasses.fields(Refinement)]
        return Refinement(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class RefinementReport:
    """What refining did to one layer.

    Attributes
    ----------
    swaps
        In all rows.
    swaps_per_row
        Their mean.
    error_before, error_after
        Mean over the rows of the absolute error that the method works on: before, with the initial mask.
    """

    swaps: int
    swaps_per_row: float
    error_before: float
    error_after: float

    @classmethod
    def of(cls, refinement: Refinement) -> RefinementReport:
        """Summarise."""
        swaps = refinement.swaps.double()
        before, after = refinement.error_before.abs().mean(), refinement.error_after.abs().mean()
        return cls(int(swaps.sum()), float(swaps.mean()), float(before), float(after))


@dataclass(frozen=True)
class Start:
    """One layer as the initial method left it.

    Attributes
    ----------
    target, stats
        The layer and the statistics of its input.
    weight
        ``(out, in)``: for each weight the value it has if kept.
    mask
        ``(out, in)`` bool.
    residual
        ``(out, in)``: dense minus present weight.
    score
        ``(out, in)``: how the initial method ranked the weights, where the refinement asked for it.
    """

    target: Target
    stats: Statistics
    weight: Tensor
    mask: Tensor
    residual: Tensor
    score: Tensor | None


@dataclass
class MaskRefiner(LayerwisePruner):
    """Base of the methods that start from the mask of another pruner and exchange weights within each row.

    Parameters
    ----------
    initial
        Name of the layer-wise pruner that chooses the first mask, or ``"current"``: the zeros that the model has
        already. Then `sparsity` is not used, and `dense` is needed.
    initial_settings
        Hyper-parameters of that pruner, such as ``{"update": False}`` for SparseGPT's mask without its weights.
    skip
        Globs on module names: these layers keep the initial mask.
    dense
        Parameter name → weight before pruning (a ``state_dict``), for ``initial="current"``.

    Attributes
    ----------
    refinements : dict of str to RefinementReport
        After :meth:`prune`: layer → what refining did to it, also in an interrupted run that was resumed. Layers
        that were skipped or that no token reached are missing.
    sequences : int
        After :meth:`prune`: number of calibration sequences.
    """

    pattern: Pattern | str = Unstructured("row")
    initial: str = "wanda"
    initial_settings: Mapping[str, Any] | None = None
    skip: Sequence[str] = ()
    dense: Mapping[str, Tensor] | None = field(default=None, repr=False)
    refinements: dict[str, RefinementReport] = field(default_factory=dict, init=False, repr=False, compare=False)

    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    """Statistics of the refinement itself; those of the initial method are added."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_swappable(self.pattern, type(self).__name__)
        if (self.initial == CURRENT) != (self.dense is not None):
            raise ConfigurationError(
                f"initial is {self.initial!r} and dense weights are {'not ' if self.dense is None else ''}given; "
                f"exactly 'current' needs them: pass dense=state_dict of the model before it was pruned"
            )
        self.sequences = 1
        self._file: Path | None = None
        self._starter = self._create_starter()
        # what is needed depends on the initial method, hence on the instance
        self.statistics = tuple(dict.fromkeys((*self._starter.statistics, *self.needs)))  # type: ignore[misc]

    def refine(self, start: Start) -> Refinement:
        """Refine the mask of one layer."""
        raise ConfigurationError(f"{type(self).__name__} defines no refinement")

    def initial_score(self, target: Target, stats: Statistics) -> Tensor | None:
        """What :attr:`Start.score` is to hold; called while the layer is still dense."""
        return None

    def prune(self, model: nn.Module, data: Iterable[Batch] | None = None, **options: Any) -> PruningResult:
        """Prune and refine a model in place; see :meth:`LayerwisePruner.prune`.

        Raises
        ------
        TargetError
            With ``initial="current"``, if a layer has no zeros or `dense` does not hold it.
        CheckpointError
            If what an interrupted run has left in the workspace is damaged.
        """
        batches = self._check_data(data)
        workspace = options.get("workspace")
        self._file = None if workspace is None else Path(workspace) / "refinements.json"
        self.refinements.clear()
        self.refinements.update(_read_reports(self._file))
        self._count_sequences(sum(map(_sequences_in, batches or [])))
        if self.initial == CURRENT:
            for target in find_targets(model, self.include, self.exclude, heads=self.heads):
                self._dense_matrix(target)
                if not target.parameter.is_meta:
                    self._starter.prune_layer(target, None, 0.0)
        return super().prune(model, batches, **options)

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:  # noqa: D102
        refined = stats is not None and not any(fnmatchcase(target.module_name, glob) for glob in self.skip)
        matrix = target.matrix()
        dense = self._dense_matrix(target).to(matrix, copy=True)
        score = self.initial_score(target, stats) if stats is not None and refined else None
        mask = self._starter.prune_layer(target, stats, sparsity)
        if stats is None or not refined:
            return mask
        residual = (dense.float() - matrix.float()).flatten(1)  # in bfloat16 the difference would be rounded
        weight = torch.where(mask, matrix, dense).flatten(1)
        refinement = self.refine(Start(target, stats, weight, mask.flatten(1), residual, score))
        self._keep(target.name, RefinementReport.of(refinement))
        matrix.copy_(weight.masked_fill(~refinement.mask, 0).view(matrix.shape))
        return refinement.mask.view(mask.shape)

    def _keep(self, name: str, report: RefinementReport) -> None:
        """Remember a report, in the workspace too: once the journal has the layer, it is not refined again."""
        self.refinements[name] = report
        if self._file is not None:
            write_json(self._file, {layer: dataclasses.asdict(r) for layer, r in self.refinements.items()})

    def _count_sequences(self, count: int) -> None:
        self.sequences = max(1, count)
        if isinstance(self._starter, MaskRefiner):
            self._starter._count_sequences(count)

    def settings(self) -> dict[str, Any]:  # noqa: D102
        values = super().settings()
        if self.dense is not None:
            values["dense"] = _digest(self.dense)
        return values

    def _create_starter(self) -> LayerwisePruner:
        if self.initial == CURRENT:
            return _Present(pattern=self.pattern, sparsity=self.sparsity)
        from gossamer.methods import create, methods

        usable = [name for name, spec in methods().items() if _is_layerwise(spec.factory)]
        if self.initial not in usable:
            raise UnknownNameError("initial method", self.initial, [*usable, CURRENT])
        settings = {**(self.initial_settings or {}), "sparsity": self.sparsity, "pattern": self.pattern}
        return create(self.initial, **settings)

    def _dense_matrix(self, target: Target) -> Tensor:
        if self.dense is None:
            return target.matrix()
        names = (target.parameter_name, *(alias.partition("[")[0] for alias in target.aliases))
        weight = next((self.dense[name] for name in names if name in self.dense), None)
        if weight is None or weight.shape != target.parameter.shape:
            found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise TargetError(
                f"{target.parameter_name} {found} in the dense weights, but it has shape "
                f"{tuple(target.parameter.shape)} in the model; pass the state_dict of the same model before pruning"
            )
        weight = weight.detach() if target.index is None else weight.detach()[target.index]
        return weight.transpose(0, 1) if target.transposed else weight


@dataclass
class _Present(LayerwisePruner):
    """The zeros that are there already."""

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:
        mask = target.matrix() != 0
        if mask.all():
            raise TargetError(
                f"{target.name} has no zeros to start from: prune the model first, exclude this layer, "
                f"or let an initial method such as 'wanda' choose"
            )
        if isinstance(self.pattern, NM):
            self.pattern.verify(mask, name=target.name)
        return mask


def _read_reports(file: Path | None) -> dict[str, RefinementReport]:
    if file is None or not file.exists():
        return {}
    try:
        return {name: RefinementReport(**values) for name, values in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete its directory to start again") from None


def _sequences_in(batch: Batch) -> int:
    values = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    first = next((value for value in values if isinstance(value, Tensor) and value.dim() > 1), None)
    return 1 if first is None else len(first)


def _is_layerwise(factory: Any) -> bool:
    return isinstance(factory, type) and issubclass(factory, LayerwisePruner)


def check_swappable(pattern: Pattern | str, method: str) -> None:
    """Raise unless swaps within a row keep the pattern: unstructured by row or layer, or N:M along the input."""
    unstructured = isinstance(pattern, Unstructured) and pattern.scope != "model"
    if not unstructured and not (isinstance(pattern, NM) and pattern.dim == 1):
        raise ConfigurationError(
            f"{method} exchanges weights within a row, which {pattern} does not allow; "
            f"use unstructured, unstructured:row, or N:M along the input such as 2:4"
        )


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Tell dense weights apart, for journals and reports."""
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""GQSA: the unit that is pruned is the unit that is quantised, so that what is gone takes no space at all.

Single weights are the finest thing that can be pruned, and a bit for each says where they are; with four-bit weights
that bit is a quarter of everything. GQSA prunes whole groups of adjacent inputs of a row, the same groups that share a
scale and a zero. A group counts by the mean saliency of its weights, in the form of the optimal brain surgeon. Then the
damage is repaired twice: block by block, training what survived together with its grids against the output of the
dense block (BQPO), and at the end by training nothing but the scales through the whole model (E2E-OQP).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.core.calibration import Gram, Statistic, Statistics
from gossamer.core.patterns import Block, Pattern, Unstructured
from gossamer.core.quantization import Grid, Quantizer
from gossamer.core.registry import register
from gossamer.core.selection import Sparsity, dropped_count, keep_highest
from gossamer.core.targets import Target, find_targets
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError
from gossamer.kernels.groups import GroupMatrix
from gossamer.models.blocks import Batch, Stage
from gossamer.pruning.base import LayerwisePruner, PruningResult
from gossamer.pruning.column_sweep import Factor, Layer, factor, sweep
from gossamer.pruning.group_files import load_groups, save_groups
from gossamer.pruning.group_tuning import Groups, Likeliest, Rates, grouped, tune_block, tune_scales
from gossamer.pruning.journal import Journal
from gossamer.pruning.recovery import next_token_loss
from gossamer.pruning.walk import Walk

SALIENCIES = ("hessian", "magnitude", "random")
STAGES = ("block", "e2e")
LOSSES = ("divergence", "next-token")


@dataclass(repr=False)
class GroupPruningResult(PruningResult):
    """What GQSA returns; the model itself was changed in place.

    Attributes
    ----------
    groups
        Parameter name → its groups: codes, scales and zeros.
    block_errors
        Block → relative squared error of its output before and after it was trained.
    losses
        Loss of every step of the training of the scales.
    """

    groups: dict[str, Groups] = field(default_factory=dict, repr=False)
    block_errors: dict[str, tuple[float, float]] = field(default_factory=dict, repr=False)
    losses: list[float] = field(default_factory=list, repr=False)

    @property
    def packed(self) -> dict[str, GroupMatrix]:
        """Parameter name → matrix as the kernels take it, for those in groups of sixteen with four bits."""
        found = {name: groups.packed() for name, groups in self.groups.items()}
        return {name: matrix for name, matrix in found.items() if matrix is not None}


@register(
    "gqsa", paper="gqsa", when="after training", granularity="blocks", criterion=("second order",), patterns=("blocks",)
)
@dataclass
class Gqsa(LayerwisePruner):
    """Drop whole groups of a row, quantise the others on a grid of their own, and train what remains in two stages.

    Zeng et al., 2025, "GQSA: Group Quantization and Sparsity for Accelerating Large Language Model Inference",
    arXiv 2412.17560. The learning rates are for few calibration windows; the paper's thousands take smaller ones.

    Parameters
    ----------
    pattern
        ``"1x16:row"``: groups of sixteen inputs, every row losing the same number; ``"1x16"``: one ranking for the
        matrix. If the inputs do not divide into groups, the last group of a row is shorter.
    bits
        Of a weight that stays, 2 to 8. Four bits in groups of sixteen can be packed.
    saliency
        ``"hessian"``: w² / [H⁻¹]²_jj with H = XᵀX; ``"magnitude"``: w²; ``"random"``.
    stages
        Which kinds of training follow: ``"block"`` (BQPO), ``"e2e"`` (E2E-OQP), both, or none.
    compensate
        Before any training, let the weights that stay make up for what pruning and rounding take, with SparseGPT's
        sweep over the columns. The paper leaves this to its first stage; with few calibration windows it helps much.
    damping
        Share of the mean diagonal added to the Hessian.
    epochs, weight_rate, grid_rate
        Of the training of blocks: how often the data is gone through, and the learning rates of Adam, for weights, and
        for scales (relative; ten times as much, in steps, for zeros).
    e2e_epochs, scale_rate
        Of the training of the scales: how often, and the learning rate of Adam (relative).
    loss
        Of the training of the scales: ``"divergence"`` from the dense model, or ``"next-token"``.
    seed
        Of the order of the data, and of random saliency.
    """

    pattern: Pattern | str = "1x16:row"
    bits: int = 4
    saliency: str = "hessian"
    stages: Sequence[str] = STAGES
    compensate: bool = False
    damping: float = 0.01
    epochs: int = 4
    weight_rate: float = 1e-3
    grid_rate: float = 1e-3
    e2e_epochs: int = 1
    scale_rate: float = 3e-3
    loss: str = "divergence"
    seed: int = 0
    _groups: dict[str, Groups] = field(default_factory=dict, init=False, repr=False, compare=False)
    _dense: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    statistics: ClassVar[tuple[type[Statistic], ...]] = (Gram,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, Block) or self.pattern.size[0] != 1:
            raise ConfigurationError(f"gqsa prunes groups of a row, such as '1x16:row' or '1x16', not {self.pattern}")
        if isinstance(self.stages, str):
            self.stages = (self.stages,) if self.stages else ()
        for kind, value, known in (("saliency", self.saliency, SALIENCIES), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise UnknownNameError(kind, value, known)
        for stage in self.stages:
            if stage not in STAGES:
                raise UnknownNameError("stage of gqsa", stage, STAGES)
        if min(self.epochs, self.e2e_epochs) < 1:
            raise ConfigurationError(f"epochs is {self.epochs} and e2e_epochs {self.e2e_epochs}; give at least 1")
        if not min(self.damping, self.weight_rate, self.grid_rate, self.scale_rate) > 0:
            raise ConfigurationError("damping, weight_rate, grid_rate and scale_rate must all be positive")
        self._quantizer = Quantizer(self.bits)
        if self.saliency != "hessian" and not self.compensate:
            self.statistics = ()  # type: ignore[misc]

    @property
    def needs_data(self) -> bool:
        """Yes: even where nothing is trained, the errors of the layers are measured."""
        return True

    @property
    def size(self) -> int:
        """Weights of a group."""
        assert isinstance(self.pattern, Block)
        return self.pattern.size[1]

    def score(self, target: Target, stats: Statistics | None) -> Tensor:
        """Mean saliency of each group, ``(out, groups)``."""
        weight = target.matrix().flatten(1).float()
        if self.saliency == "random":
            seed = zlib.crc32(f"{self.seed} {target.name}".encode())
            drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
            return _group_means(drawn, self.size)
        salient = weight.square()
        if self.saliency == "hessian":
            factored = self._factor(target, stats)
            # the diagonal of UᵀU = H⁻¹; only ratios count, and squares of it must not overflow
            precision = factored.upper.double().square().sum(0).reciprocal().masked_fill(factored.dead, 0)
            salient = salient * (precision / precision.max().clamp_min(1e-300)).square().float()
        return _group_means(salient, self.size)

    def _factor(self, target: Target, stats: Statistics | None) -> Factor:
        """The factor of the inverse Hessian, computed once for layers that share their input."""
        if stats is None:
            raise CalibrationError(f"no calibration token reached {target.name}; use more data or exclude it")
        if getattr(target.module, "groups", 1) != 1:
            raise ConfigurationError(
                f"{target.name} is a grouped convolution, whose groups see different inputs; exclude it"
            )
        key = f"gqsa:{self.damping}"
        if key not in stats.derived:
            gram = stats[Gram]
            stats.derived[key] = factor(lambda: gram.matrix, self.damping, name=target.name, tokens=gram.tokens)
        return stats.derived[key]

    def _rounded(self, target: Target, stats: Statistics | None, kept: Tensor) -> tuple[Tensor, Groups]:
        """Weights ``(out, groups, size)`` to round, and what rounding makes of them."""
        weight = grouped(target.matrix(), self.size)
        if not self.compensate:
            return weight, Groups.of(target.shape, weight, kept, self._quantizer.fit(weight))
        flat = target.matrix().flatten(1)
        mask = kept.repeat_interleave(self.size, 1)[:, : flat.shape[1]]
        quantizer = _Remembering(self.bits, self.size)
        blocks = self.size * max(1, 128 // self.size)
        layer = Layer(flat, mask=mask, name=target.name)
        (swept,) = sweep([layer], self._factor(target, stats), Unstructured(), block_size=blocks, quantizer=quantizer)
        grid = Grid(
            torch.cat([grid.scale for grid in quantizer.grids]).t().unsqueeze(2),
            torch.cat([grid.zero for grid in quantizer.grids]).t().unsqueeze(2),
            quantizer.grids[0].levels,
        )
        weight = grouped(swept.weight, self.size)
        return weight, Groups.of(target.shape, weight, kept, grid)

    def prune_layer(self, target: Target, stats: Statistics | None, sparsity: Sparsity) -> Tensor:  # noqa: D102
        score = self.score(target, stats)
        competing = score if self.pattern.scope == "row" else score.reshape(1, -1)  # type: ignore[union-attr]
        dropped = dropped_count(competing.shape[1], sparsity)
        kept = keep_highest(competing, dropped, target.name).view(score.shape)
        weight, groups = self._rounded(target, stats, kept)
        self._groups[target.name] = groups
        if "block" in self.stages:
            self._dense[target.name] = weight
        target.matrix().copy_(groups.matrix())
        return groups.mask()

    def prune(
        self,
        model: nn.Module,
        data: Iterable[Batch] | None = None,
        *,
        device: torch.device | str | None = None,
        workspace: str | Path | None = None,
        progress: bool = True,
    ) -> GroupPruningResult:
        """Prune, quantise and train a model in place; see :meth:`LayerwisePruner.prune`.

        Finished blocks are kept in the workspace; the training of the scales, which comes last, starts again.

        Raises
        ------
        NonFiniteError
            If a weight is not finite, or a loss becomes so.
        CheckpointError
            If what an interrupted run has left in the workspace is damaged.
        """
        started = time.perf_counter()
        batches = self._check_data(data) or []
        targets = find_targets(model, self.include, self.exclude, heads=self.heads)
        for target in targets:
            if not target.parameter.is_meta:
                target.check_finite()
        self._groups.clear()
        self._dense.clear()
        likeliest = Likeliest.of(model, batches) if self._trains_scales and self.loss == "divergence" else None
        journal = Journal.open(workspace, self.settings(), batches, targets)
        walk = _GroupWalk(self, model, batches, targets, device, journal, progress, "gqsa")
        walk.layer_by_layer(self._allocate(walk, targets))
        losses = self._train_scales(model, targets, batches, likeliest, progress) if self._trains_scales else []
        walk.seconds["total"] = time.perf_counter() - started
        return GroupPruningResult(
            walk.masks(),
            walk.reports(),
            dict(walk.seconds),
            self.settings(),
            {target.name: self._groups[target.name] for target in targets},
            walk.errors,
            losses,
        )

    @property
    def _trains_scales(self) -> bool:
        return "e2e" in self.stages

    def _train_scales(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        batches: Sequence[Batch],
        likeliest: Likeliest | None,
        progress: bool,
    ) -> list[float]:
        def loss(substituted: Any, number: int) -> Tensor:
            if likeliest is not None:
                return likeliest.divergence(substituted, batches[number], number)
            return next_token_loss(substituted, batches[number])

        layers = {target: self._groups[target.name] for target in targets}
        tuned, losses = tune_scales(model, layers, batches, loss, self.scale_rate, self.e2e_epochs, self.seed, progress)
        for target, groups in tuned.items():
            self._groups[target.name] = groups
            target.matrix().copy_(groups.matrix())
        return losses

    def _train_block(self, stage: Stage, targets: Sequence[Target], wanted: Sequence[Tensor]) -> tuple[float, float]:
        layers = {target: self._groups[target.name] for target in targets}
        dense = {target: self._dense.pop(target.name) for target in targets}
        rates = Rates(self.weight_rate, self.grid_rate, self.epochs, self.seed)
        tuned, before, after = tune_block(stage, layers, dense, wanted, rates)
        for target, groups in tuned.items():
            self._groups[target.name] = groups
            target.matrix().copy_(groups.matrix())
        return before, after


@dataclass(frozen=True)
class _Remembering(Quantizer):
    """A quantiser whose grids can be stored, and that keeps those it has made, in order."""

    grids: list[Grid] = field(default_factory=list, compare=False)

    def fit(self, weight: Tensor, dim: int = -1) -> Grid:
        grid = super().fit(weight, dim).storable()
        self.grids.append(grid)
        return grid


def _group_means(values: Tensor, size: int) -> Tensor:
    """Mean of the members of each group, ``(out, in)`` → ``(out, groups)``; the last group may be shorter."""
    sums = grouped(values, size).sum(2)
    members = grouped(torch.ones_like(values[:1]), size).sum(2)
    return sums / members


@dataclass
class _GroupWalk(Walk):
    """A walk that also follows the dense model, and trains each block once its layers are quantised."""

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    _stage: Stage | None = None
    _wanted: list[Tensor] = field(default_factory=list)

    def _stages(self, description: str = "pruning") -> Generator[Stage, None, None]:
        stack = None
        with closing(super()._stages(description)) as visits:
            for stage in visits:
                if "block" in self.pruner.stages and description == "pruning":  # type: ignore[attr-defined]
                    above = stage.name.rpartition(".")[0]
                    inputs = self._wanted if above == stack else stage.inputs
                    stack, self._stage = above, stage
                    with self._timed("forward"), torch.no_grad():
                        self._wanted = [c.run(stage.module, x, self.device) for c, x in zip(stage.calls, inputs)]
                yield stage

    def _keep(self, name: str, targets: list[Target]) -> None:
        pruner = self.pruner
        assert isinstance(pruner, Gqsa)
        stage = self._stage
        if stage is not None and (stage.name or "rest") == name and all(len(w) for w in self._wanted):
            self.seconds.setdefault("tuning", 0.0)
            with self._timed("tuning"):
                self.errors[name] = pruner._train_block(stage, targets, self._wanted)
        pruner._dense.clear()
        if self.journal.directory is not None:
            found = {target.name: pruner._groups[target.name] for target in targets}
            save_groups(_groups_file(self.journal.directory, name), found, self.errors.get(name))
        super()._keep(name, targets)

    def _restore(self, name: str, targets: list[Target]) -> bool:
        if not super()._restore(name, targets):
            return False
        assert self.journal.directory is not None
        assert isinstance(self.pruner, Gqsa)
        file = _groups_file(self.journal.directory, name)
        groups, errors = load_groups(file, {target.name: target.shape for target in targets})
        for target in targets:
            self.pruner._groups[target.name] = groups[target.name]
        if errors is not None:
            self.errors[name] = errors
        return True


def _groups_file(directory: Path, name: str) -> Path:
    return directory / f"groups-{name or 'model'}.safetensors"

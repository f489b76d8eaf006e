"""The walk of a pruner through a model: block by block, so that every block sees what was done to those before it."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.core.allocation import outlier_ratio
from gossamer.core.calibration import InputNorm, InputSample, Statistic, Statistics, observe, per_weight
from gossamer.core.masking import LazyScores, parameter_masks
from gossamer.core.masks import MaskSet, pack_bits, unpack_bits
from gossamer.core.patterns import Pattern
from gossamer.core.progress import track
from gossamer.core.scores import input_weighted
from gossamer.core.selection import Sparsity
from gossamer.core.targets import Target
from gossamer.models.blocks import Batch, Stage, find_stacks, stages, whole_model
from gossamer.models.offload import is_offloaded, onloaded, spilled
from gossamer.pruning.journal import Journal
from gossamer.pruning.result import LayerReport

if TYPE_CHECKING:
    from gossamer.pruning.base import LayerwisePruner


@dataclass
class Walk:
    """One walk of a pruner through a model.

    Attributes
    ----------
    pruner, model, batches, targets, device, progress
        What is pruned, with what, and where; see :meth:`gossamer.pruning.base.LayerwisePruner.prune`.
    journal
        Where finished blocks are kept.
    method
        Its name, for the bars.
    seconds
        Phase → seconds: ``forward``, ``statistics``, ``selection``.
    """

    pruner: LayerwisePruner
    model: nn.Module
    batches: list[Batch] | None
    targets: list[Target]
    device: torch.device | str | None
    journal: Journal
    progress: bool
    method: str
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "statistics": 0.0, "selection": 0.0})
    _bits: dict[str, Tensor] = field(default_factory=dict)
    _reports: dict[str, LayerReport] = field(default_factory=dict)

    def masks(self) -> MaskSet:
        """Masks by parameter name, of the shape of the parameter."""
        state: dict[str, Tensor] = {}
        for target in self.targets:
            shape = torch.tensor(target.shape, dtype=torch.int64)
            state |= {f"{target.name}:bits": self._bits[target.name], f"{target.name}:shape": shape}
        return parameter_masks(self.targets, MaskSet.from_state_dict(state))

    def reports(self) -> list[LayerReport]:
        """A report for each target, in order."""
        return [self._reports[target.name] for target in self.targets]

    def layer_by_layer(self, sparsities: Mapping[str, Sparsity]) -> None:
        """Prune block after block; each block's statistics see the pruned blocks before it."""
        if self.batches is None:
            self._without_data(sparsities)
            return
        done: set[str] = set()
        with closing(self._stages()) as visits:
            for stage in visits:
                here = [target for target in self.targets if stage.owns(target.module_name)]
                if here and not self._restore(stage.name, here):
                    self._prune_stage(stage, here, sparsities)
                done.update(target.name for target in here)
                if len(done) == len(self.targets):
                    break
                if stage.name:
                    with self._timed("forward"):
                        stage.forward(store=True)
        rest = [target for target in self.targets if target.name not in done]
        if rest and not self._restore("rest", rest):
            self._prune_stage(whole_model(self.model, self.batches, self.device), rest, sparsities)

    def jointly(self) -> None:
        """Prune with one ranking over all layers; the statistics are those of the dense model."""
        assert isinstance(self.pruner.pattern, Pattern)
        stats = self._dense_statistics(self.pruner.statistics) if self.batches else {}
        with self._timed("selection"):
            scores = LazyScores(self.targets, lambda target: self.pruner.score(target, stats.get(target.name)))
            masks = self.pruner.pattern.select_jointly(scores, self.pruner.sparsity)
        for target in self.targets:
            mask = masks[target.name].to(target.parameter.device)
            dense = _sampled_output(target, stats.get(target.name))
            target.matrix().masked_fill_(~mask, 0)
            self._report(target, mask, _output_error(target, dense, stats.get(target.name)), 0.0)

    def outlier_ratios(self) -> dict[str, float]:
        """Share of outlying scores of each block, told to every layer in it (OWL's measure on Wanda's scores)."""
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

    def _stages(self, description: str = "pruning") -> Generator[Stage, None, None]:
        assert self.batches is not None
        count = sum(len(stack.blocks) for stack in find_stacks(self.model)) or 1
        walk = stages(self.model, self.batches, device=self.device, workspace=self.journal.directory)
        # left to the garbage collector, a block that cannot be put away would fail unheard
        with closing(walk):
            yield from track(walk, f"{description}: {self.method}", count, self.progress)

    def _without_data(self, sparsities: Mapping[str, Sparsity]) -> None:
        groups: dict[str, list[Target]] = {}
        names = {n: block for stack in find_stacks(self.model) for n, block in stack.blocks.items()}
        for target in self.targets:
            owner = next((n for n in names if target.module_name.startswith(f"{n}.")), target.module_name)
            groups.setdefault(owner, []).append(target)
        for owner, group in track(groups.items(), f"pruning: {self.method}", enabled=self.progress):
            with onloaded(names.get(owner, group[0].module), self.device, self.journal.directory):
                if not self._restore(owner, group):
                    for target in group:
                        self._prune_together([target], None, sparsities)
                    self._keep(owner, group)

    def _prune_stage(self, stage: Stage, targets: list[Target], sparsities: Mapping[str, Sparsity]) -> None:
        with self._timed("forward"), observe(targets, (*self.pruner.statistics, InputSample)) as observation:
            stage.forward()
        self.seconds["statistics"] += observation.seconds
        self.seconds["forward"] -= observation.seconds
        sharing: dict[int, list[Target]] = {}
        for target in targets:
            stats = observation.get(target.name)
            if stats is not None:
                stats.check_finite(target.name)
            sharing.setdefault(id(target if stats is None else stats), []).append(target)
        for group in sharing.values():
            self._prune_together(group, observation.get(group[0].name), sparsities)
            observation.forget(target.name for target in group)
        self._keep(stage.name or "rest", targets)

    def _prune_together(
        self, targets: list[Target], stats: Statistics | None, sparsities: Mapping[str, Sparsity]
    ) -> None:
        """Prune layers that receive the same input."""
        for target in targets:
            target.check_finite()
        started = time.perf_counter()
        self.pruner.prepare_layers(targets, stats, [sparsities[target.name] for target in targets])
        shared = (time.perf_counter() - started) / sum(target.shape.numel() for target in targets)
        for target in targets:
            dense = _sampled_output(target, stats)
            started = time.perf_counter()
            mask = self.pruner.prune_layer(target, stats, sparsities[target.name])
            seconds = time.perf_counter() - started + shared * target.shape.numel()
            self.seconds["selection"] += seconds
            self._report(target, mask, _output_error(target, dense, stats), seconds)
        if stats is not None:
            stats.derived.clear()

    def _report(self, target: Target, mask: Tensor, error: float | None, seconds: float) -> None:
        self._bits[target.name] = pack_bits(mask).cpu()
        zeros = 1 - int(torch.count_nonzero(mask)) / mask.numel()
        self._reports[target.name] = LayerReport(target.name, tuple(target.shape), zeros, error, seconds)

    def _restore(self, name: str, targets: list[Target]) -> bool:
        entries = self.journal.restore(name, targets)
        for target, (mask, report) in entries.items():
            self._bits[target.name] = pack_bits(mask)
            self._reports[target.name] = LayerReport(**{**report, "shape": tuple(report["shape"])})
        return bool(entries)

    def _keep(self, name: str, targets: list[Target]) -> None:
        if self.journal.directory is not None:
            masks = {target: unpack_bits(self._bits[target.name], target.shape) for target in targets}
            self.journal.keep(name, {t: (mask, dataclasses.asdict(self._reports[t.name])) for t, mask in masks.items()})
        if is_offloaded(self.model):  # a bit for every weight of a model that does not fit is too much as well
            self._bits |= spilled({t.name: self._bits[t.name] for t in targets}, self.journal.directory)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started


def _sampled_output(target: Target, stats: Statistics | None) -> Tensor | None:
    """Output of a layer, without its bias, for the sampled rows of its input: ``(rows, out)`` float32."""
    if stats is None or InputSample not in stats or getattr(target.module, "groups", 1) != 1:
        return None
    rows = stats[InputSample].rows
    return rows @ target.matrix().flatten(1).float().t() if len(rows) else None


def _output_error(target: Target, dense: Tensor | None, stats: Statistics | None) -> float | None:
    """Relative Frobenius error of the layer's output, which was `dense`, on the sampled rows."""
    now = _sampled_output(target, stats)
    if dense is None or now is None:
        return None
    norm = float(dense.norm())
    return float((dense - now).norm()) / norm if norm > 0 and math.isfinite(norm) else None

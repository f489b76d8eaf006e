"""The report card of one sparse network: what it is, what it cost, what it takes, and which rules it would break.

It is what Liu and Wang, 2023, arXiv 2302.02596, ask every result to come with, so that nobody has to guess whether 90 %
means 90 % of all weights, or whether a speed-up was ever measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.taxonomy import Taxonomy
from gossamer.measure.fair_comparison import Violation
from gossamer.measure.report_card import scaled
from gossamer.measure.size import density, footprint
from gossamer.measure.speed import Timing, ratio
from gossamer.measure.training_cost import TrainingCost
from gossamer.measure.training_memory import TrainingMemory
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.report.markdown import table


@dataclass(frozen=True, kw_only=True)
class SparsityReport:
    """Everything that a result of a sparse method should state.

    Attributes
    ----------
    name, taxonomy
        The method, and where it stands.
    quality
        Mean over the seeds, with its 95 % interval.
    masked, zeros
        Share of the masked layers' weights that the mask removes, and that are zero: accidental zeros differ.
    of_all
        Share of all parameters that are zero.
    layers
        Layer → share that the mask removes.
    cost
        Of the training.
    memory
        Of the training, in bytes; None if it was not measured.
    inference_bytes, dense_inference_bytes
        Of the model as it would be stored, with a bit for each weight, and dense.
    latency, dense_latency
        Of inference, measured in turns; None if it was not measured.
    device
        On what.
    violations
        Rules of :mod:`gossamer.measure.fair_comparison` that the result breaks.
    """

    name: str
    taxonomy: Taxonomy
    quality: Interval
    masked: float
    zeros: float
    of_all: float
    layers: dict[str, float]
    cost: TrainingCost
    memory: TrainingMemory | None
    inference_bytes: int
    dense_inference_bytes: int
    latency: Timing | None = None
    dense_latency: Timing | None = None
    device: str | None = None
    violations: tuple[Violation, ...] = ()

    @classmethod
    def of_run(
        cls,
        name: str,
        taxonomy: Taxonomy,
        model: nn.Module,
        masks: MaskSet,
        quality: Sequence[float],
        cost: TrainingCost,
        *,
        memory: TrainingMemory | None = None,
        latency: Timing | None = None,
        dense_latency: Timing | None = None,
        device: str | None = None,
        violations: Sequence[Violation] = (),
    ) -> SparsityReport:
        """Measure what can be read off the model, and put the rest beside it.

        Parameters
        ----------
        name, taxonomy
            The method.
        model
            As training left it, plain, with its zeros.
        masks
            What remains.
        quality
            One number for each seed, at least two.
        cost, memory
            Of the training: :class:`~gossamer.measure.TrainingLedger`, :func:`~gossamer.measure.training_memory`.
        latency, dense_latency, device
            Of inference: :func:`~gossamer.measure.interleave`.
        violations
            What :func:`~gossamer.measure.fair_comparison.check_comparison` found of this result.
        """
        found = density(model, list(masks))
        return cls(
            name=name,
            taxonomy=taxonomy,
            quality=mean_interval(quality),
            masked=masks.sparsity,
            zeros=found.total("prunable").sparsity,
            of_all=found.total("all").sparsity,
            layers=masks.layer_sparsity(),
            cost=cost,
            memory=memory,
            inference_bytes=footprint(model, "bitmask"),
            dense_inference_bytes=footprint(model, "dense"),
            latency=latency,
            dense_latency=dense_latency,
            device=device,
            violations=tuple(violations),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return json.loads(json.dumps(asdict(self), default=str))

    def to_markdown(self) -> str:
        """A table of two columns."""
        least, most = (pick(self.layers, key=self.layers.__getitem__) for pick in (min, max))
        rows = [
            ("what it is", self.taxonomy.explain()),
            ("quality", str(self.quality)),
            ("zeros among masked layers", f"{self.masked:.2%} by the mask, {self.zeros:.2%} in the weights"),
            ("zeros among all parameters", f"{self.of_all:.2%}"),
            ("from layer to layer", f"{self.layers[least]:.2%} ({least}) to {self.layers[most]:.2%} ({most})"),
            ("training operations", f"{scaled(self.cost.training_flops)}, {self._of_dense:.0%} of dense training"),
            ("memory of training", self._memory()),
            ("bytes of inference", f"{scaled(self.inference_bytes)}B, dense {scaled(self.dense_inference_bytes)}B"),
            ("latency", self._latency()),
            ("rules it breaks", "; ".join(map(str, self.violations)) or "none"),
        ]
        return f"**{self.name}**\n\n" + table(("", ""), rows)

    @property
    def _of_dense(self) -> float:
        return self.cost.training_flops / self.cost.dense_training_flops

    def _memory(self) -> str:
        if self.memory is None:
            return "not measured"
        parts = {name: f"{name} {scaled(value)}B" for name, value in asdict(self.memory).items()}
        return ", ".join(parts.values())

    def _latency(self) -> str:
        if self.latency is None or self.dense_latency is None:
            return "not measured"
        faster = ratio(self.dense_latency, self.latency)
        return f"{self.latency}, {faster.median:.2f} times faster than dense on {self.device or 'an unnamed device'}"

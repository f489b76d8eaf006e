"""Magnitude pruning of attention heads: a head whose slice of the output matrix is short says little.

The heads of an attention layer leave it side by side, and one matrix maps them back. The Euclidean norm of a head's
slice of that matrix is the structured form of ``|W|``, as the norm of a column is for a feed-forward channel
(:class:`gossamer.pruning.channels.MagnitudeChannels`). Heads with the shortest slices are silenced: their slices, their
queries, and the keys and values that no other head shares.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.masks import MaskSet
from gossamer.core.patterns import Unstructured
from gossamer.core.progress import track
from gossamer.core.registry import register
from gossamer.errors import TargetError, UnknownNameError, check_sparsity
from gossamer.models.blocks import Batch
from gossamer.models.heads import AttentionHeads, find_attention_heads, silence_
from gossamer.models.offload import onloaded
from gossamer.pruning.base import _name, _plain
from gossamer.pruning.result import LayerReport, PruningResult

_SCOPES = ("layer", "model")


@register(
    "magnitude-heads",
    paper="magnitude",
    when="after training",
    granularity="heads",
    needs_data=False,
    criterion=("magnitude",),
    patterns=("channels",),
)
@dataclass
class MagnitudeHeads:
    """Silence the attention heads whose slice of the output matrix has the smallest norm; no data, no update.

    Parameters
    ----------
    sparsity
        Fraction of the heads in [0, 1) that goes, rounded down.
    scope
        What competes: the heads of a ``"layer"``, or of the whole ``"model"``. In the model they are compared by
        their share of their own layer's norm, so that the scale of a layer does not decide.
    include, exclude
        Globs on the names of attention layers, such as ``"*.layers.0.*"``.
    """

    sparsity: float = 0.5
    _: dataclasses.KW_ONLY
    scope: Literal["layer", "model"] = "layer"
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.scope not in _SCOPES:
            raise UnknownNameError("scope", self.scope, _SCOPES)

    def score(self, heads: AttentionHeads) -> Tensor:
        """``‖W_o,head‖₂`` of each head, ``(h,)``."""
        return heads.slices().float().flatten(1).norm(dim=1).cpu()

    @torch.no_grad()
    def prune(
        self,
        model: nn.Module,
        data: Iterable[Batch] | None = None,
        *,
        device: torch.device | str | None = None,
        workspace: str | Path | None = None,
        progress: bool = True,
    ) -> PruningResult:
        """Prune a model in place; every shape stays.

        Parameters
        ----------
        model
            Any module with attention layers. If accelerate keeps it elsewhere, one layer at a time is brought in.
        data
            Not needed.
        device, workspace, progress
            As for :meth:`gossamer.pruning.base.LayerwisePruner.prune`.

        Raises
        ------
        TargetError, ModelError, NonFiniteError
            Before anything is changed, naming the layer.
        """
        started = time.perf_counter()
        layers = self._layers(model)
        found = {}
        for layer in track(layers, "reading: magnitude-heads", enabled=progress):
            with onloaded(layer.module, device, workspace):
                for target in layer.targets:
                    target.check_finite()
                found[layer.name] = self.score(layer)
        kept = self._select(found)
        masks: dict[str, Tensor] = {}
        reports: list[LayerReport] = []
        for layer in track(layers, "pruning: magnitude-heads", enabled=progress):
            began = time.perf_counter()
            with onloaded(layer.module, device, workspace):
                own = silence_(layer, kept[layer.name])
            masks |= own
            seconds = (time.perf_counter() - began) / len(layer.targets)
            for target in layer.targets:
                share = 1 - float(own[target.parameter_name].double().mean())
                reports.append(LayerReport(target.name, tuple(target.shape), share, None, seconds))
        total = time.perf_counter() - started
        return PruningResult(
            MaskSet(masks),
            reports,
            {"forward": 0.0, "statistics": 0.0, "selection": total, "total": total},
            self.settings(),
        )

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters as plain values, for reports and checkpoints."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"method": _name(type(self)), **{k: _plain(v) for k, v in values.items()}}

    def _layers(self, model: nn.Module) -> list[AttentionHeads]:
        every = find_attention_heads(model)
        chosen = [
            layer
            for layer in every
            if any(fnmatchcase(layer.name, glob) for glob in self.include)
            and not any(fnmatchcase(layer.name, glob) for glob in self.exclude)
        ]
        if not chosen:
            raise TargetError(
                f"no attention layer matches include={list(self.include)} exclude={list(self.exclude)}; "
                f"there are {len(every)}, with names such as {every[0].name!r}"
            )
        return chosen

    def _select(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = {name: score.unsqueeze(0) for name, score in found.items()}
        if self.scope == "model":
            tiny = torch.finfo(torch.float32).tiny
            rows = {name: score / score.norm().clamp_min(tiny) for name, score in rows.items()}
        masks = Unstructured(self.scope).select_jointly(rows, self.sparsity)
        return {name: mask.flatten() for name, mask in masks.items()}

"""What calibration finds: for every site, the rule that says which channels count."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gossamer.core.channel_rules import ChannelRule, Everything, GroupTopK, Selection, Threshold, TopK
from gossamer.errors import CheckpointError, ModelError
from gossamer.runtime.thresholds import Thresholds
from gossamer.storage.atomic import PathLike, atomic_file

_FORMAT = "gossamer activation rules 1"


@dataclass(frozen=True, eq=False)
class LowRank:
    """A factorised weight, ``left @ right``, that computes what the channels that do not count contribute.

    Attributes
    ----------
    left
        ``(out, r)``.
    right
        ``(r, in)``.
    """

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.right.shape[0]

    @property
    def size(self) -> int:
        """Number of weights, all of which are read for every token."""
        return self.left.numel() + self.right.numel()

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same factors elsewhere, or in another dtype."""
        if (self.left.device, self.left.dtype) == (device, dtype):
            return self
        return LowRank(self.left.to(device, dtype), self.right.to(device, dtype))

    def product(self, inputs: Tensor) -> Tensor:
        """``(…, in)`` → ``(…, out)``."""
        left, right = (part.to(inputs.device, inputs.dtype) for part in (self.left, self.right))
        return (inputs @ right.T) @ left.T


@dataclass(eq=False)
class ActivationRules:
    """Rules for the sites of one model.

    Attributes
    ----------
    inputs
        Name of a linear layer → rule on its input.
    gates
        Name of a feed-forward layer → rule on what its activation function puts out.
    requested
        Name → share of channels that the rule is meant to drop.
    low_rank
        Name of a linear layer → what stands in for the channels that do not count.
    settings
        The method and its parameters.
    layers
        All layers of the calibrated model that a rule could treat, name → ``(out, in)``, by which rules of another
        model are told; empty for rules made by hand, of which only the names and widths that they use are checked.
    """

    inputs: dict[str, ChannelRule]
    gates: dict[str, ChannelRule] = field(default_factory=dict)
    requested: dict[str, float] = field(default_factory=dict)
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def check_model(self, model: nn.Module) -> None:
        """Check that a model has the layers of the calibrated one, of the same shapes and no more of their kind.

        Raises
        ------
        ModelError
            If it has not.
        """
        if not self.layers:
            return
        found = {name.removesuffix(".base_layer"): module for name, module in model.named_modules()}
        for name, shape in self.layers.items():
            if name not in found:
                raise ModelError(f"the rules are for a model with a layer {name!r}, which this one lacks")
            here = _shape(found[name])
            if here is not None and here != tuple(shape):
                raise ModelError(
                    f"{name} is of {here[0]} × {here[1]} weights, in the model that the rules are for it was of "
                    f"{shape[0]} × {shape[1]}; calibrate on this model"
                )
        kinds = {_kind(name) for name in self.layers}
        more = next((name for name in found if _kind(name) in kinds and name not in self.layers), None)
        if more is not None:
            raise ModelError(f"the rules are for a model without a layer {more!r}, which this one has; calibrate on it")

    def thresholds(self, model: nn.Module, prompt: bool = False) -> Thresholds:
        """What the channels of every site must exceed, for a compiled program.

        Parameters
        ----------
        model
            The model that the rules are for.
        prompt
            Whether they hold for prompts too; otherwise only decoding is sparse.

        Raises
        ------
        ModelError
            If a rule does not select by threshold, or needs more than that.
        """
        if self.low_rank:
            raise ModelError("these rules have a low-rank part, which is no threshold; run them through Hugging Face")
        self.check_model(model)
        modules = dict(model.named_modules())
        missing = next((name for name in self.inputs if name not in modules), None)
        if missing is not None:
            raise ModelError(f"the rules are for a model with a layer {missing!r}, which this one lacks")
        widths = {name: _width(modules[name]) for name in self.inputs}
        widths |= {name: _gate_width(name, rule) for name, rule in self.gates.items()}
        found: dict[str, dict[str, Tensor]] = {"inputs": {}, "gates": {}}
        for kind, rules in (("inputs", self.inputs), ("gates", self.gates)):
            for name, rule in rules.items():
                if isinstance(rule.selection, Everything):
                    continue
                thresholds = rule.thresholds(widths[name])
                if thresholds is None:
                    raise ModelError(
                        f"{name} selects the largest channels of each token, not by threshold; use gate='threshold'"
                    )
                found[kind][name] = thresholds
        return Thresholds(found["inputs"], found["gates"], prompt)

    def save(self, file: PathLike) -> None:
        """Write to a safetensors file, at once or not at all.

        Raises
        ------
        OutputError
            If the folder is missing, or the file cannot be written.
        """
        tensors, facts = {}, {}
        for kind, rules in (("inputs", self.inputs), ("gates", self.gates)):
            for name, rule in rules.items():
                facts[f"{kind}/{name}"] = _described(rule.selection)
                if rule.scale is not None:
                    tensors[f"{kind}/{name}/scale"] = rule.scale.float().contiguous()
        for name, factors in self.low_rank.items():
            tensors[f"low_rank/{name}/left"] = factors.left.contiguous()
            tensors[f"low_rank/{name}/right"] = factors.right.contiguous()
        said = {"format": _FORMAT, "rules": facts, "requested": self.requested, "settings": self.settings}
        said["layers"] = self.layers
        with atomic_file(file) as part:
            save_file(tensors, part, {"gossamer": json.dumps(said)})

    @classmethod
    def load(cls, file: PathLike) -> ActivationRules:
        """Read what :meth:`save` wrote; warns about a file that does not say for which model it is.

        Raises
        ------
        CheckpointError
            If the file is missing, truncated or something else.
        """
        try:
            with safe_open(file, "pt") as stored:
                said = json.loads((stored.metadata() or {}).get("gossamer", "{}"))
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} holds no activation rules ({error}); calibrate again") from error
        if not isinstance(said, dict) or said.get("format") != _FORMAT:
            said = said if isinstance(said, dict) else {}
            raise CheckpointError(f"{file} has format {said.get('format')!r} instead of {_FORMAT!r}; calibrate again")
        rules: dict[str, dict[str, ChannelRule]] = {"inputs": {}, "gates": {}}
        try:
            for key, description in said["rules"].items():
                kind, _, name = key.partition("/")
                rules[kind][name] = ChannelRule(_selection(description, file), tensors.get(f"{key}/scale"))
            names = {key.split("/")[1] for key in tensors if key.startswith("low_rank/")}
            factors = {n: LowRank(tensors[f"low_rank/{n}/left"], tensors[f"low_rank/{n}/right"]) for n in names}
            layers = {name: (out, width) for name, (out, width) in said.get("layers", {}).items()}
            if not layers:
                warnings.warn(
                    f"{file} does not say for which model its rules are, so that only names and widths are checked; "
                    f"calibrate again to have it written down",
                    stacklevel=2,
                )
            return cls(rules["inputs"], rules["gates"], said["requested"], factors, said["settings"], layers)
        except KeyError as error:
            raise CheckpointError(f"{file} lacks its part {error}; calibrate again") from None


def _described(selection: Selection) -> dict[str, Any]:
    match selection:
        case Everything():
            return {"kind": "everything"}
        case Threshold(value):
            return {"kind": "threshold", "value": value}
        case TopK(keep):
            return {"kind": "top-k", "keep": keep}
        case GroupTopK(keep, group):
            return {"kind": "group-top-k", "keep": keep, "group": group}
    raise CheckpointError(f"a selection by {type(selection).__name__} cannot be stored; use a threshold or top-k")


def _selection(said: Mapping[str, Any], file: PathLike) -> Selection:
    match said:
        case {"kind": "everything"}:
            return Everything()
        case {"kind": "threshold", "value": value}:
            return Threshold(value)
        case {"kind": "top-k", "keep": keep}:
            return TopK(keep)
        case {"kind": "group-top-k", "keep": keep, "group": group}:
            return GroupTopK(keep, group)
    raise CheckpointError(f"{file} has a selection {dict(said)!r} that is not known; calibrate again")


def _kind(name: str) -> str:
    """A layer's name without the numbers of its block."""
    return re.sub(r"\.\d+(?=\.)", ".#", name)


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """``(out, in)`` of a layer, packed or not; None if it does not say."""
    weight = getattr(module, "weight", None)
    held = weight.shape if isinstance(weight, Tensor) else getattr(module, "shape", ())
    if len(held) != 2:
        return None
    return (held[1], held[0]) if type(module).__name__ == "Conv1D" else (held[0], held[1])


def _width(module: nn.Module) -> int:
    weight: Any = module.weight
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]


def _gate_width(name: str, rule: ChannelRule) -> int:
    if rule.scale is None:
        raise ModelError(f"{name}: the rule of a gate has no scale, so its width is not known; give one of ones")
    return len(rule.scale)

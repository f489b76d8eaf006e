"""Thresholds of activations: what a method of activation sparsity has found, as whatever runs the model takes it.

A threshold belongs to an input channel of a linear layer (an input of at most this size counts as zero) or to a neuron
of a gated feed-forward block (an activation ``f(gate · x)`` of at most this size counts as zero, so that neither its
row of ``up`` nor its channel of ``down`` is needed). They are data and change no weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, ModelError
from gossamer.kernels.channel_products import check_thresholds
from gossamer.kernels.channels import ChannelMatrix, lay_by_channels
from gossamer.kernels.kinds import pack
from gossamer.storage.layers import SparseLinear


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of a whole model.

    Attributes
    ----------
    inputs
        Name of a linear layer → ``(in_features,)`` float32, at least 0.
    gates
        Name of a gated feed-forward block → ``(neurons,)`` float32, at least 0.
    prompt
        Whether they hold for the tokens of a prompt as well, and not only for those that are written.
    """

    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)
    prompt: bool = True

    def check(self, model: nn.Module) -> None:
        """Check that they are for this model.

        Raises
        ------
        ConfigurationError
            If a name is none of its layers, or a number of thresholds is not that of their channels.
        """
        modules = dict(model.named_modules())
        for name, thresholds in self.inputs.items():
            channels = _inputs_of(modules.get(name))
            if channels is None:
                raise ConfigurationError(
                    f"there are thresholds for {name}, which is no linear layer of this {type(model).__name__}; "
                    f"calibrate this model"
                )
            check_thresholds(thresholds, channels, f"thresholds of {name}")
        for name, thresholds in self.gates.items():
            neurons = _outputs_of(getattr(modules.get(name), "gate_proj", None))
            if neurons is None:
                raise ConfigurationError(
                    f"there are thresholds for {name}, which is no gated feed-forward block of this "
                    f"{type(model).__name__}; calibrate this model"
                )
            check_thresholds(thresholds, neurons, f"thresholds of {name}")

    @contextmanager
    def holding(self, model: nn.Module) -> Iterator[None]:
        """Within this, the model itself computes as they say; it saves no time."""
        self.check(model)
        handles = []
        try:
            for name, thresholds in self.inputs.items():
                module = model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(self._silence_inputs(thresholds)))
            for name, thresholds in self.gates.items():
                activation = _activation_of(model.get_submodule(name), name)
                handles.append(activation.register_forward_hook(self._silence_outputs(thresholds)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _silence_inputs(self, thresholds: Tensor) -> Any:
        return lambda module, arguments: (self._silence(arguments[0], thresholds), *arguments[1:])

    def _silence_outputs(self, thresholds: Tensor) -> Any:
        return lambda module, arguments, output: self._silence(output, thresholds)

    def _silence(self, x: Tensor, thresholds: Tensor) -> Tensor:
        if not self.prompt and x.shape[-2] > 1:  # several tokens at once are a prompt
            return x
        return torch.where(x.float().abs() <= thresholds.to(x.device), torch.zeros_like(x), x)


def lay_out_(model: nn.Module, thresholds: Thresholds, format: str | None = None) -> list[str]:
    """Give the weights of all layers of which only a part shall be read the layout they need, in place.

    Those whose inputs have thresholds, and ``down`` behind gates, are stored channel by channel; ``up`` behind gates
    stays row by row. No weight is kept twice, and packed layers stay as they are.

    Parameters
    ----------
    model
        Its linear layers are on the CPU.
    thresholds
        For this model.
    format
        What these weights become: ``bfloat16``, ``int8``, ``int4`` and so on. None keeps them as they are: the
        parameters then have equal values and shape as before, and only lie otherwise in memory.

    Returns
    -------
    list
        Names of these layers.

    Raises
    ------
    ConfigurationError
        If the thresholds are for another model, or the format is unknown.
    """
    thresholds.check(model)
    behind = [f"{name}.down_proj" for name in thresholds.gates]
    channels = list(dict.fromkeys([*thresholds.inputs, *behind]))
    rows = [name for name in (f"{block}.up_proj" for block in thresholds.gates) if name not in channels]
    for name in [*channels, *rows]:
        module = model.get_submodule(name)
        if type(module) is not nn.Linear:
            continue
        weight = module.weight.detach()
        if format is not None:
            whole = "nibble_rows" if format == "int4" else "dense"
            packed = pack(weight, "channels" if name in channels else whole, format)
            model.set_submodule(name, SparseLinear(packed, module.bias, weight.dtype))
        elif name in channels and ChannelMatrix.of_view(weight) is None:
            module.weight.data = lay_by_channels(weight)
    return [*channels, *rows]


def _inputs_of(module: nn.Module | None) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    shape = getattr(module, "shape", None)  # of a packed layer
    return int(shape[1]) if isinstance(shape, tuple) and len(shape) == 2 else None


def _outputs_of(module: nn.Module | None) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    shape = getattr(module, "shape", None)
    return int(shape[0]) if isinstance(shape, tuple) and len(shape) == 2 else None


def _activation_of(block: nn.Module, name: str) -> nn.Module:
    found = getattr(block, "act_fn", None)
    if not isinstance(found, nn.Module):
        raise ModelError(f"{name} has no module act_fn, so its activations cannot be silenced; see its class")
    return found

"""Wider networks: hidden widths times a factor, and all that belongs to them.

A group of channels has an entry in the weights that make it, in the norms that follow, and in the weights that read it;
to widen it is to resize them all. :mod:`gossamer.core.channel_groups` finds the groups of a network that torch.fx can
trace; the middles of a transformer's feed-forward layers are found here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.channel_groups import Axis, ChannelGroup
from gossamer.core.randomness import generator_for
from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.feedforward import FeedForward, record_widths
from gossamer.models.feedforward_search import choose_feed_forwards, find_feed_forwards

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def widened(size: int, factor: float, multiple: int = 1) -> int:
    """A width times a factor, to the nearest multiple, and at least one.

    Raises
    ------
    ConfigurationError
        If the factor or the multiple is below 1.
    """
    if not factor >= 1 or multiple < 1:
        raise ConfigurationError(f"factor is {factor} and multiple {multiple}; both must be at least 1")
    return max(1, round(size * factor / multiple)) * multiple


def widen(
    model: nn.Module, groups: Iterable[ChannelGroup], factor: float, multiple: int = 1, seed: int = 0
) -> nn.Module:
    """A copy of a model in which groups of channels are wider.

    Matrices that change are drawn anew, with the standard deviation that they had; vectors (biases, norms) repeat
    themselves.

    Parameters
    ----------
    model
        Stays as it is.
    groups
        Of its channels; those that are not free keep their size.
    factor
        On every size; at least 1.
    multiple
        Sizes are rounded to the nearest multiple of it.
    seed
        Of the new weights.
    """
    wide = copy.deepcopy(model)
    tensors = dict(wide.named_parameters()) | dict(wide.named_buffers())
    shapes: dict[str, list[int]] = {}
    for group in groups:
        if group.free:
            for axis in group.axes:
                shape = shapes.setdefault(axis.name, list(tensors[axis.name].shape))
                shape[axis.dim] = widened(group.size, factor, multiple) * axis.repeat
    generator = generator_for("widened weights", seed)
    for name, shape in shapes.items():
        owner, _, attribute = name.rpartition(".")
        module = wide.get_submodule(owner)
        old = getattr(module, attribute)
        new = _resized(old.detach(), shape, generator)
        setattr(module, attribute, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if attribute == "weight":
            _describe(module, old.shape)
    return wide


def _resized(old: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    if old.dim() < 2:
        return old[torch.arange(shape[0], device=old.device) % len(old)].clone()
    scale = float(old.float().std(correction=0))
    return torch.empty(shape).normal_(0, scale, generator=generator).to(old)


def _describe(module: Any, before: torch.Size) -> None:
    """Tell a module the sizes of its weight."""
    after = module.weight.shape
    if isinstance(module, _CONVOLUTIONS):
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        module.groups = after[0] if depthwise else module.groups
        module.out_channels, module.in_channels = after[0], after[1] * module.groups
    elif hasattr(module, "nf"):  # transformers' Conv1D is stored (in, out)
        module.nx, module.nf = after[0], after[1]
    else:
        sizes = {"out_features": 0, "in_features": 1, "num_features": 0, "num_parameters": 0}
        for attribute, dim in sizes.items():
            if hasattr(module, attribute):
                setattr(module, attribute, after[dim])


def feed_forward_channels(model: nn.Module) -> list[ChannelGroup]:
    """The channels in the middle of a transformer's feed-forward layers.

    Raises
    ------
    TargetError
        If there is none.
    ModelError
        If a layer holds gate and input in one matrix, or shares it.
    """
    return [_middle(each) for each in choose_feed_forwards(model, find_feed_forwards(model))]


def _middle(layer: FeedForward) -> ChannelGroup:
    axes = []
    for target in layer.inputs:
        if target.shape[0] != layer.width:
            raise ModelError(f"{target.name} holds gate and input in one matrix, which cannot be widened; exclude it")
        axes.append(Axis(target.parameter_name, 1 if target.transposed else 0))
        if getattr(target.module, "bias", None) is not None:
            axes.append(Axis(f"{target.module_name}.bias", 0))
    axes.append(Axis(layer.down.parameter_name, 0 if layer.down.transposed else 1))
    return ChannelGroup(layer.width, axes)


def record_feed_forwards(model: nn.Module, wide: nn.Module) -> None:
    """Tell the configuration of a widened model how wide its feed-forward layers have become."""
    record_widths(wide, {layer.name: layer.width for layer in find_feed_forwards(model)}, find_feed_forwards(wide))

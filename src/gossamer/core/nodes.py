"""Whole neurons: which of a network may go, what goes with them, and the smaller network that is left.

A node is a channel that the network computes for itself: a unit of a hidden layer, or a feature map. With it go its
row of the weight, its bias, its place in a normalisation, and the columns of every layer that reads it; where a
residual connection adds two layers, their nodes go together.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gossamer.core.channel_groups import Axis, ChannelGroup, find_channel_groups
from gossamer.core.masks import MaskSet
from gossamer.errors import SparsityError, TargetError, UnknownNameError

Nodes: TypeAlias = Mapping[str, Tensor]
"""Name of the weight that makes them → bool ``(nodes,)``, True where a node stays."""


def node_groups(model: nn.Module) -> dict[str, ChannelGroup]:
    """Groups of nodes that may go, by the name of the first weight that makes them.

    Raises
    ------
    ModelError
        If torch.fx cannot trace the model.
    TargetError
        If no node may go: there is no hidden layer.
    """
    groups = {group.outputs()[0]: group for group in find_channel_groups(model) if group.free and group.outputs()}
    if not groups:
        raise TargetError("no node of the model may go: it has no hidden layer whose channels torch.fx can follow")
    return groups


def node_masks(model: nn.Module, nodes: Nodes) -> MaskSet:
    """Masks of all that belongs to the nodes: weights, biases and normalisation; other parameters are not in it."""
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    for group, kept in _chosen(model, nodes):
        for axis in group.axes:
            if axis.name in parameters:
                mask = masks.setdefault(axis.name, torch.ones(parameters[axis.name].shape, dtype=torch.bool))
                mask.index_fill_(axis.dim, _places(axis, (~kept).nonzero().flatten()), False)
    return MaskSet(masks)


def shrink(model: nn.Module, nodes: Nodes) -> nn.Module:
    """Build the network without the nodes that go: smaller dense layers that compute the same.

    Parameters
    ----------
    model
        A network that torch.fx can trace; it stays as it is.
    nodes
        What stays; groups that are not named stay whole.

    Returns
    -------
    nn.Module
        A copy with smaller linear layers, convolutions and batch normalisations. Its outputs are those of `model` with
        :func:`node_masks` applied.

    Raises
    ------
    SparsityError
        If no node of a group would stay.
    UnknownNameError
        If a group is named that the model does not have.
    """
    smaller = copy.deepcopy(model)
    for group, kept in _chosen(model, nodes):
        places = kept.nonzero().flatten()
        for axis in group.axes:
            _cut(smaller, axis, places)
    for module in smaller.modules():
        _resize(module)
    return smaller


def gather_nodes(model: nn.Module, nodes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of many smaller networks at once.

    Parameters
    ----------
    model
        The network that they are part of.
    nodes
        Group → numbers of the nodes that stay, ``(networks, stay)`` int64.

    Returns
    -------
    dict of str to Tensor
        Name → ``(networks, …)`` of all floating parameters and buffers, copies where nodes go and views of the
        original elsewhere.
    """
    count = len(next(iter(nodes.values())))
    tensors = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    found = {name: tensor.expand(count, *tensor.shape) for name, tensor in tensors.items()}
    for name, group in node_groups(model).items():
        if name not in nodes:
            continue
        for axis in group.axes:
            whole = found[axis.name]
            places = (nodes[name][..., None] * axis.repeat + torch.arange(axis.repeat)).flatten(1).to(whole.device)
            found[axis.name] = torch.stack([part.index_select(axis.dim, rows) for part, rows in zip(whole, places)])
    return found


def _chosen(model: nn.Module, nodes: Nodes) -> list[tuple[ChannelGroup, Tensor]]:
    groups = node_groups(model)
    for name, kept in nodes.items():
        if name not in groups:
            raise UnknownNameError("group of nodes", name, groups)
        if kept.shape != (groups[name].size,) or kept.dtype != torch.bool:
            raise SparsityError(
                f"the mask of the nodes of {name} is {kept.dtype} {tuple(kept.shape)}; "
                f"it must be bool ({groups[name].size},)"
            )
        if not kept.any():
            raise SparsityError(f"none of the {groups[name].size} nodes of {name} would stay; at least one is needed")
    return [(groups[name], kept.cpu()) for name, kept in nodes.items()]


def _places(axis: Axis, rows: Tensor) -> Tensor:
    return (rows[:, None] * axis.repeat + torch.arange(axis.repeat)).flatten()


def _cut(model: nn.Module, axis: Axis, rows: Tensor) -> None:
    module_name, _, attribute = axis.name.rpartition(".")
    module = model.get_submodule(module_name)
    tensor = getattr(module, attribute)
    cut = tensor.detach().index_select(axis.dim, _places(axis, rows).to(tensor.device))
    setattr(module, attribute, nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)


def _resize(module: nn.Module) -> None:
    """Let the numbers that a layer keeps follow its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
        if module.groups > 1 and module.groups == module.in_channels:
            module.groups = module.in_channels = module.out_channels
        elif module.groups == 1:
            module.in_channels = module.weight.shape[1]
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        held = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if held is None else len(held)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()

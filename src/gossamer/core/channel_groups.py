"""Which channels of a network belong together: those of one dimension can only be moved all at once.

Channels that a residual addition, a depthwise convolution or a gate brings together must keep the same order on all
sides; the normalisation behind a convolution follows its output, and the input of the next layer too. The graph that
torch.fx records is walked once, and every tensor carries the dimension that its channels live in.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from gossamer.errors import ConfigurationError, ModelError

_JOINING = (operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, torch.sub)
_CHANNELWISE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)
_PASSING_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.ELU),
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Upsample, nn.Flatten, nn.ZeroPad2d, nn.Hardtanh),
)
_PASSING_FUNCTIONS = (
    *(functional.relu, functional.relu6, functional.silu, functional.hardswish, functional.sigmoid, functional.gelu),
    *(functional.dropout, functional.avg_pool2d, functional.max_pool2d, functional.adaptive_avg_pool2d),
    *(functional.hardtanh, functional.hardsigmoid, functional.interpolate, functional.pad, torch.sigmoid, torch.relu),
    *(torch.tanh, torch.clamp, torch.flatten, torch.mean),
)
_PASSING_METHODS = ("relu", "sigmoid", "clamp", "contiguous", "flatten", "mean", "tanh")


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter or buffer.

    Attributes
    ----------
    name
        Of the tensor, as in ``state_dict()``.
    dim
        0 for outputs and vectors, 1 for inputs.
    repeat
        Adjacent entries that belong to one channel: more than one where an image is flattened.
    """

    name: str
    dim: int
    repeat: int = 1


@dataclass
class ChannelGroup:
    """Channels that can only be moved together.

    Attributes
    ----------
    size
        How many there are.
    axes
        Everything that has an entry for each of them.
    free
        Whether they may be moved at all: not where they are an input or an output of the network, or reach an operation
        whose channels are not understood.
    """

    size: int
    axes: list[Axis] = field(default_factory=list)
    free: bool = True

    def outputs(self) -> list[str]:
        """Weights of which these are the output channels."""
        return [axis.name for axis in self.axes if axis.dim == 0 and axis.name.endswith("weight")]

    @torch.no_grad()
    def permute_(self, model: nn.Module, order: Tensor) -> None:
        """Move the channels: what was at ``order[i]`` comes to place i.

        Raises
        ------
        ConfigurationError
            If they are not free, or the order is no permutation.
        """
        if not self.free:
            raise ConfigurationError(f"the channels of {self.axes[0].name} are not free to move")
        if not torch.equal(order.sort().values, torch.arange(self.size)):
            raise ConfigurationError(f"the order is no permutation of {self.size} channels")
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        for axis in self.axes:
            tensor = tensors[axis.name]
            places = (order[:, None] * axis.repeat + torch.arange(axis.repeat)).flatten().to(tensor.device)
            tensor.copy_(tensor.index_select(axis.dim, places))


def find_channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """Return all groups of channels of a convolutional network, in the order in which they appear.

    Parameters
    ----------
    model
        Any module that torch.fx can trace.

    Raises
    ------
    ModelError
        If it cannot be traced.
    """
    was_training = model.training
    try:
        graph = fx.symbolic_trace(model.eval()).graph
    except Exception as error:  # a trace runs the model's own code, which may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the model cannot be traced by torch.fx ({reason}); write its forward without branches on tensors"
        ) from error
    finally:
        model.train(was_training)
    return _Walk(model).run(graph)


def _over_positions(node: fx.Node) -> bool:
    """Whether a mean leaves batch and channels alone."""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
    chosen = (dims,) if isinstance(dims, int) else tuple(dims or ())  # type: ignore[arg-type]
    return bool(chosen) and all(dim in (2, 3, -1, -2) for dim in chosen)


class _Walk:
    """One pass over a graph. Dimensions are numbers that a union-find joins; None has no channels."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.parents: list[int] = []
        self.groups: list[ChannelGroup] = []
        self.carried: dict[fx.Node, int | None] = {}

    def run(self, graph: fx.Graph) -> list[ChannelGroup]:
        for node in graph.nodes:
            self.carried[node] = self._visit(node)
        return [group for number, group in enumerate(self.groups) if self._root(number) == number and group.axes]

    def _visit(self, node: fx.Node) -> int | None:
        if node.op == "output":
            self._pin(self._inputs(node))
            return None
        if node.op == "call_module":
            return self._module(str(node.target), self.modules[str(node.target)], node)
        if node.op in ("call_function", "call_method"):
            return self._function(node)
        return None  # an input image, or a constant

    def _module(self, name: str, module: nn.Module, node: fx.Node) -> int | None:
        before = self._first(node)
        if isinstance(module, nn.Conv2d):
            return self._convolution(name, module, before)
        if isinstance(module, nn.Linear):
            self._connect(before, Axis(f"{name}.weight", 1), module.in_features)
            return self._new(module.out_features, name, module)
        if isinstance(module, _CHANNELWISE):
            for part, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.dim() == 1 and len(tensor) > 1:
                    self._connect(before, Axis(f"{name}.{part}", 0), len(tensor))
            return before
        if isinstance(module, _PASSING_MODULES):
            return before
        self._pin(self._inputs(node))
        return None

    def _convolution(self, name: str, module: nn.Conv2d, before: int | None) -> int | None:
        if module.groups == 1:
            self._connect(before, Axis(f"{name}.weight", 1), module.in_channels)
            return self._new(module.out_channels, name, module)
        if module.groups == module.in_channels == module.out_channels:
            for part, _ in module.named_parameters(recurse=False):
                self._connect(before, Axis(f"{name}.{part}", 0), module.in_channels)
            return before
        self._pin([before])  # groups of several channels, or several outputs for each
        after = self._new(module.out_channels, name, module)
        self._pin([after])
        return after

    def _function(self, node: fx.Node) -> int | None:
        known = [number for number in self._inputs(node) if number is not None]
        if node.target in _JOINING:
            for other in known[1:]:
                self._join(known[0], other)
            return known[0] if known else None
        if node.target in ("mean", torch.mean) and not _over_positions(node):
            self._pin(known)
            return None
        if node.target in _PASSING_FUNCTIONS or node.target in _PASSING_METHODS:
            return self._first(node)
        if not (node.op == "call_method" and node.target in ("size", "dim")):
            self._pin(known)
        return None

    def _inputs(self, node: fx.Node) -> list[int | None]:
        return [self.carried.get(other) for other in node.all_input_nodes]

    def _first(self, node: fx.Node) -> int | None:
        first: Any = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        return self.carried.get(first) if isinstance(first, fx.Node) else None

    def _new(self, size: int, name: str, module: nn.Module) -> int:
        number = len(self.groups)
        self.parents.append(number)
        parts = [part for part, _ in module.named_parameters(recurse=False)]
        self.groups.append(ChannelGroup(size, [Axis(f"{name}.{part}", 0) for part in parts]))
        return number

    def _connect(self, number: int | None, axis: Axis, length: int) -> None:
        """Let a tensor follow channels, whose entries may each take several places of it."""
        if number is None:
            return
        group = self.groups[self._root(number)]
        repeat, rest = divmod(length, group.size)
        if rest:
            group.free = False
            return
        new = Axis(axis.name, axis.dim, repeat)
        if new in group.axes:  # one layer that is used twice
            return
        group.axes.append(new)

    def _join(self, one: int, other: int) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        if first == second:
            return
        kept, gone = self.groups[first], self.groups[second]
        if kept.size != gone.size:
            kept.free = gone.free = False
            return
        self.parents[second] = first
        kept.axes += [axis for axis in gone.axes if axis not in kept.axes]
        kept.free = kept.free and gone.free

    def _pin(self, numbers: Iterable[int | None]) -> None:
        for number in numbers:
            if number is not None:
                self.groups[self._root(number)].free = False

    def _root(self, number: int) -> int:
        while self.parents[number] != number:
            number = self.parents[number]
        return number

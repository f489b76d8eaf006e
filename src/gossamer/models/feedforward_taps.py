"""Where the channels of feed-forward layers can be read: what goes into their last matrix, or their activation.

Both are found by what they compute. What goes into the matrix that maps back is the middle of the layer, gate and all;
the activation is the module inside that bends numbers, channel by channel. Layers that PEFT has wrapped are found as
what they were, and read as what they have become.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.core.taps import Tap
from gossamer.errors import TargetError, UnknownNameError
from gossamer.models.blocks import find_stacks
from gossamer.models.feedforward import FeedForward
from gossamer.models.feedforward_search import _evaluating, _noise, call_container, find_feed_forwards
from gossamer.models.offload import onloaded

Place = Literal["middle", "activation"]
_ACTIVATION_MODULES = (
    "torch.nn.modules.activation",
    "transformers.activations",
    "gossamer.models.activation_functions",
)
_NO_ACTIVATIONS = (nn.MultiheadAttention, nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin)
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Activation:
    """An activation function that is a module of its own.

    Attributes
    ----------
    name
        Its qualified name.
    owner, attribute
        The module that holds it, and under which name.
    layer
        Name of the feed-forward layer it belongs to.
    """

    name: str
    owner: nn.Module
    attribute: str
    layer: str

    @property
    def module(self) -> nn.Module:
        """What is there now."""
        return self.owner._modules[self.attribute]  # type: ignore[return-value]


def feed_forward_taps(model: nn.Module, place: Place = "middle") -> list[Tap]:
    """The taps at the feed-forward layers of a model; encoder and decoder are groups of their own.

    Parameters
    ----------
    model
        Any module, also one that PEFT has wrapped.
    place
        ``middle``: what goes into the matrix that maps back. ``activation``: what comes out of the activation
        function; the same where there is no gate.

    Raises
    ------
    UnknownNameError
        If there is no such place.
    TargetError
        If the model has no feed-forward layer, or one without a module for its activation.
    """
    if place not in ("middle", "activation"):
        raise UnknownNameError("place", str(place), ("middle", "activation"))
    stacks = [stack.name for stack in find_stacks(model)]

    def group(name: str) -> str:
        return next((stack for stack in stacks if f"{name}.".startswith(f"{stack}.")), "")

    if place == "activation":
        return [Tap(a.name, a.module, "output", group(a.name)) for a in feed_forward_activations(model)]
    with as_it_was(model) as wrappers:
        layers = find_feed_forwards(model)
    modules = [(layer, wrappers.get(id(layer.down.module), layer.down.module)) for layer in layers]
    return [Tap(layer.down.module_name, module, "input", group(layer.name)) for layer, module in modules]


def feed_forward_activations(model: nn.Module) -> list[Activation]:
    """The activation functions in the feed-forward layers of a model, where they are modules.

    A module counts if it maps the middle of a layer (or its gate) to something of the same shape, is not the identity
    in evaluation, and has no matrix.

    Raises
    ------
    TargetError
        If the model has no feed-forward layer, or one calls a function instead.
    """
    with as_it_was(model):
        layers = find_feed_forwards(model)
        found: dict[int, Activation] = {}
        for layer in layers:
            inside = _bending(layer)
            if not inside:
                raise TargetError(
                    f"{layer.name}: its activation is a function that its forward calls, and no module that could be "
                    f"read or replaced; read the middle of the layer instead, or give the model a module"
                )
            for name, owner, attribute in inside:
                full = f"{layer.name}.{name}" if layer.name else name
                found.setdefault(id(owner._modules[attribute]), Activation(full, owner, attribute, layer.name))
    return list(found.values())


def has_packed_matrices(model: nn.Module) -> bool:
    """Whether matrices are held in few bits, as whole numbers, so that nobody can tell what their layers compute."""
    return any(parameter.dim() > 1 and not parameter.is_floating_point() for parameter in model.parameters())


def block_activations(model: nn.Module) -> list[Tap]:
    """Taps at the activation functions inside the repeated blocks of a model, told by their class.

    For models whose matrices are packed and cannot be looked at, such as those that bitsandbytes holds in 4 bits;
    elsewhere :func:`feed_forward_taps` says for certain what is a feed-forward layer.

    Raises
    ------
    TargetError
        If no block has one.
    """
    found: list[Tap] = []
    for stack in find_stacks(model):
        for block_name, block in stack.blocks.items():
            for name, module in block.named_modules():
                known = type(module).__module__ in _ACTIVATION_MODULES and not isinstance(module, _NO_ACTIVATIONS)
                if known and not any(f"{block_name}.{name}".startswith(f"{tap.name}.") for tap in found):
                    found.append(Tap(f"{block_name}.{name}", module, "output", stack.name))
    if not found:
        raise TargetError(f"no block of {type(model).__name__} has an activation function that is a module; name taps")
    return found


@torch.no_grad()
def _bending(layer: FeedForward) -> list[tuple[str, nn.Module, str]]:
    """Name, owner and attribute of the modules in a layer's container that act on its channels one by one."""
    owners = {
        id(child): (f"{name}.{attribute}" if name else attribute, owner, attribute)
        for name, owner in layer.module.named_modules()
        for attribute, child in owner.named_children()
        if not any(p.dim() > 1 for p in child.parameters()) and not isinstance(child, _LISTS)
    }
    found: list[tuple[str, nn.Module, str]] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        wide = bool(args) and isinstance(args[0], Tensor) and args[0].shape[-1] == layer.width
        if wide and isinstance(output, Tensor) and output.shape == args[0].shape and not torch.equal(output, args[0]):
            place = owners[id(module)]
            if place not in found and _is_pointwise(module, args[0]):
                found.append(place)

    kept = [child for name, child in layer.module.named_modules() if id(child) in owners]
    handles = [child.register_forward_hook(note) for child in kept]
    try:
        with onloaded(layer.module), _evaluating(layer.module):
            call_container(layer.module, _noise(layer.down.parameter, layer.down.shape[0]))
    finally:
        for handle in handles:
            handle.remove()
    # what is made of several functions counts as a whole
    return [place for place in found if not any(place[0].startswith(f"{other[0]}.") for other in found)]


def _is_pointwise(module: nn.Module, values: Tensor) -> bool:
    """Whether the largest of a token's channels keep their outputs when the smallest are made smaller still.

    A norm fails this; a rule that keeps the k largest passes, as every function of single numbers does.
    """
    largest = int(values.flatten(0, -2)[0].argmax())
    other = values.clone()
    other[values < values.median()] -= 1
    before, after = (module.forward(each).flatten(0, -2)[0, largest] for each in (values, other))
    return bool(torch.equal(before, after))


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[dict[int, nn.Module]]:
    """The model without the wrappers around its layers; original layer → wrapper, by id. They are put back.

    Activations whose channels compete, or stay silent on noise, stand aside for ones that do not: with them a layer
    could not be told by what it computes.
    """
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in model.modules():
        for attribute, child in parent.named_children():
            if isinstance(getattr(child, "base_layer", None), nn.Module) or hasattr(child, "stand_in"):
                taken.append((parent, attribute, child))
    wrappers: dict[int, nn.Module] = {}
    try:
        for parent, attribute, child in taken:
            if hasattr(child, "stand_in"):
                parent._modules[attribute] = child.stand_in()
                continue
            original: Any = child
            while isinstance(getattr(original, "base_layer", None), nn.Module):
                original = original.base_layer
            wrappers.setdefault(id(original), child)
            parent._modules[attribute] = original
        yield wrappers
    finally:
        for parent, attribute, child in taken:
            parent._modules[attribute] = child

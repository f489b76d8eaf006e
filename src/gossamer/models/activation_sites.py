"""Where a decoder's activations can be made sparse: the inputs of linear layers, and the gates of feed-forwards.

What a layer is for is found by what it does. The matrices of attention and of feed-forward layers come from
:mod:`~gossamer.models.heads` and :mod:`~gossamer.models.feedforward_search`; of the two widening matrices of a gated
layer the gate is the one in which the output is not linear. Layers that PEFT has wrapped are found as what they were,
and hooked as what they have become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core.targets import Target, find_targets
from gossamer.errors import ModelError, TargetError, UnknownNameError
from gossamer.models.blocks import find_stacks
from gossamer.models.feedforward import FeedForward
from gossamer.models.feedforward_search import call_container, find_feed_forwards
from gossamer.models.feedforward_taps import as_it_was
from gossamer.models.heads import AttentionHeads, find_attention_heads

SiteRole = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
ROLES: tuple[SiteRole, ...] = get_args(SiteRole)
ATTENTION_INPUTS: tuple[SiteRole, ...] = ("q", "k", "v", "qkv")


@dataclass(frozen=True, eq=False)
class InputSite:
    """The input of a linear layer.

    Attributes
    ----------
    target
        Its matrix, ``(out, in)``.
    role
        What it is for; ``up`` also where a feed-forward layer has no gate.
    block
        Name of the block it belongs to.
    wrapper
        The module that is called in the layer's place, with adapters for instance; None if that is the layer itself.
    """

    target: Target
    role: SiteRole
    block: str
    wrapper: nn.Module | None = None

    @property
    def name(self) -> str:
        """Qualified name of the layer, such as ``model.layers.0.self_attn.q_proj``."""
        return self.target.module_name

    @property
    def module(self) -> nn.Module:
        """What is called: the layer, or the wrapper around it."""
        return self.wrapper or self.target.module

    @property
    def width(self) -> int:
        """Number of input channels."""
        return self.target.shape[1]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.target.shape.numel()


@dataclass(frozen=True, eq=False)
class GateSite:
    """What the activation function of a feed-forward layer puts out.

    Attributes
    ----------
    name
        Qualified name of the feed-forward layer, such as ``model.layers.0.mlp``.
    layer
        Its matrices.
    activation
        The module that computes the activation function.
    gate, up
        The widening matrix that the activation is applied to, and the other one; one and the same target where both
        are fused, and no `up` where there is no gate.
    block
        Name of the block it belongs to.
    wrappers
        Id of a layer → the module that is called in its place, with adapters for instance.
    """

    name: str
    layer: FeedForward
    activation: nn.Module
    gate: Target
    up: Target | None
    block: str
    wrappers: Mapping[int, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """Number of channels in the middle."""
        return self.layer.width

    def called(self, target: Target) -> nn.Module:
        """What is called to compute with a matrix of the layer: its own module, or the wrapper around it."""
        return self.wrappers.get(id(target.module), target.module)


def find_input_sites(
    model: nn.Module,
    roles: Sequence[SiteRole] = ROLES,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> list[InputSite]:
    """The linear layers of attention and feed-forward layers, in the order in which the model defines them.

    Parameters
    ----------
    model
        A decoder or encoder, from Hugging Face or plain.
    roles
        Only layers that are for one of these.
    include, exclude
        Globs on the names of layers.

    Raises
    ------
    UnknownNameError
        If there is no such role.
    TargetError
        If no layer is left. (Stacked experts are no linear layers: of a mixture there is attention.)
    """
    for role in set(roles) - set(ROLES):
        raise UnknownNameError("role of a layer", role, ROLES)
    blocks = [name for stack in find_stacks(model) for name in stack.blocks]
    with as_it_was(model) as wrappers:
        targets = {t.module_name: t for t in find_targets(model, heads=True) if t.index is None}
        found = _roles(model, targets)
    sites = [
        InputSite(target, found[name], _block(name, blocks), wrappers.get(id(target.module)))
        for name, target in targets.items()
        if name in found and found[name] in roles
    ]
    chosen = [site for site in sites if _matches(site.name, include) and not _matches(site.name, exclude)]
    if not chosen:
        raise TargetError(
            f"no layer of {type(model).__name__} matches roles={list(roles)} include={list(include)} "
            f"exclude={list(exclude)}; its {len(found)} layers have the roles {', '.join(sorted(set(found.values())))}"
        )
    return chosen


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """All layers that :func:`find_input_sites` finds, name → ``(out, in)``: what tells two models apart."""
    return {site.name: (site.target.shape[0], site.target.shape[1]) for site in find_input_sites(model)}


def _roles(model: nn.Module, targets: Mapping[str, Target]) -> dict[str, SiteRole]:
    found: dict[str, SiteRole] = {}
    try:
        layers = find_feed_forwards(model)
    except TargetError:
        layers = []
        if not (attention := _attention(model)):
            raise
    else:
        attention = _attention(model)
    for layer in layers:
        found |= _feed_forward_roles(layer)
    inside = {target.module_name for layer in layers for target in layer.targets}
    for heads in attention:
        found |= _attention_roles(heads, {n: t for n, t in targets.items() if n not in inside})
    return found


def _block(name: str, blocks: Sequence[str]) -> str:
    return next((block for block in blocks if name.startswith(f"{block}.")), name)


def find_gate_sites(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> list[GateSite]:
    """The activation functions of feed-forward layers, in the order in which the model defines them.

    Parameters
    ----------
    model
        A decoder or encoder, from Hugging Face or plain.
    include, exclude
        Globs on the names of feed-forward layers.

    Raises
    ------
    TargetError
        If no feed-forward layer is left.
    ModelError
        If a layer computes its activation without a module of its own, or shares that with another.
    """
    with as_it_was(model) as wrappers:
        layers = find_feed_forwards(model)
        chosen = [layer for layer in layers if _matches(layer.name, include) and not _matches(layer.name, exclude)]
        if not chosen:
            raise TargetError(
                f"no feed-forward layer of {type(model).__name__} matches include={list(include)} "
                f"exclude={list(exclude)}; they have names such as {layers[0].name!r}"
            )
        found = [gate_site(layer) for layer in chosen]
        places = [_name_of(model, site.activation) for site in found]
    # an activation that had stood aside for another is in its place again
    sites = [
        replace(site, activation=model.get_submodule(place), wrappers=wrappers) for site, place in zip(found, places)
    ]
    owners: dict[int, str] = {}
    for site in sites:
        if (other := owners.setdefault(id(site.activation), site.name)) != site.name:
            raise ModelError(
                f"{other} and {site.name} share one module for their activation function; give each its own"
            )
    return sites


def gate_site(layer: FeedForward) -> GateSite:
    """The activation function of one feed-forward layer; see :func:`find_gate_sites`."""
    roles = _feed_forward_roles(layer)
    by_role = {roles[target.module_name]: target for target in layer.inputs}
    gate = by_role.get("gate") or by_role.get("gate_up") or by_role["up"]
    up = by_role.get("up") if "gate" in by_role else by_role.get("gate_up")
    called: list[nn.Module] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and args and output.shape[-1] == layer.width == args[0].shape[-1]:
            called.append(module)

    leaves = [m for m in layer.module.modules() if not any(True for _ in m.children()) and not list(m.parameters())]
    handles = [leaf.register_forward_hook(note) for leaf in leaves if not isinstance(leaf, (nn.Dropout, nn.Identity))]
    try:
        _run(layer, _noise(layer))
    finally:
        for handle in handles:
            handle.remove()
    if len(called) != 1:
        raise ModelError(
            f"{layer.name}: {len(called)} modules compute its activation function where one is needed; "
            f"wrap the activation in a module, or choose a method that works on the inputs of layers, such as 'teal'"
        )
    return GateSite(layer.name, layer, called[0], gate, up, layer.block)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _attention(model: nn.Module) -> list[AttentionHeads]:
    try:
        return find_attention_heads(model)
    except TargetError:
        return []


def _attention_roles(heads: AttentionHeads, free: dict[str, Target]) -> dict[str, SiteRole]:
    found: dict[str, SiteRole] = {heads.output.module_name: "o"}
    if heads.query is not None:
        found[heads.query.module_name] = "q"
        for target, role in zip(heads.shared, ("k", "v")):
            found[target.module_name] = role  # type: ignore[assignment]
        return found
    for name, target in free.items():
        if name.startswith(f"{heads.name}.") and target is not heads.output and name not in found:
            found[name] = "qkv"
    return found


def _feed_forward_roles(layer: FeedForward) -> dict[str, SiteRole]:
    """The role of each matrix by the name of its layer."""
    roles: dict[str, SiteRole] = {layer.down.module_name: "down"}
    if len(layer.inputs) == 1:
        fused = layer.inputs[0].shape[0] != layer.width
        roles[layer.inputs[0].module_name] = "gate_up" if fused else "up"
        return roles
    noise = _noise(layer)
    plain = _run(layer, noise)
    for target in layer.inputs:
        handle = target.module.register_forward_hook(lambda module, args, output: -2 * output)
        try:
            turned = _run(layer, noise)
        finally:
            handle.remove()
        size = float(plain.abs().nan_to_num().max())  # NaN in a weight is for calibration to report
        linear = torch.allclose(turned.float(), -2 * plain.float(), rtol=0.05, atol=0.01 * size, equal_nan=True)
        roles[target.module_name] = "up" if linear else "gate"
    return roles


def _noise(layer: FeedForward) -> Tensor:
    weight = layer.down.parameter
    noise = torch.randn(1, 4, layer.down.shape[0], generator=torch.Generator().manual_seed(0))
    # large enough that an activation function bends; odd ones bend under doubling, the others under a change of sign
    return (8 * noise).to(weight.device, weight.dtype)


@torch.no_grad()
def _run(layer: FeedForward, noise: Tensor) -> Tensor:
    """What the matrix that maps back receives."""
    seen: list[Tensor] = []
    handle = layer.down.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    training = [module for module in layer.module.modules() if module.training]
    layer.module.eval()
    try:
        call_container(layer.module, noise, strict=True)
    finally:
        handle.remove()
        for module in training:
            module.training = True
    return seen[0]


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


class RuleAtWork:
    """What an activation rule has put into a module, as a hook or in the place of its ``forward``."""


def rules_at_work(model: nn.Module) -> bool:
    """Whether activation rules are at work in a model, installed in it, in a part of it or in a larger one."""
    return any(
        isinstance(getattr(hook, "__self__", None), RuleAtWork)
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values(), module.forward)
    )

"""The feed-forward layers of a model, found by what they compute and not by what they are called.

What makes a feed-forward layer is that channel j in its middle depends on row j of the widening matrices only, at its
own token: then a channel can be taken out and nothing else notices. That is observed: a container of linear layers is
run on a random hidden state, gradients tell which channels depend on which, and the container must give the same with
half of its channels silenced as with them taken out. Attention, state-space layers and normalised middles fail this;
gated and plain layers pass, whatever they are called.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.targets import Target, find_targets
from gossamer.errors import ModelError, TargetError
from gossamer.models.blocks import find_stacks
from gossamer.models.feedforward import FeedForward
from gossamer.models.offload import onloaded

_NOISE_SHAPE = (8, 3)  # sequences, so that no channel is cut off by its activation in all of them; tokens


def find_feed_forwards(model: nn.Module) -> list[FeedForward]:
    """The feed-forward layers of a model, in the order in which it defines them.

    Linear layers and transformers' ``Conv1D`` are looked at; experts stacked in one parameter are not, nor are
    adapters, and layers that have some are none. The model is left as it is; each kind of container is run a few times
    on a few random tokens.

    Raises
    ------
    TargetError
        If there is none.
    ModelError
        If the search fails because the model was made inside of ``torch.inference_mode()``.
    NonFiniteError
        If it fails and a weight is NaN or infinite, which hides what depends on what.
    """
    adapters = _adapters(model)
    linear = {
        id(t.module): t
        for t in find_targets(model, heads=True)
        if t.index is None and (isinstance(t.module, nn.Linear) or t.transposed) and id(t.module) not in adapters
    }
    blocks = [name for stack in find_stacks(model) for name in stack.blocks]
    found: dict[str, FeedForward] = {}
    for name, module, inputs, down in _Search(linear).below("", model):
        block = next((b for b in blocks if f"{name}.".startswith(f"{b}.")), name)
        # two in one container take the name of their last matrix
        own = down.module_name if name in found else name
        found[own] = FeedForward(own, module, block, inputs, down)
    if not found:
        _check_gradients(model)
        _check_finite(linear.values())
        if adapters:
            raise TargetError(
                f"no feed-forward layer of {type(model).__name__} is free of adapters, which compute with all of its "
                f"channels; merge them first, with merge_and_unload()"
            )
        raise TargetError(
            f"no feed-forward layer in {type(model).__name__}: none of its {len(linear)} linear layers form a pair "
            f"d→m→d with independent channels in the middle; prune weights instead, for instance with 'wanda'"
        )
    return list(found.values())


def choose_feed_forwards(
    model: nn.Module, found: Sequence[FeedForward], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> list[FeedForward]:
    """Those whose names match one of the globs of `include` and none of `exclude`.

    Raises
    ------
    TargetError
        If none does.
    ModelError
        If one of them shares a parameter with another layer.
    """
    chosen = [f for f in found if _matches(f.name, include) and not _matches(f.name, exclude)]
    if not chosen:
        raise TargetError(
            f"no feed-forward layer matches include={list(include)} exclude={list(exclude)}; "
            f"there are {len(found)}, with names such as {found[0].name!r}"
        )
    _check_untied(model, chosen)
    return chosen


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _check_untied(model: nn.Module, found: Sequence[FeedForward]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for target in (target for layer in found for target in layer.targets):
        for alias in target.aliases:
            # one module used in several places shrinks everywhere at once; a parameter of two modules cannot
            if modules[alias.rpartition(".")[0]] is not target.module:
                raise ModelError(
                    f"{target.name} and {alias} are one tied parameter of two layers; channels cannot be taken out "
                    f"of one of them: exclude {target.module_name!r} and its twin"
                )


def _check_gradients(model: nn.Module) -> None:
    name = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if name is not None:
        raise ModelError(
            f"{name} was made inside of torch.inference_mode(), and no gradient goes through it, by which feed-forward "
            f"layers are found; load the model outside of that mode"
        )


def _adapters(model: nn.Module) -> set[int]:
    """Ids of the modules that PEFT has put beside a layer."""
    found: set[int] = set()
    for wrapper in model.modules():
        base = getattr(wrapper, "base_layer", None)
        if isinstance(base, nn.Module):
            found |= {id(part) for part in wrapper.modules()} - {id(part) for part in base.modules()}
    return found


def _check_finite(targets: Iterable[Target]) -> None:
    for target in targets:
        with onloaded(target.module):
            target.check_finite()


_Found = tuple[str, nn.Module, tuple[Target, ...], Target]


class _Search:
    """Innermost containers first; linear layers that no container inside has claimed are offered to the one around."""

    def __init__(self, linear: dict[int, Target]):
        self._linear = linear
        self._known: dict[Any, list[tuple[tuple[int, ...], int]]] = {}
        self._loose: dict[int, list[Target]] = {}
        self._seen: set[int] = set()

    def below(self, name: str, module: nn.Module) -> Iterator[_Found]:
        """The feed-forward layers in `module`; what is left over is noted."""
        if id(module) in self._seen:
            self._loose[id(module)] = []
            return
        self._seen.add(id(module))
        if id(module) in self._linear:
            self._loose[id(module)] = [self._linear[id(module)]]
            return
        loose: list[Target] = []
        for child_name, child in module.named_children():
            yield from self.below(f"{name}.{child_name}" if name else child_name, child)
            loose += self._loose[id(child)]
        for inputs, down in self._pairs(name, module, loose):
            yield name, module, inputs, down
            loose = [target for target in loose if target is not down and target not in inputs]
        # members of a list are blocks, experts or branches: no layer spans two of them
        self._loose[id(module)] = [] if isinstance(module, nn.ModuleList) else loose

    def _pairs(self, name: str, module: nn.Module, loose: list[Target]) -> list[tuple[tuple[Target, ...], Target]]:
        if not any(_fits(a, b) for a in loose for b in loose):
            return []
        prefix = len(name) + 1 if name else 0
        kind = (type(module), tuple((target.name[prefix:], tuple(target.shape)) for target in loose))
        if kind not in self._known:
            self._known[kind] = _observe_pairs(module, loose)
        return [(tuple(loose[i] for i in inputs), loose[down]) for inputs, down in self._known[kind]]


def _fits(widening: Target, down: Target) -> bool:
    d, m = down.shape
    return widening is not down and tuple(widening.shape) in ((m, d), (2 * m, d))


@torch.inference_mode(False)
@torch.enable_grad()
def _observe_pairs(module: nn.Module, loose: list[Target]) -> list[tuple[tuple[int, ...], int]]:
    """Indices of the layers that widen and of the one that maps back, for each feed-forward layer in the container."""
    found: list[tuple[tuple[int, ...], int]] = []
    with onloaded(module), _evaluating(module):
        for size in sorted({b.shape[0] for a in loose for b in loose if _fits(a, b)}):
            noise = _noise(loose[0].parameter, size)
            seen = _run_noting(module, loose, noise.requires_grad_())
            for down, target in enumerate(loose):
                if down not in seen or target.shape[0] != size:
                    continue
                candidates = [i for i in seen if _fits(loose[i], target)]
                feeding = _feeding(seen[down][0], [seen[i][1] for i in candidates])
                inputs = tuple(candidates[i] for i in feeding)
                layer = FeedForward("", module, "", tuple(loose[i] for i in inputs), target)
                if inputs and _channels_come_out(layer, noise.detach()):
                    found.append((inputs, down))
    return found


def _noise(like: Tensor, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*_NOISE_SHAPE, size, generator=generator).to(like.device, like.dtype)


def _feeding(middle: Tensor, outputs: list[Tensor]) -> list[int]:
    """Which of the outputs reach the middle channel by channel and token by token.

    Parameters
    ----------
    middle
        ``(batch, tokens, m)`` or ``(batch · tokens, m)``, the input of the layer that maps back.
    outputs
        ``(…, m or 2m)`` each.
    """
    if not outputs or not middle.requires_grad:
        return []
    width = middle.shape[-1]
    chosen = _some_channels(width).to(middle.device)
    # the last token is the one that could have looked at others
    total = middle.reshape(*_NOISE_SHAPE, width)[:, -1, chosen].float().sum()
    feeding = []
    for index, gradient in enumerate(torch.autograd.grad(total, outputs, retain_graph=True, allow_unused=True)):
        if gradient is None or not gradient.any():
            continue
        gradient = gradient.reshape(*_NOISE_SHAPE, -1).clone()
        gradient[:, -1, chosen.repeat(gradient.shape[-1] // width)] = 0
        if not gradient.any():
            feeding.append(index)
    return feeding


def _some_channels(width: int) -> Tensor:
    """A random half, never all and never none."""
    chosen = torch.rand(width, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[0], chosen[-1] = True, False
    return chosen


@torch.no_grad()
def _channels_come_out(layer: FeedForward, noise: Tensor) -> bool:
    """Whether taking half of the channels out does the same as silencing them; everything is put back."""
    keep = _some_channels(layer.width)

    def silence(_: nn.Module, args: tuple) -> tuple:
        return (args[0] * keep.to(args[0]), *args[1:])

    handle = layer.down.module.register_forward_pre_hook(silence)
    expected = call_container(layer.module, noise)
    handle.remove()
    before = [(part, dict(vars(part)), dict(part._parameters)) for part in layer.module.modules()]
    try:
        layer.shrink_(keep)
        actual = call_container(layer.module, noise)
    finally:
        for part, attributes, parameters in before:
            vars(part).update(attributes)
            part._parameters.update(parameters)
    if expected is None or actual is None or expected.shape != actual.shape:
        return False
    tolerance = 10 * torch.finfo(noise.dtype).eps ** 0.5
    return float((expected - actual).float().norm()) <= tolerance * float(expected.float().norm())


def _run_noting(module: nn.Module, loose: list[Target], noise: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Input and output of each linear layer during a call of the container; empty if it cannot be called."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(index: int) -> Any:
        def hook(_: nn.Module, args: tuple, output: Tensor) -> None:
            if args and args[0].shape[:-1].numel() == noise.shape[:-1].numel():
                seen[index] = (args[0], output)

        return hook

    handles = [target.module.register_forward_hook(note(index)) for index, target in enumerate(loose)]
    output = call_container(module, noise)
    for handle in handles:
        handle.remove()
    return {} if output is None else seen


def call_container(module: nn.Module, hidden: Tensor, strict: bool = False) -> Tensor | None:
    """Call a container with a hidden state, and whatever else it insists on with nothing, or else with the same.

    None if it does not work: then it is something else than a feed-forward layer. With `strict`, what it raises is
    raised again: then it is known to be one.
    """
    required = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for other in (None, hidden):
        try:
            output = module(hidden, *[other] * (len(required) - 1))
        except Exception:  # a module that is not meant to be called like this may raise anything
            if strict and other is hidden:
                raise
            continue
        output = output[0] if isinstance(output, (tuple, list)) else output
        return output if isinstance(output, Tensor) else None
    return None


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True

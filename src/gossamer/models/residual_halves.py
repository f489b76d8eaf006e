"""The halves of a decoder's blocks, ``x + c · layer(norm(x))``: what one has to know before their stream can be turned.

Everything is seen in calls of a few tokens: which norm feeds which layers, that nobody else reads it, and by what a
block multiplies what it adds to the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.models.activation_sites import ATTENTION_INPUTS, InputSite, find_input_sites
from gossamer.models.blocks import find_stacks

SAMPLE = 4  # tokens of a call that shows which norm feeds which layer


@dataclass(eq=False)
class Half:
    """One half of a block: a norm, the layers that read it, and the one that writes back to the stream."""

    norm: nn.Module
    readers: list[nn.Module]
    writer: nn.Module
    name: str
    key: nn.Module
    factor: float = 1.0  # by which the block multiplies what the writer puts out


@dataclass(eq=False)
class _Sample:
    """What was seen in a call of a few tokens: layer → norm that it reads; what norms read, and layers put out."""

    producers: dict[int, nn.Module]
    streams: dict[int, Tensor]
    written: dict[int, Tensor]


def find_halves(model: nn.Module, head: nn.Module) -> tuple[list[Half], nn.Module]:
    """The halves of all blocks in order, and the norm before the head; refuses what cannot be rotated."""
    sites = find_input_sites(model)
    if any(site.wrapper is not None for site in sites):
        raise ModelError(
            f"{type(model).__name__} has adapters, which would not turn; merge them into its weights first"
        )
    sample = _sampled(model, [*(site.module for site in sites), head])
    halves = []
    for block in (name for stack in find_stacks(model) for name in stack.blocks):
        own = [site for site in sites if site.block == block]
        attention = [site for site in own if site.role in ATTENTION_INPUTS]
        widening = [site for site in own if site.role in ("gate", "up", "gate_up")]
        for readers, role, key in ((attention, "o", ("k", "qkv")), (widening, "down", ("gate", "gate_up", "up"))):
            writer = next((site for site in own if site.role == role), None)
            if not readers or writer is None:
                raise ModelError(
                    f"{block} has no {role} layer with readers; only blocks of attention and feed-forward turn"
                )
            halves.append(_half(readers, writer, key, sample.producers))
    if len({id(half.norm) for half in halves}) != len(halves):
        raise ModelError(
            f"{type(model).__name__} has one norm for attention and feed-forward, so a block cannot turn twice"
        )
    final = sample.producers.get(id(head))
    if final is None:
        raise ModelError(f"the head of {type(model).__name__} does not read a norm; its basis cannot be undone")
    norms = [*(half.norm for half in halves), final]
    for norm in norms:
        norm_gain(norm, halves[0].writer.weight.shape[0])  # type: ignore[union-attr, index]
    _check_readers(model, halves, final, head)
    for half, after in zip(halves, norms[1:]):
        before, behind = sample.streams[id(half.norm)], sample.streams[id(after)]
        half.factor = _factor(model, half.name, before, behind, sample.written[id(half.writer)])
    return halves, final


def _half(readers: list[InputSite], writer: InputSite, key: tuple[str, ...], producers: dict[int, nn.Module]) -> Half:
    norms = {id(norm): norm for site in readers if (norm := producers.get(id(site.module))) is not None}
    if len(norms) != 1 or any(id(site.module) not in producers for site in readers):
        raise ModelError(
            f"{readers[0].name} does not read one norm together with the layers beside it, so its input cannot turn"
        )
    if any(site.target.transposed for site in [*readers, writer]):
        raise ModelError(f"{writer.name} stores its weight transposed; only linear layers can be rotated")
    ordered = sorted((s for s in readers if s.role in key), key=lambda s: key.index(s.role))
    if not ordered:
        raise ModelError(
            f"{writer.block} has no {key[0]} matrix of its own beside {readers[0].name}, whose singular vectors would "
            f"be the new basis; use WINA without the transformation"
        )
    modules = [site.module for site in readers]
    return Half(next(iter(norms.values())), modules, writer.module, writer.name, ordered[0].module)


def _sampled(model: nn.Module, layers: list[nn.Module]) -> _Sample:
    """Which norm each layer reads, what norms read and what layers write; refuses norms that read what was written."""
    made: list[tuple[Tensor, nn.Module]] = []
    read: list[tuple[Tensor, nn.Module]] = []
    outputs: list[Tensor] = []
    sample = _Sample({}, {}, {})
    normed: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        if any(module is layer for layer in layers):
            read.append((args[0], module))
            outputs.append(output)
            sample.written[id(module)] = output.detach().clone()
        elif isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and args[0].shape == output.shape:
            made.append((output, module))
            normed.append(args[0])
            sample.streams[id(module)] = args[0].detach().clone()  # some add to the stream in place

    leaves = [m for m in model.modules() if not list(m.children())]
    norms = [m for m in leaves if [p.dim() for p in m.parameters()] in ([1], [1, 1])]
    handles = [m.register_forward_hook(note) for m in [*layers, *norms]]
    try:
        sample_logits(model)
    finally:
        for handle in handles:
            handle.remove()
    width = next(iter(layers)).weight.shape[1]  # type: ignore[union-attr, index]
    for inputs in normed:
        if inputs.shape[-1] == width and any(_is_view(inputs, output) for output in outputs):
            raise ModelError(
                f"{type(model).__name__} has norms after attention or feed-forward layers, before their output joins "
                f"the stream; a rotation cannot pass through them: use WINA without the transformation"
            )
    sample.producers |= {id(layer): norm for inputs, layer in read for output, norm in made if _is_view(inputs, output)}
    return sample


def _factor(model: nn.Module, name: str, before: Tensor, after: Tensor, written: Tensor) -> float:
    """The c of ``after = before + c · written``, by least squares; refuses blocks for which there is none."""
    eps = torch.finfo(written.dtype).eps
    old, new, output = (values.double().cpu().flatten() for values in (before, after, written))
    size = float(output.norm())
    if not size:
        return 1.0  # nothing is added, whatever it is multiplied by
    factor = float((new - old) @ output) / size**2
    rest = float((new - old - factor * output).norm())
    if rest > 4 * eps * float(old.norm() + new.norm() + output.norm()):
        raise ModelError(
            f"the stream behind {name} is not the one before it plus a multiple of what it puts out, so its skip "
            f"connection cannot turn; use WINA without the transformation"
        )
    doubt = max(1e-4 * abs(factor), 8 * rest / size / output.numel() ** 0.5)
    config: Any = getattr(model, "config", None)
    said = [value for value in vars(config).values() if isinstance(value, float)] if config is not None else []
    nearest = min([1.0, *said], key=lambda value: abs(value - factor))
    if abs(nearest - factor) <= doubt:
        return nearest
    if doubt > 1e-3 * abs(factor):
        raise ModelError(
            f"{name} is added to the stream times about {factor:.3g}, which {written.dtype} does not show exactly "
            f"enough to turn it; load the model in float32"
        )
    return factor


@torch.inference_mode(False)
@torch.enable_grad()
def _check_readers(model: nn.Module, halves: list[Half], final: nn.Module, head: nn.Module) -> None:
    """Refuse norms whose output has readers besides the layers that turn: their derivative is not zero."""
    leaves: dict[str, Tensor] = {}
    stream: list[Tensor] = []
    handles = [final.register_forward_pre_hook(lambda module, args: stream.append(args[0]))]

    def leaf(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaves[names[id(module)]] = output.detach().requires_grad_()
        return leaves[names[id(module)]]

    def cut(module: nn.Module, args: tuple) -> tuple:
        return (args[0].detach(), *args[1:])

    names = {id(module): name for name, module in model.named_modules()}
    for norm in [*(half.norm for half in halves), final]:
        handles.append(norm.register_forward_hook(leaf))
    for reader in [head, *(reader for half in halves for reader in half.readers)]:
        handles.append(reader.register_forward_pre_hook(cut))
    try:
        logits = sample_logits(model)
    finally:
        for handle in handles:
            handle.remove()
    total = logits.square().sum() + stream[0].double().square().sum()
    if not total.requires_grad:
        return
    for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values()), allow_unused=True)):
        if gradient is not None and gradient.any():
            raise ModelError(
                f"the output of {name} has other readers than linear layers of attention and feed-forward, such as a "
                f"router and stacked experts, which would not turn; use WINA without the transformation"
            )


def _is_view(one: Tensor, other: Tensor) -> bool:
    # the head of some models reads a slice of what the norm puts out
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def norm_gain(norm: nn.Module, width: int) -> Tensor:
    """By what a norm multiplies each channel, ``(d,)`` float64; refuses norms that are no RMS norms."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    sample = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) + 1
    probe = sample.to(weight.device, weight.dtype)
    wide = probe.double()
    found = norm(probe).double() / (wide / wide.square().mean(-1, keepdim=True).sqrt())
    spread = (found - found.mean(0)).abs().max()
    if spread > 20 * torch.finfo(weight.dtype).eps * found.abs().max() + 1e-4 * found.abs().max():
        raise ModelError(f"a {type(norm).__name__} is no RMS norm (it subtracts the mean); its model cannot be rotated")
    return found.mean(0)


def sample_logits(model: nn.Module) -> Tensor:
    """What a model says to a few tokens, ``(1, 4, vocabulary)`` float64."""
    tokens = torch.arange(SAMPLE, device=next(model.parameters()).device)[None]
    return model(tokens, use_cache=False).logits.double()

"""The same decoder in another basis, in which its key and gate matrices have orthogonal columns.

An RMS norm without gain commutes with rotations of the residual stream, so that a rotation can be put between any two
layers if the next layer undoes it. Where attention and feed-forward want different bases, the stream that skips them
has to be rotated by the product of both, which costs a d × d matrix each [Chen et al., 2025, arXiv 2505.19427, §3.2].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.models.activation_sites import ATTENTION_INPUTS, InputSite, find_input_sites
from gossamer.models.blocks import find_stacks

_SAMPLE = 4  # tokens of the call that shows which norm feeds which layer


@dataclass(eq=False)
class Rotation:
    """What :func:`orthogonalise` has done to a model.

    Attributes
    ----------
    skips
        Names of layers (the ones that map back to the stream) → the d × d matrix of their skip connection.
    untied
        Whether the output head was given a weight of its own.
    """

    skips: dict[str, Tensor]
    untied: bool

    @property
    def size(self) -> int:
        """Weights that every token reads besides those of the layers."""
        return sum(matrix.numel() for matrix in self.skips.values())


@dataclass(eq=False)
class _Half:
    """One half of a block: a norm, the layers that read it, and the one that writes back to the stream."""

    norm: nn.Module
    readers: list[nn.Module]
    writer: nn.Module
    name: str
    key: nn.Module


def is_rotated(model: nn.Module) -> bool:
    """Whether :func:`orthogonalise` has been at this model."""
    return getattr(model, "_rotation", None) is not None


def rotation_size(model: nn.Module) -> int:
    """Weights of the skip connections of a rotated model; 0 for any other."""
    rotation: Rotation | None = getattr(model, "_rotation", None)
    return 0 if rotation is None else rotation.size


@torch.no_grad()
def orthogonalise(model: nn.Module) -> Rotation:
    """Rotate a decoder so that W_kᵀ W_k and W_gateᵀ W_gate are diagonal, in place, without changing what it computes.

    Gains of norms are folded into the layers after them. The bases are the right singular vectors of each block's key
    matrix (of the fused one where query, key and value are one) and of its gate matrix; decompositions and products
    are in float64. A tied output head gets a weight of its own.

    Parameters
    ----------
    model
        A decoder whose blocks are ``x + attention(norm(x))`` and ``x + feed_forward(norm(x))`` with RMS norms.

    Raises
    ------
    ModelError
        If its blocks are different: norms after attention or feed-forward layers (Gemma), norms that subtract the mean
        (GPT-2, OPT), or one norm for both halves; or if it has been rotated already.
    """
    if is_rotated(model):
        raise ModelError("this model has been rotated already; load it again to start from the original")
    embedding, head = _ends(model)
    halves, final = _halves(model, head)
    untied = _untie(model, embedding, head)
    for half in halves:
        _fold(half.norm, half.readers)
    _fold(final, [head])
    bases = [torch.linalg.svd(half.key.weight.double(), full_matrices=True).Vh.T for half in halves]  # type: ignore[operator]
    _times(embedding, bases[0])
    skips: dict[str, Tensor] = {}
    for index, half in enumerate(halves):
        basis, after = bases[index], bases[min(index + 1, len(bases) - 1)]
        for reader in half.readers:
            _times(reader, basis)
        _turn_output(half.writer, after)
        skips[half.name] = (basis.T @ after).to(half.writer.weight.dtype)  # type: ignore[arg-type]
        _rotate_skip(half, skips[half.name])
    _times(head, bases[-1])
    rotation = Rotation(skips, untied)
    model._rotation = rotation  # type: ignore[assignment]
    return rotation


def _ends(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Module) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} does not name its embedding and its head; use a causal language model"
        )
    return embedding, head


def _untie(model: nn.Module, embedding: nn.Module, head: nn.Module) -> bool:
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)  # type: ignore[union-attr, operator]
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.tie_word_embeddings = False
    return True


def _halves(model: nn.Module, head: nn.Module) -> tuple[list[_Half], nn.Module]:
    """The halves of all blocks in order, and the norm before the head; refuses what cannot be rotated."""
    sites = find_input_sites(model)
    producers = _producers(model, [*(site.module for site in sites), head])
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
            halves.append(_half(readers, writer, key, producers))
    if len({id(half.norm) for half in halves}) != len(halves):
        raise ModelError(
            f"{type(model).__name__} has one norm for attention and feed-forward, so a block cannot turn twice"
        )
    final = producers.get(id(head))
    if final is None:
        raise ModelError(f"the head of {type(model).__name__} does not read a norm; its basis cannot be undone")
    for norm in [*(half.norm for half in halves), final]:
        _gain(norm, halves[0].writer.weight.shape[0])  # type: ignore[union-attr, index]
    return halves, final


def _half(readers: list[InputSite], writer: InputSite, key: tuple[str, ...], producers: dict[int, nn.Module]) -> _Half:
    norms = {id(norm): norm for site in readers if (norm := producers.get(id(site.module))) is not None}
    if len(norms) != 1 or any(id(site.module) not in producers for site in readers):
        raise ModelError(
            f"{readers[0].name} does not read one norm together with the layers beside it, so its input cannot turn"
        )
    if any(site.target.transposed for site in [*readers, writer]):
        raise ModelError(f"{writer.name} stores its weight transposed; only linear layers can be rotated")
    ordered = sorted((s for s in readers if s.role in key), key=lambda s: key.index(s.role))
    modules = [site.module for site in readers]
    return _Half(next(iter(norms.values())), modules, writer.module, writer.name, ordered[0].module)


def _producers(model: nn.Module, layers: list[nn.Module]) -> dict[int, nn.Module]:
    """The norm whose output each layer reads; refuses norms that read what a layer writes to the stream."""
    made: list[tuple[Tensor, nn.Module]] = []
    read: list[tuple[Tensor, nn.Module]] = []
    written: list[Tensor] = []
    normed: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        if any(module is layer for layer in layers):
            read.append((args[0], module))
            written.append(output)
        elif isinstance(output, Tensor) and args and isinstance(args[0], Tensor) and args[0].shape == output.shape:
            made.append((output, module))
            normed.append(args[0])

    leaves = [m for m in model.modules() if not list(m.children())]
    norms = [m for m in leaves if [p.dim() for p in m.parameters()] in ([1], [1, 1])]
    handles = [m.register_forward_hook(note) for m in [*layers, *norms]]
    try:
        device = next(model.parameters()).device
        model(torch.arange(_SAMPLE, device=device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    width = next(iter(layers)).weight.shape[1]  # type: ignore[union-attr, index]
    for inputs in normed:
        if inputs.shape[-1] == width and any(_is_view(inputs, output) for output in written):
            raise ModelError(
                f"{type(model).__name__} has norms after attention or feed-forward layers, before their output joins "
                f"the stream; a rotation cannot pass through them: use WINA without the transformation"
            )
    return {id(layer): norm for inputs, layer in read for output, norm in made if _is_view(inputs, output)}


def _is_view(one: Tensor, other: Tensor) -> bool:
    # the head of some models reads a slice of what the norm puts out
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _gain(norm: nn.Module, width: int) -> Tensor:
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


def _fold(norm: nn.Module, readers: list[nn.Module]) -> None:
    weight: Tensor = norm.weight  # type: ignore[assignment]
    before = weight.double().clone()
    gain = _gain(norm, len(weight))
    for reader in readers:
        matrix: Tensor = reader.weight  # type: ignore[assignment]
        matrix.copy_((matrix.double() * _exact_gain(before, gain)).to(matrix.dtype))
    # some keep the gain, some the gain minus one
    weight.fill_(0.0 if _is_offset(before, gain) else 1.0)


def _exact_gain(weight: Tensor, measured: Tensor) -> Tensor:
    """The gain without the rounding of its measurement: the norm's weight, or one more."""
    return weight + 1 if _is_offset(weight, measured) else weight


def _is_offset(weight: Tensor, measured: Tensor) -> bool:
    return bool((weight + 1 - measured).abs().max() < (weight - measured).abs().max())


def _times(module: nn.Module, basis: Tensor) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.copy_((weight.double() @ basis.to(weight.device)).to(weight.dtype))


def _turn_output(module: nn.Module, basis: Tensor) -> None:
    weight: Tensor = module.weight  # type: ignore[assignment]
    weight.copy_((basis.T.to(weight.device) @ weight.double()).to(weight.dtype))
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is not None:
        bias.copy_((basis.T.to(bias.device) @ bias.double()).to(bias.dtype))


def _rotate_skip(half: _Half, matrix: Tensor) -> None:
    """Add what the rotated skip has more than the plain one to what the half writes to the stream."""
    change = matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    stream: list[Tensor] = []

    def keep(module: nn.Module, args: tuple) -> None:
        stream[:] = [args[0]]

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        # a layer that is called by itself has no stream to rotate
        return output if not stream else output + stream.pop() @ change.to(output.device, output.dtype)

    half.norm.register_forward_pre_hook(keep)
    half.writer.register_forward_hook(add)

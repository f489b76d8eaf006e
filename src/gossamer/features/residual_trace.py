"""One text's way through a model, in parts that add up: what each layer's attention and feed-forward part wrote.

The stream before a layer is the embedding and all that earlier layers wrote. What a head reads of it passes through a
normalisation, whose scale is held fixed, and through the matrix of values. So each head's reading of each token is a
sum over everything that was written there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import CalibrationError, ModelError
from gossamer.features.attention_trace import AttentionTrace, attention_pattern
from gossamer.features.frozen_norm import FrozenNorm
from gossamer.features.heads import HeadGrid, evaluating, watched
from gossamer.models.attention_sites import AttentionCall, AttentionSite
from gossamer.models.blocks import find_stacks, run_batch
from gossamer.models.heads import AttentionHeads

_EXACT = 1e-3


@dataclass(frozen=True, eq=False)
class LayerTrace:
    """One layer of a :class:`ResidualTrace`.

    Attributes
    ----------
    attention
        Pattern and values.
    norm
        Before attention.
    values, read
        Values ``(heads, tokens, size)`` and what they are a function of, the normalised stream ``(1, tokens, d)``, with
        the way back from one to the other.
    before
        The stream that the layer reads, ``(tokens, d)``.
    heads
        What each head wrote, ``(tokens, heads, d)``.
    attention_bias
        What attention writes besides, ``(d,)``.
    rest
        What the feed-forward part wrote, ``(tokens, d)``.
    output
        The matrix behind the heads by heads, ``(heads, d, size)``.
    """

    attention: AttentionTrace
    norm: FrozenNorm
    values: Tensor
    read: Tensor
    before: Tensor
    heads: Tensor
    attention_bias: Tensor
    rest: Tensor
    output: Tensor
    _readers: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def back(self, head: int, direction: Tensor, position: int) -> Tensor:
        """What ``direction · v`` of a head reads of the stream before normalisation at a token, ``(d,)``.

        Raises
        ------
        ModelError
            If values are no linear function of the normalised stream.
        """
        reader = direction @ self._reader(head)
        return self.norm.back(reader, position)

    def _reader(self, head: int) -> Tensor:
        """The matrix ``(size, d)`` that makes a head's values of the normalised stream, without its bias."""
        if head not in self._readers:
            with torch.enable_grad():
                here = self.values[head, 0]
                (rows,) = torch.autograd.grad(here, self.read, torch.eye(len(here)), True, is_grads_batched=True)
            reader, values = rows[:, 0, 0].float(), self.values[head].detach()
            off = values - self.read.detach()[0].float() @ reader.t()
            if float((off - off[0]).abs().max()) > _EXACT * float(values.abs().max()):
                raise ModelError(f"layer {self.attention.layer}: values are no linear function of what attention reads")
            self._readers[head] = reader
        return self._readers[head]


@dataclass(frozen=True, eq=False)
class ResidualTrace:
    """All layers up to some layer, for one text.

    Attributes
    ----------
    tokens
        Ids ``(tokens,)``.
    layers
        In order.
    """

    tokens: Tensor
    layers: tuple[LayerTrace, ...]

    @property
    def embedding(self) -> Tensor:
        """The stream before the first layer, ``(tokens, d)``."""
        return self.layers[0].before


class _Seen:
    """What hooks have noted of one layer."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.after: Tensor | None = None
        self.children: dict[str, Tensor] = {}
        self.read: Tensor | None = None
        self.written: Tensor | None = None
        self.call: AttentionCall | None = None


def trace_residual(model: nn.Module, tokens: Tensor, layer: int) -> ResidualTrace:
    """Run one text and take all layers up to one apart.

    Parameters
    ----------
    model
        A Hugging Face decoder whose blocks add the outputs of attention and of a feed-forward part to a stream, behind
        a normalisation before each.
    tokens
        Ids, ``(tokens,)`` or ``(1, tokens)``.
    layer
        Number of the last layer.

    Raises
    ------
    ModelError
        If the model is of another kind; what does not add up is named.
    CalibrationError
        If there is no such layer or no token.
    """
    row = tokens.reshape(1, -1)
    grid = HeadGrid.of(model)
    blocks = next((list(stack.blocks.values()) for stack in find_stacks(model)), [])
    if not row.shape[1] or not 0 <= layer < len(grid.layers):
        raise CalibrationError(
            f"{row.shape[1]} tokens, layer {layer}; give a token or more, a layer below {len(grid.layers)}"
        )
    if len(blocks) != len(grid.layers):
        raise ModelError(f"{type(model).__name__} has {len(blocks)} blocks and {len(grid.layers)} attention layers")
    seen = [_Seen() for _ in blocks]

    def attend(call: AttentionCall) -> None:
        seen[call.layer].call = call

    with ExitStack() as stack:
        site = AttentionSite(model, attend)
        stack.callback(site.remove)
        for block, heads, note in zip(blocks, grid.layers, seen):
            for handle in _hooks(block, heads, note):
                stack.callback(handle.remove)
        stack.enter_context(_frozen(model))
        # values keep their way back to what attention reads; everything behind is cut off from it
        with torch.enable_grad(), evaluating(model), watched(grid, lambda number, z: z.detach()):
            run_batch(model, row)
        layers = [
            _layer(number, row[0], blocks[number], grid.layers[number], seen[number]) for number in range(layer + 1)
        ]
    return ResidualTrace(row[0], tuple(layers))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _hooks(block: nn.Module, heads: AttentionHeads, note: _Seen) -> list[Any]:
    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note.before = (args[0] if args else kwargs["hidden_states"]).detach()

    def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note.after = (output[0] if isinstance(output, tuple) else output).detach()

    def reading(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        note.read = x.detach().requires_grad_()
        return ((note.read, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": note.read})

    def writing(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note.written = output.detach()

    handles = [
        block.register_forward_pre_hook(entering, with_kwargs=True),
        block.register_forward_hook(leaving),
        heads.module.register_forward_pre_hook(reading, with_kwargs=True),
        heads.output.module.register_forward_hook(writing),
    ]
    for name, child in block.named_children():

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                note.children[name] = output.detach()

        handles.append(child.register_forward_hook(keep))
    return handles


def _layer(number: int, tokens: Tensor, block: nn.Module, heads: AttentionHeads, seen: _Seen) -> LayerTrace:
    if seen.call is None or seen.before is None or seen.after is None or seen.read is None or seen.written is None:
        raise ModelError(f"layer {number} was not seen to attend; its mask or its attention is of a kind of its own")
    before, written = seen.before[0].float(), seen.written[0].float()
    rest = seen.after[0].float() - before - written
    size = float(seen.after.abs().max())
    adds = [output[0] for output in seen.children.values() if output.shape == seen.after.shape]
    if float(rest.abs().max()) > _EXACT * size and not any(_same(rest, part.float(), size) for part in adds):
        raise ModelError(
            f"layer {number} does not add what attention and a feed-forward part put out to its stream as they are; "
            "recursive attribution cannot follow it"
        )
    read = seen.read.detach()[0].float()
    normed = [
        name for name, output in seen.children.items() if output.shape == seen.after.shape and output[0].equal(read)
    ]
    if not normed:
        raise ModelError(f"layer {number}: no part of {type(block).__name__} puts out what attention reads")
    with torch.enable_grad():
        values = seen.call.value.float().repeat_interleave(seen.call.group, 1)[0]
    trace = AttentionTrace(number, tokens, attention_pattern(seen.call)[0].detach(), values.detach())
    slices = heads.slices().detach().float()
    each = torch.einsum("thv,hdv->thd", trace.z, slices)
    if not _same(each.sum(1) + _bias(written, each), written, size):
        raise ModelError(
            f"layer {number}: its heads do not add up to what attention puts out; it does more than attend"
        )
    return LayerTrace(
        trace,
        FrozenNorm.of(getattr(block, normed[0]), before),
        values,
        seen.read,
        before,
        each,
        _bias(written, each),
        rest,
        slices,
    )


def _same(one: Tensor, other: Tensor, size: float) -> bool:
    return float((one - other).abs().max()) <= _EXACT * max(size, 1e-6)


def _bias(written: Tensor, each: Tensor) -> Tensor:
    return (written - each.sum(1)).mean(0)

"""Layers that treat some of their tokens, and pass the others by.

A layer of a decoder is called with the tokens that are kept, in their order, with their own positions and their own
rows of the mask; what it returns is put back among the tokens that were not, which keep what they had. Hooks do it,
outside of gradient checkpointing, so that neither a model's code nor its parameters' names change. Nothing of an
eliminated token is stored for the backward pass.

The order of tokens stays. Rows are read and written where they lie (:mod:`gossamer.attention.token_sparse_rows`), or
gathered and put back by torch, once a layer and way: one copy of the kept rows, and one of the whole; the backward pass
then copies once where autograd alone would fill with zeros, add, and copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.attention.token_sparse_rows import KeptRows, PermutationFree, put_back
from gossamer.core.labels import IGNORED
from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.blocks import Stack, find_stacks

Slot = int | str


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What one layer is called with.

    Attributes
    ----------
    layer
        Index of the layer.
    module
        The layer.
    hidden
        ``(batch, tokens, width)``.
    slot
        Where among its arguments they were.
    args, kwargs
        All arguments.
    real
        Bool ``(batch, tokens)``, False at padding; None if there is none, or nobody has told.
    labelled
        Bool ``(batch, tokens)``, True where a label is to be predicted; None if nobody has told.
    """

    layer: int
    module: nn.Module
    hidden: Tensor
    slot: Slot
    args: tuple
    kwargs: dict[str, Any]
    real: Tensor | None
    labelled: Tensor | None

    @property
    def caches(self) -> bool:
        """Whether keys and values are to be remembered."""
        return self.kwargs.get("past_key_values") is not None


@dataclass
class KeptTokens:
    """How many tokens the layers have kept.

    Attributes
    ----------
    layers
        Number of layers.
    tokens, seen
        Layer → tokens kept, and tokens there were, padding left out.
    """

    layers: int
    tokens: dict[int, int] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, kept: int, seen: int) -> None:
        """Count a call."""
        self.tokens[layer] = self.tokens.get(layer, 0) + kept
        self.seen[layer] = self.seen.get(layer, 0) + seen

    @property
    def kept(self) -> list[float]:
        """Share of the tokens that each layer has kept; 1 for one that was not called."""
        return [self.tokens.get(i, 1) / max(1, self.seen.get(i, 1)) for i in range(self.layers)]

    @property
    def share(self) -> float:
        """Share over all layers."""
        return sum(self.kept) / self.layers

    def __str__(self) -> str:
        return f"tokens kept: {self.share:.1%} (by layer {', '.join(f'{share:.0%}' for share in self.kept)})"


class TokenSparseLayers:
    """Decoder layers that ask, whenever they are called, which tokens they are to treat; until :meth:`remove`.

    Parameters
    ----------
    model
        A decoder of Hugging Face, wrapped by PEFT or not.
    choose
        Gets a call and returns the kept tokens, bool ``(batch, tokens)``, and for each token a priority by which
        items of a batch that keep less are filled up; or None for all tokens.
    may
        Whether tokens may be left out of a call at all.
    in_place
        Whether, for these hidden states, a layer's rows are read and written where they lie; by default never. Layers
        without root-mean-square norms, and those that compute activations again in the backward pass, get copies.

    Raises
    ------
    ModelError
        If the model has not one stack of decoder layers.
    """

    def __init__(
        self,
        model: nn.Module,
        choose: Callable[[LayerCall], tuple[Tensor, Tensor] | None],
        may: Callable[[LayerCall], bool],
        in_place: Callable[[Tensor], bool] | None = None,
    ):
        self.stack = decoder_stack(model)
        self.choose, self.may, self.in_place = choose, may, in_place
        self._stand_ins = PermutationFree([] if in_place is None else list(self.stack.blocks.values()))
        self.counts = KeptTokens(len(self.stack.blocks))
        self._real: Tensor | None = None
        self._labelled: Tensor | None = None
        self._waiting: dict[int, tuple[Tensor, Tensor]] = {}
        # what calls the layers gets the mask of real tokens even where the model itself is passed by
        body = model.get_submodule(self.stack.name.rpartition(".")[0])
        self._handles: list[Any] = []
        for outer in dict.fromkeys((model, body)):
            self._handles.append(outer.register_forward_pre_hook(self._listen, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._forget, always_call=True))
        for number, layer in enumerate(self.stack.blocks.values()):
            enter = lambda module, args, kwargs, number=number: self._enter(number, module, args, kwargs)  # noqa: E731
            leave = lambda module, args, output, number=number: self._leave(number, output)  # noqa: E731
            self._handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
            # before other hooks, which want to see what the next layer will get
            self._handles.append(layer.register_forward_hook(leave, prepend=True))

    def remove(self) -> None:
        """Give the layers all their tokens back; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stand_ins.remove()

    def _listen(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._real = mask.bool()
        if isinstance(labels, Tensor) and labels.dim() == 2:
            # position t predicts the token behind it
            self._labelled = torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1))

    def _forget(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._real = self._labelled = None
        self._waiting.clear()

    def _enter(self, number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._waiting.pop(number, None)
        self._stand_ins.end(number)  # whatever happened to an earlier call
        slot: Slot = 0 if args else "hidden_states"
        hidden = args[0] if args else kwargs["hidden_states"]
        length = hidden.shape[1]
        real = self._real if self._real is not None and self._real.shape[1] == length else None
        labelled = self._labelled if self._labelled is not None and self._labelled.shape[1] == length else None
        call = LayerCall(number, layer, hidden, slot, args, kwargs, real, labelled)
        chosen = self.choose(call) if self.may(call) else None
        if chosen is None:
            return None
        keep, priority = chosen
        seen = keep.numel() if real is None else int(real.sum())
        self.counts.add(number, int(keep.sum()), seen)
        index = token_index(keep, priority)
        if index.shape[1] == length:
            return None
        flat = (index + torch.arange(len(index), device=index.device)[:, None] * length).flatten()
        if self.in_place is not None and self.in_place(hidden) and self._stand_ins.takes(number, layer, hidden):
            kept, rest = KeptRows(hidden, flat), hidden
        else:
            kept, rest = _Gather.apply(hidden, flat)
        self._waiting[number] = (rest, flat)
        changed = self._gathered(call, kept, index)
        if isinstance(kept, KeptRows):
            self._stand_ins.begin(number)
        return changed

    def _gathered(self, call: LayerCall, kept: Tensor | KeptRows, index: Tensor) -> tuple[tuple, dict[str, Any]]:
        check_windows(call)
        batch, length = call.hidden.shape[:2]
        kwargs = {name: _rows(name, value, index, batch, length) for name, value in call.kwargs.items()}
        # in training nobody reads the cache, and one with holes would mislead whoever did
        kwargs |= {name: None for name in ("past_key_values", "past_key_value") if name in kwargs}
        args = tuple(_rows("", value, index, batch, length) for value in call.args)
        if isinstance(call.slot, int):
            args = (kept, *args[1:])
        else:
            kwargs[call.slot] = kept
        return args, kwargs

    def _leave(self, number: int, output: Any) -> Any:
        waiting = self._waiting.pop(number, None)
        if waiting is None:
            return None
        rows, *others = output if isinstance(output, tuple) else (output,)
        if self._stand_ins.end(number):
            whole = put_back(rows, *waiting)
        else:
            whole = _Scatter.apply(waiting[0], rows, waiting[1])
        return (whole, *others) if isinstance(output, tuple) else whole


def decoder_stack(model: nn.Module) -> Stack:
    """The one stack of layers of a decoder.

    Raises
    ------
    ModelError
        If there is none, or several.
    """
    stacks = find_stacks(model)
    if len(stacks) != 1 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        names = ", ".join(stack.name for stack in stacks) or "none"
        raise ModelError(
            f"{type(model).__name__} has not one stack of decoder layers (stacks: {names}); tokens are eliminated in "
            "causal language models only"
        )
    return stacks[0]


def token_index(keep: Tensor, priority: Tensor) -> Tensor:
    """Positions of the kept tokens, ascending, equally many for every item of a batch.

    Items that keep fewer than others are filled up with their best eliminated tokens.

    Parameters
    ----------
    keep
        Bool ``(batch, tokens)``.
    priority
        ``(batch, tokens)``.

    Returns
    -------
    Tensor
        ``(batch, kept)`` int64.
    """
    if len(keep) == 1:
        return keep[0].nonzero().T
    most = int(keep.sum(1).max())
    ranks = torch.where(keep, float("inf"), priority.double())
    return ranks.argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values


class _Gather(torch.autograd.Function):
    """Some rows of ``(batch, tokens, width)``, and the whole as it is for :class:`_Scatter`.

    Backward, what comes from the rows replaces what comes from the whole there: one copy, no addition.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(flat)
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, flat)
        return rows.view(len(hidden), -1, hidden.shape[-1]), hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_rows: Tensor, of_rest: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        gradient = of_rest.clone(memory_format=torch.contiguous_format)
        gradient.view(-1, gradient.shape[-1]).index_copy_(0, flat, of_rows.reshape(-1, gradient.shape[-1]))
        return gradient, None


class _Scatter(torch.autograd.Function):
    """The whole with some of its rows replaced; its own gradient at these rows is left to :class:`_Gather`."""

    @staticmethod
    def forward(ctx: Any, rest: Tensor, rows: Tensor, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.shape = rows.shape
        out = rest.clone(memory_format=torch.contiguous_format)
        out.view(-1, out.shape[-1]).index_copy_(0, flat, rows.reshape(-1, out.shape[-1]).to(out.dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (flat,) = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).index_select(0, flat)
        return gradient, rows.view(ctx.shape), None


def _rows(name: str, value: Any, index: Tensor, batch: int, length: int) -> Any:
    """The part of a layer's argument that belongs to the kept tokens."""
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_rows(name, part, index, batch, length) for part in value)
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask":
        return _mask_rows(value, index, length)
    if name == "cache_position" and value.shape == (length,):
        return value[index[0]]
    if name == "position_ids" and value.shape[-1] == length:
        return _along(value, index, value.dim() - 1)
    if value.dim() >= 2 and value.shape[1] == length and value.shape[0] in (1, batch):
        return _along(value, index, 1)
    return value


def _along(value: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries along a dimension, for each item of the batch its own; a batch of one serves all items."""
    if len(index) == 1:
        return value.index_select(dim, index[0])
    axis = dim - 1  # the batch is the dimension before
    shape = [*value.shape]
    shape[axis] = len(index)
    where = index.reshape([len(index) if d == axis else -1 if d == dim else 1 for d in range(value.dim())])
    shape[dim] = index.shape[1]
    return value.expand([len(index) if d == axis else s for d, s in enumerate(value.shape)]).gather(
        dim, where.expand(shape)
    )


def _mask_rows(mask: Tensor, index: Tensor, length: int) -> Tensor:
    """Rows and columns ``(batch, heads, queries, keys)`` of the kept tokens; of a mask of keys, its entries."""
    if mask.dim() == 2:
        return mask.expand(len(index), -1).gather(1, index)
    if mask.dim() != 4 or mask.shape[-2] != length or mask.shape[-1] < length:
        raise ModelError(
            f"attention_mask has shape {tuple(mask.shape)}; tokens can be eliminated under a mask of shape "
            f"(batch, 1, {length}, {length}) or none: use the attention 'sdpa' or 'eager'"
        )
    some = mask.expand(len(index), -1, -1, -1)
    rows = index[:, None, :, None].expand(-1, some.shape[1], -1, some.shape[3])
    some = some.gather(2, rows)
    columns = index[:, None, None, :].expand(-1, some.shape[1], some.shape[2], -1)
    return some.gather(3, columns)


def check_windows(call: LayerCall) -> None:
    """Refuse a sliding window that nothing but the order of the kept tokens would tell."""
    window = getattr(getattr(call.module, "self_attn", None), "sliding_window", None)
    mask = call.kwargs.get("attention_mask")
    if window and window < call.hidden.shape[1] and not (isinstance(mask, Tensor) and mask.dim() == 4):
        raise ConfigurationError(
            f"layer {call.layer} slides a window of {window} tokens without a mask, so that kept tokens would reach "
            "too far; load the model with attn_implementation='sdpa'"
        )

"""Blocks that are called with some of the tokens only: what becomes of hidden states, rotary embeddings and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def thinned(value: Any, kept: Tensor, length: int) -> Any:
    """What a block is called with, for the kept of so many tokens only: hidden states, rotary embeddings, masks."""
    if isinstance(value, tuple):
        return tuple(thinned(part, kept, length) for part in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    # masks run over tokens twice, (batch, heads, queries, keys); what is one-dimensional is a list of positions
    dims = {1: (0,), 2: (1,), 3: (1,)}.get(value.dim(), (value.dim() - 2, value.dim() - 1))
    for dim in dims:
        if value.shape[dim] == length:
            value = value.index_select(dim, kept.to(value.device))
    return value


def restored(hidden: Tensor, kept: Tensor, length: int) -> Tensor:
    """Hidden states ``(1, n, d)`` of the kept tokens among zeros for the others, ``(1, length, d)``."""
    whole = hidden.new_zeros(1, length, hidden.shape[-1])
    return whole.index_copy_(1, kept.to(hidden.device), hidden)


def behind(value: Any, entries: int) -> Any:
    """A mask ``(…, …, tokens, …)`` for tokens that see so many entries of a cache before them; the rest stays."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return value
    tokens = value.shape[-2]
    seen = value.new_ones(()) if value.dtype == torch.bool else value.new_zeros(())
    return torch.cat([seen.expand(*value.shape[:-1], entries), value[..., -tokens:]], dim=-1)


def on_inputs(change: Callable[[Any], Any]) -> Any:
    """A hook, with keyword arguments, that changes everything that a block is called with."""

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return tuple(change(value) for value in args), {name: change(value) for name, value in kwargs.items()}

    return hook


def on_hidden(change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that changes the hidden states that a block puts out."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook

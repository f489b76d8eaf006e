"""A cache that keeps, beside keys and values, the bounds of the keys of every page of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, eq=False)
class Pages:
    """Bounds of the keys of every page.

    Attributes
    ----------
    low, high
        ``(batch, key heads, pages, head size)``.
    tokens
        Keys in all of them; the last page may have room for more.
    size
        Keys of a page.
    """

    low: Tensor
    high: Tensor
    tokens: int
    size: int

    @classmethod
    @torch.no_grad()
    def of(cls, key: Tensor, size: int) -> Pages:
        """Pages of keys ``(batch, key heads, keys, head size)``."""
        spare = -key.shape[2] % size
        low, high = (
            pad(key, (0, 0, 0, spare), value=value).unflatten(2, (-1, size)) for value in (float("inf"), -float("inf"))
        )
        return cls(low.amin(3), high.amax(3), key.shape[2], size)

    @torch.no_grad()
    def extended(self, key: Tensor) -> Pages:
        """These, and more keys behind them, ``(batch, key heads, keys, head size)``."""
        room = -self.tokens % self.size
        more = Pages.of(key[:, :, room:], self.size)
        low, high, first = self.low, self.high, key[:, :, :room]
        if first.shape[2]:
            low = torch.cat([low[:, :, :-1], low[:, :, -1:].minimum(first.amin(2, keepdim=True))], 2)
            high = torch.cat([high[:, :, :-1], high[:, :, -1:].maximum(first.amax(2, keepdim=True))], 2)
        low, high = torch.cat([low, more.low], 2), torch.cat([high, more.high], 2)
        return Pages(low, high, self.tokens + key.shape[2], self.size)

    def each(self, change: Callable[[Tensor], Tensor]) -> Pages:
        """These with both bounds changed along the batch."""
        return Pages(change(self.low), change(self.high), self.tokens, self.size)


class PagedLayer(DynamicLayer):
    """Keys and values of one layer, and the bounds of their pages.

    Parameters
    ----------
    keys, values
        ``(batch, key heads, tokens, head size)``, what is there already.
    size
        Tokens of a page.

    Attributes
    ----------
    pages
        The bounds, of all keys in the cache.
    """

    def __init__(self, keys: Tensor, values: Tensor, size: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.pages = Pages.of(keys, size)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens, ``(batch, key heads, tokens, size)``; returns all keys and values."""
        found = super().update(key_states, value_states)
        known = self.pages.tokens == found[0].shape[2] - key_states.shape[2]
        self.pages = self.pages.extended(key_states) if known else Pages.of(found[0], self.pages.size)
        return found

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; see :meth:`DynamicLayer.crop`."""
        super().crop(tokens_to_remove)
        self.pages = Pages.of(self.keys, self.pages.size)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every beam the cache of another."""
        super().reorder_cache(beam_idx)
        self.pages = self.pages.each(lambda bound: bound.index_select(0, beam_idx.to(bound.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self.pages = self.pages.each(lambda bound: bound.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self.pages = self.pages.each(lambda bound: bound[indices])

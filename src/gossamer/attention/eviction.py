"""A cache that forgets: keys and values of a prompt thrown away for good, head by head.

Heads may keep different numbers of tokens. What is kept lies at the front, as wide as the head that keeps most; tokens
that are decoded later follow behind it. Positions go on counting from the whole prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gossamer.attention.model_cache import CacheInstalled, layer_of
from gossamer.attention.token_selection import TokenSelection
from gossamer.errors import ConfigurationError


class EvictedLayer(DynamicLayer):
    """Keys and values of the tokens that each head has kept.

    Parameters
    ----------
    keys, values
        ``(batch, key heads, tokens, size)`` before eviction.
    kept
        Bool ``(batch, key heads, tokens)``.
    """

    is_croppable = False

    def __init__(self, keys: Tensor, values: Tensor, kept: Tensor):
        super().__init__()
        self.counts = kept.sum(-1)
        self.front = int(self.counts.max())
        self.seen = keys.shape[2]
        order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : self.front]
        self.lazy_initialization(keys, values)
        self.keys, self.values = (
            states.gather(2, order[..., None].expand(-1, -1, -1, states.shape[3])) for states in (keys, values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append decoded tokens, ``(batch, key heads, tokens, size)``; returns all that is stored."""
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones included: where the next one stands."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if nothing had been evicted; see :meth:`listed` for what there is."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was evicted cannot be brought back.

        Raises
        ------
        ConfigurationError
            Always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise ConfigurationError(
                f"{-tokens_to_remove} tokens are to be removed from a cache that has evicted others; decode without "
                "assistance"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self.counts = self.counts.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self.counts = self.counts[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every beam the cache of another."""
        super().reorder_cache(beam_idx)
        self.counts = self.counts[beam_idx.to(self.counts.device)]

    def listed(self) -> TokenSelection:
        """What every head has, as places in the stored tensors."""
        stored = self.keys.shape[2]
        places = torch.arange(stored, device=self.keys.device)
        if bool((self.counts == self.front).all()):
            return TokenSelection(places.expand(*self.counts.shape, -1))
        counts = self.counts[..., None]
        indices = torch.where(places < counts, places, places - counts + self.front).clamp(max=stored - 1)
        return TokenSelection(indices, self.counts + (stored - self.front))


class EvictingInstalled(CacheInstalled):
    """A method at work that evicts tokens, after which no prompt may follow."""

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._look(module, args, kwargs)
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        evicted = isinstance(layer_of(self.method.cache, module.layer_idx), EvictedLayer)
        if evicted and hidden is not None and hidden.shape[1] > 1:
            raise ConfigurationError(
                f"{hidden.shape[1]} tokens follow a prompt of which some were evicted; decode them one by one, or put "
                "them into the prompt"
            )


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers holds."""
    found = [states for layer in cache.layers for states in (layer.keys, layer.values) if states is not None]
    return sum(states.numel() * states.element_size() for states in found)

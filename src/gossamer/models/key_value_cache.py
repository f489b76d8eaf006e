"""Caches of keys and values that are rolled back, rewritten in place, and thinned out to some of their tokens.

One kind grows and shows what it holds. The other has one size for good, as compiled graphs want it, and a number that
says how many of its places count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from gossamer.errors import ConfigurationError

_FIRST_CAPACITY = 256  # tokens


def room_for_tokens(like: Tensor, capacity: int) -> Tensor:
    """Memory for so many tokens ``(…, capacity, width)`` like those that are there.

    It may be made in inference mode and written to outside of it: a prompt is read in one, and decoding goes on in
    another.
    """
    with torch.inference_mode(False):
        return like.new_empty(*like.shape[:-2], capacity, like.shape[-1])


class RewritableLayer(DynamicLayer):
    """Keys and values of one layer in memory that is there beforehand.

    New tokens are written behind the last one and cropped ones are forgotten, so that a token that is computed again
    overwrites what was there, and no call copies what it has already.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self._memory: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write tokens, ``(batch, heads, tokens, width)``, behind those that are there; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        memory = self._memory
        # what may be needed for a gradient is not written to again
        if memory is None or end > memory[0].shape[-2] or any(part.requires_grad for part in memory):
            self._grow(end, key_states, value_states)
        views = []
        for memory, states in zip(self._memory or (), (key_states, value_states)):
            memory[..., start:end, :] = states
            views.append(memory[..., :end, :])
        self.keys, self.values = views
        return self.keys, self.values

    def _grow(self, needed: int, *states: Tensor) -> None:
        capacity = max(_FIRST_CAPACITY, 2 * needed)
        grown = [self._room(state, capacity) for state in states]
        for memory, old in zip(grown, (self.keys, self.values)):
            if old is not None and old.numel():
                memory[..., : old.shape[-2], :] = old
        self._memory = (grown[0], grown[1])

    def _room(self, like: Tensor, capacity: int) -> Tensor:
        """Memory as of :func:`room_for_tokens`, wherever this layer keeps it."""
        return room_for_tokens(like, capacity)


def rewritable(cache: Any) -> Any:
    """Return the cache, which can now be cropped and thinned out; an empty one is given memory beforehand.

    Parameters
    ----------
    cache
        A ``DynamicCache`` of transformers, all of whose layers keep all tokens.

    Raises
    ------
    ConfigurationError
        If a layer keeps a sliding window, is quantised, or is of a kind that cannot go back to an earlier state.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise ConfigurationError(f"past_key_values is a {type(cache).__name__}; rollback needs a DynamicCache")
    for number, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, RewritableLayer):
            raise ConfigurationError(
                f"layer {number} of the cache is a {type(layer).__name__}, which cannot be cropped to any earlier "
                f"token; use a model without sliding windows and a plain DynamicCache"
            )
    if not cache.get_seq_length():
        cache.layers = [RewritableLayer() for _ in layers]
        if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
            cache.layer_class_to_replicate = RewritableLayer
    return cache


def empty_cache(model: Any) -> Any:
    """A rewritable cache of the kind that a model of transformers generates with.

    Raises
    ------
    ConfigurationError
        If that kind cannot be rewritten, as with sliding windows; see :func:`rewritable`.
    """
    config = getattr(model, "config", None)
    return rewritable(DynamicCache(config=config if config is None else config.get_text_config(decoder=True)))


def crop_to(cache: Any, tokens: int) -> None:
    """Forget all but the first `tokens` of a cache that :func:`rewritable` has returned."""
    surplus = cache.get_seq_length() - tokens
    if surplus > 0:
        cache.crop(-surplus)


def keep_positions(cache: Any, index: Tensor, layers: slice = slice(None)) -> None:
    """Drop the entries of all other tokens from layers of a cache; the rest keep their order and their positions.

    Parameters
    ----------
    cache
        That :func:`rewritable` has returned.
    index
        Entries to keep, ``(n,)`` int64, ascending.
    layers
        Which layers; all by default. Where they have not equally many entries, each block needs a mask of its own.
    """
    for layer in cache.layers[layers]:
        kept = [states.index_select(-2, index.to(states.device)) for states in (layer.keys, layer.values)]
        if isinstance(layer, RewritableLayer):
            layer.keys = layer.values = None
            layer._memory = None
        layer.keys, layer.values = kept


def entries(cache: Any, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """Copies of keys and values of the tokens from `start` to `end`, a pair for each layer."""
    return [(layer.keys[..., start:end, :].clone(), layer.values[..., start:end, :].clone()) for layer in cache.layers]


def overwrite(cache: Any, start: int, stored: list[tuple[Tensor, Tensor]], tokens: int) -> None:
    """Write the first `tokens` of what :func:`entries` returned back into the cache, from `start` on."""
    with torch.no_grad():
        for layer, (keys, values) in zip(cache.layers, stored, strict=True):
            layer.keys[..., start : start + tokens, :] = keys[..., :tokens, :]
            layer.values[..., start : start + tokens, :] = values[..., :tokens, :]


class StaticMemory:
    """Keys and values of one text at addresses and in shapes that never change.

    A model that is called with :attr:`cache` writes its tokens from place :attr:`length` on, over what was there, and
    sees the places before. Compiled graphs can therefore be used for every token, and recorded ones again.

    Parameters
    ----------
    layers
        Of the model.
    capacity
        Places for tokens.

    Attributes
    ----------
    cache
        For ``past_key_values``; a call advances its length, not :attr:`length`: say so with :meth:`rewind`.
    length
        Tokens that count.
    """

    def __init__(self, layers: int, capacity: int):
        self.capacity, self.length = capacity, 0
        self._layers: list[Any] = [StaticLayer(max_cache_len=capacity) for _ in range(layers)]
        self.cache = Cache(layers=self._layers)

    def fill(self, cache: Any) -> None:
        """Take over the tokens of a cache that :func:`rewritable` has returned.

        Raises
        ------
        ConfigurationError
            If there are more than places.
        """
        tokens = cache.get_seq_length()
        if tokens > self.capacity:
            raise ConfigurationError(f"{tokens} tokens do not fit into a static cache of {self.capacity}")
        self.rewind(0)
        for number, layer in enumerate(cache.layers):
            self._layers[number].update(layer.keys, layer.values)
        self.length = tokens

    def places(self, tokens: int) -> tuple[Tensor, Tensor]:
        """What a call with so many tokens needs: positions ``(1, tokens)``, and an additive mask.

        The mask, ``(1, 1, tokens, capacity)``, shows every token those before it. Models make one of their own from
        what a cache says about itself, which depends on numbers that a graph does not know.
        """
        keys = self._layers[0].keys
        positions = torch.arange(self.length, self.length + tokens, device=keys.device)
        unseen = torch.arange(self.capacity, device=keys.device) > positions[:, None]
        mask = torch.zeros(unseen.shape, dtype=keys.dtype, device=keys.device)
        return positions[None], mask.masked_fill_(unseen, torch.finfo(keys.dtype).min)[None, None]

    def rewind(self, tokens: int) -> None:
        """Let so many tokens count; what comes next overwrites the places behind them."""
        self.length = tokens
        for layer in self._layers:
            layer.cumulative_length.fill_(tokens)

    def append_to(self, cache: Any) -> None:
        """Give the tokens that `cache` does not have yet to it, at most those that count."""
        start = cache.get_seq_length()
        for number, layer in enumerate(self._layers):
            states = (layer.keys[:, :, start : self.length], layer.values[:, :, start : self.length])
            cache.layers[number].update(*(part.clone() for part in states))

"""A cache that keeps, beside keys and values, the few channels of every key by which tokens are found.

Labels are written when a token enters the cache, contiguous, so that ranking all tokens reads nothing else. They may
be rounded to 8 or 4 bits, with a smallest value and a step for every token and head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from gossamer.errors import ConfigurationError
from gossamer.kernels.attention_labels import LABEL_BITS, Labels, make_labels
from gossamer.models.key_value_cache import RewritableLayer, room_for_tokens


def channels_of(states: Tensor, order: Tensor) -> Tensor:
    """Channels ``(heads, r)``, for each head its own, of states ``(batch, fewer heads, tokens, size)``.

    Heads of the order that share a head of the states are adjacent. Returns ``(batch, heads, tokens, r)``.
    """
    shared = len(order) // states.shape[1]
    states = states.repeat_interleave(shared, 1) if shared > 1 else states
    index = order[None, :, None, :].expand(len(states), -1, states.shape[2], -1)
    return states.gather(-1, index)


class LabelLayer(RewritableLayer):
    """Keys, values and labels of one layer, in memory that is there beforehand.

    Parameters
    ----------
    order
        Channels ``(key heads or heads, r)``; for every head its own.
    bits
        Of each label: 4, 8, 16 or 32.
    """

    def __init__(self, order: Tensor, bits: int = 16):
        super().__init__()
        if bits not in LABEL_BITS:
            raise ConfigurationError(f"label_bits is {bits}; it must be one of {', '.join(map(str, LABEL_BITS))}")
        self.order, self.bits = order, bits
        self._labels: Labels | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write tokens, ``(batch, heads, tokens, size)``, and their labels; returns all keys and values."""
        start = self.get_seq_length()
        found = super().update(key_states, value_states)
        new = make_labels(channels_of(key_states.detach(), self.order.to(key_states.device)), self.bits)
        self._write(new, start)
        return found

    def _write(self, new: Labels, start: int) -> None:
        end = start + new.codes.shape[2]
        held = self._labels
        if held is None or end > held.codes.shape[2]:
            capacity = max(256, 2 * end)
            grown = [room_for_tokens(part, capacity) for part in new.parts()]
            for memory, old in zip(grown, held.parts() if held is not None else []):
                memory[:, :, :start] = old[:, :, :start]
            held = new.like(grown)
            self._labels = held
        for memory, part in zip(held.parts(), new.parts()):
            memory[:, :, start:end] = part

    @property
    def labels(self) -> Labels:
        """Labels of all tokens in the cache.

        Raises
        ------
        ConfigurationError
            If nothing was written yet.
        """
        if self._labels is None:
            raise ConfigurationError("the cache has no labels yet; run a prompt through the model first")
        return self._labels.first(self.get_seq_length())

    def _each(self, change: Any) -> None:
        """Change everything along the batch."""
        if self.get_seq_length() == 0:
            return
        keys, values, labels = change(self.keys), change(self.values), self.labels
        self._memory, self._labels = None, None
        self.keys, self.values = keys, values
        self._labels = labels.like([change(part) for part in labels.parts()])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give every beam the cache of another."""
        self._each(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        self._each(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        self._each(lambda states: states[indices])

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._memory = self._labels = None


class LabelCache(Cache):
    """A cache of transformers all of whose layers keep labels.

    Parameters
    ----------
    orders
        Channels of every layer, ``(key heads or heads, r)``, the most important first; None for a layer that stays
        dense and keeps none.
    bits
        Of each label.
    """

    def __init__(self, orders: list[Tensor | None], bits: int = 16):
        layers = [RewritableLayer() if order is None else LabelLayer(order, bits) for order in orders]
        super().__init__(layers=layers)

    @property
    def label_bytes(self) -> int:
        """Bytes of all labels."""
        return sum(
            layer.labels.nbytes for layer in self.layers if isinstance(layer, LabelLayer) and layer.keys is not None
        )

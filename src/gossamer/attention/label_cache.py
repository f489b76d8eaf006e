"""A cache that keeps, beside keys and values, the few channels of every key by which tokens are found.

Labels are written when a token enters the cache, contiguous, so that ranking all tokens reads nothing else. They may
be rounded to 8 or 4 bits, with a smallest value and a step for every token and head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from gossamer.errors import ConfigurationError
from gossamer.models.key_value_cache import RewritableLayer, room_for_tokens

LABEL_BITS = (4, 8, 16, 32)


@dataclass(frozen=True, eq=False)
class Labels:
    """Channels of keys as they are stored.

    Attributes
    ----------
    codes
        ``(batch, heads, tokens, r)`` floating-point; or uint8, with 4 bits two to a byte.
    low, step
        ``(batch, heads, tokens, 1)`` of rounded labels, else None.
    channels
        r.
    bits
        Of each label.
    """

    codes: Tensor
    low: Tensor | None
    step: Tensor | None
    channels: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        parts = [part for part in (self.codes, self.low, self.step) if part is not None]
        return sum(part.numel() * part.element_size() for part in parts)

    def values(self) -> Tensor:
        """The labels, ``(batch, heads, tokens, r)``, in the dtype they were rounded from or stored in."""
        if self.low is None or self.step is None:
            return self.codes
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., : self.channels]
        return codes.to(self.step.dtype) * self.step + self.low

    def parts(self) -> list[Tensor]:
        """Everything that grows with the tokens."""
        return [part for part in (self.codes, self.low, self.step) if part is not None]


def make_labels(values: Tensor, bits: int) -> Labels:
    """Round channels of keys ``(batch, heads, tokens, r)`` to labels.

    With 16 bits they keep a 16-bit dtype, and become bfloat16 from any other; with 32 they stay as they are. With 8
    and 4 bits they lie on a grid of 2^bits − 1 steps from the smallest to the largest of the token and head.

    Raises
    ------
    ConfigurationError
        If bits are none of these.
    """
    channels = values.shape[-1]
    if bits not in LABEL_BITS:
        raise ConfigurationError(f"label_bits is {bits}; it must be one of {', '.join(map(str, LABEL_BITS))}")
    if bits >= 16:
        wide = values.element_size() > 2 and bits == 16
        return Labels(values.to(torch.bfloat16) if wide else values, None, None, channels, bits)
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((values - low) / torch.where(step > 0, step, 1)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, channels % 2)).unflatten(-1, (-1, 2))
        codes = codes[..., 0] | (codes[..., 1] << 4)
    return Labels(codes, low, step, channels, bits)


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
        new = make_labels(channels_of(key_states, self.order.to(key_states.device)), self.bits)
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
            held = Labels(grown[0], *(grown[1:] or (None, None)), new.channels, new.bits)
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
        held, length = self._labels, self.get_seq_length()
        low, step = (None if part is None else part[:, :, :length] for part in (held.low, held.step))
        return Labels(held.codes[:, :, :length], low, step, held.channels, held.bits)

    def _each(self, change: Any) -> None:
        """Change everything along the batch."""
        if self.get_seq_length() == 0:
            return
        keys, values, labels = change(self.keys), change(self.values), self.labels
        self._memory, self._labels = None, None
        self.keys, self.values = keys, values
        low, step = (None if part is None else change(part) for part in (labels.low, labels.step))
        self._labels = Labels(change(labels.codes), low, step, labels.channels, labels.bits)

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

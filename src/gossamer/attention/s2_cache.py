"""A cache of keys and values that keeps, for each head, only the blocks that later tokens still read.

Memory is held in slots of a block each. When a block has left the window of a head that has no stripe there, its slot
takes the next new block. So what is freed is really free, and nothing is copied to free it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from gossamer.attention.s2_pattern import LocalStridePattern
from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.attention_sites import as_autocast

_SPARE = 8  # of so many slots one more is reserved when memory grows

PatternOf = Callable[[int], LocalStridePattern]
"""Number of key heads → pattern of as many heads."""


@dataclass(frozen=True, eq=False)
class Shard:
    """What heads of one kind hold, ready to be read.

    Attributes
    ----------
    heads
        Which heads of keys and values, int64.
    keys, values
        ``(batch, heads, places, size)``; places are in no order.
    indices, counts
        Places in use, ``(batch, heads, most)``, and how many they are, ``(batch, heads)``.
    """

    heads: Tensor
    keys: Tensor
    values: Tensor
    indices: Tensor
    counts: Tensor


class _Slots:
    """Which block lies in which slot, of heads that keep about equally many; the same for all layers.

    Parameters
    ----------
    heads
        Of keys and values.
    pattern
        Of all heads.
    block_size
        Tokens of a slot.
    paddings
        At the beginning of each sequence.
    """

    def __init__(self, heads: list[int], pattern: LocalStridePattern, block_size: int, paddings: list[int]):
        self.heads, self.pattern, self.size, self.paddings = heads, pattern, block_size, paddings
        self.length = 0
        self.capacity = 0
        self.blocks: list[list[dict[int, int]]] = [[{} for _ in heads] for _ in paddings]
        self.places = torch.zeros(len(paddings), len(heads), 0, dtype=torch.int64)
        #: what :meth:`tokens` gave before the last piece of several tokens came, by sequence and head
        self.before: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._reading: tuple[Tensor, Tensor] | None = None

    def advance(self, length: int) -> None:
        """Take in tokens up to a length: free blocks that are no longer read, and find a place for each new token."""
        if length == self.length:
            return
        start = self.length
        self.before = self._all_tokens() if start and length - start > 1 else {}
        self.places = torch.full((len(self.paddings), len(self.heads), length - start), -1)
        for row, padding in enumerate(self.paddings):
            if length <= padding:
                continue
            new = torch.arange(max(start, padding), length)
            block = (new - padding) // self.size
            kept = self.pattern.kept_blocks((length - padding - 1) // self.size)
            for column, head in enumerate(self.heads):
                slots = self._place(self.blocks[row][column], kept[head])
                table = torch.full((int(block[-1]) + 1,), -1)
                table[list(slots)] = torch.tensor(list(slots.values()))
                slot = table[block]
                where = torch.where(slot >= 0, slot * self.size + (new - padding) % self.size, -1)
                self.places[row, column, new - start] = where
        used = max((1 + max(slots.values(), default=-1) for row in self.blocks for slots in row), default=0)
        if used > self.capacity:
            self.capacity = used + used // _SPARE
        self.length = length
        self._reading = None

    def _place(self, slots: dict[int, int], kept: list[int]) -> dict[int, int]:
        """Block → slot, changed in place: freed ones go, new ones take the lowest free slots."""
        if slots.keys() == set(kept):
            return slots
        for block in slots.keys() - set(kept):
            del slots[block]
        free = iter(sorted(set(range(len(kept))) - set(slots.values())))
        for block in kept:
            if block not in slots:
                slots[block] = next(free)
        return slots

    def reading(self) -> tuple[Tensor, Tensor]:
        """Places in use and their numbers, see :class:`Shard`."""
        if self._reading is None:
            rows = [places for _, places in self._all_tokens().values()]
            counts = torch.tensor([len(places) for places in rows]).view(len(self.paddings), len(self.heads))
            indices = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            self._reading = indices.view(*counts.shape, -1), counts
        return self._reading

    def _all_tokens(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        heads = range(len(self.heads))
        return {(row, column): self.tokens(row, column) for row in range(len(self.paddings)) for column in heads}

    def tokens(self, row: int, column: int) -> tuple[Tensor, Tensor]:
        """Positions, padding included, of the tokens that a head holds of a sequence, and their places."""
        slots = self.blocks[row][column]
        if not slots:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        within = torch.arange(self.size)
        blocks, places = torch.tensor(list(slots)), torch.tensor(list(slots.values()))
        positions = (blocks[:, None] * self.size + within).flatten() + self.paddings[row]
        there = positions < self.length
        return positions[there], (places[:, None] * self.size + within).flatten()[there]


@dataclass
class _Plan:
    """Slots of all kinds of heads; made when the first layer sees the first tokens."""

    pattern_of: PatternOf
    block_size: int
    paddings: list[int] | None
    slots: list[_Slots] = field(default_factory=list)

    def begin(self, batch: int, heads: int) -> None:
        if self.slots:
            return
        paddings = self.paddings if self.paddings is not None else [0] * batch
        if len(paddings) != batch:
            raise ConfigurationError(
                f"left_paddings has {len(paddings)} numbers, but the batch {batch}; give one for each sequence"
            )
        pattern = self.pattern_of(heads)
        stripes = pattern.stripes
        for dense in (False, True):
            mine = [head for head, stripe in enumerate(stripes) if (stripe is None) is dense]
            if mine:
                self.slots.append(_Slots(mine, pattern, self.block_size, paddings))


class ShardedLayer(CacheLayerMixin):
    """The shards of one layer. Made by :class:`S2Cache`."""

    is_sliding = False
    is_compileable = False

    def __init__(self, plan: _Plan):
        super().__init__()
        self._plan = plan
        self._memory: list[tuple[Tensor, Tensor]] = []
        self._length = 0
        self._unread = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take note of shapes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.num_heads, self.value_size = key_states.shape[1], value_states.shape[-1]
        self._plan.begin(key_states.shape[0], key_states.shape[1])
        for slots in self._plan.slots:
            shape = (key_states.shape[0], len(slots.heads), 0)
            self._memory.append(
                (key_states.new_empty(*shape, key_states.shape[-1]), value_states.new_empty(*shape, self.value_size))
            )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in tokens, and free what they make superfluous.

        Returns
        -------
        keys, values
            For a prompt those of all tokens, zero where they were freed. For a single token the memory itself, in which
            :class:`~gossamer.attention.s2_attention.S2Attention` finds its way by :func:`shards_of`.

        Raises
        ------
        ModelError
            If S2-Attention is not at work in the model: other attention would read places that hold nothing.
        """
        key_states, value_states = as_autocast(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._memory = [
            (_grown(keys, 0, key_states.dtype), _grown(values, 0, value_states.dtype)) for keys, values in self._memory
        ]
        if self._unread:
            raise ModelError(
                "an S2Cache is in use but S2Attention is not at work in the model; generate inside active(model)"
            )
        new, start = key_states.shape[2], self._length
        self._length += new
        for slots in self._plan.slots:
            slots.advance(self._length)
            if slots.length != self._length or slots.places.shape[2] != new:
                raise ModelError("layers of an S2Cache have seen different tokens; make a new cache for each sample")
        if new > 1:
            whole = self._with_past(key_states, value_states, start)
        self._write(key_states, value_states)
        if new > 1:
            return whole
        self._unread = True
        _BY_STORAGE[self.address] = self
        return self._memory[0]

    @property
    def address(self) -> int:
        """Of the keys that :meth:`update` returns for a single token."""
        return self._memory[0][0].untyped_storage().data_ptr()

    def _write(self, keys: Tensor, values: Tensor) -> None:
        for number, slots in enumerate(self._plan.slots):
            old, places = self._memory[number], slots.capacity * slots.size
            self._memory[number] = (_grown(old[0], places, keys.dtype), _grown(old[1], places, values.dtype))
            places = slots.places.to(keys.device)
            if keys.shape[2] == 1 and bool((slots.places >= 0).all()):
                for memory, new in zip(self._memory[number], (keys, values)):
                    index = places[..., None].expand(-1, -1, -1, new.shape[-1])
                    memory.scatter_(2, index, new[:, slots.heads])
                continue
            row, column, token = (places >= 0).nonzero(as_tuple=True)
            heads = torch.tensor(slots.heads, device=keys.device)[column]
            for memory, new in zip(self._memory[number], (keys, values)):
                memory[row, column, places[row, column, token]] = new[row, heads, token]

    def _with_past(self, keys: Tensor, values: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The tokens that are held at their true positions, and the new ones behind them."""
        if not start:
            return keys, values
        past = [new.new_zeros(*new.shape[:2], start, new.shape[-1]) for new in (keys, values)]
        for number, slots in enumerate(self._plan.slots):
            for (row, column), (positions, places) in slots.before.items():
                for whole, memory in zip(past, self._memory[number]):
                    whole[row, slots.heads[column], positions] = memory[row, column, places]
        return torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)

    def read(self) -> list[Shard]:
        """All that is held, by kinds of heads."""
        self._unread = False
        found = []
        for slots, (keys, values) in zip(self._plan.slots, self._memory):
            indices, counts = (part.to(keys.device) for part in slots.reading())
            found.append(Shard(torch.tensor(slots.heads), keys, values, indices, counts))
        return found

    @property
    def nbytes(self) -> int:
        """Memory of keys and values."""
        return sum(part.numel() * part.element_size() for pair in self._memory for part in pair)

    @property
    def paddings(self) -> list[int]:
        """Tokens of padding in front of each sequence, as far as the cache was told."""
        return self._plan.slots[0].paddings

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: as if nothing were freed."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self._length

    def get_max_length(self) -> int:
        """−1: any length."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._memory, self._length, self._unread, self.is_initialized = [], 0, False, False
        self._plan.slots.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was freed cannot be brought back.

        Raises
        ------
        ConfigurationError
            Always, unless nothing is to be removed.
        """
        if tokens_to_remove:
            raise ConfigurationError(
                f"{-tokens_to_remove} tokens are to be removed from an S2Cache, which has freed others for them; "
                "decode without an assistant model, or with the model's own cache"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences, for beam search."""
        self._memory = [(k.index_select(0, beam_idx), v.index_select(0, beam_idx)) for k, v in self._memory]


class S2Cache(Cache):
    """Keys and values of S2-Attention, for ``model.generate(..., past_key_values=S2Cache(...))``.

    A head holds the blocks of its stripe and its window, about ``local_blocks + blocks / vert_stride`` of all blocks;
    dense layers and heads hold everything [Lin et al., 2024, arXiv 2407.17678, section 3].

    Parameters
    ----------
    method
        The :class:`~gossamer.attention.s2_attention.S2Attention` that is at work in the model.
    num_layers
        Of the model.
    attention_mask
        ``(batch, prompt)``, of a batch that is padded on the left; None if it is not padded.

    Raises
    ------
    ConfigurationError
        If a sequence is padded anywhere but on the left.
    """

    def __init__(self, method: Any, num_layers: int, attention_mask: Tensor | None = None):
        self.method = method
        self._plan = _Plan(method.pattern, method.block_size, _left_paddings(attention_mask))
        layers = [DynamicLayer() if method.is_dense(n) else ShardedLayer(self._plan) for n in range(num_layers)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Memory of keys and values of all layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, ShardedLayer):
                total += layer.nbytes
            elif layer.is_initialized:
                total += sum(part.numel() * part.element_size() for part in (layer.keys, layer.values))
        return total


#: address of memory → the layer that holds it; a view that transformers makes of the keys has the same
_BY_STORAGE: weakref.WeakValueDictionary[int, ShardedLayer] = weakref.WeakValueDictionary()


def shards_of(key: Tensor) -> ShardedLayer | None:
    """The layer of an :class:`S2Cache` whose memory these keys are, if a single token has just been added there."""
    address = key.untyped_storage().data_ptr()
    layer = _BY_STORAGE.get(address)
    # an address may belong to something else by now: memory that grew has left its old one
    return layer if layer is not None and layer._unread and layer.address == address else None


def _grown(memory: Tensor, places: int, dtype: torch.dtype) -> Tensor:
    """Memory of at least so many places and a dtype, with what was there."""
    if memory.shape[2] >= places and memory.dtype == dtype:
        return memory
    # a prompt may be read in inference mode and decoded outside of it
    with torch.inference_mode(False):
        grown = memory.new_zeros(*memory.shape[:2], max(places, memory.shape[2]), memory.shape[3], dtype=dtype)
    grown[:, :, : memory.shape[2]] = memory
    return grown


def _left_paddings(mask: Tensor | None) -> list[int] | None:
    if mask is None:
        return None
    real = mask.bool()
    if real.dim() != 2 or not bool((real[:, 1:] | ~real[:, :-1]).all()):
        raise ConfigurationError(
            f"attention_mask has shape {tuple(mask.shape)}; give (batch, tokens) padded on the left only"
        )
    return (~real).sum(1).tolist()

"""Double Sparsity with keys and values elsewhere: fetched before they are needed, by a guess of the next query.

Only labels stay where attention is computed. Keys and values lie in the host's memory or in a file, and the rows that
a layer will attend to are fetched while the layer before it computes. Which rows those are is told by an approximate
query: the next layer's queries made of this layer's input, since hidden states of neighbouring layers are alike.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from gossamer.attention.base import Answer, missing_calibration
from gossamer.attention.density import COUNTING
from gossamer.attention.double_sparsity import DoubleSparsity, LabelInstalled, label_layer, token_count
from gossamer.attention.label_cache import LabelLayer
from gossamer.attention.model_cache import PerThread, cache_of
from gossamer.attention.token_selection import TokenSelection
from gossamer.attention.token_sparse_layers import decoder_stack
from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.models.attention_sites import AttentionCall, allowed_links

Place = Literal["mapped", "host", "pinned"]


class OffloadedLayer(LabelLayer):
    """A layer whose labels stay with the model, and whose keys and values lie elsewhere.

    Parameters
    ----------
    order, bits
        As of :class:`~gossamer.attention.label_cache.LabelLayer`.
    place
        ``mapped``: a file that has no name and goes with the cache. ``host``: the CPU's memory; ``pinned`` there.
    folder
        On the disk to use; by default the one for temporary files.
    """

    def __init__(self, order: Tensor, bits: int = 16, place: Place = "mapped", folder: str | Path | None = None):
        super().__init__(order, bits)
        self.place, self.folder = place, folder

    @torch.inference_mode(False)  # see room_for_tokens
    def _room(self, like: Tensor, capacity: int) -> Tensor:
        shape, dtype = torch.Size((*like.shape[:-2], capacity, like.shape[-1])), like.dtype
        if self.place != "mapped":
            return torch.empty(shape, dtype=dtype, pin_memory=self.place == "pinned")
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="gossamer-") as file:
            file.truncate(shape.numel() * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write tokens; returns all of them, where they lie, or those of a prompt as they came."""
        first = self.get_seq_length() == 0
        found = super().update(key_states, value_states)
        return (key_states, value_states) if first else found


@dataclass
class HitCounts:
    """How many of the tokens that a layer's true query chooses had been fetched.

    Attributes
    ----------
    hits, wanted
        Layer → tokens.
    fetched_bytes
        Keys and values that were fetched.
    """

    hits: dict[int, int] = field(default_factory=dict)
    wanted: dict[int, int] = field(default_factory=dict)
    fetched_bytes: int = 0

    def add(self, layer: int, guessed: Tensor, true: Tensor) -> None:
        """Compare two selections ``(batch, heads, tokens)``."""
        same = int((guessed[..., None] == true[..., None, :]).any(-1).sum())
        with COUNTING:
            self.hits[layer] = self.hits.get(layer, 0) + same
            self.wanted[layer] = self.wanted.get(layer, 0) + true.numel()

    @property
    def rates(self) -> dict[int, float]:
        """Layer → share of the wanted tokens that were there."""
        return {layer: hits / self.wanted[layer] for layer, hits in sorted(self.hits.items())}


@dataclass(frozen=True, eq=False)
class Fetched:
    """Rows of a layer's cache.

    Attributes
    ----------
    selection
        Where they come from, ``(batch, heads, tokens)``.
    keys, values
        ``(batch, heads, tokens, size)``.
    """

    selection: TokenSelection
    keys: Tensor
    values: Tensor


class Fetching(PerThread):
    """What a thread has sent for, and the query that it asks a layer for.

    Attributes
    ----------
    coming
        Layer → rows on their way.
    probe
        Where the query is put, while it is asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coming: dict[int, Future[Fetched]] = {}
        self.probe: list[AttentionCall] | None = None


@dataclass(kw_only=True)
class OffloadedDoubleSparsity(DoubleSparsity):
    """Double Sparsity whose keys and values are fetched one layer ahead [Yang et al., 2024, arXiv 2408.07092, 4.2].

    Parameters are those of :class:`~gossamer.attention.double_sparsity.DoubleSparsity`, and:

    Parameters
    ----------
    place
        Where keys and values lie: ``mapped`` from a file, ``host`` memory, or ``pinned`` there for a GPU.
    folder
        Where the file is made.
    dense_last
        Whether the last layer stays dense, as in the authors' code.
    count_hits
        Whether the true query chooses too, to report how many of its tokens had been fetched; this costs time.

    Attributes
    ----------
    hits
        The counts, if they are wanted.
    """

    place: Place = "mapped"
    folder: str | Path | None = None
    dense_last: bool = True
    count_hits: bool = False
    hits: HitCounts = field(default_factory=HitCounts, init=False, repr=False, compare=False)
    _thread: Fetching = field(default_factory=Fetching, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place not in get_args(Place):
            raise UnknownNameError("place", self.place, get_args(Place))

    def new_layer(self, index: int, order: Tensor) -> OffloadedLayer:
        """What keeps labels, and knows where keys and values are."""
        return OffloadedLayer(order, self.label_bits, self.place, self.folder)

    def reset(self) -> None:
        """Forget what was fetched and counted."""
        super().reset()
        self._thread.coming.clear()
        self.hits = HitCounts()

    def install(self, model: nn.Module) -> LabelInstalled:
        """As :meth:`DoubleSparsity.install`, with a thread that fetches."""
        stack = decoder_stack(model)
        if self.dense_last:
            last = len(stack.blocks) - 1
            self.dense_layers = tuple(dict.fromkeys((*self.dense_layers, last)))
        if self.share_tokens:
            raise ConfigurationError("rows are fetched for every head; set share_tokens=False")
        if not hasattr(self, "order_"):
            raise missing_calibration(self)
        return OffloadInstalled(model, self, list(stack.blocks.values()))

    def attend(self, call: AttentionCall) -> Answer | None:
        """Attention over what was fetched, and the newest token."""
        if self._thread.probe is not None:
            self._thread.probe.append(call)
            raise Probed
        if call.phase != "decode" or call.layer in self.dense_layers or call.window is not None:
            return self._brought(call)
        keys = call.key.shape[2]
        count = token_count(self.tokens, keys)
        layer = label_layer(self.cache, call.layer)
        coming = self._thread.coming.pop(call.layer, None)
        if layer is None or count < 2 or (coming is None and count >= keys):
            return self._brought(call)
        fetched = coming.result() if coming is not None else self.fetch(layer, self._true(call, layer, count), call)
        if self.count_hits and coming is not None:
            self.hits.add(call.layer, fetched.selection.indices, self._true(call, layer, count).indices)
        with COUNTING:
            self.hits.fetched_bytes += fetched.keys.nbytes + fetched.values.nbytes
        newest = 1 / keys if call.key_mask is None else len(call.query) / float(call.key_mask.sum())
        return Answer(_over(call, fetched), fetched.selection.density(keys, call.key_mask) + newest)

    def _brought(self, call: AttentionCall) -> Answer | None:
        """The answer over all keys and values, brought to the queries; the caller has them only where they lie."""
        here = _here(call)
        answer = super().attend(here)
        return Answer(here.dense(), 1.0) if answer is None and here is not call else answer

    def _true(self, call: AttentionCall, layer: LabelLayer, count: int) -> TokenSelection:
        """What the query itself chooses among the tokens before the newest."""
        real = None if call.key_mask is None else call.key_mask[:, :-1]
        return self.guess(call.query, layer, call.key.shape[2] - 1, count - 1, real)

    def guess(
        self, query: Tensor, layer: LabelLayer, length: int, count: int, real: Tensor | None = None
    ) -> TokenSelection:
        """The tokens among the first `length` that a query ``(batch, heads, 1, size)`` chooses."""
        labels = layer.labels.first(length)
        # select() takes in one more token by itself, the newest
        mask = None if real is None else torch.cat([real, real.new_ones(len(real), 1)], 1)
        shape = query.new_empty(0).expand(len(query), query.shape[1], length + 1, 0)
        call = AttentionCall(None, query, shape, shape, 1.0, key_mask=mask)
        found = self.select(call, layer.order.to(query.device), labels, count + 1)
        if found.counts is None:
            return TokenSelection(found.indices[..., :-1])
        # padding stands behind what is meant, of which the newest is the last
        return TokenSelection(found.indices[..., :-1].clamp(max=length - 1), found.counts - 1)

    def fetch(self, layer: LabelLayer, selection: TokenSelection, call: AttentionCall | Tensor) -> Fetched:
        """Copy rows of keys and values to where attention is computed."""
        like = call if isinstance(call, Tensor) else call.query
        keys, values = (
            _rows(states, selection.indices).to(like.device, non_blocking=True)
            for states in (layer.keys, layer.values)
            if states is not None
        )
        return Fetched(selection, keys, values)


class OffloadInstalled(LabelInstalled):
    """The method at work: before a layer computes, the rows of the next one are sent for.

    Parameters
    ----------
    model, method
        As of :class:`~gossamer.attention.base.Installed`.
    layers
        The decoder's.
    """

    method: OffloadedDoubleSparsity

    def __init__(self, model: nn.Module, method: OffloadedDoubleSparsity, layers: list[nn.Module]):
        super().__init__(model, method)
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="gossamer-fetch")
        for number, layer in enumerate(layers[:-1]):
            ahead = lambda module, args, kwargs, n=number: self._ahead(n + 1, layers[n + 1], args, kwargs)  # noqa: E731
            self._handles.append(layer.register_forward_pre_hook(ahead, with_kwargs=True))

    @torch.no_grad()
    def _ahead(self, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Send for the rows of a layer by the input of the layer before it."""
        method = self.method
        hidden = args[0] if args else kwargs["hidden_states"]
        layers = getattr(cache_of(args, kwargs), "layers", None)
        held = layers[index] if isinstance(layers, list) and index < len(layers) else None
        if hidden.shape[1] != 1 or index in method.dense_layers or not isinstance(held, OffloadedLayer):
            return
        length = held.get_seq_length()
        count = token_count(method.tokens, length + 1)
        if not 1 < count <= length:
            return
        real = _padding_of(kwargs.get("attention_mask"), length)
        query = self._approximate(layer, hidden, args, kwargs)

        def work() -> Fetched:
            return method.fetch(held, method.guess(query, held, length, count - 1, real), query)

        method._thread.coming[index] = self._fetcher.submit(work)

    def _approximate(self, layer: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The next layer's query if its input were this layer's; computed by the layer itself."""
        given = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        given["attention_mask"] = None
        probe: list[AttentionCall] = []
        self.method._thread.probe = probe
        try:
            layer.forward(*args, **given)
        except Probed:
            return probe[0].query
        finally:
            self.method._thread.probe = None
        raise ConfigurationError(f"{type(layer).__name__} computes no attention; its rows cannot be fetched ahead")

    def remove(self) -> None:
        """Give the model its own attention back, and end the thread."""
        super().remove()
        self._fetcher.shutdown()
        self.method._thread.coming.clear()


class Probed(Exception):
    """A query is known; what the layer would do with it is of no interest."""


def _over(call: AttentionCall, fetched: Fetched) -> Tensor:
    """Attention of one query a head over fetched rows and the newest token."""
    newest = [s[:, :, -1:].to(call.query).repeat_interleave(call.group, 1) for s in (call.key, call.value)]
    found = [s.to(call.query) for s in (fetched.keys, fetched.values)]
    keys, values = (torch.cat(pair, 2) for pair in zip(found, newest))
    mask = None
    if fetched.selection.counts is not None:
        places = torch.arange(keys.shape[2], device=keys.device)
        mask = (places < fetched.selection.counts[..., None]) | (places == keys.shape[2] - 1)
        mask = mask[:, :, None]
    return scaled_dot_product_attention(call.query, keys, values, mask, scale=call.scale)


def _rows(states: Tensor, indices: Tensor) -> Tensor:
    """Rows ``(batch, heads, tokens)`` of ``(batch, key heads, keys, size)``."""
    indices = indices.to(states.device)
    shared = indices.shape[1] // states.shape[1]
    head = torch.arange(indices.shape[1], device=indices.device)[None, :, None] // shared
    place = torch.arange(len(states), device=indices.device)[:, None, None]
    return states[place, head, indices]


def _here(call: AttentionCall) -> AttentionCall:
    """The call with keys and values where its query is."""
    if call.key.device == call.query.device:
        return call
    # autocast has passed by what lies elsewhere
    return replace(call, key=call.key.to(call.query), value=call.value.to(call.query))


def _padding_of(mask: Any, length: int) -> Tensor | None:
    """Which of the first keys are real, by the mask of a single query; None for all."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    real = allowed_links(mask[:, 0, -1, :length])
    return None if bool(real.all()) else real

"""Double Sparsity: a few channels of a key tell whether its token matters, so read those first and the rest of few.

Which channels of a head decide its scores hardly depends on the text. They are found once; beside the cache of keys
and values they are stored again, contiguous, as labels. A decoding step ranks all tokens by their labels, and attends
exactly to the best of them: two sparsities, over channels to choose and over tokens to attend.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from gossamer.attention.base import Answer, Installed, missing_calibration
from gossamer.attention.channel_order import ChannelOrder, Importance, Scope, calibrate_channels, check_names
from gossamer.attention.label_cache import LabelCache, LabelLayer, channels_of
from gossamer.attention.model_cache import CachedAttention, CacheInstalled, layer_of
from gossamer.attention.token_selection import TokenSelection
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import label_attention, label_topk
from gossamer.kernels.attention_labels import LABEL_BITS, Labels, make_labels, of_values
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.blocks import Batch


@register(
    "double-sparsity",
    paper="double-sparsity",
    when="at inference",
    granularity="tokens",
    criterion=("activation",),
    patterns=("unstructured", "channels"),
)
@dataclass(kw_only=True)
class DoubleSparsity(CachedAttention):
    """Decode with the tokens that a few calibrated channels rank highest.

    Yang et al., 2024, "Post-Training Sparse Attention with Double Sparsity", arXiv 2408.07092. Prompts are read
    densely.

    Parameters
    ----------
    tokens
        Tokens that a query reads: a share of the context in (0, 1], rounded up, or a whole number. The newest is
        always among them; a context that is not longer is read whole.
    channels
        Channels of a label: a share of the head size in (0, 1], or a whole number up to it.
    label_bits
        16 (bfloat16 for a model in float32), or 8, 4 or 32.
    importance
        What channels are sorted by; see :func:`~gossamer.attention.channel_order.calibrate_channels`.
    scope
        ``group``: heads that share keys share labels. ``head``: each has its own, which cost as many times more.
    share_tokens
        Whether heads that share keys also choose their tokens together, by the sum of their scores, so that each row
        of the cache is read for all of them; the paper's heads choose for themselves.
    dense_layers
        Layers that stay dense; the first two.
    channel_order
        Which channels decide, as :meth:`calibrate` finds and sets it and
        :meth:`ChannelOrder.load <gossamer.attention.channel_order.ChannelOrder.load>` reads it.

    Raises
    ------
    ConfigurationError
        If a number is out of range.
    UnknownNameError
        If there is no such importance or scope.
    """

    tokens: float | int = 1 / 16
    channels: float | int = 1 / 16
    label_bits: int = 16
    importance: Importance = "qk"
    scope: Scope = "group"
    share_tokens: bool = False
    dense_layers: tuple[int, ...] = (0, 1)
    channel_order: ChannelOrder | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        token_count(self.tokens, 1)
        if isinstance(self.channels, int) and not isinstance(self.channels, bool):
            channel_count(self.channels, max(1, self.channels))
        else:
            channel_count(self.channels, 1 << 20)
        if self.label_bits not in LABEL_BITS:
            raise ConfigurationError(
                f"label_bits is {self.label_bits}; it must be one of {', '.join(map(str, LABEL_BITS))}"
            )
        check_names(self.importance, self.scope)

    @property
    def order_(self) -> ChannelOrder:
        """What calibration found, or was given; there is no such attribute before."""
        if self.channel_order is None:
            raise AttributeError("order_")
        return self.channel_order

    @order_.setter
    def order_(self, order: ChannelOrder) -> None:
        self.channel_order = order

    def calibrate(self, model: nn.Module, data: Iterable[Batch], progress: bool = True) -> ChannelOrder:
        """Find the channels on a little text; see :func:`~gossamer.attention.channel_order.calibrate_channels`."""
        found = calibrate_channels(model, data, self.importance, self.scope, progress)
        self.channel_order = found
        return found

    def order(self, layer: int | None, heads: int, size: int, device: torch.device) -> Tensor:
        """Channels of a layer, ``(key heads or heads, r)``.

        Raises
        ------
        ConfigurationError
            If no layer is named.
        CalibrationError
            If there was no calibration, or for another model.
        """
        if self.channel_order is None:
            raise missing_calibration(self)
        return self.channel_order.first(layer, channel_count(self.channels, size), heads, device)

    def attend(self, call: AttentionCall) -> Answer | None:
        """Attention of a call, or None if it is to stay dense; without padding, tokens are read as they are chosen."""
        if call.phase != "decode" or call.key_mask is not None or call.layer in self.dense_layers or call.slides:
            return super().attend(call)
        count = self._count(call)
        if count is None:
            return None
        order, labels = self._labels(call)
        pooling = self._pooling(call, labels)
        output = label_attention(
            *(call.query, call.key, call.value, order, labels.first(call.key.shape[2] - 1), count - 1),
            newest=True,
            pooling=pooling,
            scale=call.scale,
        )
        return Answer(output, count / call.key.shape[2])

    def decode(self, call: AttentionCall) -> TokenSelection | None:
        """The newest token, and those whose labels agree best with the query; all, where a window slides."""
        count = self._count(call)
        return None if count is None else self.select(call, *self._labels(call), count)

    def _count(self, call: AttentionCall) -> int | None:
        """How many tokens a query reads; None for all."""
        keys = call.key.shape[2]
        count = token_count(self.tokens, keys)
        return None if call.window is not None or count >= keys else count

    def select(self, call: AttentionCall, order: Tensor, labels: Labels, count: int) -> TokenSelection:
        """The best tokens of a call.

        Parameters
        ----------
        order
            ``(key heads or heads, r)``.
        labels
            Of all keys, or all but the newest.
        count
            Tokens to read, the newest included; fewer than there are.
        """
        keys = call.key.shape[2]
        by_head = order.repeat_interleave(call.query.shape[1] // len(order), 0)
        query = channels_of(call.query, by_head)[:, :, 0].to(of_values(labels).dtype)
        real = None if call.key_mask is None else call.key_mask[:, : keys - 1].contiguous()
        newest = torch.full((), keys - 1, device=call.query.device)
        if count == 1:
            heads = call.key.shape[1] if self.share_tokens else call.query.shape[1]
            return TokenSelection(newest.expand(len(call.query), heads, 1))
        pooling = self._pooling(call, labels)
        best = label_topk(query, labels.first(keys - 1), count - 1, key_mask=real, pooling=pooling).long()
        indices = torch.cat([best, newest.expand(*best.shape[:2], 1)], -1)
        return TokenSelection(indices) if call.key_mask is None else TokenSelection.real_first(indices, call.key_mask)

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, for one token after a context of `length`."""
        return 2.0 * length * channel_count(self.channels, size) * heads

    def _labels(self, call: AttentionCall) -> tuple[Tensor, Labels]:
        """Which channels are labels, and the labels of all keys."""
        order = self.order(call.layer, call.query.shape[1], call.query.shape[3], call.query.device)
        layer = label_layer(self.cache, call.layer)
        if layer is not None and layer.get_seq_length() == call.key.shape[2]:
            return order, layer.labels
        # a cache of another kind keeps none: they are read from the keys
        return order, make_labels(channels_of(call.key, order), self.label_bits)

    def _pooling(self, call: AttentionCall, labels: Labels) -> Literal["sum"] | None:
        if self.share_tokens and labels.shape[1] != call.key.shape[1]:
            raise ConfigurationError("heads with labels of their own cannot choose tokens together; set scope='group'")
        return "sum" if self.share_tokens else None

    def install(self, model: nn.Module) -> Installed:
        """Put the method into a model, whose caches then keep labels; see :class:`SparseAttention`.

        Raises
        ------
        CalibrationError
            If there was no calibration yet.
        ModelError
            If the model does not let its attention be replaced, or another method is at work there.
        """
        if self.channel_order is None:
            raise missing_calibration(self)
        return LabelInstalled(model, self)

    @contextmanager
    def active(self, model: nn.Module) -> Iterator[Installed]:
        """The method at work inside the context."""
        with self.install(model) as installed:
            yield installed

    def new_layer(self, index: int, order: Tensor) -> DynamicLayer:
        """What keeps keys, values and labels of a layer."""
        return LabelLayer(order, self.label_bits)

    def make_cache(self, model: Any) -> LabelCache:
        """An empty cache with labels, for ``model(…, past_key_values=cache)``; installed, the method makes its own.

        Raises
        ------
        CalibrationError
            If there was no calibration yet.
        """
        config = model.config.get_text_config()
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads, device = config.num_attention_heads, torch.device("cpu")
        layers = range(config.num_hidden_layers)
        orders = [None if n in self.dense_layers else self.order(n, heads, size, device) for n in layers]
        return LabelCache(orders, self.label_bits)


class LabelInstalled(CacheInstalled):
    """A method at work that gives new caches of the model layers with labels, and sees them when it decodes."""

    method: DoubleSparsity

    def _look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._look(module, args, kwargs)
        cache = None if self.method.cache is None else self.method.cache()
        layers, index = getattr(cache, "layers", None), module.layer_idx
        if not isinstance(layers, list) or index in self.method.dense_layers:
            return
        size = getattr(module, "head_dim", None)
        order = self.method.order_.layers.get(index)
        if size is None or order is None or getattr(module, "sliding_window", None):
            return
        if index == len(layers) and getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
            layers.append(DynamicLayer())
        if index < len(layers) and type(layers[index]) is DynamicLayer and not layers[index].get_seq_length():
            heads = getattr(getattr(module, "config", None), "num_attention_heads", len(order))
            first = self.method.order_.first(index, channel_count(self.method.channels, size), heads, order.device)
            layers[index] = self.method.new_layer(index, first)


def label_layer(cache: weakref.ref[Any] | None, index: int | None) -> LabelLayer | None:
    """The layer of a cache that keeps labels, or None."""
    found = layer_of(cache, index)
    return found if isinstance(found, LabelLayer) else None


def token_count(tokens: float | int, keys: int) -> int:
    """How many of `keys` tokens are read.

    Raises
    ------
    ConfigurationError
        If it is neither a share in (0, 1] nor a whole number from 1 up.
    """
    return _count(tokens, keys, "tokens", "read")


def channel_count(channels: float | int, size: int) -> int:
    """How many of `size` channels a label has.

    Raises
    ------
    ConfigurationError
        If it is neither a share in (0, 1] nor a whole number up to the head size.
    """
    count = _count(channels, size, "channels", "used")
    if isinstance(channels, int) and count > size:
        raise ConfigurationError(f"channels is {channels}; it must be at most head_dim, which is {size}")
    return count


def _count(value: float | int, of: int, name: str, verb: str) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value >= 1:
        return int(value)
    if not whole and isinstance(value, float) and 0 < value <= 1:
        return math.ceil(value * of - 1e-9)
    what = "the head_dim" if name == "channels" else "the context"
    raise ConfigurationError(
        f"{name} is {value!r}; give a share of {what} in (0, 1], such as 1/16, or how many are {verb}, from 1 up"
    )

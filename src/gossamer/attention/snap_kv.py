"""SnapKV: once a prompt is read, keep the tokens its last queries looked at and throw the others away.

What a model will look at while it answers can be seen from where the end of the prompt, the question, looks. Each key
head keeps its own tokens, with their neighbours, since single tokens out of their context say little; the first tokens
and the last ones are always kept.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d
from transformers.cache_utils import DynamicLayer

from gossamer.attention.base import Answer, Installed
from gossamer.attention.eviction import EvictedLayer, EvictingInstalled
from gossamer.attention.last_queries import last_query_weights
from gossamer.attention.model_cache import CachedAttention, layer_of
from gossamer.attention.selection import ranks
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import gather_attention
from gossamer.models.attention_sites import AttentionCall, Phase


@register(
    "snap-kv",
    paper="sparse-frontier",
    when="at inference",
    granularity="tokens",
    needs_data=False,
    criterion=("activation",),
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class SnapKV(CachedAttention):
    """Evict all but the tokens that the end of the prompt looks at.

    The prompt itself is read densely. Memory falls layer by layer while it is: tokens are taken out of the cache for
    good, in layers that keep all tokens; those with a sliding window are left alone. A cache that gives no token up,
    as a static one, stays whole, and a warning says so.

    Source: Li et al. [2024, arXiv 2404.14469, section 4], as compared by Nawrot et al. [2025, arXiv 2504.17768].

    Parameters
    ----------
    token_capacity
        Tokens of the prompt that a key head keeps.
    approximation
        How many last queries are asked.
    kernel_size
        Neighbouring tokens over which importance is averaged, an odd number.
    local_window, sinks
        Last and first tokens that are kept in any case.
    """

    token_capacity: int = 1024
    approximation: int = 256
    kernel_size: int = 7
    local_window: int = 128
    sinks: int = 4
    _told: bool = field(init=False, repr=False, compare=False, default=False)

    phase: ClassVar[Phase] = "decode"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("approximation", 1), ("kernel_size", 1), ("local_window", 0), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be {least} or more")
        if self.kernel_size % 2 == 0:
            raise ConfigurationError(f"kernel_size is {self.kernel_size}; it must be odd, such as 7")
        if self.token_capacity <= self.local_window + self.sinks:
            raise ConfigurationError(
                f"token_capacity is {self.token_capacity}; it must exceed local_window + sinks, "
                f"{self.local_window} + {self.sinks}, or nothing is left to choose"
            )

    def install(self, model: nn.Module) -> Installed:
        """As :meth:`SparseAttention.install`; the cache is seen, too."""
        self._told = False
        return EvictingInstalled(model, self)

    def attend(self, call: AttentionCall) -> Answer | None:
        """Evict after the prompt, and decode with what is left."""
        if call.layer in self.dense_layers or call.slides:
            return None
        layer = layer_of(self.cache, call.layer)
        if call.phase == "prefill":
            if self.token_capacity < call.key.shape[2]:
                self._evict(call, layer)
            return None
        if not isinstance(layer, EvictedLayer):
            return None
        listed = layer.listed()
        output = gather_attention(call.query, call.key, call.value, listed.indices, listed.counts, scale=call.scale)
        read = listed.density(1) * len(call.query)
        seen = len(call.query) * layer.seen if call.key_mask is None else float(call.key_mask.sum())
        return Answer(output, read / seen, (read, seen))

    def _evict(self, call: AttentionCall, layer: Any) -> None:
        cache = None if self.cache is None else self.cache()
        if type(layer) is DynamicLayer and layer.keys.shape[2] == call.key.shape[2]:
            cache.layers[call.layer] = EvictedLayer(layer.keys, layer.values, self.kept(call))
        elif cache is not None and call.window is None and not self._told:
            self._told = True
            warnings.warn(
                f"{type(self).__name__} evicts nothing: the cache of {call.place} is of type "
                f"{type(layer or cache).__name__}, and only a DynamicCache gives tokens up; leave cache_implementation "
                "out",
                stacklevel=2,
            )

    def kept(self, call: AttentionCall) -> Tensor:
        """Tokens that every key head keeps, bool ``(batch, key heads, tokens)``."""
        chosen = ranks(self._importance(call)) < self.token_capacity
        return chosen if call.key_mask is None else chosen & call.key_mask[:, None]

    def grouped(self, weights: Tensor) -> Tensor:
        """Importance from the weights ``(batch, key heads, heads a key head, queries, tokens)``."""
        return weights.mean(2).sum(2)

    def _importance(self, call: AttentionCall) -> Tensor:
        weights = last_query_weights(call, self.approximation).unflatten(1, (call.key.shape[1], -1))
        smooth = avg_pool1d(self.grouped(weights), self.kernel_size, stride=1, padding=self.kernel_size // 2)
        places = torch.arange(smooth.shape[-1], device=smooth.device)
        first: Tensor | int = 0
        if call.key_mask is not None:
            smooth = smooth.masked_fill(~call.key_mask[:, None], -1.0)
            first = call.key_mask.int().argmax(-1)[:, None, None]
        forced = (places >= first) & (places < first + self.sinks)
        return smooth.masked_fill(forced | (places >= smooth.shape[-1] - self.local_window), float("inf"))

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, once for a prompt of `length` tokens."""
        return 2.0 * min(self.approximation, length) * length * size * heads

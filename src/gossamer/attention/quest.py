"""Quest: a query reads the pages of the cache that could hold a key it agrees with.

The keys of a page of 16 tokens lie in a box: the smallest and largest value of every channel. No key in the box can
agree with a query better than the box's best corner, so pages are ranked by that corner, and only the best are read.
Nothing is ever evicted: another query finds another page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers.cache_utils import DynamicLayer

from gossamer.attention.model_cache import CachedAttention, layer_of
from gossamer.attention.page_cache import PagedLayer, Pages
from gossamer.attention.token_selection import TokenSelection
from gossamer.core.block_mask import block_count
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import page_scores
from gossamer.models.attention_sites import AttentionCall, Phase


@register(
    "quest",
    paper="sparse-frontier",
    when="at inference",
    granularity="tokens",
    needs_data=False,
    criterion=("activation",),
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class Quest(CachedAttention):
    """Decode with the pages whose bounds promise the highest score; the layers of the cache keep the bounds.

    Source: Tang et al. [2024, arXiv 2406.10774, section 3], as compared by Nawrot et al. [2025, arXiv 2504.17768].

    Parameters
    ----------
    token_budget
        Tokens of the pages that a query reads, a multiple of the page size; the current page comes on top. A context
        without more pages than that is read whole, which the report of densities shows.
    page_size
        Tokens of a page.
    share_pages
        Whether heads that share keys choose their pages together, by the sum of their scores.
    """

    token_budget: int = 1024
    page_size: int = 16
    share_pages: bool = True

    phase: ClassVar[Phase] = "decode"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.page_size < 1:
            raise ConfigurationError(f"page_size is {self.page_size}; it must be 1 or more, such as 16")
        if self.token_budget < self.page_size or self.token_budget % self.page_size:
            raise ConfigurationError(
                f"token_budget is {self.token_budget}; it must be a multiple of the page size {self.page_size}, one "
                "page or more"
            )

    def decode(self, call: AttentionCall) -> TokenSelection | None:
        """The best pages, and the one that is being filled."""
        keys = call.key.shape[2]
        chosen, current = self.token_budget // self.page_size, (keys - 1) // self.page_size
        if current <= chosen:
            return None
        pages = self._bounds(call)
        low, high = (bound[:, :, :current].to(call.query.dtype) for bound in (pages.low, pages.high))
        scores = page_scores(call.query, low, high)[:, :, 0]
        if self.share_pages:
            scores = scores.unflatten(1, (call.key.shape[1], -1)).sum(2)
        if call.key_mask is not None:
            real = call.key_mask[:, : current * self.page_size].unflatten(1, (current, -1)).any(-1)
            scores = scores.masked_fill(~real[:, None], float("-inf"))
        best = scores.topk(chosen, dim=-1).indices.sort(-1).values
        inside = torch.arange(self.page_size, device=best.device)
        tokens = (best[..., None] * self.page_size + inside).flatten(-2)
        rest = torch.arange(current * self.page_size, keys, device=best.device)
        tokens = torch.cat([tokens, rest.expand(*tokens.shape[:2], -1)], -1)
        return TokenSelection(tokens) if call.key_mask is None else TokenSelection.real_first(tokens, call.key_mask)

    def _bounds(self, call: AttentionCall) -> Pages:
        layer = layer_of(self.cache, call.layer)
        if type(layer) not in (DynamicLayer, PagedLayer) or layer.get_seq_length() != call.key.shape[2]:
            # a cache of another kind keeps no bounds: they are read from the keys
            return Pages.of(call.key, self.page_size)
        if not isinstance(layer, PagedLayer) or layer.pages.size != self.page_size:
            layer = self.cache().layers[call.layer] = PagedLayer(layer.keys, layer.values, self.page_size)
        return layer.pages

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, for one token after a context of `length`."""
        return 4.0 * block_count(length, self.page_size) * size * heads

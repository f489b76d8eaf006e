"""Quest: a query reads the pages of the cache that could hold a key it agrees with.

The keys of a page of 16 tokens lie in a box: the smallest and largest value of every channel. No key in the box can
agree with a query better than the box's best corner, so pages are ranked by that corner, and only the best are read.
Nothing is ever evicted: another query finds another page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.attention.base import SparseAttention, TokenSelection
from gossamer.core.block_mask import block_count
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import page_scores
from gossamer.models.attention_sites import AttentionCall, Phase


@dataclass
class Pages:
    """Bounds of the keys of every page of a layer.

    Attributes
    ----------
    low, high
        ``(batch, key heads, pages, size)``.
    tokens
        Keys seen so far.
    """

    low: Tensor
    high: Tensor
    tokens: int

    @classmethod
    def of(cls, key: Tensor, size: int) -> Pages:
        """Bounds of all keys ``(batch, key heads, keys, head size)``."""
        spare = -key.shape[2] % size
        low, high = (
            pad(key, (0, 0, 0, spare), value=value).unflatten(2, (-1, size)) for value in (float("inf"), -float("inf"))
        )
        return cls(low.amin(3), high.amax(3), key.shape[2])

    def append(self, key: Tensor, size: int) -> None:
        """Take in one more key, ``(batch, key heads, 1, head size)``."""
        if self.tokens % size == 0:
            self.low, self.high = torch.cat([self.low, key], 2), torch.cat([self.high, key], 2)
        else:
            self.low[:, :, -1:] = self.low[:, :, -1:].minimum(key)
            self.high[:, :, -1:] = self.high[:, :, -1:].maximum(key)
        self.tokens += 1


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
class Quest(SparseAttention):
    """Decode with the pages whose bounds promise the highest score.

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
    _pages: dict[int, Pages] = field(init=False, repr=False, compare=False, default_factory=dict)

    phase: ClassVar[Phase] = "decode"

    def __post_init__(self) -> None:
        if self.page_size < 1:
            raise ConfigurationError(f"page_size is {self.page_size}; it must be 1 or more, such as 16")
        if self.token_budget < self.page_size or self.token_budget % self.page_size:
            raise ConfigurationError(
                f"token_budget is {self.token_budget}; it must be a multiple of the page size {self.page_size}, one "
                "page or more"
            )

    def reset(self) -> None:
        """Forget all pages."""
        self._pages.clear()

    def prefill(self, call: AttentionCall) -> None:
        """Prompts are read densely; what was known of an earlier one is forgotten."""
        self._pages.pop(call.layer, None)

    def decode(self, call: AttentionCall) -> TokenSelection | None:
        """The best pages, and the one that is being filled."""
        pages = self._bounds(call)
        chosen, current = self.token_budget // self.page_size, (pages.tokens - 1) // self.page_size
        if current <= chosen:
            return None
        scores = page_scores(call.query, pages.low[:, :, :current], pages.high[:, :, :current])[:, :, 0]
        if self.share_pages:
            scores = scores.unflatten(1, (call.key.shape[1], -1)).sum(2)
        if call.key_mask is not None:
            real = call.key_mask[:, : current * self.page_size].unflatten(1, (current, -1)).any(-1)
            scores = scores.masked_fill(~real[:, None], float("-inf"))
        best = scores.topk(chosen, dim=-1).indices.sort(-1).values
        inside = torch.arange(self.page_size, device=best.device)
        tokens = (best[..., None] * self.page_size + inside).flatten(-2)
        rest = torch.arange(current * self.page_size, pages.tokens, device=best.device)
        tokens = torch.cat([tokens, rest.expand(*tokens.shape[:2], -1)], -1)
        return TokenSelection(tokens) if call.key_mask is None else _without_padding(tokens, call.key_mask)

    def _bounds(self, call: AttentionCall) -> Pages:
        known = self._pages.get(call.layer)
        same = known is not None and known.low.shape[:2] == call.key.shape[:2]
        if known is not None and same and known.tokens == call.key.shape[2] - 1:
            known.append(call.key[:, :, -1:], self.page_size)
            return known
        self._pages[call.layer] = Pages.of(call.key, self.page_size)
        return self._pages[call.layer]

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, for one token after a context of `length`."""
        return 4.0 * block_count(length, self.page_size) * size * heads


def _without_padding(tokens: Tensor, real: Tensor) -> TokenSelection:
    """The tokens ``(batch, heads, n)`` that are real first, and how many they are."""
    meant = real[:, None, :].expand(-1, tokens.shape[1], -1).gather(-1, tokens)
    order = meant.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return TokenSelection(tokens.gather(-1, order), meant.sum(-1))

"""Choosing tokens, judged without decoding: every query of a text reads what it would have read as the newest token.

The choice becomes a mask over all rows of queries, so that one pass over a text gives the perplexity of a whole
generation. Rankings by calibrated channels stand beside others: the query's own largest channels, bounds of pages,
the true scores, recency, and heavy hitters, which never get back what they have evicted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.attention.base import Answer, SparseAttention
from gossamer.attention.channel_order import ChannelOrder
from gossamer.attention.double_sparsity import channel_count, token_count
from gossamer.attention.label_cache import channels_of
from gossamer.errors import ConfigurationError
from gossamer.kernels.attention import page_scores
from gossamer.kernels.attention_labels import make_labels
from gossamer.models.attention_sites import AttentionCall

_CHUNK = 1 << 24  # scores that are in memory at a time


class Ranking(ABC):
    """By what the keys of a query are ranked."""

    @abstractmethod
    def scores(self, call: AttentionCall, first: int, last: int) -> Tensor:
        """Of the queries from `first` to `last`, ``(batch, heads, queries, keys)``; higher is read first.

        Keys behind a query may have any score: they are never read.
        """


@dataclass(frozen=True)
class LabelRanking(Ranking):
    """Products over the first channels of an order; Double Sparsity's.

    Parameters
    ----------
    order
        Of the channels.
    channels
        How many, or which share of the head size.
    bits
        Of each label.
    """

    order: ChannelOrder
    channels: float | int = 1 / 16
    bits: int = 16

    def scores(self, call: AttentionCall, first: int, last: int) -> Tensor:  # noqa: D102
        heads, size = call.query.shape[1], call.query.shape[3]
        order = self.order.first(call.layer, channel_count(self.channels, size), heads, call.query.device)
        labels = make_labels(channels_of(call.key, order), self.bits).values()
        by_head = order.repeat_interleave(heads // len(order), 0)
        query = channels_of(call.query[:, :, first:last], by_head)
        return query.to(labels.dtype).float() @ labels.float().repeat_interleave(heads // len(order), 1).mT


@dataclass(frozen=True)
class QueryChannels(Ranking):
    """Products over the channels in which the query itself is largest [Ribar et al., 2024, SparQ, arXiv 2312.04985].

    Parameters
    ----------
    channels
        How many, or which share of the head size.
    """

    channels: float | int = 1 / 16

    def scores(self, call: AttentionCall, first: int, last: int) -> Tensor:  # noqa: D102
        query = call.query[:, :, first:last].float()
        largest = query.abs().topk(channel_count(self.channels, query.shape[-1]), dim=-1).indices
        few = torch.zeros_like(query).scatter_(-1, largest, query.gather(-1, largest))
        return few @ call.key.float().repeat_interleave(call.group, 1).mT


@dataclass(frozen=True)
class PageRanking(Ranking):
    """The highest score that a key within the bounds of a page can have [Tang et al., 2024, Quest, arXiv 2406.10774].

    The page of the query itself, which is not full yet, is always read.

    Parameters
    ----------
    page_size
        Tokens of a page.
    """

    page_size: int = 16

    def scores(self, call: AttentionCall, first: int, last: int) -> Tensor:  # noqa: D102
        length, size = call.key.shape[2], self.page_size
        low, high = (
            pad(call.key.float(), (0, 0, 0, -length % size), value=value).unflatten(2, (-1, size))
            for value in (float("inf"), -float("inf"))
        )
        found = page_scores(call.query[:, :, first:last].float(), low.amin(3), high.amax(3))
        page = torch.arange(length, device=call.key.device) // size
        offset = length - call.query.shape[2]
        own = page[first + offset : last + offset, None] == page
        return found[..., page].masked_fill(own, float("inf"))


class TrueScores(Ranking):
    """The scores themselves: what no other ranking can beat in recall."""

    def scores(self, call: AttentionCall, first: int, last: int) -> Tensor:  # noqa: D102
        return true_scores(call, first, last)


@dataclass(frozen=True)
class Recent(Ranking):
    """The first tokens and the last [Xiao et al., 2024, StreamingLLM, arXiv 2309.17453].

    Parameters
    ----------
    sinks
        First tokens that are always read.
    """

    sinks: int = 4

    def scores(self, call: AttentionCall, first: int, last: int) -> Tensor:  # noqa: D102
        place = torch.arange(call.key.shape[2], device=call.key.device, dtype=torch.float32)
        place[: self.sinks] = float("inf")
        return place.expand(*call.query.shape[:2], last - first, -1)


@dataclass(kw_only=True)
class SimulatedDecoding(SparseAttention):
    """Queries of a text read the tokens that a ranking puts first, as if each were decoded.

    Parameters
    ----------
    ranking
        Of the keys.
    tokens
        That a query reads, itself included: a whole number (``heavy_const`` of the authors' code), or a share of what
        it may see.
    start
        The first query that is decoded; those before it belong to the prompt and stay dense.
    """

    ranking: Ranking
    tokens: float | int = 1 / 16
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        token_count(self.tokens, 1)
        if self.start < 0:
            raise ConfigurationError(f"start is {self.start}; it must be at least 0")

    def attend(self, call: AttentionCall) -> Answer | None:
        """Attention of all queries, each over its own tokens."""
        if call.layer in self.dense_layers or call.slides or not call.causal or call.query.shape[2] <= self.start:
            return None
        outputs, read, seen = [], 0.0, 0.0
        real = torch.ones_like(call.query[:, 0, :, 0], dtype=torch.bool)
        if call.key_mask is not None:
            real = call.key_mask[:, -call.query.shape[2] :]
        for first, last in _chunks(call, self.start):
            visible = visible_keys(call, first, last)
            kept = self.kept(call, first, last, visible) if first >= self.start else visible
            shares = true_scores(call, first, last).masked_fill(~kept, float("-inf")).softmax(-1).nan_to_num(0.0)
            outputs.append(shares @ call.value.float().repeat_interleave(call.group, 1))
            asks = real[:, None, first:last, None]
            read += float((kept & asks).sum()) / kept.shape[1]
            seen += float((visible & asks).expand(len(call.query), -1, -1, -1).sum())
        return Answer(torch.cat(outputs, 2).to(call.query.dtype), read / max(seen, 1.0))

    def kept(self, call: AttentionCall, first: int, last: int, visible: Tensor) -> Tensor:
        """What the queries from `first` to `last` read, bool ``(batch, heads, queries, keys)``."""
        scores = self.ranking.scores(call, first, last).float()
        return best_keys(scores, visible, self.tokens, call.key.shape[2] - call.query.shape[2] + first)


@dataclass(kw_only=True)
class HeavyHitters(SparseAttention):
    """Evict all but the recent tokens and those that drew most attention so far [Zhang et al., 2023, H2O].

    arXiv 2306.14048, algorithm 1: half of the budget is for the last tokens, half for the heavy hitters; what is
    evicted never comes back. Every head of queries evicts for itself, which favours it where heads share keys.

    Parameters
    ----------
    tokens
        That are held, the newest included.
    start
        The first query that is decoded; of the prompt before it, what drew most attention is held.
    """

    tokens: int = 64
    start: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2 or self.start < 0:
            raise ConfigurationError(f"tokens is {self.tokens} and start {self.start}; at least 2 and 0 are needed")

    def attend(self, call: AttentionCall) -> Answer | None:
        """Attention of all queries, one after the other."""
        length = call.query.shape[2]
        if call.layer in self.dense_layers or call.slides or call.key_mask is not None or length <= self.start:
            return None
        if length != call.key.shape[2] or not call.causal:
            return None
        scores = true_scores(call, 0, length)
        scores.masked_fill_(~visible_keys(call, 0, length), float("-inf"))
        shares = scores[:, :, : self.start].softmax(-1)
        drawn = shares.sum(2) if self.start else scores.new_zeros(*scores.shape[:2], length)
        held = self._first(drawn)
        rows, read = [shares], shares[..., 0].numel() * (self.start + 1) / 2
        for row in range(self.start, length):
            held[..., row] = True
            read += float(held.sum())
            share = scores[:, :, row].masked_fill(~held, float("-inf")).softmax(-1)
            drawn += share
            rows.append(share[:, :, None])
            if row + 1 >= self.tokens:
                self._evict(held, drawn, row)
        shares = torch.cat(rows, 2)
        output = shares @ call.value.float().repeat_interleave(call.group, 1)
        return Answer(output.to(call.query.dtype), read / (shares[..., 0].numel() * (length + 1) / 2))

    def _first(self, drawn: Tensor) -> Tensor:
        """What of the prompt is held: the last tokens, and those that drew most attention."""
        held = torch.zeros_like(drawn, dtype=torch.bool)
        held[..., : self.start] = True
        surplus = self.start - (self.tokens - 1)
        if surplus > 0:
            old = self.start - self.tokens // 2
            least = drawn[..., :old].topk(surplus, largest=False).indices
            held.scatter_(-1, least, False)
        return held

    def _evict(self, held: Tensor, drawn: Tensor, row: int) -> None:
        """Let the older token go that drew the least attention."""
        old = row + 1 - self.tokens // 2
        weakest = drawn[..., :old].masked_fill(~held[..., :old], float("inf")).argmin(-1, keepdim=True)
        full = held.sum(-1, keepdim=True) >= self.tokens
        held.scatter_(-1, weakest, held.gather(-1, weakest) & ~full)


def best_keys(scores: Tensor, visible: Tensor, tokens: float | int, offset: int) -> Tensor:
    """The best visible keys of every query, itself among them: bool ``(batch, heads, queries, keys)``.

    Parameters
    ----------
    scores
        ``(batch, heads, queries, keys)``.
    visible
        Bool, can be broadcast to the scores.
    tokens
        Whole number, or share of what a query sees.
    offset
        Place of the first query among the keys.
    """
    queries, keys = scores.shape[-2:]
    own = torch.arange(keys, device=scores.device) == torch.arange(queries, device=scores.device)[:, None] + offset
    ranked = scores.nan_to_num(neginf=-1e30).clamp(-1e30, 1e30).masked_fill(own, float("inf"))
    ranked = ranked.masked_fill(~visible, float("-inf"))
    seen = visible.sum(-1).expand(scores.shape[:-1])
    counts = seen.clamp(max=tokens) if isinstance(tokens, int) else (seen * tokens - 1e-9).ceil().long()
    most = max(1, int(counts.max()))
    best = ranked.topk(min(most, keys), dim=-1).indices
    inside = torch.arange(best.shape[-1], device=best.device) < counts[..., None]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, inside) & visible


def true_scores(call: AttentionCall, first: int, last: int) -> Tensor:
    """Scaled scores of some queries with all keys, ``(batch, heads, queries, keys)`` float32."""
    query = call.query[:, :, first:last].float() * call.scale
    shared = query.unflatten(1, (call.key.shape[1], -1)).flatten(2, 3)
    return (shared @ call.key.float().mT).unflatten(2, (call.group, -1)).flatten(1, 2)


def visible_keys(call: AttentionCall, first: int, last: int) -> Tensor:
    """Which keys some queries may read, bool ``(batch or 1, 1, queries, keys)``."""
    keys = call.key.shape[2]
    offset = keys - call.query.shape[2]
    place = torch.arange(first, last, device=call.query.device)[:, None] + offset
    visible = (torch.arange(keys, device=call.query.device) <= place)[None, None]
    return visible if call.key_mask is None else visible & call.key_mask[:, None, None, :]


def _chunks(call: AttentionCall, start: int) -> Iterator[tuple[int, int]]:
    """Stretches of queries, of which none reaches across `start`."""
    batch, heads, queries, _ = call.query.shape
    step = max(1, _CHUNK // (batch * heads * call.key.shape[2]))
    for begin, end in ((0, min(start, queries)), (min(start, queries), queries)):
        for first in range(begin, end, step):
            yield first, min(first + step, end)

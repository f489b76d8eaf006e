"""Attention inside clusters of tokens: which tokens a cluster takes, and what its tokens read of each other.

Every cluster has the same number of members, so that all of them are one batched product of small squares; tokens are
gathered into it and scattered back, and nothing of the size of the whole attention matrix is ever made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from gossamer.errors import ConfigurationError

SELF_SCORE = -5e4
"""Score of a token with itself where queries are keys: it would always be its own best match."""


def balanced_topk_route(scores: Tensor, window: int | Tensor, mask: Tensor | None = None) -> Tensor:
    """Let every cluster take the tokens that it scores highest, equally many of them.

    A token may be taken by several clusters or by none. Note that a cluster looks at the whole sequence: a later token
    can push out an earlier one.

    Parameters
    ----------
    scores
        Of tokens for clusters, ``(batch, heads, n, clusters)``.
    window
        Tokens of a cluster; all n where there are fewer. For every sample its own if given as ``(batch,)``.
    mask
        Bool ``(batch, n)``, True for real tokens; all by default.

    Returns
    -------
    Tensor
        Positions ``(batch, heads, clusters, min(window, n))`` int64, ascending, of the largest window. Where a window
        is smaller or too few tokens are real the last are n, which is no token.

    Raises
    ------
    ConfigurationError
        If the window is below 1.
    """
    largest = int(window.max()) if isinstance(window, Tensor) else window
    if largest < 1:
        raise ConfigurationError(f"window is {largest}; a cluster needs at least 1 token")
    length = scores.shape[2]
    turned = scores.transpose(-1, -2)
    if mask is not None:
        turned = turned.masked_fill(~mask[:, None, None], -math.inf)
    best, chosen = turned.topk(min(largest, length), dim=-1, sorted=isinstance(window, Tensor))
    if isinstance(window, Tensor):
        places = torch.arange(chosen.shape[-1], device=chosen.device)
        chosen = chosen.masked_fill(places >= window[:, None, None, None], length)
    if mask is not None:
        chosen = chosen.masked_fill(best == -math.inf, length)
    return chosen.sort(-1).values


class Members(NamedTuple):
    """Positions of the queries and the keys of each cluster, as :func:`balanced_topk_route` gives them."""

    queries: Tensor
    keys: Tensor


def clustered_attention(q: Tensor, k: Tensor, v: Tensor, members: Members, *, causal: bool, shared: bool) -> Tensor:
    """Attention of each cluster's queries to its keys, averaged over the clusters that took a query.

    Parameters
    ----------
    q, k, v
        ``(batch, heads, n, width)``; keys and values may be of another length, and values of another width.
    members
        Of the clusters. The same tensor twice if queries and keys are the same tokens.
    causal
        Whether keys behind the query are hidden; true positions are compared.
    shared
        Whether keys are made of queries; a token then reads itself only if it sees nothing else.

    Returns
    -------
    Tensor
        ``(batch, heads, n, width of values)``; zero for queries that no cluster took, or that see no key there.
    """
    width = q.shape[-1]
    taken = [_rows(x, places) for x, places in ((q, members.queries), (k, members.keys), (v, members.keys))]
    scores = (taken[0] * width**-0.5) @ taken[1].transpose(-1, -2)
    sees: Tensor | None = None
    complete = members.queries is members.keys and not bool((members.keys == k.shape[2]).any())
    if complete:  # positions ascend and coincide: one triangle is right for all clusters
        rule, alike = _square(scores.shape[-1], causal, scores.device)
    else:
        query, key = members.queries[..., :, None], members.keys[..., None, :]
        rule, alike = (key <= query) & (key < k.shape[2]) if causal else (key < k.shape[2]), key == query
        sees = rule.any(-1).expand(scores.shape[:-1]) & (members.queries < q.shape[2])
    if shared:
        scores = scores.masked_fill(alike, SELF_SCORE)
    scores = scores.masked_fill(~rule, torch.finfo(scores.dtype).min)
    mixed = scores.softmax(-1) @ taken[2]
    if sees is not None:
        mixed = mixed.masked_fill(~sees[..., None], 0)
    return _mean_by_position(mixed, members.queries, sees, q.shape[2])


def _square(size: int, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    seen = torch.ones(size, size, dtype=torch.bool, device=device)
    return seen.tril() if causal else seen, torch.eye(size, dtype=torch.bool, device=device)


def ordered_attention(
    q: Tensor, k: Tensor, v: Tensor, nearest: Tensor, window: int, mask: Tensor | None = None
) -> Tensor:
    """Attention of every token to the last of its cluster, with keys made of queries, strictly causal.

    Tokens are sorted by cluster, and by position in it. In this order each reads the `window` members of its cluster
    that end with itself: they lie in its own piece of the order and the one before. What a token reads depends on no
    later token, neither directly nor through the choice.

    Parameters
    ----------
    q, k, v
        ``(batch, heads, n, width)``.
    nearest
        Cluster of each token, ``(batch, heads, n)`` int64 from 0.
    window
        Tokens that one reads at most, itself included.
    mask
        Bool ``(batch, n)``, True for real tokens; all by default.

    Returns
    -------
    Tensor
        ``(batch, heads, n, width of values)``; zero for padding.

    Raises
    ------
    ConfigurationError
        If the window is below 1.
    """
    if window < 1:
        raise ConfigurationError(f"window is {window}; a token must read at least itself")
    length, width = q.shape[2:]
    window = min(window, length)
    if mask is not None:
        nearest = nearest.masked_fill(~mask[:, None], int(nearest.max()) + 1)
    order = nearest.argsort(dim=-1, stable=True)
    cluster = nearest.gather(-1, order)
    pieces = -(-length // window)
    spare = pieces * window - length
    sorted_ = [pad(_rows(x, order[:, :, None]).squeeze(2), (0, 0, 0, spare)) for x in (q, k, v)]
    cluster = pad(cluster, (0, spare), value=-1).unflatten(-1, (pieces, window))
    queries = (sorted_[0] * width**-0.5).unflatten(2, (pieces, window))
    keys, values = (_with_piece_before(x.unflatten(2, (pieces, window))) for x in sorted_[1:])
    near, alike = _band(window, q.device)
    sees = near & (cluster[..., :, None] == _with_piece_before(cluster[..., None], -2).squeeze(-1)[..., None, :])
    scores = (queries @ keys.transpose(-1, -2)).masked_fill(alike, SELF_SCORE)
    scores = scores.masked_fill(~sees, torch.finfo(scores.dtype).min)
    mixed = (scores.softmax(-1) @ values).flatten(2, 3)[:, :, :length]
    back = torch.empty_like(order).scatter_(-1, order, torch.arange(length, device=q.device).expand_as(order))
    out = _rows(mixed, back[:, :, None]).squeeze(2)
    return out if mask is None else out.masked_fill(~mask[:, None, :, None], 0)


def _with_piece_before(x: Tensor, value: float = 0) -> Tensor:
    """``(batch, heads, pieces, window, width)`` → each piece behind the one before it, ``(…, 2 · window, width)``."""
    before = pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0), value=value)
    return torch.cat([before, x], 3)


def _band(window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the keys of two pieces a query of the second reads, and which of them it is."""
    behind = torch.arange(window, device=device)[:, None] + window - torch.arange(2 * window, device=device)
    return (behind >= 0) & (behind < window), behind == 0


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Rows of ``(batch, heads, n, width)`` at positions ``(batch, heads, …)``; whatever row for the position n."""
    length, width = x.shape[2:]
    if places.numel() == 0:
        return x.new_empty(*places.shape, width)
    flat = _flat(places.clamp(max=length - 1), length)
    # as a gather along the first dimension: its backward pass adds whole rows and is much faster than that of indexing
    rows = x.reshape(-1, width).gather(0, flat[:, None].expand(-1, width))
    return rows.view(*places.shape, width)


def _flat(places: Tensor, length: int) -> Tensor:
    batch, heads = places.shape[:2]
    first = torch.arange(batch * heads, device=places.device).view(batch, heads, *[1] * (places.dim() - 2))
    return (places + first * length).flatten()


def _mean_by_position(mixed: Tensor, places: Tensor, sees: Tensor | None, length: int) -> Tensor:
    """Average of the rows of each position, zero where there are none."""
    batch, heads, width = places.shape[0], places.shape[1], mixed.shape[-1]
    flat = _flat(places.clamp(max=length - 1), length)
    one = torch.ones_like(flat, dtype=mixed.dtype) if sees is None else sees.flatten().to(mixed.dtype)
    counts = one.new_zeros(batch * heads * length).scatter_add_(0, flat, one)
    total = mixed.new_zeros(batch * heads * length, width)
    total = total.scatter_add(0, flat[:, None].expand(-1, width), mixed.reshape(-1, width))
    return (total / counts.clamp(min=1)[:, None]).view(batch, heads, length, width)

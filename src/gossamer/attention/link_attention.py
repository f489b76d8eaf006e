"""Attention over single links: every query reads its own list of keys, and nothing else is computed.

A list of keys has a fixed length for all queries of a call, so that a selection by rank is a plain tensor of indices.
Queries of the prefix, such as the class token, read everything. On short sequences a dense product is faster than a
sparse one: from which length and density on links pay is measured by the experiment of the paper, not assumed here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from gossamer.core.selection import check_scores
from gossamer.errors import ConfigurationError

_GATHERED = 1 << 18  # elements of keys gathered at once: they stay in the cache between both products
_SPARSE_TYPES = (torch.float32, torch.float64)


def link_count(keep: float, tokens: int) -> int:
    """``⌈keep · tokens⌉``, in exact decimal arithmetic.

    Raises
    ------
    ConfigurationError
        If `keep` is no share in (0, 1].
    """
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ConfigurationError(f"keep_rate is {keep!r}; it must be a share of the tokens in (0, 1], such as 0.25")
    return math.ceil(Fraction(repr(float(keep))) * tokens)


@dataclass(frozen=True, eq=False)
class LinkMask:
    """Which keys every query reads.

    Attributes
    ----------
    indices
        ``(batch, heads, rows, links)`` int64, different keys in each row, in any order. Rows are the queries behind
        the prefix.
    valid
        The same shape, bool: False where a row has fewer links than there is room for. None means that all count.
    keys
        Number of keys.
    prefix
        Queries before the first row, which read all keys.
    """

    indices: Tensor
    valid: Tensor | None
    keys: int
    prefix: int = 1

    @classmethod
    def topk(cls, scores: Tensor, keep: float, token_mask: Tensor | None = None, prefix: int = 1) -> LinkMask:
        """Keep a share of the keys in every row, ``⌈keep · keys⌉`` of them; see :meth:`highest`.

        Raises
        ------
        ConfigurationError
            If `keep` is no share in (0, 1].
        NonFiniteError
            If a score is NaN.
        """
        return cls.highest(scores, link_count(keep, scores.shape[-1]), token_mask, prefix)

    @classmethod
    def highest(cls, scores: Tensor, count: int, token_mask: Tensor | None = None, prefix: int = 1) -> LinkMask:
        """Keep the same number of links in every row: those of the highest scores, exactly as many even if they tie.

        Parameters
        ----------
        scores
            ``(batch, heads, rows, keys)``; −∞ for keys that may not be read. No gradient goes back through it.
        count
            Links of a row, from 1 to the number of keys.
        token_mask
            ``(batch, rows)`` bool: rows of dropped tokens keep no link.
        prefix
            See the class.
        """
        scores = check_scores(scores.detach(), "scores of links")
        if not 0 < count <= scores.shape[-1]:
            raise ConfigurationError(f"count is {count} links of {scores.shape[-1]} keys; give 1 to all of them")
        values, indices = scores.topk(count, -1, sorted=False)
        valid: Tensor | None = values > -math.inf
        if token_mask is not None:
            valid = valid & token_mask[:, None, :, None]
        return cls(indices, None if bool(valid.all()) else valid, scores.shape[-1], prefix)

    @classmethod
    def threshold(cls, scores: Tensor, least: float = 1e-4, prefix: int = 1) -> LinkMask:
        """Keep the links whose score is above a threshold, as many as that may be in each row."""
        scores = check_scores(scores.detach(), "scores of links")
        room = max(1, int((scores > least).sum(-1).max()))
        values, indices = scores.topk(room, -1, sorted=False)
        return cls(indices, values > least, scores.shape[-1], prefix)

    @property
    def counts(self) -> Tensor:
        """Links of every row, ``(batch, heads, rows)`` int64; the prefix has none."""
        if self.valid is None:
            return torch.full(self.indices.shape[:-1], self.indices.shape[-1], device=self.indices.device)
        return self.valid.sum(-1)

    @property
    def links(self) -> int:
        """All links of the batch, those of the prefix included."""
        batch, heads = self.indices.shape[:2]
        return int(self.counts.sum()) + batch * heads * self.prefix * self.keys

    def to_dense(self) -> Tensor:
        """Bool ``(batch, heads, prefix + rows, keys)``, True where a query reads a key."""
        shape = self.indices.shape
        mask = torch.zeros(*shape[:-1], self.keys, dtype=torch.bool, device=self.indices.device)
        true = torch.ones_like(self.indices, dtype=torch.bool) if self.valid is None else self.valid
        mask.scatter_(-1, self.indices, true)
        return torch.cat([mask.new_ones(*shape[:2], self.prefix, self.keys), mask], 2)

    def recall(self, attention: Tensor) -> float:
        """Share of the attention that lies on links, over the rows behind the prefix.

        Parameters
        ----------
        attention
            Probabilities ``(batch, heads, prefix + rows, keys)``.
        """
        rows = attention[:, :, self.prefix :]
        found = rows.gather(-1, self.indices)
        found = found if self.valid is None else found * self.valid
        return float(found.sum(dtype=torch.float64) / rows.sum(dtype=torch.float64))


def link_attention(q: Tensor, k: Tensor, v: Tensor, mask: LinkMask, scale: float | None = None) -> Tensor:
    """Softmax attention in which only links are computed: scores sampled, row softmax, sparse rows times values.

    Parameters
    ----------
    q, k
        ``(batch, heads, tokens, d)``.
    v
        ``(batch, heads, tokens, e)``.
    mask
        The links. If every row has all keys, this is dense attention, bit for bit.
    scale
        Of scores; None means ``d^−½``.

    Returns
    -------
    Tensor
        ``(batch, heads, tokens, e)``; zeros for queries without a link.

    Raises
    ------
    ConfigurationError
        If the mask is for other numbers of tokens, heads or images.
    """
    _check_links(q, k, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask.valid is None and mask.indices.shape[-1] == mask.keys:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    first = torch.nn.functional.scaled_dot_product_attention(q[:, :, : mask.prefix], k, v, scale=scale)
    rows = q[:, :, mask.prefix :].reshape(-1, q.shape[-1])
    offsets = torch.arange(k.shape[0] * k.shape[1], device=k.device).view(*k.shape[:2], 1, 1) * mask.keys
    places = (mask.indices + offsets).flatten(0, 2)
    valid = None if mask.valid is None else mask.valid.flatten(0, 2)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    way = _gathered if differentiable or q.dtype not in _SPARSE_TYPES else _sampled
    rest = way(rows, k.reshape(-1, k.shape[-1]), v.reshape(-1, v.shape[-1]), places, valid, scale)
    return torch.cat([first, rest.view(*mask.indices.shape[:3], -1)], 2)


def _sampled(
    queries: Tensor, keys: Tensor, values: Tensor, places: Tensor, valid: Tensor | None, scale: float
) -> Tensor:
    """Queries ``(rows, d)`` over the rows ``places`` ``(rows, links)`` of keys and values, by torch's sparse products.

    Heads and images lie along the diagonal of one sparse matrix, of which nothing but the links exists.
    """
    rows, links = places.shape
    ends = torch.arange(0, places.numel() + 1, links, device=places.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        pattern = torch.sparse_csr_tensor(
            ends, places.reshape(-1), queries.new_zeros(places.numel()), (rows, len(keys)), check_invariants=False
        )
        scores = torch.sparse.sampled_addmm(pattern, queries, keys.t(), beta=0.0, alpha=scale).values()
        weights = _softmax(scores.view(rows, links), valid)
        mixing = torch.sparse_csr_tensor(
            ends, places.reshape(-1), weights.view(-1), pattern.shape, check_invariants=False
        )
        return mixing @ values


def _gathered(
    queries: Tensor, keys: Tensor, values: Tensor, places: Tensor, valid: Tensor | None, scale: float
) -> Tensor:
    """The same with gradients and in any precision, by copying keys and values to where they are needed."""
    links = places.shape[-1]
    step = max(1, _GATHERED // (links * max(keys.shape[-1], values.shape[-1])))
    parts = []
    for start in range(0, len(places), step):
        part = slice(start, start + step)
        flat = places[part].reshape(-1)
        near = keys.index_select(0, flat).view(-1, links, keys.shape[-1])
        scores = (near @ (queries[part] * scale).unsqueeze(-1)).squeeze(-1)
        weights = _softmax(scores, None if valid is None else valid[part])
        parts.append(
            (weights.unsqueeze(-2) @ values.index_select(0, flat).view(-1, links, values.shape[-1])).squeeze(-2)
        )
    return torch.cat(parts)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """The same by a dense product, for training: links that are not in the mask get −∞ before the softmax.

    Parameters
    ----------
    q, k, v, scale
        See :func:`link_attention`.
    mask
        Bool, broadcastable to ``(batch, heads, tokens, keys)``; a row without True gives zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _softmax(q @ k.transpose(-1, -2) * scale, mask) @ v


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Row softmax of what is valid; zeros, and no NaN, for rows without anything."""
    if valid is None:
        return scores.softmax(-1)
    # the lowest number instead of −∞: a row of nothing has a gradient of zeros and not of NaN
    weights = scores.masked_fill(~valid, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * valid


def _check_links(q: Tensor, k: Tensor, mask: LinkMask) -> None:
    wanted = (*q.shape[:2], q.shape[2] - mask.prefix)
    if tuple(mask.indices.shape[:3]) != wanted or mask.keys != k.shape[2]:
        raise ConfigurationError(
            f"the links are for {tuple(mask.indices.shape[:3])} (batch, heads, rows) and {mask.keys} keys, attention "
            f"has {wanted} and {k.shape[2]}; select them anew"
        )

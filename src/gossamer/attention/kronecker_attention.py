"""Attention to tuples of tokens: every query weighs pairs, or triples, by the products of their keys.

Some relations hold between three tokens and between no two of them. Attention over pairs sees them in one layer, at a
cubic price; if the entries of queries and keys are small, a polynomial of low degree takes the place of the
exponential, and then no pair is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gossamer.attention.tensor_exact import column_kronecker, exact_attention, topk_attention
from gossamer.attention.tensor_features import (
    PolynomialPlan,
    plan_polynomial,
    polynomial_attention,
    random_feature_attention,
    score_bound,
)
from gossamer.attention.tensor_polynomial import (
    Basis,
    exp_polynomial,
    feature_count,
    monomial_exponents,
    monomial_features,
    required_degree,
)
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError

Method = Literal["exact", "polynomial", "topk"]
_MEMORY = 1 << 30

__all__ = [
    "PolynomialPlan",
    "TensorSelfAttention",
    "column_kronecker",
    "exp_polynomial",
    "feature_count",
    "monomial_exponents",
    "monomial_features",
    "plan_polynomial",
    "random_feature_attention",
    "required_degree",
    "score_bound",
    "tensor_attention",
]


def tensor_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scale: float | None = None,
    method: Method = "exact",
    degree: int | Literal["auto"] = "auto",
    eps: float = 1e-2,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    count: int = 64,
    basis: Basis = "chebyshev",
    memory_limit: int = _MEMORY,
) -> Tensor:
    """Attention of order k: softmax over all tuples of k − 1 tokens.

    ``S[i, (j, l)] = scale · Σ_c Q_ic K1_jc K2_lc`` and ``out = D⁻¹ exp(S) (V1 ⊘ V2)``; more keys make longer tuples.
    Alman & Song, 2024, "How to Capture Higher-order Correlations?", ICLR, arXiv 2310.04064, definitions 1.1 and 1.2.

    Parameters
    ----------
    q
        ``(batch, heads, n, d)``.
    keys, values
        k − 1 tensors each, ``(batch, heads, n, d)`` and ``(batch, heads, n, e)``.
    scale
        None means ``1/d``, the paper's, and not ``1/√d``: then entries up to B make scores up to ``B^k``.
    method
        ``exact`` takes time ``n^k d`` and memory of a chunk, in training as well; ``polynomial`` time ``n r e`` with
        ``r = binom(d + g, g)`` features; ``topk`` keeps the best tuples of each query, which it finds among all.
    degree, eps, basis
        Of the polynomial: g, or ``auto`` for the smallest whose weights have a relative error of at most eps. The
        bound on scores is measured; entries are never clipped. :func:`plan_polynomial` tells all of it beforehand.
    causal
        Whether tuples with a member later than the query are left out.
    key_mask
        ``(batch, n)`` bool, False for padding, whose keys and values may be anything; queries that see nothing give
        zeros.
    count
        Tuples that ``topk`` keeps.
    memory_limit
        Bytes that the features of the polynomial may take.

    Returns
    -------
    Tensor
        ``(batch, heads, n, e)``.

    Raises
    ------
    ConfigurationError
        If shapes or numbers do not fit, the polynomial needs too much memory, or its denominator is not positive.

    Examples
    --------
    >>> import torch
    >>> q, a, b, v, w = torch.randn(5, 1, 2, 16, 4).clamp(-1, 1)
    >>> exact = tensor_attention(q, [a, b], [v, w])
    >>> close = tensor_attention(q, [a, b], [v, w], method="polynomial", eps=1e-4)
    >>> bool((exact - close).abs().max() < 1e-3)
    True
    """
    _check(q, keys, values, causal, key_mask)
    scale = 1 / q.shape[-1] if scale is None else scale
    if method == "topk" and count < 1:
        raise ConfigurationError(f"count is {count} tuples; it must be at least 1")
    if method not in ("exact", "polynomial", "topk"):
        raise ConfigurationError(f"method is {method!r}; it must be 'exact', 'polynomial' or 'topk'")
    if key_mask is not None:
        # a weight of 0 would not hide a NaN, and a large key would widen the bound of scores
        hidden = ~key_mask[:, None, :, None]
        keys, values = ([x.masked_fill(hidden, 0) for x in tables] for tables in (keys, values))
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        # sums over n² tuples would lose most of what they add up
        q, keys, values = q.float(), [key.float() for key in keys], [value.float() for value in values]
    if method == "exact":
        return exact_attention(q, keys, values, scale, causal, key_mask).to(dtype)
    if method == "topk":
        return topk_attention(q, keys, values, scale, causal, key_mask, count).to(dtype)
    plan = plan_polynomial(q, keys, scale, degree, eps, basis)
    return polynomial_attention(q, keys, values, scale, causal, key_mask, plan, memory_limit).to(dtype)


def _check(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], causal: bool, key_mask: Tensor | None) -> None:
    if not keys or len(keys) != len(values):
        raise ConfigurationError(f"{len(keys)} keys and {len(values)} values; attention of order k needs k − 1 of each")
    for name, tables, width in (("keys", keys, q.shape[-1]), ("values", values, values[0].shape[-1])):
        for table in tables:
            wanted = (*q.shape[:-2], keys[0].shape[-2], width)
            if q.dim() != 4 or tuple(table.shape) != wanted:
                raise ConfigurationError(
                    f"queries have shape {tuple(q.shape)} and {name} {tuple(table.shape)}; (batch, heads, n, ·) is "
                    f"needed, here {wanted}"
                )
    n = keys[0].shape[-2]
    if causal and q.shape[-2] != n:
        raise ConfigurationError(f"{q.shape[-2]} queries and {n} keys; causal attention needs as many")
    if key_mask is not None and tuple(key_mask.shape) != (len(q), n):
        raise ConfigurationError(f"key_mask has shape {tuple(key_mask.shape)}; {(len(q), n)} is needed")


@register(
    "kronecker-attention",
    paper="kronecker-attention",
    when="layer",
    granularity="tokens",
    needs_data=False,
    criterion=("structure",),
)
class TensorSelfAttention(nn.Module):
    """Multi-head attention in which every token weighs tuples of tokens [Alman & Song, 2024, arXiv 2310.04064].

    Parameters
    ----------
    dim
        Width of tokens; the number of heads divides it.
    num_heads
        Heads.
    order
        k, at least 2, which is common attention at the scale of this one; 3 weighs pairs.
    method, degree, eps, causal
        See :func:`tensor_attention`.
    bias
        Whether the projections have one.
    scale
        Of scores; None means ``1/d``.

    Raises
    ------
    ConfigurationError
        If heads do not divide the width, or the order is below 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        order: int = 3,
        method: Method = "exact",
        degree: int | Literal["auto"] = "auto",
        eps: float = 1e-2,
        causal: bool = False,
        bias: bool = True,
        scale: float | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigurationError(f"num_heads is {num_heads}; it must divide the width {dim}")
        if order < 2:
            raise ConfigurationError(f"order is {order}; it must be at least 2, and 3 for pairs")
        self.num_heads, self.order, self.scale = num_heads, order, scale
        self.method, self.degree, self.eps, self.causal = method, degree, eps, causal
        self.query = nn.Linear(dim, dim, bias)
        self.keys = nn.ModuleList(nn.Linear(dim, dim, bias) for _ in range(order - 1))
        self.values = nn.ModuleList(nn.Linear(dim, dim, bias) for _ in range(order - 1))
        self.output = nn.Linear(dim, dim, bias)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Tokens ``(batch, n, dim)`` → the same shape; `key_mask` ``(batch, n)`` bool is False for padding."""
        if key_mask is not None:
            x = x.masked_fill(~key_mask[..., None], 0)
        out = tensor_attention(
            self._heads(self.query(x)),
            [self._heads(key(x)) for key in self.keys],
            [self._heads(value(x)) for value in self.values],
            self.scale,
            method=self.method,
            degree=self.degree,
            eps=self.eps,
            causal=self.causal,
            key_mask=key_mask,
        )
        return self.output(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

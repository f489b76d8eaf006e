"""A low-rank guess of an attention map: which keys will a query need, before any score has been computed.

Queries and keys are halved in width and the keys are averaged down to a few learned prototypes; how a query weighs the
prototypes says, through a learned basis, how it will weigh the tokens. Both factors can be made sparse, and then the
guess is a product of two sparse matrices.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class Guess:
    """What a predictor says of one batch.

    Attributes
    ----------
    approx
        The map, ``(batch, heads, rows, tokens)``: a row for every query behind the prefix, a column for every token.
        Columns of tokens that are masked are −∞.
    coefficients
        Weights of the prototypes, ``(batch, heads, rows, M)``; zero where they were dropped.
    basis
        U or, made sparse, |U| without its small entries: ``(tokens, M)``, or ``(batch, tokens, M)`` for chosen tokens.
    """

    approx: Tensor
    coefficients: Tensor
    basis: Tensor

    def products(self) -> int:
        """Multiplications that the product of both factors needs when zeros of either are skipped; over the batch."""
        column = (self.basis != 0).sum(-2)  # (M,) or (batch, M)
        used = (self.coefficients != 0).sum((1, 2))  # (batch, M)
        return int((used * column).sum())


class ConnectivityPredictor(nn.Module):
    """Guess attention maps by ``softmax(s · (q W_q)((k W_k)ᵀ P)) Uᵀ``.

    Wei et al., 2023, "Sparsifiner", CVPR, arXiv 2303.13755, section 3.2. The paper's code scales by heads^−½ where the
    text says nothing; the default here is that of attention.

    Parameters
    ----------
    head_dim
        d, width of a head. Both maps to ``c = d // reduce_c`` are shared by all heads.
    num_tokens
        N, tokens of an image with those of the prefix.
    reduce_n, reduce_c
        Factors by which tokens and widths are reduced; ``M = N // reduce_n`` prototypes.
    coef_topk
        How many prototypes each query keeps when factors are sparse; all if M is smaller.
    basis_threshold
        Entries of |U| up to this are zero when factors are sparse.
    scale
        s; None means ``d^−½``.
    prefix
        Tokens at the beginning that see everything and have no row, such as the class token.
    shared
        Whether U is P.
    coef_threshold
        In place of `coef_topk`: coefficients up to this are zero when factors are sparse, such as 0.05.

    Raises
    ------
    ConfigurationError
        If a number is out of range, or nothing is left of tokens or widths.
    """

    def __init__(
        self,
        head_dim: int,
        num_tokens: int,
        reduce_n: int = 6,
        reduce_c: int = 2,
        coef_topk: int = 8,
        basis_threshold: float = 0.02,
        scale: float | None = None,
        prefix: int = 1,
        shared: bool = False,
        coef_threshold: float | None = None,
    ):
        super().__init__()
        if reduce_n < 1 or reduce_c < 1 or num_tokens // reduce_n < 1 or head_dim // reduce_c < 1:
            raise ConfigurationError(
                f"reduce_n {reduce_n} of {num_tokens} tokens and reduce_c {reduce_c} of width {head_dim}: each must be "
                f"at least 1 and leave at least one"
            )
        if coef_topk < 1 or not basis_threshold >= 0 or not 0 <= prefix < num_tokens:
            raise ConfigurationError(
                f"coef_topk is {coef_topk}, basis_threshold {basis_threshold}, prefix {prefix}; they must be at least "
                f"1, at least 0, and from 0 to {num_tokens - 1}"
            )
        self.head_dim, self.num_tokens, self.prefix = head_dim, num_tokens, prefix
        self.width, self.prototypes = head_dim // reduce_c, num_tokens // reduce_n
        self.coef_topk, self.basis_threshold = min(coef_topk, self.prototypes), basis_threshold
        self.coef_threshold = coef_threshold
        self.scale = head_dim**-0.5 if scale is None else scale
        self.query = nn.Linear(head_dim, self.width)
        self.key = nn.Linear(head_dim, self.width)
        self.down = nn.Parameter(torch.empty(num_tokens, self.prototypes))
        self.up = self.down if shared else nn.Parameter(torch.empty(num_tokens, self.prototypes))
        for weight in (self.query.weight, self.key.weight, self.down, self.up):
            nn.init.trunc_normal_(weight, std=0.02)
        for linear in (self.query, self.key):
            nn.init.zeros_(linear.bias)

    def forward(self, q: Tensor, k: Tensor, token_mask: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """The guess alone; see :meth:`guess`. Factors are sparse unless the module is in training mode."""
        return self.guess(q, k, not self.training, token_mask, tokens).approx

    def guess(
        self, q: Tensor, k: Tensor, sparse: bool, token_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> Guess:
        """Guess a map.

        Parameters
        ----------
        q, k
            Queries and keys of attention, ``(batch, heads, tokens, d)``.
        sparse
            Whether both factors are made sparse: |U| beyond its threshold, and the largest coefficients.
        token_mask
            ``(batch, tokens − prefix)`` bool, False for tokens that were dropped but still have a place.
        tokens
            ``(batch, tokens)``: which of the N tokens these are, where others were really removed.

        Raises
        ------
        ConfigurationError
            If there are other than N tokens and nothing says which, or they are wider than the head.
        """
        self._check(q, tokens)
        down, up = (self.down, self.up) if tokens is None else (self.down[tokens], self.up[tokens])
        basis = nn.functional.threshold(up.abs(), self.basis_threshold, 0.0) if sparse else up
        reduced = self.key(k)
        if token_mask is not None:
            kept = nn.functional.pad(token_mask, (self.prefix, 0), value=True)
            reduced = reduced * kept[:, None, :, None]
        if tokens is not None:
            down, across = down.unsqueeze(1), basis.unsqueeze(1).transpose(-1, -2)
        else:
            across = basis.transpose(-1, -2)
        prototypes = reduced.transpose(-1, -2) @ down
        coefficients = (self.scale * (self.query(q[:, :, self.prefix :]) @ prototypes)).softmax(-1)
        if sparse:
            coefficients = self._few(coefficients)
        approx = coefficients @ across
        if token_mask is not None:
            approx = approx.masked_fill(~kept[:, None, None, :], -math.inf)
        return Guess(approx, coefficients, basis)

    def _few(self, coefficients: Tensor) -> Tensor:
        if self.coef_threshold is not None:
            return nn.functional.threshold(coefficients, self.coef_threshold, 0.0)
        if self.coef_topk == self.prototypes:
            return coefficients
        values, places = coefficients.topk(self.coef_topk, -1, sorted=False)
        return torch.zeros_like(coefficients).scatter(-1, places, values)

    def _check(self, q: Tensor, tokens: Tensor | None) -> None:
        if q.shape[-1] != self.head_dim:
            raise ConfigurationError(f"queries have width {q.shape[-1]}, the predictor {self.head_dim}")
        count = self.num_tokens if tokens is None else tokens.shape[-1]
        if q.shape[-2] != count:
            raise ConfigurationError(
                f"{q.shape[-2]} tokens, but the predictor knows {count}; call resize({q.shape[-2]}) to interpolate it"
            )

    @torch.no_grad()
    def resize(self, num_tokens: int) -> ConnectivityPredictor:
        """A predictor for images of another size: P and U interpolated along tokens, everything else the same.

        Square grids are interpolated in both directions, other sequences along their length. P is rescaled so that
        its columns sum to what they summed to, since it averages over tokens.

        Parameters
        ----------
        num_tokens
            The new N.

        Raises
        ------
        ConfigurationError
            If there is no token besides the prefix.
        """
        if num_tokens <= self.prefix:
            raise ConfigurationError(
                f"a predictor for {self.num_tokens} tokens cannot be resized to {num_tokens}; {self.prefix} of them "
                f"are the prefix, so give at least {self.prefix + 1}"
            )
        other = copy.deepcopy(self)
        other.num_tokens = num_tokens
        grown = (num_tokens - self.prefix) / (self.num_tokens - self.prefix)
        other.down = nn.Parameter(_interpolated(self.down, num_tokens, self.prefix, 1 / grown))
        other.up = other.down if self.up is self.down else nn.Parameter(_interpolated(self.up, num_tokens, self.prefix))
        return other


def _interpolated(table: Tensor, tokens: int, prefix: int, factor: float = 1.0) -> Tensor:
    """``(N, M)`` → ``(tokens, M)``; the rows of the prefix stay, the others are interpolated and multiplied."""
    rows = table[prefix:].t().unsqueeze(0)  # (1, M, patches)
    before, after = math.isqrt(rows.shape[-1]), math.isqrt(tokens - prefix)
    if before**2 == rows.shape[-1] and after**2 == tokens - prefix:
        grid = nn.functional.interpolate(
            rows.unflatten(-1, (before, before)), (after, after), mode="bilinear", align_corners=False
        )
        rows = grid.flatten(2)
    else:
        rows = nn.functional.interpolate(rows, tokens - prefix, mode="linear", align_corners=False)
    return torch.cat([table[:prefix], factor * rows[0].t()])

"""Online k-means on the unit sphere: centroids that follow what they are shown, one set for each head.

On the sphere the nearest centroid is the one with the largest inner product, so that the product that routes tokens is
also the product that clusters them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.randomness import generator_for
from gossamer.core.ranks import average_, ranks
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, UnknownNameError

Reduction = Literal["sum", "mean"]

LLOYD_ITERATIONS = 10


class SphericalKMeans(nn.Module):
    """Centroids of unit length that move a little towards the tokens assigned to them.

    Roy et al., 2021, "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997, equation
    of the centroid update: ``μ ← λ μ + (1 − λ) Σ x`` over the tokens x that μ is nearest to, back to unit length.

    Tokens are shown by :meth:`observe`, which only adds them up, and :meth:`update` moves the centroids. So a step that
    accumulates gradients over many batches moves them once, and processes that train together move them alike.

    Parameters
    ----------
    num_heads, num_clusters, dim
        Sets of centroids, centroids in a set, and width of a token.
    decay
        λ in [0, 1]; at 1 they never move.
    reduction
        ``"sum"``, as published: the more tokens, the larger the step. ``"mean"`` takes the direction of the sum, which
        makes the step independent of how many tokens a batch has.
    seed
        Of the first centroids.

    Attributes
    ----------
    means
        ``(num_heads, num_clusters, dim)``, of unit length; a buffer, no parameter. Random until :meth:`initialize`.
    initialized
        Whether they come from tokens.

    Raises
    ------
    ConfigurationError, UnknownNameError
        If a parameter is out of range, or the reduction unknown.
    """

    means: Tensor
    initialized: Tensor

    def __init__(
        self,
        num_heads: int,
        num_clusters: int,
        dim: int,
        decay: float = 0.999,
        *,
        reduction: Reduction = "sum",
        seed: int = 0,
    ):
        super().__init__()
        for name, value in (("num_heads", num_heads), ("num_clusters", num_clusters), ("dim", dim)):
            if value < 1:
                raise ConfigurationError(f"{name} is {value}; it must be at least 1")
        if not 0 <= decay <= 1:
            raise ConfigurationError(f"decay is {decay}; it must lie in [0, 1], such as 0.999")
        if reduction not in get_args(Reduction):
            raise UnknownNameError("reduction", reduction, get_args(Reduction))
        self.decay, self.reduction, self.seed = decay, reduction, seed
        drawn = torch.randn(num_heads, num_clusters, dim, generator=generator_for("centroids", seed))
        self.register_buffer("means", functional.normalize(drawn, dim=-1))
        self.register_buffer("initialized", torch.tensor(False))
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    @property
    def num_clusters(self) -> int:
        """Centroids of a head."""
        return self.means.shape[1]

    @property
    def pending(self) -> bool:
        """Whether tokens were observed since the last update."""
        return self._sums is not None

    def similarity(self, x: Tensor) -> Tensor:
        """Inner products of tokens ``(batch, heads, n, dim)``, of any length, with all centroids ``(…, n, clusters)``.

        Cosines if the tokens have unit length. For choosing among centroids or among normalised tokens only: no
        gradient flows.
        """
        self._check(x)
        with torch.no_grad():
            return x.detach() @ self.means.to(x.dtype).transpose(-1, -2)

    def assign(self, x: Tensor) -> Tensor:
        """Nearest centroid of each token, int64 ``(batch, heads, n)``; the lower index among equals."""
        return self.similarity(x).argmax(-1)

    def occupancy(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """How many tokens each centroid is nearest to, int64 ``(heads, clusters)``; see :meth:`observe`."""
        counted = _totals(functional.normalize(x.detach(), dim=-1), self.assign(x), self.num_clusters, mask)[1]
        return counted.long()

    @torch.no_grad()
    def initialize(self, x: Tensor, mask: Tensor | None = None, iterations: int = LLOYD_ITERATIONS) -> None:
        """Take random tokens as centroids, and improve them by Lloyd's iterations.

        Several processes start from the same tokens, those of the first, and iterate over all of theirs.

        Parameters
        ----------
        x
            ``(batch, heads, n, dim)``; brought to unit length.
        mask
            Bool ``(batch, n)``, True for real tokens; all by default.
        iterations
            Of Lloyd's algorithm.

        Raises
        ------
        CalibrationError
            If no token is real.
        NonFiniteError
            If a token is NaN or infinite.
        """
        self._check(x, mask)
        x = functional.normalize(x.detach().float(), dim=-1)
        tokens = x.transpose(0, 1).flatten(1, 2)
        if mask is not None:
            tokens = tokens[:, mask.flatten()]
        if tokens.shape[1] == 0:
            raise CalibrationError("no token is real, so there is nothing to cluster; look at the padding mask")
        if not bool(torch.isfinite(tokens).all()):
            raise NonFiniteError("the tokens to cluster hold NaN or infinity; look at the layer before, or the rate")
        generator = generator_for("initial centroids", self.seed)
        order = torch.randperm(tokens.shape[1], generator=generator)[: self.num_clusters]
        short = self.num_clusters - len(order)
        if short > 0:  # fewer tokens than centroids: some start alike, and the first of them takes all
            order = torch.cat([order, torch.randint(tokens.shape[1], (short,), generator=generator)])
        means = tokens[:, order.to(tokens.device)].contiguous()
        if ranks() > 1:
            torch.distributed.broadcast(means, 0)
        self.means.copy_(means)
        for _ in range(iterations):
            sums, counts = _totals(x, self.assign(x), self.num_clusters, mask)
            average_(sums), average_(counts)
            self._move(sums, counts)
        self.initialized.fill_(True)

    @torch.no_grad()
    def observe(
        self, x: Tensor, mask: Tensor | None = None, weight: float = 1.0, nearest: Tensor | None = None
    ) -> None:
        """Add tokens up by their nearest centroid, for the next :meth:`update`.

        Parameters
        ----------
        x
            ``(batch, heads, n, dim)``; brought to unit length.
        mask
            Bool ``(batch, n)``, True for real tokens; all by default.
        weight
            Of these tokens: queries and keys count half each.
        nearest
            What :meth:`assign` says of them, where it is known already.
        """
        self._check(x, mask)
        x = functional.normalize(x.detach(), dim=-1)
        sums, counts = _totals(x, self.assign(x) if nearest is None else nearest, self.num_clusters, mask)
        sums, counts = sums * weight, counts * weight
        if self._sums is None or self._counts is None:
            self._sums, self._counts = sums, counts
        else:
            self._sums, self._counts = self._sums + sums, self._counts + counts

    @torch.no_grad()
    def update(self) -> None:
        """Move the centroids towards what was observed since the last update, averaged over processes.

        Centroids to which nothing was assigned stay. Every process has to call this the same number of times.
        """
        if self.decay == 1:
            self._sums = self._counts = None
            return
        if self._sums is None or self._counts is None:
            if ranks() == 1:
                return
            self._sums = torch.zeros_like(self.means, dtype=torch.float32)
            self._counts = self._sums.new_zeros(self.means.shape[:2])
        sums, counts = average_(self._sums), average_(self._counts)
        self._sums = self._counts = None
        step = functional.normalize(sums, dim=-1) if self.reduction == "mean" else sums
        self._move(self.decay * self.means.to(step.dtype) + (1 - self.decay) * step, counts)

    def _move(self, target: Tensor, counts: Tensor) -> None:
        """Take on directions, save where nothing was assigned or tokens cancel out."""
        length = target.norm(dim=-1, keepdim=True)
        moves = (counts[..., None] > 0) & (length > torch.finfo(target.dtype).eps)
        direction = target / length.clamp(min=torch.finfo(target.dtype).tiny)
        self.means.copy_(torch.where(moves, direction.to(self.means.dtype), self.means))

    def _check(self, x: Tensor, mask: Tensor | None = None) -> None:
        heads, _, dim = self.means.shape
        if x.dim() != 4 or x.shape[1] != heads or x.shape[3] != dim:
            raise ConfigurationError(
                f"tokens have shape {tuple(x.shape)}; (batch, {heads}, n, {dim}) is needed for these centroids"
            )
        if mask is not None and (tuple(mask.shape) != (x.shape[0], x.shape[2]) or mask.dtype is not torch.bool):
            raise ConfigurationError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}; bool ({x.shape[0]}, {x.shape[2]}) is needed"
            )

    def extra_repr(self) -> str:
        """The shape of the centroids, and how they move."""
        heads, clusters, dim = self.means.shape
        return f"{heads}, {clusters}, {dim}, decay={self.decay}, reduction={self.reduction!r}"


def _totals(x: Tensor, nearest: Tensor, clusters: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum of the tokens of each cluster ``(heads, clusters, dim)`` and their number, in float32 or float64."""
    heads, dim = x.shape[1], x.shape[3]
    x = x if x.dtype == torch.float64 else x.float()
    place = nearest + torch.arange(heads, device=x.device)[:, None] * clusters
    one = torch.ones_like(x[..., 0])
    if mask is not None:
        one = one * mask[:, None]
        x = x.masked_fill(~mask[:, None, :, None], 0)  # padding may hold anything, also NaN
    place, rows = place.flatten(), x.reshape(-1, dim)
    sums = rows.new_zeros(heads * clusters, dim).scatter_add_(0, place[:, None].expand(-1, dim), rows)
    counts = rows.new_zeros(heads * clusters).scatter_add_(0, place, one.flatten())
    return sums.view(heads, clusters, dim), counts.view(heads, clusters)

"""Routing attention: tokens that mean alike attend to each other, wherever they are.

Roy et al. cluster queries and keys on the sphere by online k-means; a token reads only the members of its clusters.
With √n clusters of √n tokens a sequence of n tokens costs n^1.5 instead of n². Local heads, which see the near past,
stand beside the routed ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.attention.cluster_attention import Members, balanced_topk_route, clustered_attention, ordered_attention
from gossamer.attention.local_attention import RelativeLocalAttention
from gossamer.core.backward_passes import recomputing
from gossamer.core.kmeans import Reduction, SphericalKMeans
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError

__all__ = ["RoutingAttention", "update_centroids_after"]


@register(
    "routing-attention",
    paper="routing-transformer",
    when="layer",
    granularity="tokens",
    needs_data=False,
    timing="during training",
    path=("sparse-to-sparse",),
    topology="dynamic",
    criterion=("activation", "learned"),
    aims=("training", "inference"),
)
class RoutingAttention(nn.Module):
    """Multi-head attention within clusters of tokens, beside local heads.

    Roy et al., 2021, "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv 2003.05997, section 4.

    As published, every cluster takes the tokens that it scores highest in the *whole* sequence. A later token can push
    an earlier one out of a cluster, so what a token reads is causal, but the choice is not: text must not be generated
    from such a model token by token as if its losses were honest. With `strict_causal` a token belongs to its nearest
    centroid alone and reads the last members of that cluster; then a later token changes nothing.

    Parameters
    ----------
    dim
        Width of the input; a multiple of the heads.
    num_heads
        Of both kinds together.
    num_clusters
        c; about the root of the length is cheapest.
    window
        w, tokens of a cluster. By default n / c, rounded up, for the n real tokens of each sample; all n where there
        are fewer.
    causal
        Whether a token reads no later one.
    shared_qk
        Whether keys are the normalised queries, so that both sets of a cluster are the same tokens.
    decay, reduction
        Of the centroids; see :class:`~gossamer.core.kmeans.SphericalKMeans`.
    commitment
        Weight of the loss that pulls tokens to their centroids.
    local_heads
        How many heads are local instead; half of them by default.
    local_window
        Tokens of a piece of local attention.
    strict_causal
        See above; needs `causal`, `shared_qk` and a window.
    seed
        Of the first centroids.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range, or two contradict each other.

    Examples
    --------
    >>> layer = RoutingAttention(32, num_heads=4, num_clusters=8, local_window=16)
    >>> out, aux_loss = layer(torch.randn(2, 100, 32))
    >>> out.shape, aux_loss.shape
    (torch.Size([2, 100, 32]), torch.Size([]))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_clusters: int,
        window: int | None = None,
        causal: bool = True,
        shared_qk: bool = True,
        decay: float = 0.999,
        commitment: float = 1e-4,
        local_heads: int | None = None,
        local_window: int = 128,
        *,
        strict_causal: bool = False,
        reduction: Reduction = "sum",
        seed: int = 0,
    ):
        super().__init__()
        local = num_heads // 2 if local_heads is None else local_heads
        _check(dim, num_heads, local, window, commitment)
        if strict_causal and not (causal and shared_qk):
            raise ConfigurationError("strict_causal needs causal=True and shared_qk=True; set them, or leave it off")
        if strict_causal and window is None and local < num_heads:
            raise ConfigurationError(
                "strict_causal needs a window: n / clusters would depend on the tokens that follow"
            )
        self.dim, self.num_heads, self.local_heads, self.routed_heads = dim, num_heads, local, num_heads - local
        self.window, self.causal, self.shared_qk, self.strict_causal = window, causal, shared_qk, strict_causal
        self.commitment = commitment
        size = dim // num_heads
        if self.routed_heads:
            parts = 2 if shared_qk else 3
            self.routed_projection = nn.Linear(dim, parts * self.routed_heads * size, bias=False)
            self.kmeans = SphericalKMeans(self.routed_heads, num_clusters, size, decay, reduction=reduction, seed=seed)
        if local:
            self.local_projection = nn.Linear(dim, 3 * local * size, bias=False)
            self.local = RelativeLocalAttention(local, size, local_window, causal)
        self.out = nn.Linear(dim, dim, bias=False)
        #: whether the centroids wait for somebody else to call their update; see :func:`update_centroids_after`
        self.deferred = False

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attention of ``(batch, n, dim)`` to itself.

        In training the centroids take note of the tokens. They move at the beginning of the next training pass (so that
        a pass which is computed again, to save memory, meets the same ones) or after an optimiser's step.

        Parameters
        ----------
        x
            Any length.
        key_padding_mask
            Bool ``(batch, n)``, True for padding, as in :class:`torch.nn.MultiheadAttention`. Padding is neither read
            nor clustered, and its own output is zero; wherever it lies, real tokens give what they give without it.

        Returns
        -------
        out, aux_loss
            ``(batch, n, dim)``, and what to add to the loss.

        Raises
        ------
        ConfigurationError
            If a shape does not fit.
        """
        mask = self._mask(x, key_padding_mask)
        if mask is None:
            return self._attend(x, None)
        # real tokens in front: pieces and windows begin with the first of them
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        mask = mask.gather(1, order)
        places = order[..., None].expand_as(x)
        out, loss = self._attend(x.gather(1, places).masked_fill(~mask[..., None], 0), mask)
        return torch.zeros_like(out).scatter(1, places, out), loss

    def _attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention of ``(batch, n, dim)``, of which real tokens, True in the mask, come first."""
        heads, loss = [], x.new_zeros(())
        if self.local_heads:
            q, k, v = self._heads(self.local_projection(x), 3)
            heads.append(self.local(q, k, v, mask))
        if self.routed_heads:
            routed, loss = self._route(x, mask)
            heads.append(routed)
        joined = torch.cat(heads, 1).transpose(1, 2).flatten(2)
        if mask is not None:
            joined = joined.masked_fill(~mask[..., None], 0)
        return self.out(joined), loss

    def _route(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        parts = self._heads(self.routed_projection(x), 2 if self.shared_qk else 3)
        size = (parts[0].shape[-1],)
        q, v = functional.layer_norm(parts[0], size), parts[-1]
        k = q if self.shared_qk else functional.layer_norm(parts[1], size)
        asked = (q,) if self.shared_qk else (q, k)
        learns = self.training and not recomputing()
        if learns:
            self._move_centroids(asked, mask)
        scores = [self.kmeans.similarity(part) for part in asked]
        nearest = [part.argmax(-1) for part in scores]
        if learns:
            for part, near in zip(asked, nearest):
                self.kmeans.observe(part, mask, 1 / len(asked), near)  # queries and keys count half each
        loss = sum((self._distance(part, near, mask) for part, near in zip(asked, nearest)), x.new_zeros(()))
        if self.strict_causal:
            assert self.window is not None
            mixed = ordered_attention(q, k, v, nearest[0], self.window, mask)
        else:
            window = self._window(x.shape[1], mask)
            places = [balanced_topk_route(part, window, mask) for part in scores]
            members = Members(places[0], places[-1])
            mixed = clustered_attention(q, k, v, members, causal=self.causal, shared=self.shared_qk)
        return mixed, self.commitment * loss / len(asked)

    def _window(self, length: int, mask: Tensor | None) -> int | Tensor:
        """Tokens of a cluster; of every sample ``(batch,)`` where padding makes them differ."""
        clusters = self.kmeans.num_clusters
        if self.window is not None or mask is None:
            return self.window or -(-length // clusters)
        return -(-mask.sum(1) // clusters)

    def _move_centroids(self, asked: tuple[Tensor, ...], mask: Tensor | None) -> None:
        """Place them at first, and later by what the last training pass has shown."""
        if not self.kmeans.initialized:
            both = None if mask is None else mask.repeat(1, len(asked))
            self.kmeans.initialize(torch.cat(asked, 2), both)
        elif not self.deferred:
            self.kmeans.update()

    def _distance(self, part: Tensor, nearest: Tensor, mask: Tensor | None) -> Tensor:
        """Mean squared distance of the tokens, at unit length, from their centroids."""
        heads = torch.arange(self.routed_heads, device=part.device)[:, None]
        centroids = self.kmeans.means.to(part.dtype)[heads, nearest]
        squares = (functional.normalize(part, dim=-1) - centroids).square().mean(-1)
        if mask is None:
            return squares.mean()
        return (squares * mask[:, None]).sum() / (mask.sum().clamp(min=1) * self.routed_heads)

    def _heads(self, projected: Tensor, parts: int) -> list[Tensor]:
        """``(batch, n, parts · heads · size)`` → that many of ``(batch, heads, n, size)``."""
        size = self.dim // self.num_heads
        return [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in projected.chunk(parts, -1)]

    def _mask(self, x: Tensor, padding: Tensor | None) -> Tensor | None:
        if x.dim() != 3 or x.shape[-1] != self.dim or not x.shape[1]:
            raise ConfigurationError(f"the input has shape {tuple(x.shape)}; (batch, n, {self.dim}) is needed, n > 0")
        if padding is None:
            return None
        if padding.shape != x.shape[:2] or padding.dtype is not torch.bool:
            raise ConfigurationError(
                f"key_padding_mask is {padding.dtype} of shape {tuple(padding.shape)}; bool {tuple(x.shape[:2])} is "
                "needed, True for padding"
            )
        if bool(padding.all()):
            raise ConfigurationError(
                "key_padding_mask is True everywhere, so there is nothing to read; it marks padding"
            )
        return ~padding if bool(padding.any()) else None

    def extra_repr(self) -> str:
        """What is not a module."""
        mode = "strictly causal" if self.strict_causal else "causal" if self.causal else "bidirectional"
        return f"{self.dim}, {self.local_heads} local + {self.routed_heads} routed heads, window={self.window}, {mode}"


def _check(dim: int, heads: int, local: int, window: int | None, commitment: float) -> None:
    if heads < 1 or dim < 1 or dim % heads:
        raise ConfigurationError(f"dim is {dim} and num_heads {heads}; the first must be a multiple of the second")
    if not 0 <= local <= heads:
        raise ConfigurationError(f"local_heads is {local}; it must lie between 0 and num_heads, {heads}")
    if window is not None and window < 1:
        raise ConfigurationError(f"window is {window}; a cluster needs at least 1 token, or None for n / clusters")
    if commitment < 0:
        raise ConfigurationError(f"commitment is {commitment}; it must not be negative")


def update_centroids_after(optimizer: torch.optim.Optimizer, model: nn.Module) -> Any:
    """Move the centroids of a model once after every step of an optimiser, however many batches the step gathered.

    Parameters
    ----------
    optimizer
        Of the model's parameters.
    model
        With routing attention anywhere in it.

    Returns
    -------
    RemovableHandle
        ``remove()`` ends it.

    Raises
    ------
    ConfigurationError
        If the model has no routed head.
    """
    layers = [m for m in model.modules() if isinstance(m, RoutingAttention) and m.routed_heads]
    if not layers:
        raise ConfigurationError(f"{type(model).__name__} has no routed head, so it has no centroids to update")
    for layer in layers:
        layer.deferred = True

    def update(*ignored: Any) -> None:
        for layer in layers:
            layer.kmeans.update()

    return optimizer.register_step_post_hook(update)

"""The Routing Transformer: a language model whose lower layers attend nearby and whose upper layers route.

Roy et al., 2021, arXiv 2003.05997. Its layer is in :mod:`gossamer.attention.routing_attention`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from gossamer.attention.cluster_attention import balanced_topk_route
from gossamer.attention.routing_attention import RoutingAttention, update_centroids_after
from gossamer.errors import ConfigurationError

__all__ = ["RoutingAttention", "RoutingTransformerLM", "balanced_topk_route", "update_centroids_after"]


class _Layer(nn.Module):
    def __init__(self, dim: int, inner: int, gated: bool, attention: RoutingAttention):
        super().__init__()
        self.attention = attention
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.gated = gated
        self.up = nn.Linear(dim, (2 if gated else 1) * inner)
        self.down = nn.Linear(inner, dim)

    def forward(self, x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
        mixed, loss = self.attention(self.norm1(x), padding)
        x = x + mixed
        up = self.up(self.norm2(x))
        if self.gated:
            up, gate = up.chunk(2, -1)
            return x + self.down(functional.gelu(gate) * up), loss
        return x + self.down(functional.gelu(up)), loss


class RoutingTransformerLM(nn.Module):
    """A causal language model whose lower layers are local and whose upper layers route.

    Parameters
    ----------
    vocabulary
        Tokens there are.
    dim, num_layers, num_heads, num_clusters, window, local_window
        See :class:`RoutingAttention`.
    local_heads
        Local heads of a layer that routes; half of them by default.
    local_layers
        How many of the lower layers have local heads only; half of them by default, rounded down.
    max_length
        Longest sequence, for learned absolute positions; None leaves positions to the local heads.
    gated
        Whether feed-forward layers are gated.
    **options
        Of :class:`RoutingAttention`, such as ``strict_causal``.

    Raises
    ------
    ConfigurationError
        If a parameter is out of range.

    Examples
    --------
    >>> model = RoutingTransformerLM(256, dim=32, num_layers=2, num_heads=4, num_clusters=8, local_window=16)
    >>> logits, aux_loss = model(torch.randint(256, (1, 50)))
    >>> logits.shape
    torch.Size([1, 50, 256])
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_clusters: int,
        window: int | None = None,
        *,
        local_window: int = 128,
        local_heads: int | None = None,
        local_layers: int | None = None,
        max_length: int | None = None,
        gated: bool = False,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        local_layers = num_layers // 2 if local_layers is None else local_layers
        if not 0 <= local_layers <= num_layers:
            raise ConfigurationError(f"local_layers is {local_layers}; it must lie in 0 … {num_layers}")
        self.max_length = max_length
        self.embedding = nn.Embedding(vocabulary, dim)
        self.position = None if max_length is None else nn.Embedding(max_length, dim)
        options |= {"causal": True, "local_window": local_window}
        self.layers = nn.ModuleList()
        for number in range(num_layers):
            local = num_heads if number < local_layers else local_heads
            attention = RoutingAttention(
                dim, num_heads, num_clusters, window, local_heads=local, seed=seed + number, **options
            )
            self.layers.append(_Layer(dim, 4 * dim, gated, attention))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``(batch, n, vocabulary)`` of tokens ``(batch, n)``, and the loss of all layers that tokens commit to.

        Raises
        ------
        ConfigurationError
            If a sequence is longer than `max_length`.
        """
        x = self.embedding(tokens)
        if self.position is not None:
            if tokens.shape[1] > self.position.num_embeddings:
                raise ConfigurationError(
                    f"the sequence has {tokens.shape[1]} tokens; max_length is {self.max_length}, build a longer model"
                )
            x = x + self._positions(tokens, key_padding_mask)
        total = x.new_zeros(())
        for layer in self.layers:
            x, loss = layer(x, key_padding_mask)
            total = total + loss
        return self.head(self.norm(x)), total

    def _positions(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """Embeddings of positions, counted from the first real token."""
        assert self.position is not None
        if padding is None:
            return self.position.weight[: tokens.shape[1]]
        return self.position((~padding).cumsum(1).sub(1).clamp(min=0))

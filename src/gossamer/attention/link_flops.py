"""Operations of a vision transformer whose attention computes links only, part by part, beside the dense ones.

A multiplication with its addition counts as two operations. Norms, softmax, the selection of links, patch embedding
and head are left out, as in the paper's account.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.attention.connectivity_predictor import ConnectivityPredictor, Guess
from gossamer.attention.link_attention import LinkMask
from gossamer.attention.vision_sites import VisionSite


@dataclass(frozen=True)
class LayerCost:
    """Operations of one block for one image, averaged over a batch.

    Attributes
    ----------
    name
        Of the attention layer.
    tokens, all_tokens
        Tokens that the block sees, and that it would see if none had been dropped.
    predictor
        Of projecting queries and keys, of the prototypes, and of weighing them.
    guess
        Of the product of both sparse factors, zeros skipped.
    links
        Of scores and values on links: ``4 · links · d``.
    dense_attention
        Of dense attention among all tokens: ``4 N² d`` for each head.
    projections, feed_forward
        Of the matrices around attention and behind it, for the tokens that are seen.
    """

    name: str
    tokens: int
    all_tokens: int
    predictor: float
    guess: float
    links: float
    dense_attention: float
    projections: float
    feed_forward: float

    @property
    def attention(self) -> float:
        """Attention itself with all that its sparsity needs."""
        return self.predictor + self.guess + self.links


@dataclass(frozen=True)
class VisionFlops:
    """Operations of all blocks for one image.

    Attributes
    ----------
    layers
        One for each block.
    """

    layers: tuple[LayerCost, ...]

    @property
    def attention(self) -> float:
        """Of attention over links, predictors included."""
        return sum(layer.attention for layer in self.layers)

    @property
    def dense_attention(self) -> float:
        """Of attention if it were dense and no token dropped."""
        return sum(layer.dense_attention for layer in self.layers)

    @property
    def multihead(self) -> float:
        """Attention with its projections: what the paper calls MHSA."""
        return self.attention + sum(layer.projections for layer in self.layers)

    @property
    def dense_multihead(self) -> float:
        """The same, dense."""
        return self.dense_attention + sum(_undropped(layer, layer.projections) for layer in self.layers)

    @property
    def total(self) -> float:
        """Whole blocks."""
        return self.multihead + sum(layer.feed_forward for layer in self.layers)

    @property
    def dense_total(self) -> float:
        """Whole blocks, dense."""
        return self.dense_multihead + sum(_undropped(layer, layer.feed_forward) for layer in self.layers)


def _undropped(layer: LayerCost, operations: float) -> float:
    return operations / layer.tokens * layer.all_tokens


def layer_cost(
    site: VisionSite, predictor: ConnectivityPredictor, tokens: int, guess: Guess | None, mask: LinkMask | None
) -> LayerCost:
    """Count one block from what it has just done; without a mask it read everything, without a guess it made none."""
    d, c, prototypes, prefix = site.head_dim, predictor.width, predictor.prototypes, predictor.prefix
    rows = tokens - prefix
    reduced = (tokens + rows) * d * c  # keys of all tokens, queries behind the prefix
    weighed = (tokens + rows) * prototypes * c
    links = site.heads * tokens**2 if mask is None else mask.links / mask.indices.shape[0]
    return LayerCost(
        name=site.name,
        tokens=tokens,
        all_tokens=predictor.num_tokens,
        predictor=0.0 if guess is None else 2.0 * site.heads * (reduced + weighed),
        guess=0.0 if guess is None else 2 * guess.products() / guess.approx.shape[0],
        links=4.0 * links * d,
        dense_attention=4.0 * site.heads * predictor.num_tokens**2 * d,
        projections=8.0 * tokens * site.width * site.heads * d,
        feed_forward=4.0 * tokens * site.width * site.hidden,
    )

"""Why a feature of attention was active: so much of it through each head, and from each token that was read.

With attention held fixed, the preactivation of a feature of z is a sum, ``Σ_h Σ_s A^h_{t,s} (e^h · v^h_s)``
and a constant, over heads h and tokens s [Kissane et al., 2024, arXiv 2406.17759, section 2]. Nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.features.attention_sae import AttentionSAE
from gossamer.features.attention_trace import AttentionTrace


@dataclass(frozen=True, eq=False)
class DirectAttribution:
    """The preactivation of one feature taken apart.

    Attributes
    ----------
    feature
        Which.
    positions
        Tokens at which it is explained, ``(chosen,)`` int64.
    parts
        Through each head from each token, ``(chosen, heads, tokens)``.
    constant
        What it has without any attention, from the biases of the autoencoder.
    """

    feature: int
    positions: Tensor
    parts: Tensor
    constant: float

    @property
    def preactivation(self) -> Tensor:
        """All of it, ``(chosen,)``."""
        return self.parts.sum((1, 2)) + self.constant

    @property
    def by_head(self) -> Tensor:
        """Through each head, ``(chosen, heads)``."""
        return self.parts.sum(2)

    @property
    def by_source(self) -> Tensor:
        """From each token, ``(chosen, tokens)``; the first token's is often large and means nothing."""
        return self.parts.sum(1)

    @property
    def from_first(self) -> Tensor:
        """From the first token, where attention goes that has nowhere to go, ``(chosen,)``."""
        return self.parts[:, :, 0].sum(1)


@torch.no_grad()
def attribution_by_head(sae: AttentionSAE, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Preactivations by heads, one number each, and their constants.

    Parameters
    ----------
    sae
        The autoencoder.
    z
        ``(tokens, heads · size)`` or ``(tokens, heads, size)``.
    features
        One feature for each token, ``(tokens,)``.

    Returns
    -------
    (Tensor, Tensor)
        ``(tokens, heads)`` and ``(tokens,)``; together they sum to the preactivation of the feature.
    """
    blocks = sae.encoder_blocks[features]
    parts = torch.einsum("thv,thv->th", z.reshape(-1, sae.n_heads, sae.d_head).to(blocks), blocks) * sae.scale
    return parts, constants(sae)[features]


@torch.no_grad()
def constants(sae: AttentionSAE) -> Tensor:
    """What every feature has without any attention, ``c − e · b``, ``(features,)``."""
    return sae.encoder_bias - sae.encoder @ sae.bias


@torch.no_grad()
def dfa(
    sae: AttentionSAE, trace: AttentionTrace, feature: int, positions: Tensor | list[int] | None = None
) -> DirectAttribution:
    """Direct feature attribution of one feature, by head and token.

    Parameters
    ----------
    sae
        Trained on z of the traced layer.
    trace
        Of a text; see :func:`gossamer.features.attention_trace.trace_attention`.
    feature
        Which.
    positions
        Tokens at which it is explained; by default all.

    Raises
    ------
    ConfigurationError
        If there is no such feature or position, or heads are of another number or size.
    """
    heads, tokens, size = trace.values.shape
    if (heads, size) != (sae.n_heads, sae.d_head):
        raise ConfigurationError(
            f"the layer has {heads} heads of {size}, the autoencoder is for {sae.n_heads} of {sae.d_head}"
        )
    if not 0 <= feature < sae.n_features:
        raise ConfigurationError(f"feature is {feature}; there are {sae.n_features}")
    chosen = torch.arange(tokens) if positions is None else torch.as_tensor(positions, dtype=torch.int64)
    if chosen.dim() != 1 or bool(((chosen < 0) | (chosen >= tokens)).any()):
        raise ConfigurationError(f"positions are {chosen.tolist()}; the text has {tokens} tokens")
    worth = torch.einsum("hsv,hv->hs", trace.values.double(), sae.encoder_blocks[feature].double()) * float(sae.scale)
    parts = trace.pattern[:, chosen].double().transpose(0, 1) * worth
    return DirectAttribution(feature, chosen, parts, float(constants(sae)[feature]))

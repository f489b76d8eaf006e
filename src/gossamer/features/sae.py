"""Sparse autoencoders: a wide dictionary of which few features explain each activation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import ActivationRule
from gossamer.kernels.codes import decode, products_at, scattered
from gossamer.kernels.encode_select import encode_topk


@dataclass(frozen=True, eq=False)
class Explained:
    """What an autoencoder makes of a batch.

    Attributes
    ----------
    output
        Reconstructed activations, the shape of the input.
    codes
        Active features of every token, in the order of the tokens.
    before
        Affinities of the active features before the activation, ``(stored,)``.
    """

    output: Tensor
    codes: SparseCodes
    before: Tensor


class SAE(nn.Module):
    """A sparse autoencoder with any rule of selection.

    Activations x are explained as ``x ≈ b + Σ zⱼ dⱼ`` over the active features j, whose affinities are
    ``zⱼ = ReLU((x − b) · eⱼ + cⱼ)``. Gradients touch active features only, in decoder and encoder alike.

    Parameters
    ----------
    d_in
        Size of an activation.
    n_features
        Features of the dictionary.
    activation
        The rule that says which are active, such as ``TopK(32)``; it becomes a part of this module.
    seed
        Of the directions at the beginning, random and of length one; encoders begin as the decoders.

    Attributes
    ----------
    encoder, decoder
        ``(n_features, d_in)``, a row for each feature.
    encoder_bias, bias
        c, ``(n_features,)``, and b, ``(d_in,)``.
    scale
        What activations are multiplied by first, so that their mean square is one; stored with the weights.

    Examples
    --------
    >>> sae = SAE(16, 64, TopK(4))
    >>> sae(torch.randn(10, 16)).codes.counts.max() <= 4
    tensor(True)
    """

    scale: Tensor

    def __init__(self, d_in: int, n_features: int, activation: ActivationRule, seed: int = 0):
        super().__init__()
        if d_in < 1 or n_features < 1:
            raise ConfigurationError(f"d_in is {d_in} and n_features {n_features}; both must be 1 or more")
        activation.build(n_features)
        generator = torch.Generator().manual_seed(seed)
        directions = nn.functional.normalize(torch.randn(n_features, d_in, generator=generator), dim=1)
        self.activation = activation
        self.decoder = nn.Parameter(directions)
        self._add_encoder()
        self.bias = nn.Parameter(torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    def _add_encoder(self) -> None:
        self.encoder = nn.Parameter(self.decoder.detach().clone())
        self.encoder_bias = nn.Parameter(torch.zeros(self.n_features))

    @property
    def d_in(self) -> int:
        """Size of an activation."""
        return self.decoder.shape[1]

    @property
    def n_features(self) -> int:
        """Features of the dictionary."""
        return self.decoder.shape[0]

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Take scale and bias from a sample of activations ``(tokens, d_in)``: mean square one, their mean.

        Raises
        ------
        NonFiniteError
            If an activation is NaN or infinite.
        """
        flat = self._flat(x)
        size = flat.square().sum(1).mean(dtype=torch.float64).sqrt()
        self.scale.copy_(math.sqrt(self.d_in) / size.clamp(min=torch.finfo(torch.float32).tiny))
        self.bias.copy_((flat * self.scale).mean(0))

    @torch.no_grad()
    def normalize_(self) -> None:
        """Give every feature's direction the length one."""
        self.decoder.copy_(nn.functional.normalize(self.decoder, dim=1))

    @torch.no_grad()
    def straighten_gradient_(self) -> None:
        """Take out of the decoder's gradient what would only change lengths, which :meth:`normalize_` undoes."""
        grad = self.decoder.grad
        if grad is not None:
            grad -= (grad * self.decoder).sum(1, keepdim=True) * self.decoder

    def affinity(self, x: Tensor) -> Tensor:
        """What tokens have in common with every feature, ``(tokens, n_features)``, without gradients."""
        with torch.no_grad():
            centred = self._flat(x) * self.scale - self.bias
            return torch.addmm(self.encoder_bias, centred, self.encoder.t()).relu_()

    def encode(self, x: Tensor, gradient: Tensor | None = None) -> SparseCodes:
        """Active features of activations ``(…, d_in)``, a row for each token.

        Parameters
        ----------
        x
            Activations.
        gradient
            Of the model's loss with respect to them, for rules that look at it.

        Raises
        ------
        ConfigurationError
            If the last dimension is not `d_in`, or the gradient has another shape.
        NonFiniteError
            If an activation or a gradient is NaN or infinite.
        """
        return self._explain(x, gradient)[0]

    def decode(self, codes: SparseCodes) -> Tensor:
        """Activations ``(tokens, d_in)`` that codes stand for."""
        return decode(codes, self.decoder, self.bias) / self.scale

    def forward(self, x: Tensor, gradient: Tensor | None = None) -> Explained:
        """Explain activations ``(…, d_in)``: see :meth:`encode`."""
        codes, before = self._explain(x, gradient)
        return Explained(self.decode(codes).view(x.shape), codes, before)

    def _explain(self, x: Tensor, gradient: Tensor | None) -> tuple[SparseCodes, Tensor]:
        flat = self._flat(x)
        if gradient is not None and gradient.shape != x.shape:
            raise ConfigurationError(
                f"gradient is {tuple(gradient.shape)}; it must have the shape of x, {tuple(x.shape)}"
            )
        k = self.activation.highest(gradient is not None)
        if k is None:
            indices, starts = self.activation.choose(self.affinity(x), self._effect(gradient))
            before = self.preactivation(flat, indices, starts)
        else:
            with torch.no_grad():
                found = encode_topk(flat * self.scale - self.bias, self.encoder, self.encoder_bias, k)
            indices, starts = found.indices, found.starts
            before = self.preactivation(flat, indices, starts, found.values)
        values = self.activation.values(before, indices)
        return SparseCodes(indices, values, starts, self.n_features), before

    def preactivation(self, flat: Tensor, indices: Tensor, starts: Tensor, known: Tensor | None = None) -> Tensor:
        """``(x − b) · e + c`` of listed matches, ``(stored,)``; gradients reach everything.

        `known` are the same numbers, where they have been computed already.
        """
        found: Tensor = _EncodeAt.apply(
            flat * self.scale, self.encoder, self.encoder_bias, self.bias, indices, starts, known
        )
        return found

    def _effect(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or not self.activation.needs_effect:
            return None
        with torch.no_grad():
            return self._flat(gradient, "gradient") @ self.decoder.t()

    def _flat(self, x: Tensor, name: str = "x") -> Tensor:
        if x.shape[-1:] != (self.d_in,):
            raise ConfigurationError(
                f"{name} is {tuple(x.shape)}; its last dimension must be {self.d_in}, an activation"
            )
        flat = x.reshape(-1, self.d_in).to(self.decoder.dtype)
        if not bool(torch.isfinite(flat.sum())) and not bool(torch.isfinite(flat).all()):
            bad = int((~torch.isfinite(flat)).any(1).nonzero()[0])
            raise NonFiniteError(f"{name} of token {bad} holds NaN or infinity; the capture or the model is damaged")
        return flat

    def settings(self) -> dict[str, Any]:
        """Plain values that say what this is, without its weights."""
        return {"d_in": self.d_in, "n_features": self.n_features, "activation": self.activation.settings()}

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.d_in} → {self.n_features} features"


class _EncodeAt(torch.autograd.Function):
    """Affinities of tokens to listed features; gradients touch those alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        encoder_bias: Tensor,
        bias: Tensor,
        indices: Tensor,
        starts: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, encoder, bias, indices, starts)
        if known is not None:
            return known
        codes = SparseCodes(indices, x.new_ones(len(indices)), starts, len(encoder))
        return products_at(codes, x - bias, encoder) + encoder_bias[indices.long()]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, encoder, bias, indices, starts = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        codes = SparseCodes(indices, grads[0].contiguous(), starts, len(encoder))
        of_x = decode(codes, encoder) if wanted[0] else None
        of_encoder = scattered(codes, x - bias) if wanted[1] else None
        of_feature = codes.values.new_zeros(len(encoder)).index_add_(0, indices.long(), codes.values)
        # what tokens share: one product for all of them
        of_bias = -(of_feature @ encoder) if wanted[3] else None
        return of_x, of_encoder, of_feature, of_bias, None, None, None

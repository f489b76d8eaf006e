"""Normalisation made linear: with its scale held at what it was, each part of a sum passes by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError

_EXACT = 1e-3


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A layer or root-mean-square normalisation of known inputs, ``x ↦ gain ⊙ (x − c · mean(x)) · scale + bias``.

    Attributes
    ----------
    gain, bias
        ``(d,)``.
    scale
        One over the length of every input, ``(tokens,)``.
    centred
        c, whether means are taken away.
    """

    gain: Tensor
    bias: Tensor
    scale: Tensor
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, x: Tensor) -> FrozenNorm:
        """Learn it from what the module does: to zeros, to ones, to a vector of mean zero, and to the inputs.

        Parameters
        ----------
        norm
            The module.
        x
            What it normalised, ``(tokens, d)``.

        Raises
        ------
        ModelError
            If it does anything else than this.
        """
        d = x.shape[1]
        probe = torch.ones(d, dtype=x.dtype)
        probe[1::2] = -1
        if d % 2:
            probe[-3:] = torch.tensor([1.0, 1.0, -2.0], dtype=x.dtype)
        bias = norm(torch.zeros_like(x[:1]))[0]
        gain = (norm(probe[None])[0] - bias) / probe
        centred = float((norm(torch.ones_like(x[:1]))[0] - bias).abs().max()) < _EXACT * float(gain.abs().max())
        away = gain * (x - x.mean(1, keepdim=True) * centred)
        wanted = norm(x) - bias
        scale = (away * wanted).sum(1) / away.square().sum(1).clamp(min=torch.finfo(x.dtype).tiny)
        if float((away * scale[:, None] - wanted).abs().max()) > _EXACT * float(wanted.abs().max()):
            raise ModelError(f"{type(norm).__name__} is not a normalisation of length; its parts cannot be told apart")
        return cls(gain, bias, scale, centred)

    def back(self, direction: Tensor, position: int) -> Tensor:
        """What ``direction · norm(x)`` reads of x at a token, ``(d,)``: its transpose, without the bias."""
        scaled = self.gain * direction * self.scale[position]
        return scaled - scaled.mean() if self.centred else scaled

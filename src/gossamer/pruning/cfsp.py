"""CFSP: how much a block turns its input says how much it may lose; how loud a channel is says which to take.

A block that hands its input on almost unchanged is doing little. CFSP measures the angle between the input and the
output of each block and lets the feed-forward layers of the blocks that turn most keep most (coarse). Inside a layer
it weighs a channel by its shares of the three matrices and by the norm of its activation (fine). Both come from one
forward pass of the dense model; then the channels are taken out for good. The blocks that matter more also get more
of the rank with which low-rank recovery (:mod:`gossamer.pruning.recovery`) repairs the model afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.allocation import STEEPNESS, sigmoid
from gossamer.core.calibration import InputNorm, Statistic, Statistics
from gossamer.core.registry import register
from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.models.feedforward import FeedForward
from gossamer.pruning.channels import ChannelPruner, Reading


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    # token by token; near 1 a cosine in half precision says nothing about the angle
    return torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).clamp(-1, 1)


COARSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "angular": lambda x, y: _cosine(x, y).arccos() / math.pi,
    "cosine": lambda x, y: 1 - _cosine(x, y),
    "mse": lambda x, y: (x.float() - y.float()).square().mean(-1),
    "mae": lambda x, y: (x.float() - y.float()).abs().mean(-1),
}
"""Distances between the hidden states before and after a block, ``(batch, tokens, d)`` → ``(batch, tokens)``."""


@register(
    "cfsp",
    paper="cfsp",
    when="after training",
    granularity="channels",
    criterion=("magnitude", "activation"),
    allocation="measured",
    patterns=("channels",),
)
@dataclass
class Cfsp(ChannelPruner):
    """Take feed-forward channels out, by block after how much it turns its input and within it by relative importance.

    Wang, Ma, Wang et al., 2025, "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine
    Activation Information", COLING, arXiv 2409.13199.

    Parameters
    ----------
    sparsity
        r: fraction of all feed-forward channels that goes.
    allocation
        ``"sigmoid"``: by the coarse importance of blocks; or as for every pruner of channels.
    coarse
        How block importance is measured: ``"angular"``, ``"cosine"``, ``"mse"`` or ``"mae"``.
    a
        Steepness of the sigmoid; 1 is the paper's, whatever the number of tokens.
    b, c
        Exponents of the activation norm within the share of the matrix that maps back, and on the whole.
    normalize
        ``"channel"``: a weight's share among the channels of its hidden row. ``"hidden"``: its share among the hidden
        rows of its channel, as in the authors' released code; the mean of such shares is the same for every channel,
        so that only the activation norm decides.
    """

    sparsity: float = 0.2
    allocation: str | Mapping[str, float] = "sigmoid"
    coarse: str = "angular"
    a: float = 1.0
    b: float = 1.0
    c: float = 1.0
    normalize: str = "channel"

    statistics: ClassVar[tuple[type[Statistic], ...]] = (InputNorm,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coarse not in COARSE:
            raise UnknownNameError("coarse importance", self.coarse, COARSE)
        if self.normalize not in ("channel", "hidden"):
            raise UnknownNameError("normalizer", self.normalize, ("channel", "hidden"))
        for name in ("a", "b", "c"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be finite and ≥ 0, such as 1")

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """The coarse importance of a block at each token."""
        return COARSE[self.coarse](before, after)

    def sparsities(self, layers: Sequence[FeedForward], reading: Reading) -> Mapping[str, float]:
        """The budgets of the blocks, told to their feed-forward layers; uniform for a model without blocks."""
        if self.allocation != "sigmoid":
            if self.allocation != "uniform" and isinstance(self.allocation, str):
                raise UnknownNameError("allocation", self.allocation, ["sigmoid", "uniform"])
            return super().sparsities(layers, reading)
        if not reading.importance:
            return {layer.name: self.sparsity for layer in layers}
        budgets = sigmoid(reading.importance, self.sparsity, steepness=STEEPNESS * self.a)
        return {layer.name: budgets.get(layer.block, self.sparsity) for layer in layers}

    def score(self, layer: FeedForward, stats: Statistics | None) -> Tensor:
        """``f_j``: mean share of channel j in the matrices, times the norm of its activation."""
        down = layer.down.matrix().abs().double()
        norm = torch.ones(layer.width).to(down) if stats is None else stats[InputNorm].norm.to(down)
        shares = self.share(down * norm**self.b)
        for widening in layer.widening():
            shares = shares + self.share(widening.abs().double().t())
        return shares * norm**self.c

    def share(self, magnitude: Tensor) -> Tensor:
        """Mean over the hidden dimension of ``magnitude / Z``, ``(d, m)`` → ``(m,)``."""
        total = magnitude.sum(1 if self.normalize == "channel" else 0, keepdim=True)
        return (magnitude / total.clamp_min(torch.finfo(torch.float64).tiny)).mean(0)

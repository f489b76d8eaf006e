"""What sparse autoencoders are trained for besides reconstruction: sparsity, and features that stay alive."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError
from gossamer.features.sae import SAE, Explained
from gossamer.kernels.codes import decode


def reconstruction_loss(output: Tensor, x: Tensor) -> Tensor:
    """Mean over tokens of the squared distance, ``‖x − x̂‖²``."""
    return (output - x).square().sum(-1).mean()


def unexplained_variance(output: Tensor, x: Tensor) -> Tensor:
    """Fraction of the variance of activations ``(tokens, d)`` that a reconstruction leaves, the FVU."""
    return (output - x).square().sum() / (x - x.mean(0)).square().sum()


def l1_penalty(codes: SparseCodes, decoder: Tensor) -> Tensor:
    """Mean over tokens of the values' sum, each times the length of its feature's direction.

    The lengths keep a dictionary from growing while its values shrink.
    """
    lengths = decoder.norm(dim=1)
    return (codes.values * lengths[codes.indices.long()]).sum() / max(len(codes), 1)


def auxiliary_loss(sae: SAE, x: Tensor, explained: Explained, weight: Tensor, k: int) -> Tensor:
    """How badly features that are used too little explain what is left over, from 0 up.

    Of the affinities, each times its feature's weight, the k highest of every token are decoded and compared with the
    residual: ``‖e − ê‖² / ‖e‖²``. With weights of 0 and 1 for features alive and dead this is the aux-k loss of Gao et
    al. [2024, arXiv 2406.04093, section A.2]; with weights in between the aux-zipf loss of Ayonrinde [2024, arXiv
    2411.02124].

    Parameters
    ----------
    sae
        The autoencoder.
    x
        Activations ``(tokens, d_in)``.
    explained
        What it made of them.
    weight
        ``(features,)`` from 0 up; features of weight 0 take no part.
    k
        How many of a token take part.

    Returns
    -------
    Tensor
        0 where no feature has a weight.
    """
    if k < 1:
        raise ConfigurationError(f"k is {k}; the auxiliary loss needs at least one feature of a token")
    some = (weight > 0).nonzero()[:, 0]
    if not len(some):
        return x.new_zeros(())
    residual = ((x - explained.output) * sae.scale).detach()
    with torch.no_grad():
        # in the order of the dying among themselves; an affinity of zero still learns, for it is what they suffer from
        centred = x * sae.scale - sae.bias
        before = torch.addmm(sae.encoder_bias[some], centred, sae.encoder[some].t())
        ranked = before.relu() * weight[some] + torch.finfo(before.dtype).tiny * before
        best = some[ranked.topk(min(k, len(some)), dim=1).indices]
    rows = SparseCodes.from_rows(best, torch.zeros_like(best, dtype=x.dtype), sae.n_features)
    values = sae.preactivation(x, rows.indices, rows.starts).relu()
    guess = decode(SparseCodes(rows.indices, values, rows.starts, sae.n_features), sae.decoder)
    return (residual - guess).square().sum() / residual.square().sum().clamp(min=torch.finfo(x.dtype).tiny)

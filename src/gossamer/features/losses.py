"""What sparse autoencoders are trained for besides reconstruction: sparsity, and features that stay alive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError
from gossamer.features.sae import SAE, Explained
from gossamer.kernels.codes import decode, products_at


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


def attribution_penalty(codes: SparseCodes, decoder: Tensor, gradient: Tensor) -> Tensor:
    """As :func:`l1_penalty`, each value times the change of the model's loss along its feature, ``|z · d · ∇L|``.

    What makes no difference to the model is cheap, what does is dear: the first-order effect of a code becomes sparse
    [Templeton et al., 2024; compared with in Olmo et al., 2024, arXiv 2411.10397]. Changes are divided by their mean
    over what is active, so that weights mean the same as without.

    Parameters
    ----------
    codes
        Of a batch.
    decoder
        Directions of the features.
    gradient
        ``(tokens, d)``, of the model's loss.
    """
    change = products_at(codes, gradient, decoder.detach()).abs()
    change = change / change.mean().clamp(min=torch.finfo(change.dtype).tiny) if len(change) else change
    return (codes.values * change).sum() / max(len(codes), 1)


def nested_loss(sae: SAE, x: Tensor, explained: Explained, prefixes: Sequence[int]) -> Tensor:
    """Mean of the reconstruction losses from the first features alone, for several numbers of them, and from all.

    What is active is chosen once among all features, whatever the prefix [Bussmann et al., 2025, arXiv 2503.17547].

    Parameters
    ----------
    sae, x, explained
        The autoencoder, activations ``(tokens, d)``, and what it made of them.
    prefixes
        Numbers of features, each below that of the autoencoder.

    Raises
    ------
    ConfigurationError
        If a prefix is not from 1 to the number of features.
    """
    bad = next((size for size in prefixes if not 0 < size <= sae.n_features), None)
    if bad is not None:
        raise ConfigurationError(f"prefix is {bad}; it must be from 1 to {sae.n_features} features")
    total = reconstruction_loss(explained.output, x)
    codes = explained.codes
    for size in prefixes:
        inside = SparseCodes(codes.indices, codes.values * (codes.indices < size), codes.starts, codes.width)
        total = total + reconstruction_loss(sae.decode(inside).view(x.shape), x)
    return total / (len(prefixes) + 1)


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

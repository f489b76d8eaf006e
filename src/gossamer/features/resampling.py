"""Dead features that begin anew where the dictionary explains worst."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.features.sae import SAE

_ENCODER_SHARE = 0.2  # of the length of the encoders that are alive


@torch.no_grad()
def resample_(
    sae: SAE,
    dead: Tensor,
    x: Tensor,
    output: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> int:
    """Point dead features to what is left of badly explained activations [Bricken et al., 2023].

    Activations are drawn with a chance in proportion to their squared error. Encoders begin short, so that the new
    features do not drown the others, and what the optimiser knew of the old ones is forgotten. A greedy encoder, which
    has no weights of its own and no auxiliary loss, needs this most.

    Parameters
    ----------
    sae
        Is changed.
    dead
        Which features, bool ``(n_features,)``.
    x, output
        A batch of activations ``(tokens, d)``, and its reconstruction.
    optimizer
        Of the autoencoder, if it is being trained.
    seed
        Of the draw.

    Returns
    -------
    int
        How many have begun anew: at most as many as there are activations with an error.
    """
    left = (x - output) * sae.scale
    chances = left.double().square().sum(1).cpu()
    count = min(int(dead.sum()), int((chances > 0).sum()))
    if not count:
        return 0
    drawn = torch.multinomial(chances, count, generator=torch.Generator().manual_seed(seed))
    begun = dead.nonzero()[:count, 0].to(x.device)
    directions = nn.functional.normalize(left[drawn.to(x.device)], dim=1)
    sae.decoder[begun] = directions.to(sae.decoder.dtype)
    if sae.encoder is not sae.decoder:
        alive = sae.encoder[~dead.to(sae.encoder.device)].norm(dim=1)
        length = float(alive.mean()) * _ENCODER_SHARE if len(alive) else 1.0
        sae.encoder[begun] = directions.to(sae.encoder.dtype) * length
        sae.encoder_bias[begun] = 0
    for parameter in sae.parameters():
        if optimizer is None or parameter.shape[:1] != (sae.n_features,):
            continue
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value[begun] = 0
    return count

"""What an optimiser remembers of each weight, when weights come and go.

A weight that is removed must leave no momentum behind, or it would be pushed away from zero; one that comes back
starts without any. An average of squared gradients is the exception: started at zero, it would make the first step of
Adam and its relatives as large as the learning rate allows, so that grown weights start with the mean of the layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: what the optimisers of torch call running squares, maxima and sums of gradients
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf", "acc_delta"})

#: optimisers under which a weight stays zero whose gradient and memory are zero, whatever they decay
KEEP_ZEROS = frozenset(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")
)


def per_weight(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimiser holds for every single weight of a parameter: name → tensor of its shape."""
    state = optimizer.state.get(parameter, {})
    shape = parameter.shape
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape}


@torch.no_grad()
def repair(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, removed: Tensor, grown: Tensor, stayed: int
) -> None:
    """Forget removed weights, and start grown ones.

    Parameters
    ----------
    optimizer, parameter
        Whose state; it is zero for what was not active.
    removed, grown
        Bool, the shape of the parameter: what was active and is no longer, and what is now and was not.
    stayed
        How many were and are.
    """
    for key, value in per_weight(optimizer, parameter).items():
        value.masked_fill_(removed.to(value.device), 0)
        if key in SECOND_MOMENTS and stayed:
            value.masked_fill_(grown.to(value.device), float(value.sum(dtype=torch.float64)) / stayed)


@torch.no_grad()
def rearrange(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, old: dict[str, Tensor], source: Tensor
) -> None:
    """Carry the state of a list of weights over to another list.

    Parameters
    ----------
    optimizer, parameter
        Whose state; the parameter is one-dimensional and has its new length.
    old
        What :func:`per_weight` gave before.
    source
        For every weight its old place, −1 where it is new.
    """
    stayed = source >= 0
    for key, value in old.items():
        kept = value[source[stayed]]
        first = float(kept.mean(dtype=torch.float64)) if key in SECOND_MOMENTS and len(kept) else 0.0
        fresh = value.new_full((len(source),), first)
        fresh[stayed] = kept
        optimizer.state[parameter][key] = fresh

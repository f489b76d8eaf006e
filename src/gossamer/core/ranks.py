"""What must be the same on every process that trains the same model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.core.sparse_weight import SparseWeight
from gossamer.errors import ConfigurationError


def ranks() -> int:
    """How many processes train the same model together."""
    return torch.distributed.get_world_size() if _distributed() else 1


def rank() -> int:
    """Which of these processes this is; 0 where there is but one."""
    return torch.distributed.get_rank() if _distributed() else 0


def own_share(rows: Tensor) -> Tensor:
    """The rows of this process, where every process holds the same batch.

    Raises
    ------
    ConfigurationError
        If they cannot be divided equally.
    """
    if len(rows) % ranks():
        raise ConfigurationError(
            f"{len(rows)} rows cannot be divided among {ranks()} processes; choose a multiple for the batch size"
        )
    return rows.tensor_split(ranks())[rank()]


def same_everywhere(mask: Tensor) -> Tensor:
    """The mask of the first rank: sums over ranks may differ in their last bit, and masks must not.

    Parameters
    ----------
    mask
        Bool, or packed bits.
    """
    if ranks() == 1:
        return mask
    bytes_ = mask.to(torch.uint8)
    torch.distributed.broadcast(bytes_, 0)
    return bytes_.to(mask.dtype)


@torch.no_grad()
def leave_out_of_ddp(model: nn.Module) -> list[str]:
    """Prepare layers that store no zeros for ``DistributedDataParallel(model)``, and call it before that.

    DistributedDataParallel lays out its buffers once, for parameters whose length never changes. So it is told to leave
    these layers' values and indices alone. From now on the layers average the gradient of their values over the ranks
    themselves, in every backward pass, and their topology may change. Every rank has to pass through each of them in
    every step. Biases, and all other layers, stay with DistributedDataParallel.

    Parameters
    ----------
    model
        The very module that will be wrapped. Topologies and values become those of the first rank.

    Returns
    -------
    list of str
        Names of what is left out; empty if all layers are dense.

    Examples
    --------
    >>> from gossamer.training.sparse_layers import SparseLinear
    >>> leave_out_of_ddp(nn.Sequential(SparseLinear(4, 3), nn.ReLU(), nn.Linear(3, 2)))[0]
    '0.values'
    """
    names: list[str] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, SparseWeight):
            continue
        module.apart = True
        if ranks() > 1:
            mask = module.mask()
            first = same_everywhere(mask)
            if not torch.equal(mask, first):
                module.set_mask(first)
            torch.distributed.broadcast(module.values.detach(), 0)
        own = ["values", *(name for name, _ in module.named_buffers(recurse=False))]
        names += [f"{prefix}.{name}" if prefix else name for name in own]
    earlier = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*earlier, *names])
    return names


def average_(gradient: Tensor) -> Tensor:
    """Average a gradient over all ranks, in place."""
    if ranks() > 1:
        torch.distributed.all_reduce(gradient)
        gradient /= ranks()
    return gradient


def summed(value: Tensor) -> Tensor:
    """The sum over all ranks; `value` is not changed."""
    if ranks() == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total


@torch.no_grad()
def take_from_first_(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the first rank."""
    if ranks() > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, 0)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

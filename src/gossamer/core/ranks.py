"""What must be the same on every process that trains the same model."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks() -> int:
    """How many processes train the same model together."""
    return torch.distributed.get_world_size() if _distributed() else 1


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


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()

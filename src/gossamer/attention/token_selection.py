"""Which keys a single query reads: what methods of decoding choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenSelection:
    """The keys that a single query reads.

    Attributes
    ----------
    indices
        ``(batch, heads or key heads, tokens)``, without repetition.
    counts
        ``(batch, heads or key heads)``: how many of the first are meant; None for all.
    """

    indices: Tensor
    counts: Tensor | None = None

    @classmethod
    def real_first(cls, indices: Tensor, real: Tensor) -> TokenSelection:
        """Listed keys ``(batch, heads, n)`` that are no padding, ``(batch, keys)``, in front, and how many they are."""
        meant = real[:, None, :].expand(-1, indices.shape[1], -1).gather(-1, indices)
        order = meant.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return cls(indices.gather(-1, order), meant.sum(-1))

    def density(self, keys: int, real: Tensor | None = None) -> float:
        """Share of the keys that is read; of those that are no padding, ``(batch, keys)``, where they are told."""
        if real is None:
            each = float(self.indices.shape[-1]) if self.counts is None else float(self.counts.double().mean())
            return each / keys
        real = real & real[:, -1:]  # of a query that is padding nothing counts
        read = real[:, None].expand(-1, self.indices.shape[1], -1).gather(-1, self.indices)
        if self.counts is not None:
            read &= torch.arange(read.shape[-1], device=read.device) < self.counts[..., None]
        return int(read.sum()) / self.indices.shape[1] / max(int(real.sum()), 1)

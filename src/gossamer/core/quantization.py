"""Rounding weights to a few bits, per row or per group of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class Grid:
    """A uniform grid for each row: ``scale · (code − zero)``, codes in 0 … levels."""

    scale: Tensor
    zero: Tensor
    levels: int

    def round(self, values: Tensor) -> Tensor:
        """Nearest grid points; `values` broadcasts against scale and zero."""
        codes = torch.clamp(torch.round(values / self.scale) + self.zero, 0, self.levels)
        return self.scale * (codes - self.zero)


@dataclass(frozen=True)
class Quantizer:
    """Round-to-nearest on a grid spanned by the extremes of each group.

    Parameters
    ----------
    bits
        2 to 8.
    group_size
        Inputs that share a grid; None for a whole row.
    symmetric
        Whether the grid is centred on zero.
    """

    bits: int = 4
    group_size: int | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigurationError(f"bits is {self.bits}; it must be between 2 and 8")
        if self.group_size is not None and self.group_size < 1:
            raise ConfigurationError(f"group_size is {self.group_size}; it must be positive, or None for a whole row")

    def fit(self, weight: Tensor, dim: int = -1) -> Grid:
        """The grid of each slice of `weight` along `dim` (which is kept with size 1). Zero is always on the grid."""
        levels = 2**self.bits - 1
        low = weight.amin(dim, keepdim=True).clamp_max(0)
        high = weight.amax(dim, keepdim=True).clamp_min(0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        empty = high == low
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale = (high - low) / levels
        middle = torch.full_like(scale, (levels + 1) // 2)
        return Grid(scale, middle if self.symmetric else torch.round(-low / scale), levels)

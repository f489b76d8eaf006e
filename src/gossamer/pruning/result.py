"""What a pruner reports about the whole run and about every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gossamer.core.masks import MaskSet


@dataclass
class LayerReport:
    """What happened to one layer.

    Attributes
    ----------
    name
        Parameter name (with an expert's index).
    shape
        Of the weight as a matrix.
    sparsity
        Achieved: zeros of the mask over all weights.
    error
        ‖X(W − Ŵ)ᵀ‖ / ‖XWᵀ‖ (Frobenius) on a sample of its inputs; None where no data was seen.
    seconds
        Spent on scoring, selecting and updating.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    error: float | None
    seconds: float


@dataclass
class PruningResult:
    """What a pruner returns; the model itself was changed in place.

    Attributes
    ----------
    masks
        Which weights remain.
    layers
        A report for each layer, in order.
    seconds
        Phase → seconds: ``forward`` (running blocks), ``statistics``, ``selection``, ``total``.
    settings
        Everything needed to repeat it.
    """

    masks: MaskSet
    layers: list[LayerReport]
    seconds: dict[str, float]
    settings: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Zeros over weights, of the layers that were pruned."""
        return self.masks.sparsity

    def __repr__(self) -> str:
        return (
            f"PruningResult({self.settings.get('method')}, {len(self.layers)} layers, "
            f"{self.sparsity:.2%} of {self.masks.total:,} weights zero, {self.seconds.get('total', 0):.1f} s)"
        )

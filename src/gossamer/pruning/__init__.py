"""Zeros in trained weights: one method, one file."""

from gossamer.pruning.base import LayerReport, LayerwisePruner, PruningResult, prune

__all__ = ["LayerReport", "LayerwisePruner", "PruningResult", "prune"]

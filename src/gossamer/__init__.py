"""Make models sparse, and make sparse pay."""

__version__ = "0.1.0"

from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM, Block, Channels, Pattern, Unstructured
from gossamer.pruning.base import PruningResult, prune

__all__ = ["NM", "Block", "Channels", "MaskSet", "Pattern", "PruningResult", "Unstructured", "prune"]

"""Make models sparse, and make sparse pay."""

__version__ = "0.1.0"

from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM, Block, Channels, Pattern, Unstructured
from gossamer.kernels import histogram as _compiled_histogram  # noqa: F401
from gossamer.kernels import masking as _compiled_masks  # noqa: F401  (core asks them first from now on)
from gossamer.kernels import selection as _compiled_selection  # noqa: F401
from gossamer.models import LoadedModel, calibration_batches, evaluation_tokens, load, read_text, save_dense
from gossamer.pruning.base import PruningResult, prune
from gossamer.runtime import Engine, compress
from gossamer.storage import save
from gossamer.training.sparsify import sparsify

__all__ = [
    "NM",
    "Block",
    "Channels",
    "Engine",
    "LoadedModel",
    "MaskSet",
    "Pattern",
    "PruningResult",
    "Unstructured",
    "calibration_batches",
    "compress",
    "evaluation_tokens",
    "load",
    "prune",
    "read_text",
    "save",
    "save_dense",
    "sparsify",
]

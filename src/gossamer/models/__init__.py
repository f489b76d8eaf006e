"""Models: loading and saving them, and text to calibrate and evaluate them with."""

from gossamer.models.export import save_dense
from gossamer.models.load import LoadedModel, load
from gossamer.models.packages import fetch
from gossamer.models.text import BUNDLED_TEXTS, calibration_batches, evaluation_tokens, read_text

__all__ = [
    "BUNDLED_TEXTS",
    "LoadedModel",
    "calibration_batches",
    "evaluation_tokens",
    "fetch",
    "load",
    "read_text",
    "save_dense",
]

"""Running a model over data to see what happens inside: the batches, checked and without padding, one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.progress import track
from gossamer.errors import CalibrationError
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import Batch, run_batch, without_padding


def prepared(data: Iterable[Batch]) -> list[Batch]:
    """Batches without padding, as a list.

    Raises
    ------
    CalibrationError
        If there are none, or a single batch instead of several.
    """
    if isinstance(data, Tensor | Mapping):
        raise CalibrationError("the calibration data is one batch; give a list of batches, such as [data]")
    batches = [part for batch in data for part in without_padding(batch)]
    if not batches:
        raise CalibrationError("the calibration data is empty: at least one batch is needed")
    return batches


def run_over(model: nn.Module, data: Sequence[Batch], title: str, progress: bool = True) -> None:
    """Call the model with every batch, without gradients and in evaluation mode.

    Raises
    ------
    CalibrationError
        If a batch is not ``(batch, tokens)`` ids of the model's vocabulary.
    """
    for batch in data:
        _check_ids(model, batch)
    with evaluation_mode(model), torch.no_grad():
        for batch in track(data, title, enabled=progress):
            run_batch(model, batch, logits=False)


def _check_ids(model: nn.Module, batch: Batch) -> None:
    """Refuse what a language model cannot read, before it fails somewhere inside."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(config, "vocab_size", None)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if getattr(model, "main_input_name", None) != "input_ids" or not isinstance(vocabulary, int) or ids is None:
        return
    if isinstance(ids, str):
        raise CalibrationError("the calibration data is text; make token ids of it with the model's tokenizer")
    if not isinstance(ids, Tensor):
        return
    if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        raise CalibrationError(
            f"a batch of calibration data is {tuple(ids.shape)} {ids.dtype}; give token ids, (batch, tokens) int64"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary}; make the tokens "
            f"with this model's own tokenizer"
        )

"""Thresholds of informativeness: how little each layer needs to see before the loss tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gossamer.attention.lemo import TokenSparseConfig, apply_token_sparsity
from gossamer.attention.lemo_predictors import BlockPredictor
from gossamer.core.progress import track
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import Batch, run_batch, without_padding


def search_thresholds(
    model: nn.Module,
    data: Iterable[Batch],
    tolerance: float = 0.01,
    config: TokenSparseConfig | None = None,
    predictors: Sequence[BlockPredictor] | None = None,
    *,
    highest: float = 2.0,
    steps: int = 5,
    progress: bool = True,
) -> TokenSparseConfig:
    """Find for each layer the highest threshold under which the loss rises little enough.

    Layers take turns from the first, each with the thresholds found before it; of L layers the first l + 1 may together
    spend (l + 1) / L of the tolerance. A threshold is moved by a step that is halved each time: up while the loss
    stays within, down when it does not.

    Parameters
    ----------
    model
        A decoder of Hugging Face, whose loss on the data is measured in evaluation mode.
    data
        Batches of token ids, or keyword arguments with labels.
    tolerance
        Share by which the loss may rise, above 0.
    config, predictors
        As of :func:`apply_token_sparsity`.
    highest
        Threshold that is never passed, in units of the average block.
    steps
        Of each layer's search.
    progress
        Whether to show a bar.

    Returns
    -------
    TokenSparseConfig
        The same with thresholds.

    Raises
    ------
    ConfigurationError
        If the tolerance or the number of steps is out of range.
    CalibrationError
        If there is no data.
    """
    if not 0 < tolerance < math.inf or steps < 1 or not highest > 0:
        raise ConfigurationError(
            f"tolerance is {tolerance}, steps {steps} and highest {highest}; all must be above 0, such as 0.01, 5 and 2"
        )
    batches = [part for batch in data for part in without_padding(batch)]
    if not batches:
        raise CalibrationError("no data to search thresholds on; give at least one batch of token ids")
    dense = mean_loss(model, batches)
    start = replace(config or TokenSparseConfig(), thresholds=None, causal=False, share=0.5)
    causal = config is not None and config.causal
    with apply_token_sparsity(model, start, predictors) as sparsity, evaluation_mode(model):
        layers = sparsity.report.layers
        thresholds = [0.0] * layers
        sparsity.when = "always"
        for layer in track(range(layers), "searching thresholds", enabled=progress):
            limit = dense * (1 + tolerance * (layer + 1) / layers)

            def within(value: float, layer: int = layer, limit: float = limit) -> bool:
                tried = (*thresholds[:layer], value, *thresholds[layer + 1 :])
                sparsity.config = replace(start, thresholds=tried, causal=causal)
                return mean_loss(model, batches) <= limit

            thresholds[layer] = _highest_within(within, highest, steps)
    return replace(start, thresholds=tuple(thresholds), causal=causal, share=(config or start).share)


def _highest_within(within: Callable[[float], bool], highest: float, steps: int) -> float:
    best = value = 0.0
    step = highest / 2
    for _ in range(steps):
        tried = value + step
        if within(tried):
            best = value = tried
        step /= 2
    return best


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean loss of a causal language model, in nats a token; token ids are their own labels."""
    losses = []
    with evaluation_mode(model):
        for batch in batches:
            given = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else {**batch}  # type: ignore[dict-item]
            given.setdefault("labels", given["input_ids"])
            losses.append(float(run_batch(model, given).loss))
    return sum(losses) / len(losses)

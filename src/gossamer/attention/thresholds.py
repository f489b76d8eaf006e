"""A threshold for every head of every layer: found on data, stored, and looked up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer.attention.base import SparseAttention, named_layer
from gossamer.core.progress import track
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError, ModelError
from gossamer.measure.perplexity import perplexity
from gossamer.measure.runs import prepared, run_over
from gossamer.models.attention_sites import AttentionCall, AttentionSite
from gossamer.models.blocks import Batch
from gossamer.storage.atomic import atomic_file

_LOWERED = 0.9  # what a threshold is multiplied by when it is lowered


@dataclass(eq=False, repr=False)
class HeadThresholds:
    """Thresholds in (0, 1] of all heads.

    Attributes
    ----------
    layers
        Layer → ``(heads,)`` float32.
    """

    layers: dict[int, Tensor] = field(default_factory=dict)

    def of(self, layer: int | None, heads: int) -> Tensor:
        """Thresholds of a layer, ``(heads,)``.

        Raises
        ------
        ConfigurationError
            If no layer is named.
        ModelError
            If there are none for this layer, or for another number of heads.
        """
        found = self.layers.get(named_layer(layer, self.layers))
        if found is None or len(found) != heads:
            known = "no layer" if found is None else f"{len(found)} heads in layer"
            raise ModelError(
                f"the thresholds are for another model: they know {known} {layer}, this one has {heads} heads there; "
                "calibrate on it"
            )
        return found

    def raise_to(self, layer: int, values: Tensor) -> None:
        """Take the higher of what is known and `values`, head by head."""
        values = values.float().cpu()
        known = self.layers.get(layer)
        self.layers[layer] = values if known is None else known.maximum(values)

    def checked(self, block_size: int) -> HeadThresholds:
        """Itself, if it knows any layer."""
        if not self.layers:
            raise CalibrationError(
                f"no text of the calibration data is longer than a block of {block_size} tokens; give longer ones"
            )
        return self

    @property
    def mean(self) -> float:
        """Over all heads of all layers."""
        return float(torch.cat(list(self.layers.values())).mean())

    def __repr__(self) -> str:
        return f"HeadThresholds({len(self.layers)} layers" + (f", mean {self.mean:.3g})" if self.layers else ")")

    def copy(self) -> HeadThresholds:
        """A copy that can be changed without changing this."""
        return HeadThresholds({layer: values.clone() for layer, values in self.layers.items()})

    def save(self, file: Path | str) -> None:
        """Write to a safetensors file, at once or not at all."""
        with atomic_file(file) as part:
            save_file({f"layer.{layer}": values.contiguous() for layer, values in self.layers.items()}, part)

    @classmethod
    def load(cls, file: Path | str) -> HeadThresholds:
        """Read what :meth:`save` wrote.

        Raises
        ------
        CheckpointError
            If the file is missing, truncated, or holds something else.
        """
        try:
            stored = load_file(file)
            found = {int(name.removeprefix("layer.")): values for name, values in stored.items()}
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{file} holds no thresholds of heads ({error}); calibrate again") from error
        for layer, values in found.items():
            if values.dim() != 1 or not bool(((values > 0) & (values <= 1)).all()):
                raise CheckpointError(f"{file}: the thresholds of layer {layer} are not all in (0, 1]; calibrate again")
        return cls(found)


def observe_calls(
    model: nn.Module, data: Iterable[Batch], look: Callable[[AttentionCall], None], progress: bool = True
) -> None:
    """Run a model over data, its attention dense, and look at every call of attention.

    Parameters
    ----------
    model
        A Hugging Face model.
    data
        Batches of token ids or of keyword arguments; padding is left out.
    look
        Called with every call, in order; what it is given must not be kept without need, for it is large.
    progress
        Whether to show a progress bar.

    Raises
    ------
    CalibrationError
        If there is no data.
    ModelError
        If the model does not let its attention be replaced.
    """
    batches = prepared(data)
    site = AttentionSite(model, look)  # type: ignore[arg-type]  # nothing returned: dense
    try:
        run_over(model, batches, "looking at attention", progress)
    finally:
        site.remove()


def predict_thresholds(
    make: Callable[[HeadThresholds], SparseAttention],
    start: float | HeadThresholds,
    model: nn.Module,
    data: Iterable[Batch],
    trials: int = 1000,
    tolerance: float = 0.01,
    progress: bool = True,
) -> HeadThresholds:
    """Lower thresholds of single heads, by tenths, as long as text is predicted as well [Xu et al., 2025, section 2.3].

    All heads begin at the same threshold, or each at its own. In every round each head in turn tries nine tenths of
    what it has; it keeps that if the perplexity stays within the tolerance of the model's at the beginning, and is out
    of the game otherwise. With D[h][m] the best setting of the first h heads after m rounds and P(h, m) the quality
    with head h lowered for the m-th time, this walks the paper's D[h][m] = max(D[h−1][m], P(h, m)) and of all settings
    within the tolerance returns the one of the lowest mean.

    Parameters
    ----------
    make
        ``make(thresholds)`` gives the method with these thresholds.
    start
        Where the heads begin.
    model
        A Hugging Face language model.
    data
        Batches of token ids, ``(batch, tokens)``.
    trials
        Settings that are tried at most; each costs one run over the data.
    tolerance
        Rise of the perplexity that is allowed, as a share of it.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ConfigurationError
        If the number of trials is below 1 or the tolerance negative.
    CalibrationError
        If there is no data, or it is too short.
    """
    if trials < 1 or tolerance < 0:
        raise ConfigurationError(f"trials is {trials} and tolerance {tolerance}; give at least one, and at least 0")
    tokens = [batch for batch in prepared(data) if isinstance(batch, Tensor)]
    if not tokens:
        raise CalibrationError("there are no token ids to measure perplexity on; give (batch, tokens) int64")
    shapes: dict[int, int] = {}
    observe_calls(model, tokens[:1], lambda call: shapes.update({call.layer: call.query.shape[1]}), progress=False)
    window = max(part.shape[-1] for part in tokens)

    def measured(setting: HeadThresholds) -> float:
        with make(setting).install(model):
            return perplexity(model, tokens, window, window, progress=False).value

    if isinstance(start, HeadThresholds):
        best = HeadThresholds({layer: start.of(layer, heads).clone() for layer, heads in shapes.items()})
    else:
        best = HeadThresholds({layer: torch.full((heads,), start) for layer, heads in shapes.items()})
    limit = measured(best) * (1 + tolerance)
    return _lowered(best, measured, limit, trials, progress)


def _lowered(
    best: HeadThresholds, measured: Callable[[HeadThresholds], float], limit: float, trials: int, progress: bool
) -> HeadThresholds:
    playing = deque((layer, head) for layer, values in best.layers.items() for head in range(len(values)))
    for _ in track(range(trials), "lowering thresholds", trials, progress):
        if not playing:
            break
        layer, head = playing.popleft()
        setting = best.copy()
        setting.layers[layer][head] *= _LOWERED
        if measured(setting) <= limit:
            best = setting
            playing.append((layer, head))
    return best

"""FLAP: a channel that hardly fluctuates can be replaced by its mean.

What a feed-forward channel adds to the output is its value times a column of the matrix that maps back. If the value
is almost the same for every token, then a constant does the same job: the channel goes, and its mean times its column
goes into the bias. What is lost is the fluctuation around the mean. Standardised within each layer, that loss is
ranked over the whole model at once, which also decides how much each layer gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.core.calibration import InputMoments, Statistic, Statistics
from gossamer.core.registry import register
from gossamer.core.selection import dropped_count, keep_highest_jointly
from gossamer.errors import UnknownNameError
from gossamer.models.feedforward import FeedForward
from gossamer.pruning.channels import ChannelPruner, Reading


@register(
    "flap",
    paper="cfsp",
    when="after training",
    granularity="channels",
    criterion=("activation",),
    allocation="measured",
    patterns=("channels",),
)
@dataclass
class Flap(ChannelPruner):
    """Take out the feed-forward channels that fluctuate least, and put their mean into the bias.

    An, Zhao, Yu, Tang & Wang, 2024, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
    arXiv 2312.11983 (here for feed-forward channels, as CFSP compares with it).

    Parameters
    ----------
    allocation
        ``"global"``: one ranking of standardised scores over all layers; or as for every pruner of channels.
    bias
        Whether the mean of what goes is added to the bias of the matrix that maps back. Where it has none it gets
        one, which the stock class of the model does not expect when it loads the checkpoint.
    """

    allocation: str | Mapping[str, float] = "global"
    bias: bool = True

    statistics: ClassVar[tuple[type[Statistic], ...]] = (InputMoments,)

    def score(self, layer: FeedForward, stats: Statistics | None) -> Tensor:
        """``Var(h_j) · ‖W_down,:j‖²``, standardised within the layer."""
        column = layer.down.matrix().double().square().sum(0)
        fluctuation = column if stats is None else stats[InputMoments].variance * column
        spread = fluctuation.std(correction=0)
        return (fluctuation - fluctuation.mean()) / torch.where(spread > 0, spread, 1)

    def sparsities(self, layers: Sequence[FeedForward], reading: Reading) -> Mapping[str, float]:
        """What one threshold over all layers leaves of each."""
        if self.allocation != "global":
            if self.allocation != "uniform" and isinstance(self.allocation, str):
                raise UnknownNameError("allocation", self.allocation, ["global", "uniform"])
            return super().sparsities(layers, reading)
        total = sum(layer.width for layer in layers)
        keep = keep_highest_jointly(reading.scores, dropped_count(total, self.sparsity))
        return {name: 1 - float(mask.double().mean()) for name, mask in keep.items()}

    def compensation(self, layer: FeedForward, keep: Tensor, stats: Statistics | None) -> Tensor | None:
        """``Σ_j mean(h_j) · W_down,:j`` over the channels that go."""
        if not self.bias or stats is None:
            return None
        weight = layer.down.matrix().double()
        mean = stats[InputMoments].mean.to(weight.device)
        return weight @ torch.where(keep.to(weight.device), 0.0, mean)

"""XAttention: blocks ranked by sums over strided antidiagonals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gossamer.attention.base import SparseAttention, check_share
from gossamer.attention.scores import Scoring, check_scoring, exact_mass, score_blocks
from gossamer.attention.selection import mass_blocks, sinks_and_diagonal
from gossamer.attention.thresholds import HeadThresholds, observe_calls, predict_thresholds
from gossamer.core.block_mask import BlockMask
from gossamer.core.registry import register
from gossamer.models.attention_sites import AttentionCall
from gossamer.models.blocks import Batch


@register(
    "xattention",
    paper="xattention",
    when="at inference",
    granularity="blocks",
    needs_data=False,
    criterion=("activation",),
    allocation="measured",
    patterns=("blocks",),
)
@dataclass(kw_only=True)
class XAttention(SparseAttention):
    """Read the blocks that hold most of the attention, as strided antidiagonals show it [Xu et al., 2025].

    The scaled scores of `stride` × `stride` tiles are averaged over their antidiagonals, which cross every vertical
    and every diagonal line of a pattern; after a softmax they estimate the attention mass of blocks, and every row of
    blocks reads the fewest that hold a share τ of it [arXiv 2503.16428, algorithm 1]. Prompts only: single queries
    stay dense.

    With an even stride, as in the paper, an antidiagonal pairs queries and keys at odd distances only; a head that
    looks back by an even number of tokens exactly, and by nothing else, is not seen.

    Parameters
    ----------
    threshold
        τ in (0, 1], where 1 is dense; or one for every head, as :meth:`calibrate` and :meth:`search` find and set
        them and :meth:`HeadThresholds.load <gossamer.attention.thresholds.HeadThresholds.load>` reads them.
    stride
        S, which divides the block size; scores take 1 / S of the time of dense ones.
    block_size
        Queries and keys of a block.
    keep_sink, keep_recent
        Whether the first block, and the row's own, are always read.
    scoring
        ``antidiagonal``, or one of the paper's comparisons; see :func:`~gossamer.attention.scores.score_blocks`.
    dense_layers
        Layers that stay dense.

    Raises
    ------
    ConfigurationError
        If a threshold is not in (0, 1], the stride does not divide the block size, or there is no such scoring.
    """

    threshold: float | HeadThresholds = 0.9
    stride: int = 8
    block_size: int = 128
    keep_sink: bool = True
    keep_recent: bool = True
    scoring: Scoring = "antidiagonal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.threshold, HeadThresholds):
            check_share(self.threshold, "threshold")
        check_scoring(self.scoring, self.stride, self.block_size)

    def score(self, call: AttentionCall) -> Tensor:
        """Estimated mass of every block, ``(batch, heads, query blocks, key blocks)``."""
        return score_blocks(call, self.scoring, self.stride, self.block_size)

    def select(self, scores: Tensor, call: AttentionCall) -> BlockMask:
        """The blocks to read, by their scores."""
        everything = _geometry(call, self.block_size)
        always = None
        if call.causal:
            always = sinks_and_diagonal(everything, int(self.keep_sink), int(self.keep_recent), call.key_mask)
        blocks = mass_blocks(scores, self._threshold(call), everything.allowed, always)
        return BlockMask(
            blocks, call.query.shape[2], call.key.shape[2], (self.block_size, self.block_size), call.causal
        )

    def _threshold(self, call: AttentionCall) -> float | Tensor:
        if isinstance(self.threshold, HeadThresholds):
            return self.threshold.of(call.layer, call.query.shape[1]).to(call.query.device)
        return self.threshold

    def prefill(self, call: AttentionCall) -> BlockMask | None:
        """The blocks of a prompt; None where all would be read anyway."""
        if call.query.shape[2] <= self.block_size and call.key.shape[2] <= self.block_size:
            return None
        if self.threshold == 1:
            return None
        return self.select(self.score(call), call)

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing, for a prompt of `length` tokens."""
        return 2.0 * length**2 / self.stride * size * heads

    def calibrate(
        self, model: nn.Module, data: Iterable[Batch], coverage: float = 0.9, progress: bool = True
    ) -> HeadThresholds:
        """Give every head a threshold of its own, that of blocks which hold a share of the true attention.

        Of every row of blocks the fewest that hold `coverage` of its true mass are found; all blocks whose estimate is
        at least the lowest among these make up a share of the row's estimated mass. A head's threshold is that share
        over all rows of a text, and of several texts the highest, as in the authors' ``profile_threshold.py``. From
        then on it is :attr:`threshold`.

        Parameters
        ----------
        model
            A Hugging Face model.
        data
            Batches of token ids, long enough for several blocks.
        coverage
            Share of the true mass in (0, 1].
        progress
            Whether to show a progress bar.

        Raises
        ------
        CalibrationError
            If there is no data, or no call is longer than a block.
        """
        check_share(coverage, "coverage")
        found = HeadThresholds()

        def look(call: AttentionCall) -> None:
            if call.phase == "prefill" and call.query.shape[2] > self.block_size:
                found.raise_to(call.layer, self._covering(call, coverage))

        observe_calls(model, data, look, progress)
        self.threshold = found.checked(self.block_size)
        return found

    def _covering(self, call: AttentionCall, coverage: float) -> Tensor:
        """Share of the estimated mass in the blocks that `coverage` of the true mass asks for, ``(heads,)``.

        Every row has a lowest block of its own; what all rows ask for is added up before the share is taken.
        """
        allowed = _geometry(call, self.block_size).allowed
        estimate = self.score(call).double()
        wanted = mass_blocks(exact_mass(call, self.block_size), coverage, allowed)
        lowest = torch.where(wanted, estimate, torch.inf).amin(-1, keepdim=True)
        share = torch.where(estimate >= lowest, estimate, 0).sum((-2, -1)) / estimate.sum((-2, -1))
        return share.amax(0).clamp(max=1.0)

    def search(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        trials: int = 1000,
        tolerance: float = 0.01,
        progress: bool = True,
    ) -> HeadThresholds:
        """Lower the thresholds of single heads by tenths as long as the model predicts text as well [section 2.3].

        See :func:`~gossamer.attention.thresholds.predict_thresholds`. Heads begin at :attr:`threshold`,
        and what is found takes its place.
        """
        found = predict_thresholds(
            lambda setting: replace(self, threshold=setting), self.threshold, model, data, trials, tolerance, progress
        )
        self.threshold = found
        return found


def _geometry(call: AttentionCall, block_size: int) -> BlockMask:
    return BlockMask.full(call.query.shape[2], call.key.shape[2], block_size, call.causal, call.query.device)

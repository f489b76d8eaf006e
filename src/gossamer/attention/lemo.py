"""LeMo: in long contexts most tokens tell a layer nothing new, so let only informative ones enter it.

Sparse attention lets each query skip keys, but every token is still read by some query, so that its activations must
be kept for the backward pass. A token that a whole layer leaves out costs that layer neither time nor memory: it goes
on by the residual connection, and may come back in the next layer. Which tokens those are is decided a block at a
time, by the attention they receive, which a small network predicts before the layer is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.attention.base import check_share
from gossamer.attention.lemo_predictors import BlockPredictor, blocks_that_exist, pool_blocks
from gossamer.attention.lemo_scores import Pooling, attention_call, attention_received
from gossamer.attention.token_sparse_layers import KeptTokens, LayerCall, TokenSparseLayers
from gossamer.attention.token_sparse_rows import worth_it
from gossamer.core.block_mask import block_count
from gossamer.core.randomness import generator_for
from gossamer.core.registry import register
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError

Scores = Literal["predicted", "attention", "random", "recent"]
When = Literal["training", "always", "never"]


@register(
    "lemo",
    paper="lemo",
    when="fine-tuning",
    granularity="tokens",
    timing="fine-tuning",
    path=("dense-to-sparse",),
    topology="dynamic",
    criterion=("activation", "learned"),
    allocation="measured",
    patterns=("blocks",),
    aims=("training",),
)
@dataclass(frozen=True, kw_only=True)
class TokenSparseConfig:
    """Leave uninformative blocks of tokens out of whole layers while fine-tuning.

    Wang et al., 2025, "LeMo: Enabling LEss Token Involvement for MOre Context Fine-tuning", arXiv 2501.09767.

    Parameters
    ----------
    block
        Consecutive tokens that are kept or left out together.
    keep_first, keep_last
        Blocks at both ends that are always kept.
    thresholds
        For each layer the informativeness from which a block is kept, in units of the average block; from
        :func:`~gossamer.attention.lemo_search.search_thresholds`. None to keep a share of the blocks instead.
    share
        Of the blocks that are kept where there are no thresholds, in (0, 1]; 1 is dense.
    predictor_rank
        Width of the predictors' projections.
    pooled
        Whether a block is as informative as all its tokens together (``mean``) or as the best of them (``max``).
    scores
        What decides: ``predicted`` informativeness, ``attention`` itself (an oracle: it is computed for all tokens),
        ``random``, or ``recent``, the last blocks.
    causal
        Whether no later block takes part in the decision about a block, but for `keep_last` and labels. A share would
        compare it with later ones, so that thresholds are needed; whether any later one will be kept is not known, so
        that the first always is.
    loss_layers
        Final layers in which positions that bear a label are always kept; all positions, where nobody has told
        which ones do.
    permutation_free
        Whether a layer's norms read its kept rows where they lie, and its last products add to them there, instead of
        copies that are gathered and put back. None where that is known to be faster.
    """

    block: int = 64
    keep_first: int = 1
    keep_last: int = 1
    thresholds: tuple[float, ...] | None = None
    share: float = 0.5
    predictor_rank: int = 32
    pooled: Pooling = "mean"
    scores: Scores = "predicted"
    causal: bool = False
    loss_layers: int = 1
    permutation_free: bool | None = None

    def __post_init__(self) -> None:
        if self.block < 1 or self.predictor_rank < 1:
            raise ConfigurationError(
                f"block is {self.block} and predictor_rank {self.predictor_rank}; both must be at least 1"
            )
        for name in ("keep_first", "keep_last", "loss_layers"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; it must be at least 0")
        check_share(self.share, "share")
        for name, kinds in (("scores", Scores), ("pooled", Pooling)):
            if getattr(self, name) not in get_args(kinds):
                raise UnknownNameError(name, str(getattr(self, name)), get_args(kinds))
        if self.thresholds is not None:
            object.__setattr__(self, "thresholds", tuple(map(float, self.thresholds)))
            if any(math.isnan(value) or value < 0 for value in self.thresholds or ()):
                raise ConfigurationError(f"thresholds are {self.thresholds}; each must be at least 0, where 0 is dense")
        elif self.causal:
            raise ConfigurationError("causal decisions need thresholds, as a share compares blocks with later ones")

    def wrap(self, model: nn.Module, predictors: Sequence[BlockPredictor] | None = None) -> TokenSparsity:
        """The same as :func:`apply_token_sparsity`."""
        return apply_token_sparsity(model, self, predictors)


@dataclass(eq=False)
class TokenSparsity:
    """Token sparsity at work in a model, from :func:`apply_token_sparsity`, until :meth:`remove`.

    Attributes
    ----------
    config
        The rules; may be replaced between steps.
    predictors
        One a layer, frozen; they are no part of the model, and its optimiser does not see them.
    when
        ``training``: in training mode alone, so that text is generated with all tokens. ``always``: also in
        evaluation mode, without a cache. ``never``.
    seed
        Of random decisions.
    """

    model: nn.Module
    config: TokenSparseConfig
    predictors: list[BlockPredictor] | None = None
    when: When = "training"
    seed: int = 0
    _layers: TokenSparseLayers = field(init=False, repr=False)
    _calls: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._layers = TokenSparseLayers(self.model, self._choose, self._may, self._in_place)
        try:
            self._check()
        except Exception:
            self.remove()
            raise

    @property
    def report(self) -> KeptTokens:
        """How many tokens each layer has kept since the beginning, or :meth:`reset`."""
        return self._layers.counts

    def reset(self) -> None:
        """Begin counting anew."""
        self._layers.counts = KeptTokens(self._layers.counts.layers)

    def keep(self, share: float) -> None:
        """Keep another share of the blocks from now on."""
        self.config = replace(self.config, share=share)

    def remove(self) -> None:
        """Give the layers all their tokens back; a second call does nothing."""
        self._layers.remove()

    def __enter__(self) -> TokenSparsity:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _check(self) -> None:
        count, config = len(self._layers.stack.blocks), self.config
        if config.scores == "predicted" and len(self.predictors or ()) != count:
            raise CalibrationError(
                f"{len(self.predictors or ())} predictors for {count} layers; make them with "
                "fit_predictors(model, data, config), or choose scores='attention'"
            )
        if config.thresholds is not None and len(config.thresholds) != count:
            raise ConfigurationError(
                f"{len(config.thresholds)} thresholds for {count} layers; search_thresholds makes one for each"
            )

    def _in_place(self, hidden: Tensor) -> bool:
        wanted = self.config.permutation_free
        return worth_it(hidden) if wanted is None else wanted

    def _may(self, call: LayerCall) -> bool:
        if self.when == "never" or (self.when == "training" and not self.model.training):
            return False
        if call.caches and not self.model.training:
            raise ConfigurationError(
                "a cache of keys and values would have holes where tokens were left out; pass use_cache=False"
            )
        return True

    def _choose(self, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        config, length = self.config, call.hidden.shape[1]
        whole = config.thresholds is None and config.share == 1
        must = self._must_keep(call)
        exists = blocks_that_exist(call.real, config.block)
        if exists is None:
            exists = call.hidden.new_ones(1, block_count(length, config.block), dtype=torch.bool)
        if whole or bool((must | ~exists).all()):
            keep = exists.expand(len(call.hidden), -1)
            scores = torch.zeros_like(keep, dtype=torch.float32)
        else:
            scores = self._scores(call).masked_fill(~exists, float("-inf"))
            keep = self._kept(call.layer, scores, must & exists, exists)
        self._calls += 1
        return expanded(keep, config.block, call.real, length), scores.repeat_interleave(config.block, 1)[:, :length]

    def _must_keep(self, call: LayerCall) -> Tensor:
        """Blocks at both ends of each sequence and, in final layers, with labels: ``(batch, blocks)``."""
        config, (batch, length) = self.config, call.hidden.shape[:2]
        blocks = block_count(length, config.block)
        exists = blocks_that_exist(call.real, config.block)
        if exists is None:
            exists = call.hidden.new_ones(1, blocks, dtype=torch.bool)
        rank = exists.long().cumsum(1)
        ends = (rank <= max(config.keep_first, int(config.causal))) | (rank > rank[:, -1:] - config.keep_last)
        if call.layer >= len(self._layers.stack.blocks) - config.loss_layers:
            labelled = blocks_that_exist(call.labelled, config.block)
            ends = torch.ones_like(ends) if labelled is None else ends | labelled
        return ends.expand(batch, -1)

    @torch.no_grad()
    def _scores(self, call: LayerCall) -> Tensor:
        """Informativeness of the blocks, ``(batch, blocks)``."""
        config, (batch, length) = self.config, call.hidden.shape[:2]
        blocks, device = block_count(length, config.block), call.hidden.device
        if config.scores == "predicted":
            assert self.predictors is not None
            pooled = pool_blocks(call.hidden, config.block, call.real)
            exists = blocks_that_exist(call.real, config.block)
            return self.predictors[call.layer].to(device)(pooled, exists, config.causal)
        if config.scores == "attention":
            inner = attention_call(self.model, call)
            return attention_received(inner, config.block, call.real, config.pooled, config.causal)
        if config.scores == "random":
            generator = generator_for("random blocks", self.seed * 1_000_003 + self._calls)
            return torch.rand(batch, blocks, generator=generator).to(device)
        return torch.arange(blocks, dtype=torch.float32, device=device).expand(batch, -1)

    def _kept(self, layer: int, scores: Tensor, must: Tensor, exists: Tensor) -> Tensor:
        """Kept blocks, bool ``(batch, blocks)``; at least one of every sequence that is no padding."""
        if self.config.thresholds is not None:
            found = (scores >= self.config.thresholds[layer]) & exists | must
            return found | _best(scores) & ~must.any(1, keepdim=True)
        counts = (self.config.share * exists.expand_as(must).sum(1)).round().clamp_min(1)
        ranked = scores.masked_fill(must, float("inf")).argsort(dim=1, descending=True, stable=True).argsort(1)
        return (ranked < counts[:, None]) & exists | must


def apply_token_sparsity(
    model: nn.Module, config: TokenSparseConfig | None = None, predictors: Sequence[BlockPredictor] | None = None
) -> TokenSparsity:
    """Let the layers of a decoder leave tokens out while it trains, until ``remove()`` or the end of a ``with`` block.

    Works with LoRA of PEFT, with gradient checkpointing and in a Trainer; see :func:`keep_share_callback`,
    :class:`~gossamer.core.segments.SegmentedLMLoss` and :mod:`gossamer.attention.lemo_memory`.

    Parameters
    ----------
    model
        A decoder of Hugging Face, wrapped by PEFT or not.
    config
        The rules.
    predictors
        From :func:`~gossamer.attention.lemo_predictors.fit_predictors`; needed where scores are predicted.

    Raises
    ------
    CalibrationError
        If predictors are missing.
    ConfigurationError
        If there is not one threshold a layer.
    ModelError
        If the model is no decoder.

    Examples
    --------
    >>> config = TokenSparseConfig(share=0.5)
    >>> predictors = fit_predictors(model, batches, config)  # doctest: +SKIP
    >>> with apply_token_sparsity(model, config, predictors) as sparsity:  # doctest: +SKIP
    ...     train(model)
    ...     print(sparsity.report)
    """
    return TokenSparsity(model, config or TokenSparseConfig(), None if predictors is None else list(predictors))


def keep_share_callback(sparsity: TokenSparsity, schedule: Callable[[int], float]) -> Any:
    """A callback for ``transformers.Trainer`` that anneals the share of the blocks that is kept.

    Parameters
    ----------
    sparsity
        At work in the model that is trained.
    schedule
        Step → share, such as ``Linear(final=0.5, end=100, initial=1.0)`` of :mod:`gossamer.core.schedules`.
    """
    return _callback_class()(sparsity, schedule)


@cache
def _callback_class() -> type:
    from transformers import TrainerCallback

    class KeepShareCallback(TrainerCallback):
        def __init__(self, sparsity: TokenSparsity, schedule: Callable[[int], float]):
            self.sparsity, self.schedule = sparsity, schedule

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.sparsity.keep(self.schedule(state.global_step))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs is not None:
                logs["tokens_kept"] = self.sparsity.report.share

    return KeepShareCallback


def expanded(keep: Tensor, block: int, real: Tensor | None, length: int) -> Tensor:
    """Kept tokens, ``(batch, length)``, of kept blocks ``(batch, blocks)``; padding is not kept."""
    tokens = keep.repeat_interleave(block, 1)[:, :length]
    return tokens if real is None else tokens & real


def _best(scores: Tensor) -> Tensor:
    """The best block of each sequence."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argmax(1, keepdim=True), True)


@contextmanager
def always(sparsity: TokenSparsity) -> Iterator[TokenSparsity]:
    """Leave tokens out in evaluation mode too, to measure what that costs."""
    before, sparsity.when = sparsity.when, "always"
    try:
        yield sparsity
    finally:
        sparsity.when = before

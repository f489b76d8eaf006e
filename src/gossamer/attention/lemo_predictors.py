"""Small networks that say, from what goes into a layer, which blocks of tokens will receive its attention.

What a layer's input says about a block is pooled into one vector. Two narrow projections of these vectors play the
parts of queries and keys: a matrix of scores as small as the number of blocks squared, whose column means are the
predicted informativeness. Nothing in it depends on the length of the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad

from gossamer.attention.lemo_scores import Pooling, attention_call, attention_received
from gossamer.attention.token_sparse_layers import LayerCall, TokenSparseLayers
from gossamer.core.progress import track
from gossamer.core.randomness import generator_for
from gossamer.errors import CalibrationError, ConfigurationError, UnknownNameError
from gossamer.measure.windows import evaluation_mode
from gossamer.models.blocks import Batch, run_batch

Target = Literal["log", "bit"]
_DISTANCES = 16  # powers of two, in blocks


class BlockPredictor(nn.Module):
    """Informativeness of blocks, from their pooled embeddings.

    Wang et al., 2025, "LeMo", arXiv 2501.09767: ``softmax((E P_q)(E P_k)ᵀ / √r)``, causal, and its column means. Two
    biases are ours: one on the queries, by which a block may be informative to whomever, and one for the logarithm of
    the distance, as pooled embeddings do not say where a block stands.

    Parameters
    ----------
    width
        d, of the hidden states.
    rank
        r, of the projections; far below d.
    seed
        Of the first weights.
    """

    def __init__(self, width: int, rank: int = 32, seed: int = 0):
        super().__init__()
        if not 1 <= rank <= width:
            raise ConfigurationError(f"predictor_rank is {rank}; it must be between 1 and the width, {width}")
        generator = generator_for("block predictor", seed)
        draw = lambda: torch.randn(rank, width, generator=generator) * (rank * width) ** -0.25  # noqa: E731
        self.queries, self.keys = nn.Parameter(draw()), nn.Parameter(draw())
        self.offset = nn.Parameter(torch.zeros(rank))
        self.distance = nn.Parameter(torch.zeros(_DISTANCES))
        self.sharpness = nn.Parameter(torch.ones(2))  # of the keep-bit's logit, when that is what is learnt

    @property
    def rank(self) -> int:
        """R."""
        return len(self.queries)

    def forward(self, pooled: Tensor, exists: Tensor | None = None, causal: bool = False) -> Tensor:
        """Predicted informativeness in units of the average block, or with `causal` of the average block so far.

        Parameters
        ----------
        pooled
            ``(batch, blocks, width)``, from :func:`pool_blocks`.
        exists
            Bool ``(batch, blocks)``, False for blocks of padding.
        causal
            Whether only the block itself and those before it count: the diagonal in place of column means.

        Returns
        -------
        Tensor
            ``(batch, blocks)``.
        """
        blocks = pooled.shape[1]
        scores = (pooled @ self.queries.T + self.offset) @ (pooled @ self.keys.T).mT / math.sqrt(self.rank)
        place = torch.arange(blocks, device=pooled.device)
        apart = place[:, None] - place
        scores = scores + self.distance[(apart.clamp_min(0) + 1).log2().long().clamp_max(_DISTANCES - 1)]
        allowed = (apart >= 0)[None]
        if exists is None:
            exists = torch.ones(1, blocks, dtype=torch.bool, device=pooled.device)
        allowed = allowed & exists[:, None]
        shares = scores.masked_fill(~allowed, -1e9).softmax(-1) * exists[..., None]
        if causal:
            return shares.diagonal(dim1=1, dim2=2) * exists.cumsum(-1)
        seen = exists.flip(-1).cumsum(-1).flip(-1).clamp_min(1)
        return shares.sum(1) / seen * exists.sum(-1, keepdim=True)

    @torch.no_grad()
    def narrowed(self, rank: int) -> BlockPredictor:
        """The predictor with the neurons alone that matter most.

        These are the ones of the largest ``‖P_q[i]‖ · ‖P_k[i]‖``, the query's bias included.

        Raises
        ------
        ConfigurationError
            If there are not so many.
        """
        if not 1 <= rank <= self.rank:
            raise ConfigurationError(f"rank is {rank}; this predictor has {self.rank} neurons to keep some of")
        strength = (self.queries.square().sum(1) + self.offset.square()).sqrt()
        chosen = (strength * self.keys.norm(dim=1)).topk(rank).indices.sort().values
        smaller = BlockPredictor(self.queries.shape[1], rank)
        neurons = {name: getattr(self, name)[chosen] for name in ("queries", "keys", "offset")}
        smaller.load_state_dict(self.state_dict() | neurons)
        for part in (smaller.queries, smaller.offset):
            part.mul_(math.sqrt(rank / self.rank))  # scores are divided by the root of the rank
        return smaller.to(self.queries.device)


def pool_blocks(hidden: Tensor, block: int, real: Tensor | None = None) -> Tensor:
    """Mean over each block of the hidden states, each scaled to a mean square of 1: ``(batch, blocks, width)``."""
    states = hidden.detach().float()
    states = states * states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    length = hidden.shape[1]
    if real is None and length % block == 0:
        return states.unflatten(1, (-1, block)).mean(2)
    mask = torch.ones_like(states[..., :1]) if real is None else real[..., None].to(states.dtype)
    size = (-length) % block
    sums = pad(states * mask, (0, 0, 0, size)).unflatten(1, (-1, block)).sum(2)
    return sums / pad(mask, (0, 0, 0, size)).unflatten(1, (-1, block)).sum(2).clamp_min(1)


def blocks_that_exist(real: Tensor | None, block: int) -> Tensor | None:
    """Which blocks hold any token that is no padding, ``(batch, blocks)``."""
    if real is None:
        return None
    return pad(real, (0, -real.shape[1] % block)).unflatten(1, (-1, block)).any(-1)


@dataclass(frozen=True, eq=False)
class BlockObservation:
    """One sequence as one layer sees it.

    Attributes
    ----------
    pooled
        ``(1, blocks, width)``.
    informativeness
        ``(1, blocks)``, from attention.
    """

    pooled: Tensor
    informativeness: Tensor


def observe_blocks(
    model: nn.Module,
    data: Iterable[Batch],
    block: int,
    pooled: Pooling = "mean",
    causal: bool = False,
    progress: bool = True,
) -> list[list[BlockObservation]]:
    """Run a dense model and note, for every layer, its blocks and the attention they receive.

    Parameters
    ----------
    model
        A decoder of Hugging Face, in whatever state; it is run in evaluation mode.
    data
        Batches of token ids, or of keyword arguments.
    block, pooled, causal
        As of :class:`~gossamer.attention.lemo.TokenSparseConfig`.
    progress
        Whether to show a bar.

    Returns
    -------
    list
        For each layer its observations, one a sequence.

    Raises
    ------
    CalibrationError
        If there is no data.
    """
    batches = list(data)
    seen: list[list[BlockObservation]] = []

    def note(call: LayerCall) -> None:
        inner = attention_call(model, call)
        scores = attention_received(inner, block, call.real, pooled, causal)
        states = pool_blocks(call.hidden, block, call.real)
        exists = blocks_that_exist(call.real, block)
        for item in range(len(states)):
            kept = slice(None) if exists is None else exists[item]
            seen[call.layer].append(BlockObservation(states[item : item + 1, kept], scores[item : item + 1, kept]))

    layers = TokenSparseLayers(model, note, lambda call: True)
    seen.extend([] for _ in layers.stack.blocks)
    try:
        # in inference mode observations could not be learnt from
        with evaluation_mode(model), torch.inference_mode(False), torch.no_grad():
            for batch in track(batches, "observing blocks", enabled=progress):
                run_batch(model, batch, logits=False)
    finally:
        layers.remove()
    if not all(seen):
        raise CalibrationError("no data to observe blocks of; give at least one batch of token ids")
    return seen


def train_predictor(
    observations: Sequence[BlockObservation],
    rank: int = 32,
    *,
    share: float = 0.5,
    target: Target = "log",
    causal: bool = False,
    steps: int = 300,
    learning_rate: float | None = None,
    seed: int = 0,
) -> BlockPredictor:
    """Train the predictor of one layer.

    Parameters
    ----------
    observations
        Sequences, of any lengths.
    rank
        r.
    share
        Of the blocks that the keep-bit is 1 for.
    target
        ``log``: mean squared error of the logarithm of informativeness. ``bit``: cross-entropy of whether a block is
        among the most informative.
    causal
        See :class:`BlockPredictor`.
    steps, learning_rate
        Of Adam, one sequence a step, cooled down along a line; by default from 0.01, and less in proportion for hidden
        states wider than 64, of which each step would otherwise move the scores too far.
    seed
        Of weights and order.

    Raises
    ------
    UnknownNameError
        If there is no such target.
    CalibrationError
        If there are no observations.
    """
    if target not in get_args(Target):
        raise UnknownNameError("target of a predictor", target, get_args(Target))
    if not observations:
        raise CalibrationError("no blocks to learn a predictor from; give at least one batch")
    predictor = BlockPredictor(observations[0].pooled.shape[-1], rank, seed).to(observations[0].pooled.device)
    rate = 1e-2 * min(1.0, 64 / observations[0].pooled.shape[-1]) if learning_rate is None else learning_rate
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    generator = generator_for("order of blocks", seed)
    for _ in range(steps):
        item = observations[int(torch.randint(len(observations), (), generator=generator))]
        optimizer.zero_grad()
        predictor_loss(predictor, item, share, target, causal).backward()
        optimizer.step()
        schedule.step()
    return predictor.eval().requires_grad_(False)


def predictor_loss(
    predictor: BlockPredictor, item: BlockObservation, share: float, target: Target, causal: bool = False
) -> Tensor:
    """What a predictor is trained by; see :func:`train_predictor`."""
    predicted = predictor(item.pooled, causal=causal).clamp_min(1e-6).log()
    true = item.informativeness.clamp_min(1e-6).log()
    if target == "log":
        return functional.mse_loss(predicted, true)
    bits = (true >= true.topk(max(1, round(share * true.shape[1])), dim=1).values[:, -1:]).float()
    factor, offset = predictor.sharpness
    return functional.binary_cross_entropy_with_logits(factor * predicted + offset, bits)


def fit_predictors(
    model: nn.Module, data: Iterable[Batch], config: Any, *, progress: bool = True, **options: Any
) -> list[BlockPredictor]:
    """Learn to predict what each layer of a model finds informative; the model is frozen meanwhile.

    Parameters
    ----------
    model
        A decoder of Hugging Face, dense.
    data
        Batches of token ids, or of keyword arguments; padding is left out.
    config
        A :class:`~gossamer.attention.lemo.TokenSparseConfig`: its block, pooling, rank and causality.
    progress
        Whether to show bars.
    **options
        Of :func:`train_predictor`.

    Returns
    -------
    list
        One predictor a layer, frozen. To refresh them later, call this again.
    """
    observed = observe_blocks(model, data, config.block, config.pooled, config.causal, progress)
    usual = {"rank": config.predictor_rank, "share": config.share, "causal": config.causal}
    return [
        train_predictor(layer, **{"seed": number, **usual, **options})
        for number, layer in enumerate(track(observed, "training predictors", enabled=progress))
    ]


@torch.no_grad()
def recall_of_kept(
    predictors: Sequence[BlockPredictor],
    observed: Sequence[Sequence[BlockObservation]],
    share: float,
    causal: bool = False,
) -> list[float]:
    """Share of the most informative blocks that each layer's predictor would keep, if it kept equally many.

    Parameters
    ----------
    predictors, observed
        One a layer, and its observations.
    share
        Of the blocks that are kept, in (0, 1].
    causal
        See :class:`BlockPredictor`.
    """
    found = []
    for predictor, layer in zip(predictors, observed, strict=True):
        hits = total = 0
        for item in layer:
            count = max(1, round(share * item.pooled.shape[1]))
            true = item.informativeness[0].topk(count).indices
            kept = predictor(item.pooled, causal=causal)[0].topk(count).indices
            hits += int(torch.isin(kept, true).sum())
            total += count
        found.append(hits / total)
    return found

"""What sparse attention over denoising steps is compared with, and how far a sample may be from the dense one.

Rivals choose their blocks or windows anew at every step, or follow a fixed shape; all of them may be dense at the same
steps as the method under test, and read as many blocks at the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.attention.base import Answer
from gossamer.attention.local_windows import Mask, WindowMask, mask_density, masked_attention
from gossamer.attention.scores import exact_mass, score_blocks
from gossamer.attention.selection import top_blocks
from gossamer.attention.state import StepwiseAttention
from gossamer.core.block_mask import BlockMask
from gossamer.core.randomness import generator_for
from gossamer.models.attention_sites import AttentionCall
from gossamer.papers.experiment import Observation
from gossamer.papers.results import Number, Verdict
from gossamer.papers.statistics import Interval, mean_interval

Chooser = Callable[[AttentionCall], Mask]
_SAMPLED_ROWS = 32


@dataclass(kw_only=True)
class ChosenMask(StepwiseAttention):
    """Attention under a mask that is chosen for every call behind the dense steps.

    Parameters
    ----------
    choose
        Call → mask.
    dense_at
        Steps that are dense.
    """

    choose: Chooser = field(repr=False)
    dense_at: Collection[int] = ()

    def mix(self, call: AttentionCall) -> Answer | None:
        """Dense at some steps, under the mask at all others."""
        if self.cache.index in self.dense_at:
            return None
        mask = self.choose(call)
        output, _ = masked_attention(call.query, call.key, call.value, mask, scale=call.scale, key_mask=call.key_mask)
        return Answer(output, mask_density(mask))


@dataclass(kw_only=True)
class HeadChoice(StepwiseAttention):
    """Each head takes one of two windows, whichever comes nearer to full attention on a sample of its rows.

    The way of Sparse VideoGen [Xi et al., 2025, arXiv 2502.01776], whose heads look either at their own frame or at the
    same place in all frames.

    Parameters
    ----------
    windows
        The two windows.
    dense_at
        Steps that are dense.
    """

    windows: tuple[WindowMask, WindowMask]
    dense_at: Collection[int] = ()

    def mix(self, call: AttentionCall) -> Answer | None:
        """Dense at some steps, by heads at all others."""
        if self.cache.index in self.dense_at:
            return None
        options = {"scale": call.scale, "key_mask": call.key_mask}
        outputs = [masked_attention(call.query, call.key, call.value, window, **options)[0] for window in self.windows]
        rows = torch.linspace(0, call.query.shape[2] - 1, _SAMPLED_ROWS).long()
        full = functional.scaled_dot_product_attention(call.query[:, :, rows], call.key, call.value, scale=call.scale)
        errors = [(output[:, :, rows] - full).square().sum((-2, -1)) for output in outputs]
        first = (errors[0] <= errors[1])[..., None, None]
        share = float(first.double().mean())
        density = share * self.windows[0].density + (1 - share) * self.windows[1].density
        return Answer(torch.where(first, *outputs), density)


@dataclass(kw_only=True)
class StaleKeys(StepwiseAttention):
    """Keys and values of all tokens outside the block being written are those of the block's first step.

    The approximation of block-wise key-value caches for diffusion language models [Wu et al., 2025, arXiv 2505.22618];
    what it saves lies in not running the other tokens at all, which is not imitated here.

    Parameters
    ----------
    block_length, steps_per_block
        Of the sampler.
    """

    block_length: int
    steps_per_block: int

    def mix(self, call: AttentionCall) -> Answer | None:
        """Dense attention with old keys and values."""
        block, within = divmod(self.cache.index, self.steps_per_block)
        if within == 0:
            self.cache.put(call, "keys and values", (call.key, call.value))
            return None
        start = self.cache.context.stop + block * self.block_length
        place = torch.arange(call.key.shape[2])
        fresh = ((place >= start) & (place < start + self.block_length))[:, None]
        old_key, old_value = self.cache.get(call, "keys and values")
        key, value = torch.where(fresh, call.key, old_key), torch.where(fresh, call.value, old_value)
        return Answer(functional.scaled_dot_product_attention(call.query, key, value, scale=call.scale), 1.0)


def top_mass(keep: int, block_size: int, text: int = 0) -> Chooser:
    """The blocks of largest exact weight, searched anew every time: the oracle."""
    return lambda call: _best(exact_mass(call, block_size), keep, block_size, call, text)


def pooled(keep: int, block_size: int, text: int = 0) -> Chooser:
    """The blocks whose mean query and mean key fit best, as MInference's [Jiang et al., 2024, arXiv 2407.02490]."""
    return lambda call: _best(score_blocks(call, "mean", 1, block_size), keep, block_size, call, text)


def at_random(keep: int, block_size: int, seed: int, text: int = 0) -> Chooser:
    """Any blocks, drawn once for each layer."""

    def choose(call: AttentionCall) -> Mask:
        rows = -(-call.query.shape[2] // block_size)
        shape = (1, call.query.shape[1], rows, rows)
        scores = torch.rand(shape, generator=generator_for(f"random blocks of layer {call.layer}", seed))
        return _best(scores, keep, block_size, call, text)

    return choose


def nearest(keep: int, block_size: int, sinks: int = 0) -> Chooser:
    """The blocks nearest to the diagonal, and the first ones if wanted [Xiao et al., 2023, arXiv 2309.17453]."""

    def choose(call: AttentionCall) -> Mask:
        rows = torch.arange(-(-call.query.shape[2] // block_size))
        scores = -(rows[:, None] - rows).abs().float()
        scores[:, :sinks] = 1.0
        return _best(scores[None, None], keep, block_size, call)

    return choose


def _best(scores: Tensor, keep: int, block_size: int, call: AttentionCall, text: int = 0) -> BlockMask:
    always = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    covered = -(-text // block_size)
    always[:covered], always[:, :covered] = True, True
    blocks = top_blocks(scores, keep, torch.ones_like(always), always)
    n = call.query.shape[2]
    return BlockMask(blocks, n, n, (block_size, block_size), causal=False)


# ---------------------------------------------------------------------------------------------- distances of pictures

RANGE = 2.0  # of a picture's values


def psnr(pictures: Tensor, reference: Tensor) -> float:
    """Peak signal to noise in decibels, mean over the batch."""
    errors = (pictures - reference).square().flatten(1).mean(1).clamp(min=1e-12)
    return float((10 * torch.log10(RANGE**2 / errors)).mean())


def ssim(pictures: Tensor, reference: Tensor, window: int = 7) -> float:
    """Structural similarity with a flat window, mean over pictures [Wang et al., 2004]; frames count as pictures."""
    x, y = (part.reshape(-1, 1, *part.shape[-2:]) for part in (pictures, reference))

    def mean(values: Tensor) -> Tensor:
        return functional.avg_pool2d(values, window, 1)

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    small, smaller = (0.03 * RANGE) ** 2, (0.01 * RANGE) ** 2
    found = (2 * mx * my + smaller) * (2 * both + small) / ((mx**2 + my**2 + smaller) * (vx + vy + small))
    return float(found.mean())


def relative_error(pictures: Tensor, reference: Tensor) -> float:
    """‖x − y‖ / ‖y‖."""
    return float((pictures - reference).norm() / reference.norm())


def frechet(features: Tensor, reference: Tensor) -> float:
    """Fréchet distance of two sets of features ``(n, d)`` taken as normal [Heusel et al., 2017, arXiv 1706.08500]."""
    (m1, c1), (m2, c2) = _moments(features), _moments(reference)
    root = _root(c1)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


def features_of(body: nn.Module, pictures: Tensor) -> Tensor:
    """What a classifier's body makes of still pictures of 32 × 32, ``(n, d)``."""
    with torch.no_grad():
        return body(((pictures[..., 2:-2, 2:-2] + 0.5) / 2).clamp(0, 1))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    double = features.double()
    return double.mean(0), torch.cov(double.T)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def blocks_for(density: float, blocks: int) -> int:
    """The fewest blocks of a row that are no less than a density."""
    return max(1, min(blocks, math.ceil(round(density * blocks, 9))))


# ------------------------------------------------------------------------------------------------------------- verdicts


def gap(observations: Sequence[Observation], part: str, one: str, other: str, measure: str) -> Interval:
    """Mean of one method's measure minus another's, paired by seed."""
    return mean_interval([row[part][one][measure] - row[part][other][measure] for row in observations])


def judged(needed: Mapping[str, Interval], told: Mapping[str, Number], success: str) -> Verdict:
    """Holds if all intervals lie above zero, does not hold if one lies below, and is inconclusive otherwise."""
    numbers = {**needed, **told}
    wrong = [name for name, value in needed.items() if value.below_zero]
    unclear = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if unclear:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(unclear)}", numbers)
    return Verdict("holds", success, numbers)


def means(observations: Sequence[Observation], part: str) -> dict[str, float]:
    """``method, measure`` → mean over seeds."""
    found = {}
    for name, values in observations[0][part].items():
        for measure in values:
            rows = [row[part][name][measure] for row in observations]
            found[f"{name}, {measure}"] = sum(rows) / len(rows)
    return found

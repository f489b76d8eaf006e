"""A categorical distribution over all N:M masks of every group, that gradients can learn.

A group of M weights has K = C(M, N) masks. Keeping one logit for each is cheap; what is not is everything that
automatic differentiation would keep beside: the noise, the softmax, the products with all candidates. Here the soft
mask ``p @ S`` is made in chunks that fit a cache, and made again in the backward pass from the same numbers, so that
nothing of the size of the logits is ever held but the logits and their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.patterns import NM
from gossamer.core.randomness import generator_for
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError
from gossamer.storage.combinations import masks_by_rank

_CHUNK = 1 << 19  # logits worked on at a time: two megabytes, so that a chunk's passes stay in the cache
_LEAST = 1e-30  # an exponential number may be drawn as zero, whose logarithm would be infinite
_RAREST = 1e-7  # probability that is told from none, which is about the rounding of their sum
_POOL = 1 << 22  # numbers; every draw is a stretch of them from a place of its own


def candidates(n: int, m: int) -> Tensor:
    """All masks that keep `n` of `m`: float32 ``(C(m, n), m)``, in the order of :mod:`gossamer.storage.combinations`.

    Examples
    --------
    >>> candidates(2, 4).int().tolist()[0]
    [1, 1, 0, 0]
    """
    return torch.from_numpy(masks_by_rank(n, m).astype(np.float32))


def group_axis(target: Target, pattern: NM) -> int:
    """The dimension of the stored parameter along which the groups of a pattern lie."""
    axis = pattern.dim
    if target.transposed and axis < 2:
        axis = 1 - axis
    return axis + (target.index is not None)


@lru_cache(maxsize=2)
def _pool(seed: int, device: torch.device) -> Tensor:
    """Standard Gumbel numbers."""
    source = np.random.Generator(np.random.SFC64(generator_for("gumbel pool", seed).initial_seed()))
    exponential = torch.from_numpy(source.standard_exponential(_POOL, dtype=np.float32))
    return exponential.clamp_(min=_LEAST).log_().neg_().to(device)


@dataclass(frozen=True)
class Noise:
    """Standard Gumbel numbers, the same whenever they are asked for.

    They follow from three things that every process which trains the same model knows, so that all of them draw the
    same masks, and a backward pass can draw those of its forward pass again. To draw afresh would take longer than
    everything else that is done with a logit, so they are stretches of four million numbers that are drawn once;
    where each begins is drawn for every chunk of every weight at every step.

    Attributes
    ----------
    name
        Of the weight.
    seed, step
        Of the run, and of the optimiser.
    """

    name: str
    seed: int
    step: int

    def stream(self, device: torch.device) -> Callable[[int, int], Tensor]:
        """A function that returns the next ``(rows, columns)`` of them, not to be written to."""
        pool = _pool(self.seed, device)
        places = np.random.Generator(
            np.random.SFC64(generator_for(f"gumbel:{self.name}:{self.step}", self.seed).initial_seed())
        )

        def draw(rows: int, columns: int) -> Tensor:
            start = int(places.integers(_POOL - rows * columns))
            return pool[start : start + rows * columns].view(rows, columns)

        return draw


@dataclass
class Clock:
    """What all gates of a model share.

    Attributes
    ----------
    kappa, tau
        Factor of the logits, and temperature.
    norm_reg
        Weight of the reward for large remaining weights.
    hard
        Whether the forward pass takes the likeliest mask of each sample, and only the backward pass a soft one.
    seed, step
        Of the noise.
    """

    kappa: float
    tau: float
    norm_reg: float = 0.0
    hard: bool = False
    seed: int = 0
    step: int = 0


def chosen_probabilities(
    logits: Tensor, clock: Clock, noise: Noise | None, chunk: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """``softmax((κ π + g) / τ)`` of some groups after the other.

    Parameters
    ----------
    logits
        ``(K, groups)``.
    clock
        κ and τ.
    noise
        None for g = 0.
    chunk
        Groups at a time, at most; as many as fit half a million logits.

    Yields
    ------
    slice, Tensor
        Which groups, and their probabilities, float32 ``(K, chunk)``.
    """
    patterns, groups = logits.shape
    chunk = min(chunk or groups, max(1, _CHUNK // patterns))
    draw = None if noise is None else noise.stream(logits.device)
    for start in range(0, groups, chunk):
        part = slice(start, min(start + chunk, groups))
        values = logits[:, part].float() * (clock.kappa / clock.tau)
        if draw is not None:
            values.add_(draw(patterns, part.stop - part.start), alpha=1 / clock.tau)
        # products of smaller numbers, and their squares in an optimiser, would be subnormal, and slow
        yield part, nn.functional.threshold_(torch.softmax(values, 0), _RAREST, 0.0)


class _MaskedWeight(torch.autograd.Function):
    """``W ⊙ (p @ S)``: keeps W and the logits, and makes p again when gradients arrive."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, logits: Tensor, gate: MaskGate) -> Tensor:
        ctx.save_for_backward(weight, logits)
        ctx.gate, ctx.clock, ctx.noise = gate, Clock(**vars(gate.clock)), gate.noise()
        groups = gate.groups(weight)
        result = torch.empty_like(groups)
        table = gate.candidates
        for part, p in chosen_probabilities(logits, ctx.clock, ctx.noise):
            mask = table[p.argmax(0)] if ctx.clock.hard else p.T @ table
            result[part] = groups[part] * mask
        return gate.ungroup(result, weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, logits = ctx.saved_tensors
        gate, clock = ctx.gate, ctx.clock
        groups, gradient = gate.groups(weight), gate.groups(gradients[0])
        rewarded = 2 * clock.norm_reg if gate.reward_due(clock.step) else 0.0
        of_logits = torch.empty_like(logits) if ctx.needs_input_grad[1] else None
        of_weight = torch.empty_like(groups) if ctx.needs_input_grad[0] else None
        for part, p in chosen_probabilities(logits, clock, ctx.noise):
            here = groups[part].float()
            above = gradient[part].float()
            mask = None
            if rewarded or of_weight is not None:
                mask = gate.candidates[p.argmax(0)] if clock.hard else p.T @ gate.candidates
            if of_weight is not None and mask is not None:
                of_weight[part] = above * mask
            if of_logits is not None:
                above = above * here
                if rewarded and mask is not None:
                    above.sub_(here.square().mul_(mask), alpha=rewarded)
                of_choice = gate.candidates @ above.T
                of_choice.sub_((p * of_choice).sum(0))
                of_logits[:, part] = of_choice.mul_(p).mul_(clock.kappa / clock.tau)
        shaped = None if of_weight is None else gate.ungroup(of_weight, weight.shape)
        return shaped, of_logits, None


class MaskGate(nn.Module):
    """A parametrisation of one weight: while training a soft N:M mask, otherwise the likeliest one.

    Parameters
    ----------
    name
        Of the weight; it decides the noise.
    shape
        Of the weight as it is stored.
    pattern
        N of M; its own dimension is not used.
    axis
        Along which the groups lie.
    clock
        Shared with all other gates.
    dtype, device
        Of the logits.
    std
        Of the logits at first.

    Attributes
    ----------
    logits
        ``(K, groups)``: of all masks in the order of :func:`candidates`; groups in C order with the axis put last.

    Raises
    ------
    PatternError
        If M does not divide the length of the axis.
    """

    candidates: Tensor

    def __init__(
        self,
        name: str,
        shape: torch.Size,
        pattern: NM,
        axis: int,
        clock: Clock,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        std: float = 0.01,
    ):
        super().__init__()
        NM(pattern.n, pattern.m, axis).check_shape(tuple(shape), name)
        self.name, self.shape, self.axis, self.clock = name, shape, axis, clock
        self.n, self.m = pattern.n, pattern.m
        self.register_buffer("candidates", candidates(pattern.n, pattern.m).to(device), persistent=False)
        first = torch.empty(len(self.candidates), shape.numel() // pattern.m)
        first.normal_(0, std, generator=generator_for(f"mask logits:{name}", clock.seed))
        self.logits = nn.Parameter(first.to(device, dtype))
        self._rewarded_at = -1

    def forward(self, weight: Tensor) -> Tensor:
        """The weight under its mask."""
        if self.training:
            return _MaskedWeight.apply(weight, self.logits, self)
        return weight * self.mask().to(weight.dtype)

    def noise(self) -> Noise:
        """What is drawn at the present step."""
        return Noise(self.name, self.clock.seed, self.clock.step)

    def reward_due(self, step: int) -> bool:
        """Whether a backward pass is the first of its step, which alone brings the regularisation."""
        due = step != self._rewarded_at
        self._rewarded_at = step
        return due

    def groups(self, stored: Tensor) -> Tensor:
        """``(groups, M)`` of a tensor of the shape of the weight; a view where the axis is the last."""
        return stored.movedim(self.axis, -1).reshape(-1, self.m)

    def ungroup(self, groups: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`groups`."""
        moved = list(shape)
        moved.append(moved.pop(self.axis))
        return groups.view(moved).movedim(-1, self.axis)

    def choice(self) -> Tensor:
        """Number of the likeliest mask of every group, ``(groups,)``, in a byte where that will do."""
        return self.logits.detach().argmax(0).to(torch.uint8 if len(self.logits) <= 256 else torch.int32)

    def mask(self) -> Tensor:
        """The likeliest masks, ones and zeros in float32, in the shape of the weight."""
        return self.ungroup(self.candidates[self.choice().int()], self.shape)

    @torch.no_grad()
    def max_probability(self) -> float:
        """Mean over groups of the largest probability, ``max_i softmax(κ π)_i``: how far the choice is made."""
        found = [float(p.amax(0).sum()) for _, p in chosen_probabilities(self.logits, Clock(self.clock.kappa, 1), None)]
        return sum(found) / self.logits.shape[1]

    @torch.no_grad()
    def add_prior(self, mask: Tensor, strength: float) -> None:
        """``π_i += α · std(π) · (⟨S_i, M₀⟩ − N / 2)`` [Fang et al., 2024, arXiv 2409.17481, eq. 9].

        Parameters
        ----------
        mask
            Bool, the shape of the weight.
        strength
            α.

        Raises
        ------
        ConfigurationError
            If a group of the mask does not keep exactly N, naming the first.
        """
        wanted = self.groups(mask.to(self.candidates.device))
        counts = wanted.sum(1)
        wrong = (counts != self.n).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise ConfigurationError(
                f"the prior of {self.name} keeps {int(counts[first])} of {self.m} in group {first} "
                f"({len(wrong)} groups are wrong); it must keep exactly {self.n}: prune with pattern {self.n}:{self.m}"
            )
        scale = strength * float(self.logits.float().std())
        chunk = max(1, _CHUNK // len(self.logits))
        for start in range(0, len(wanted), chunk):
            agreement = self.candidates @ wanted[start : start + chunk].T.float() - self.n / 2
            self.logits[:, start : start + chunk] += (scale * agreement).to(self.logits.dtype)

"""Which features of a token are active: the interchangeable part of a sparse autoencoder.

A rule sees affinities, what a token has in common with every feature, and chooses. What it chooses keeps its affinity
as its value. While training a rule may look at a whole batch at once; afterwards every token is treated by itself,
with thresholds that the rule has learned meanwhile, so that no result depends on what else is in the batch.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.features.allocation import allocate, rounded_budgets, zipf_budgets

Chosen = tuple[Tensor, Tensor]
"""Feature of every match, token after token, and where each token's matches begin: see ``SparseCodes``."""


class ActivationRule(nn.Module, ABC):
    """Chooses among non-negative affinities ``(tokens, features)``."""

    needs_effect = False  # whether it looks at changes of the model's loss, which take a product to compute

    def build(self, features: int) -> None:
        """Make room for what is remembered of every feature."""

    @abstractmethod
    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:
        """The chosen matches, bool ``(tokens, features)``.

        Parameters
        ----------
        affinity
            Not negative, without gradients.
        effect
            Change of the model's loss along every feature for every token, of the same shape, if it is known.
        """

    def choose(self, affinity: Tensor, effect: Tensor | None = None) -> Chosen:
        """The chosen matches as a list."""
        mask = self.mask(affinity, effect)
        starts = torch.zeros(len(mask) + 1, dtype=torch.int64, device=mask.device)
        torch.cumsum(mask.sum(1), 0, out=starts[1:])
        return mask.nonzero()[:, 1], starts

    def highest(self, with_effect: bool) -> int | None:
        """How many features of the highest affinity a token gets, if that is the whole rule; a faster way then."""
        return None

    def values(self, before: Tensor, features: Tensor) -> Tensor:
        """Values of the chosen matches from their affinities before the ReLU; gradients reach both."""
        return before.relu()

    def settings(self) -> dict[str, Any]:
        """Plain values that say which rule this is."""
        return {"rule": type(self).__name__}


class ReLU(ActivationRule):
    """All features with an affinity above zero; sparse only through a penalty on the values."""

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        return affinity > 0


class CountedRule(ActivationRule):
    """A rule with a number of features for a token."""

    def __init__(self, k: int):
        super().__init__()
        if not isinstance(k, int) or k < 1:
            raise ConfigurationError(f"k is {k!r}; it must be a whole number of at least 1, such as 32")
        self.k = k

    def build(self, features: int) -> None:  # noqa: D102
        if self.k > features:
            raise ConfigurationError(f"k is {self.k}; there are only {features} features")

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {**super().settings(), "k": self.k}


class TopK(CountedRule):
    """The k features of the highest affinity, for every token [Gao et al., 2024, arXiv 2406.04093].

    Parameters
    ----------
    k
        Features of a token, at most: affinities of zero are never chosen.
    """

    def highest(self, with_effect: bool) -> int | None:  # noqa: D102
        return self.k

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        return allocate(affinity, self.k * len(affinity), "token")


class GradientTopK(CountedRule):
    """The k features whose affinity, and effect on what the model does, is highest [Olmo et al., 2024].

    Ranked by ``z + β · z · |d · ∇L|``, where d is a feature's direction and ∇L the gradient of the model's loss with
    respect to the token's activation [arXiv 2411.10397]. Effects are divided by their running mean, so that β has no
    unit. Without a gradient, and with β = 0, it is :class:`TopK`.

    Parameters
    ----------
    k
        Features of a token, at most.
    beta
        β, from 0 up.
    memory
        Of the running mean: how much of it a batch leaves as it was.
    """

    mean_effect: Tensor

    needs_effect = True

    def __init__(self, k: int, beta: float = 1.0, memory: float = 0.99):
        super().__init__(k)
        if not beta >= 0 or not 0 <= memory < 1:
            raise ConfigurationError(f"beta is {beta} and memory {memory}; give at least 0, and a number in [0, 1)")
        self.beta, self.memory = beta, memory
        self.register_buffer("mean_effect", torch.zeros(()))

    def highest(self, with_effect: bool) -> int | None:  # noqa: D102
        return None if with_effect and self.beta else self.k

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        ranked = affinity
        if effect is not None and self.beta:
            size = effect.abs()
            mean = size.mean(dtype=torch.float32)
            known = float(self.mean_effect) > 0
            if self.training:
                self.mean_effect.copy_(self.memory * self.mean_effect + (1 - self.memory) * mean if known else mean)
            scale = self.mean_effect if known or self.training else mean
            ranked = affinity * (1 + self.beta * size / scale.clamp(min=torch.finfo(torch.float32).tiny))
        return allocate(ranked, self.k * len(affinity), "token")

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {**super().settings(), "beta": self.beta, "memory": self.memory}


class MutualChoice(ActivationRule):
    """The best matches of a whole batch, k for a token in the mean; also known as BatchTopK.

    Tokens that need more features get more [Ayonrinde, 2024, arXiv 2411.02124; Bussmann et al., 2024, arXiv
    2412.06410]. Afterwards a match is chosen by a threshold, the running mean of the smallest affinity that was chosen.

    Parameters
    ----------
    k
        Features of a token in the mean; need not be a whole number.
    memory
        Of the running mean.
    """

    threshold: Tensor

    def __init__(self, k: float, memory: float = 0.99):
        super().__init__()
        if not k > 0 or not 0 <= memory < 1:
            raise ConfigurationError(f"k is {k} and memory {memory}; give more than 0, and a number in [0, 1)")
        self.k, self.memory = k, memory
        self.register_buffer("threshold", torch.full((), float("nan")))

    def build(self, features: int) -> None:  # noqa: D102
        if self.k > features:
            raise ConfigurationError(f"k is {self.k}; there are only {features} features")

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        if not self.training and not _unknown(self, self.threshold):
            return (affinity >= self.threshold) & (affinity > 0)
        found = allocate(affinity, max(1, round(self.k * len(affinity))), "mutual")
        if self.training and bool(found.any()):
            _follow(self.threshold, affinity[found].min(), self.memory)
        return found

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {**super().settings(), "k": self.k, "memory": self.memory}


class FeatureChoice(CountedRule):
    """Every feature takes its best tokens, as many as its rank deserves [Ayonrinde, 2024, arXiv 2411.02124].

    Ranks are those of the running densities, and budgets fall with the rank as (r + q)⁻ˢ, or are all the same. No
    feature can die, since each gets tokens. Afterwards a match is chosen by a threshold for every feature.

    Parameters
    ----------
    k
        Features of a token in the mean.
    zipf
        s and q; None for equal budgets.
    memory
        Of densities and thresholds.
    every
        Batches after which ranks are looked at again: budgets that jump with every batch disturb training.
    seed
        Of the rounding of budgets below one token.
    """

    thresholds: Tensor
    times: Tensor
    density: Tensor
    rank: Tensor
    batches: Tensor

    def __init__(
        self,
        k: int,
        zipf: tuple[float, float] | None = (1.0, 0.0),
        memory: float = 0.99,
        every: int = 200,
        seed: int = 0,
    ):
        super().__init__(k)
        if not 0 <= memory < 1 or every < 1:
            raise ConfigurationError(f"memory is {memory} and every {every}; give a number in [0, 1), and at least 1")
        self.zipf, self.memory, self.every, self.seed = zipf, memory, every, seed

    def build(self, features: int) -> None:  # noqa: D102
        super().build(features)
        self.register_buffer("thresholds", torch.full((features,), float("nan")))
        self.register_buffer("times", torch.zeros(features))
        self.register_buffer("density", torch.zeros(features))
        self.register_buffer("rank", torch.arange(features))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        exponent, shift = self.zipf or (0.0, 0.0)
        zipf_budgets(features, 1.0, exponent, shift)

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        if not self.training and not _unknown(self, self.thresholds):
            return (affinity >= self.thresholds) & (affinity > 0)
        budgets = self._budgets(len(affinity))
        found = allocate(affinity, int(budgets.sum()), "feature", budgets)
        if self.training:
            self._learn(affinity, found)
        return found

    def _budgets(self, tokens: int) -> Tensor:
        features = len(self.rank)
        exponent, shift = self.zipf or (0.0, 0.0)
        by_rank = zipf_budgets(features, self.k * tokens, exponent, shift)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.batches))
        return rounded_budgets(by_rank[self.rank.cpu()], tokens, generator)

    def _learn(self, affinity: Tensor, found: Tensor) -> None:
        chosen = found.any(0)
        lowest = affinity.masked_fill(~found, torch.inf).amin(0)
        # a plain mean of the first few batches, so that what a threshold begins with is soon forgotten
        memory = (self.times / (self.times + 1)).clamp(max=self.memory)
        known = torch.where(self.thresholds.isnan(), lowest, self.thresholds)
        self.thresholds.copy_(torch.where(chosen, memory * known + (1 - memory) * lowest, self.thresholds))
        self.times += chosen
        # what a feature would get if all matches competed tells how common it is, not what it was granted
        common = (affinity > competing(affinity, self.k)).float().mean(0)
        self.density.copy_(self.memory * self.density + (1 - self.memory) * common if self.batches else common)
        self.batches += 1
        if int(self.batches) % self.every == 0:
            self.rank_anew()

    def rank_anew(self) -> None:
        """Put features in the order of their densities."""
        order = self.density.argsort(descending=True, stable=True)
        self.rank[order] = torch.arange(len(order), device=order.device)

    def settings(self) -> dict[str, Any]:  # noqa: D102
        own = {"zipf": self.zipf, "memory": self.memory, "every": self.every, "seed": self.seed}
        return {**super().settings(), **own}


class JumpReLU(ActivationRule):
    """Features whose affinity passes a threshold of their own, which is learned [Rajamanoharan et al., 2024].

    The step at the threshold has no gradient; a rectangle of some width around it takes its place, for the threshold
    alone [arXiv 2407.14435, eq. 11 and 12].

    Parameters
    ----------
    threshold
        At the beginning, above 0.
    bandwidth
        Width of the rectangle.
    """

    log_threshold: nn.Parameter

    def __init__(self, threshold: float = 1e-3, bandwidth: float = 1e-3):
        super().__init__()
        if not threshold > 0 or not bandwidth > 0:
            raise ConfigurationError(f"threshold is {threshold} and bandwidth {bandwidth}; both must be above 0")
        self.start, self.bandwidth = threshold, bandwidth

    def build(self, features: int) -> None:  # noqa: D102
        self.log_threshold = nn.Parameter(torch.full((features,), self.start).log())

    @property
    def thresholds(self) -> Tensor:
        """Of all features."""
        return self.log_threshold.exp()

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        thresholds = self.thresholds.detach()
        if not self.training:
            return affinity > thresholds
        # those just below take part with a value of zero, for the sake of their threshold's gradient
        return affinity > (thresholds - self.bandwidth / 2).clamp(min=0)

    def values(self, before: Tensor, features: Tensor) -> Tensor:  # noqa: D102
        found: Tensor = _Jump.apply(before, self.thresholds[features.long()], self.bandwidth)
        return found

    def active(self, before: Tensor, features: Tensor) -> Tensor:
        """One for every match above its threshold, with a gradient for the threshold: their sum is the L0."""
        found: Tensor = _Step.apply(before, self.thresholds[features.long()], self.bandwidth)
        return found

    def settings(self) -> dict[str, Any]:  # noqa: D102
        return {**super().settings(), "threshold": self.start, "bandwidth": self.bandwidth}


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(x > threshold, x, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.bandwidth / 2).to(x.dtype)
        return grads[0] * (x > threshold), -grads[0] * threshold / ctx.bandwidth * near, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return (x > threshold).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.bandwidth / 2).to(x.dtype)
        return None, -grads[0] / ctx.bandwidth * near, None


def competing(affinity: Tensor, k: int, sample: int = 1 << 17) -> float:
    """About the affinity that k features of a token exceed in the mean, from a sample of ``(tokens, features)``."""
    drawn = affinity.flatten()[:: max(1, affinity.numel() // sample)]
    dropped = round(len(drawn) * (1 - k / affinity.shape[1]))
    return max(float(drawn.kthvalue(dropped).values), 0.0) if dropped else 0.0


def _follow(mean: Tensor, value: Tensor, memory: float) -> None:
    mean.copy_(value if bool(mean.isnan()) else memory * mean + (1 - memory) * value)


def _unknown(rule: ActivationRule, thresholds: Tensor) -> bool:
    if not bool(thresholds.isnan().all()):
        return False
    warnings.warn(
        f"{type(rule).__name__} has not been trained: without thresholds it chooses among the tokens of the batch",
        stacklevel=2,
    )
    return True


RULES: dict[str, type[ActivationRule]] = {
    kind.__name__: kind for kind in (ReLU, TopK, GradientTopK, MutualChoice, FeatureChoice, JumpReLU)
}

"""First all matches compete, then every feature gets its share: both choices of a dictionary, one after the other.

Mutual choice finds out how common each feature wants to be. Their densities follow a law, and at the end of training
feature choice gives every feature the budget that the law expects at its rank, which wakes those that fell behind
[Ayonrinde, 2024, arXiv 2411.02124].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import CountedRule, FeatureChoice, MutualChoice, competing
from gossamer.features.zipf import fit_zipf


class PhasedChoice(CountedRule):
    """:class:`MutualChoice` for some batches, then :class:`FeatureChoice` with the law of its densities.

    Parameters
    ----------
    k
        Features of a token in the mean.
    switch_after
        Batches of training with mutual choice; 80 to 90 % of all.
    memory
        Of densities and thresholds.
    every, seed
        Of :class:`FeatureChoice`.

    Attributes
    ----------
    feature_phase
        Whether the second phase has begun.
    """

    law: Tensor
    seen: Tensor

    def __init__(self, k: int, switch_after: int, memory: float = 0.99, every: int = 200, seed: int = 0):
        super().__init__(k)
        if not isinstance(switch_after, int) or switch_after < 1:
            raise ConfigurationError(f"switch_after is {switch_after!r}; it must be a whole number of at least 1")
        self.switch_after = switch_after
        self.mutual = MutualChoice(k, memory)
        self.feature = FeatureChoice(k, None, memory, every, seed)
        self.register_buffer("law", torch.full((2,), torch.nan, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def feature_phase(self) -> bool:
        """Whether features choose by now."""
        return not bool(self.law.isnan().any())

    def build(self, features: int) -> None:  # noqa: D102
        super().build(features)
        self.feature.build(features)

    def mask(self, affinity: Tensor, effect: Tensor | None) -> Tensor:  # noqa: D102
        if self.training and not self.feature_phase:
            if int(self.seen) >= self.switch_after:
                self._switch()
            else:
                self._watch(affinity)
        if not self.feature_phase:
            return self.mutual.mask(affinity, effect)
        self.feature.zipf = (float(self.law[0]), float(self.law[1]))  # also after weights were loaded
        return self.feature.mask(affinity, effect)

    def _watch(self, affinity: Tensor) -> None:
        common = (affinity > competing(affinity, self.k)).float().mean(0)
        known = self.mutual.memory if int(self.seen) else 0.0
        self.feature.density.mul_(known).add_(common, alpha=1 - known)
        self.seen += 1

    def _switch(self) -> None:
        found = fit_zipf(self.feature.density)
        self.law.copy_(torch.tensor([found.exponent, found.shift]))
        self.feature.rank_anew()
        # a feature begins with the threshold that all of them had
        self.feature.thresholds.fill_(float(self.mutual.threshold))
        self.feature.batches += 1

    def settings(self) -> dict[str, Any]:  # noqa: D102
        own = {"switch_after": self.switch_after, "memory": self.mutual.memory, "every": self.feature.every}
        return {**super().settings(), **own, "seed": self.feature.seed}

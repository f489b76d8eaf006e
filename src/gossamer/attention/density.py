"""How much attention was computed: pairs of a query and a key, counted against what may be read at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from gossamer.models.attention_sites import AttentionCall, Phase, allowed_links

if TYPE_CHECKING:
    from gossamer.attention.base import Answer


@dataclass
class Tally:
    """Query–key pairs computed and allowed, over the calls of a layer in one phase.

    Attributes
    ----------
    computed, allowed
        Pairs of a head, averaged over heads.
    calls
        Number of calls.
    dense_calls
        How many of them were left dense.
    masked_calls
        How many of these because of a mask that is more than causality and padding.
    """

    computed: float = 0.0
    allowed: float = 0.0
    calls: int = 0
    dense_calls: int = 0
    masked_calls: int = 0

    @property
    def density(self) -> float:
        """Share of the allowed pairs that was computed; NaN before the first call."""
        return self.computed / self.allowed if self.allowed else float("nan")

    def add(self, call: AttentionCall, answer: Answer | None) -> None:
        """Count a call and what was answered, None for dense attention; padding does not count."""
        if answer is not None and answer.pairs is not None:
            computed, allowed = answer.pairs
        else:
            pairs, allowed = _pairs(call)
            computed = pairs if answer is None else answer.density * pairs
        self.computed += min(computed, allowed)
        self.allowed += allowed
        self.calls += 1
        self.dense_calls += answer is None

    def add_masked(self, call: AttentionCall, mask: Tensor) -> None:
        """Count a call that was dense because of its mask."""
        links = allowed_links(mask).sum((-2, -1)).double().mean()
        pairs = float(links) * len(call.query) * call.query.shape[2] / mask.shape[-2]
        self.computed += pairs
        self.allowed += pairs
        self.calls += 1
        self.dense_calls += 1
        self.masked_calls += 1


def _pairs(call: AttentionCall) -> tuple[float, float]:
    """Query–key pairs of a head by the lengths of a call, and those among them that are no padding."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    pairs = len(call.query) * (queries * keys - (queries * (queries - 1) / 2 if call.causal else 0))
    if call.key_mask is None:
        return pairs, pairs
    seen = call.key_mask.long()
    each = (seen.cumsum(1) * seen)[:, -queries:] if call.causal else queries * seen
    return pairs, float(each.sum())


@dataclass(frozen=True)
class DensityReport:
    """What a method has computed so far.

    Attributes
    ----------
    tallies
        (layer, phase) → counts.
    """

    tallies: dict[tuple[int, Phase], Tally]

    def density(self, phase: Phase) -> float:
        """Share of the allowed pairs that was computed in a phase, over all layers; NaN if it did not occur."""
        found = [tally for (_, when), tally in self.tallies.items() if when == phase]
        allowed = sum(tally.allowed for tally in found)
        return sum(tally.computed for tally in found) / allowed if allowed else float("nan")

    def layers(self, phase: Phase) -> dict[int, float]:
        """Layer → its density in a phase."""
        return {layer: tally.density for (layer, when), tally in sorted(self.tallies.items()) if when == phase}

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain values, for JSON."""
        return {
            phase: {str(layer): density for layer, density in self.layers(phase).items()}
            for phase in ("prefill", "decode")
            if self.layers(phase)
        }

    def __str__(self) -> str:
        parts = [f"{phase} {self.density(phase):.1%}" for phase in ("prefill", "decode") if self.layers(phase)]
        masked = sum(tally.masked_calls for tally in self.tallies.values())
        calls = sum(tally.calls for tally in self.tallies.values())
        told = f"; {masked} of {calls} calls dense, by masks of more than causality and padding" if masked else ""
        return f"attention computed: {', '.join(parts) or 'none yet'}{told}"

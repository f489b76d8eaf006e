"""How much attention was computed: pairs of a query and a key, counted against what may be read at all."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from gossamer.core.block_geometry import BlockGeometry
from gossamer.models.attention_sites import AttentionCall, Phase, allowed_links

if TYPE_CHECKING:
    from gossamer.attention.base import Answer

COUNTING = threading.Lock()  # several threads may use one model


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
            allowed = allowed_pairs(call)
            computed = allowed if answer is None else answer.density * allowed
        self.computed += computed
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


def allowed_pairs(call: AttentionCall) -> float:
    """Pairs of a query and a key of a head that causality, a window and padding leave, over the batch."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.key_mask is not None:
        whole = BlockGeometry(queries, keys, (queries, keys), call.causal, call.key_mask.device)
        return float(whole.real_pairs(call.key_mask, call.window).sum())
    if not call.causal:
        return float(len(call.query) * queries * keys)
    window = keys if call.window is None else call.window
    return float(len(call.query) * (_read_up_to(keys, window) - _read_up_to(keys - queries, window)))


def _read_up_to(length: int, window: int) -> int:
    """Pairs of the first queries of a causal sequence."""
    short = min(length, window)
    return short * (short + 1) // 2 + (length - short) * window


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

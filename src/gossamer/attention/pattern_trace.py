"""How attention changes over the steps of a sample, from head to head, and from input to input.

Methods that find a pattern once and keep it rest on one observation: a head's important blocks stay where they are
while a sample is made, although those of two heads, or of two inputs, differ. :class:`PatternTrace` looks whether that
is so in a model at hand, before anything is made sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.attention.base import Answer
from gossamer.attention.selection import top_blocks
from gossamer.attention.state import StepwiseAttention
from gossamer.errors import CalibrationError, check_sparsity
from gossamer.kernels.attention import attention_with_lse, block_mass
from gossamer.models.attention_sites import AttentionCall


@dataclass(kw_only=True)
class PatternTrace(StepwiseAttention):
    """Dense attention that keeps the weight of every block, and every row's log-sum-exp, of all steps.

    Parameters
    ----------
    block_size
        Tokens of a block.

    Attributes
    ----------
    masses, sums
        (Step, layer) → block weights ``(batch, heads, query blocks, key blocks)``, and log-sum-exps
        ``(batch, heads, n)``, of the last sample.
    """

    block_size: int = 64
    masses: dict[tuple[int, int], Tensor] = field(init=False, repr=False, default_factory=dict)
    sums: dict[tuple[int, int], Tensor] = field(init=False, repr=False, default_factory=dict)

    def begin(self, steps: int, context: slice = slice(0, 0)) -> None:
        """A sample begins; what was kept of the last one is forgotten."""
        super().begin(steps, context)
        self.masses.clear()
        self.sums.clear()

    def mix(self, call: AttentionCall) -> Answer | None:
        """Dense, and looked at."""
        options = {"causal": False, "scale": call.scale, "key_mask": call.key_mask}
        output, lse = attention_with_lse(call.query, call.key, call.value, **options)
        place = (self.cache.index, call.layer)
        self.masses[place] = block_mass(call.query, call.key, lse, self.block_size, **options)
        self.sums[place] = lse.float()
        return Answer(output, 1.0)

    def between_steps(self, share: float = 0.3, gap: int = 1) -> float:
        """Overlap of a head's top blocks at one step with those `gap` steps later, mean over heads, layers and steps.

        Parameters
        ----------
        share
            Of each row's blocks that count as its pattern.
        gap
            Steps between the two.

        Raises
        ------
        CalibrationError
            If nothing was observed, or no two steps lie so far apart.
        """
        return self._mean(share, lambda step, layer: self._patterns(step + gap, layer, share))

    def between_heads(self, share: float = 0.3) -> float:
        """Overlap of the patterns of different heads of a layer, at the same step and for the same input."""
        return self._mean(share, lambda step, layer: self._patterns(step, layer, share), dimension=1)

    def between_inputs(self, share: float = 0.3) -> float:
        """Overlap of a head's patterns for different inputs of the batch, at the same step."""
        return self._mean(share, lambda step, layer: self._patterns(step, layer, share), dimension=0)

    def sum_correlation(self, gap: int = 1, across: str = "steps") -> float:
        """Correlation over rows of a head's log-sum-exps, mean over heads, layers and steps.

        Parameters
        ----------
        gap
            Steps between the two that are compared.
        across
            ``steps``, or ``heads`` or ``inputs``: then with the next head, or the next input, at the same step.
        """
        shift = {"steps": gap}.get(across, 0)
        pairs = [(rows, self.sums.get((step + shift, layer))) for (step, layer), rows in self.sums.items()]
        dimension = {"heads": 1, "inputs": 0}.get(across)
        found = [
            correlation(rows, later if dimension is None else later.roll(1, dimension)).mean()
            for rows, later in pairs
            if later is not None
        ]
        return _mean_of(found)

    def _patterns(self, step: int, layer: int, share: float) -> Tensor | None:
        mass = self.masses.get((step, layer))
        if mass is None:
            return None
        check_sparsity(1 - share, "1 − share")
        keep = max(1, round(share * mass.shape[-1]))
        return top_blocks(mass, keep, mass.new_ones(mass.shape[-2:], dtype=torch.bool))

    def _mean(self, share: float, partner: Callable[[int, int], Tensor | None], dimension: int | None = None) -> float:
        found = []
        for step, layer in self.masses:
            mine, other = self._patterns(step, layer, share), partner(step, layer)
            if mine is None or other is None:
                continue
            if dimension is None:
                found.append(overlap(mine, other).mean())
                continue
            shifts = range(1, mine.shape[dimension])
            found += [overlap(mine, other.roll(shift, dimension)).mean() for shift in shifts]
        return _mean_of(found)


def overlap(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of two patterns, bool ``(…, query blocks, key blocks)`` → ``(…,)``."""
    union = (one | other).sum((-2, -1))
    return (one & other).sum((-2, -1)) / union.clamp(min=1)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation over the last dimension; 0 where either does not vary."""
    one, other = one.double(), other.double()
    one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
    size = (one.square().sum(-1) * other.square().sum(-1)).sqrt()
    return torch.where(size > 0, (one * other).sum(-1) / size.clamp(min=1e-300), 0.0)


def _mean_of(found: list[Tensor]) -> float:
    if not found:
        raise CalibrationError("nothing to compare was observed; run a sample of more steps, heads or inputs first")
    return float(torch.stack(found).double().mean())

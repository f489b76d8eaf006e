"""How much each layer drops, when together they are to drop a given share of the weights.

Uniform budgets need no search. The greedy one goes through the model block by block: it raises the sparsity of
whichever layer of the block hurts the block's output least, again and again, until the block as a whole drops enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.core.channel_rules import ChannelRule
from gossamer.core.progress import track
from gossamer.errors import CalibrationError, ConfigurationError, SparsityError, check_sparsity
from gossamer.models.activation_sites import InputSite
from gossamer.models.blocks import Batch, Stage, stages

RuleMaker = Callable[[InputSite, float], ChannelRule]
"""From a site and a sparsity to its rule."""

_MOST = 0.95  # no layer is driven to nothing


@dataclass(frozen=True)
class GreedyAllocation:
    """Block-wise greedy budgets [Liu et al., 2024, arXiv 2408.14690, algorithm 1].

    In every round each layer of a block is tried with `step` / (its size ÷ that of the query matrix) more sparsity, the
    others as they are, and the layer whose trial changes the block's output least keeps its own. The change is the
    norm over the tokens at the end of each sequence, averaged over channels. The last step is shortened so that the
    budget is met exactly.

    Attributes
    ----------
    step
        Sparsity that a layer of the size of the query matrix gains in a round.
    tail
        Share of each sequence, at its end, on which outputs are compared.
    """

    step: float = 0.05
    tail: float = 0.25

    def __post_init__(self) -> None:
        for name, value in (("step", self.step), ("tail", self.tail)):
            if not 0 < value <= 1:
                raise ConfigurationError(f"{name} is {value}; it must be above 0 and at most 1")

    @staticmethod
    def check(sparsity: float) -> None:
        """Refuse a sparsity that no budgets reach, since no layer is driven to nothing."""
        check_sparsity(sparsity)
        if sparsity > _MOST:
            raise ConfigurationError(
                f"sparsity is {sparsity}; with allocation='greedy' it must be at most {_MOST}, since no single layer "
                f"drops more: lower it, or use allocation='uniform'"
            )

    def allocate(
        self,
        model: nn.Module,
        data: Iterable[Batch],
        sites: Sequence[InputSite],
        rule: RuleMaker,
        sparsity: float,
        progress: bool = True,
    ) -> dict[str, float]:
        """Name of a site → its sparsity, with a mean of `sparsity` over each block, weighted by size.

        Raises
        ------
        CalibrationError
            If the model is not one of blocks that can be run one by one.
        ConfigurationError
            If the sparsity is more than a single layer may have.
        """
        self.check(sparsity)
        found: dict[str, float] = {}
        blocks = len({site.block for site in sites})
        walk = stages(model, data)
        for stage in track(walk, "greedy budgets", total=blocks, enabled=progress):
            own = [site for site in sites if stage.owns(site.name)]
            if not stage.name:
                raise CalibrationError(f"{type(model).__name__} has no blocks to go through; use allocation='uniform'")
            if own:
                found |= self._block(stage, own, rule, sparsity)
        missing = next((site.name for site in sites if site.name not in found), None)
        if missing is not None:
            raise CalibrationError(f"{missing} is in no block of the model; exclude it, or use allocation='uniform'")
        return found

    def _block(self, stage: Stage, sites: list[InputSite], rule: RuleMaker, sparsity: float) -> dict[str, float]:
        """Budgets of one block, whose inputs are those of the dense model."""
        unit = self.step * next((s.size for s in sites if s.role in ("q", "qkv")), sites[0].size)
        total = sum(site.size for site in sites)
        dense = self._outputs(stage)
        budget = dict.fromkeys((site.name for site in sites), 0.0)
        left = sparsity * total
        while left > 1e-9 * total:
            trials: list[tuple[float, str, float, float]] = []
            for site in sites:
                gain = min(unit, left, (_MOST - budget[site.name]) * site.size)
                if gain > 0:
                    raised = budget | {site.name: budget[site.name] + gain / site.size}
                    trials.append((self._error(stage, sites, rule, raised, dense), site.name, raised[site.name], gain))
            _, name, value, gain = min(trials)
            budget[name] = value
            left -= gain
        return budget

    def _error(
        self, stage: Stage, sites: list[InputSite], rule: RuleMaker, budget: dict[str, float], dense: list[Tensor]
    ) -> float:
        with ExitStack() as hooks:
            for site in sites:
                if budget[site.name] > 0:
                    hooks.enter_context(_rule_at(site.module, rule(site, budget[site.name])))
            found = self._outputs(stage)
        gaps = [(a - b).norm(dim=1).mean(dim=-1) for a, b in zip(found, dense)]
        return float(torch.cat(gaps).mean())

    def _outputs(self, stage: Stage) -> list[Tensor]:
        """The last tokens of what the block puts out, ``(batch, tokens, d)`` float32 for each batch."""
        outputs: list[Tensor] = []

        def visit(before: Tensor, after: Tensor) -> None:
            count = max(1, round(self.tail * after.shape[1]))
            outputs.append(after[:, -count:].float())

        stage.forward(visit)
        return outputs


class _rule_at:
    """A rule on the input of a layer, for as long as the context lasts."""

    def __init__(self, module: nn.Module, rule: ChannelRule):
        self._module, self._rule = module, rule

    def __enter__(self) -> None:
        def mask(module: nn.Module, args: tuple) -> tuple:
            return (args[0] * self._rule.live(args[0]), *args[1:])

        self._handle = self._module.register_forward_pre_hook(mask)

    def __exit__(self, *exception: object) -> None:
        self._handle.remove()


def largest_within(measure: Callable[[float], float], limit: float, low: float, high: float, tolerance: float) -> float:
    """The largest value of a setting whose measure stays within a limit, by bisection.

    The measure need not be monotone: what is returned is `low`, or a setting that was tried and found within the limit.
    A setting that leaves a layer nothing to read (:class:`SparsityError`) counts as beyond it.

    Parameters
    ----------
    measure
        From a setting to what it costs.
    limit
        Most that it may cost.
    low, high
        Where to look; `low` is taken to be within the limit.
    tolerance
        Width of the bracket at which the search ends.
    """

    def within(setting: float) -> bool:
        try:
            return measure(setting) <= limit
        except SparsityError:
            return False

    if within(high):
        return high
    while high - low > tolerance:
        middle = (low + high) / 2
        if within(middle):
            low = middle
        else:
            high = middle
    return low

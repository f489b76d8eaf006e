"""Activate-while-pruning: let a share of what is pruned be weights that keep neurons silent.

Behind a ReLU all inputs of a layer are at least zero, so that a negative weight can only lower a pre-activation. Of
the negative weights, those that training has hardly moved are in nobody's way: removing them wakes neurons that were
zero for many inputs, and costs little. Whatever decides which weights are unimportant (the host) keeps the larger
share of each cycle's budget; the smaller one goes to such weights. Liu, Ghosh, Tan & Motani, 2023, arXiv 2212.06145.

Their published program, cycle by cycle, is :meth:`ActivateWhilePruning.tickets` with ``variant="full"``; where it
removes one weight more or less (thresholds, not counts) and gathers the weights of a layer twice, this one is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gossamer.core import scores
from gossamer.core.masks import MaskSet
from gossamer.core.registry import register
from gossamer.core.rounds import Round, Scores, drop_in_turn, prune_in_rounds
from gossamer.core.selection import dropped_count
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Phase, Sparsifier, check_steps
from gossamer.core.targets import Target
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.training.importance import HOSTS, Host

Sign = Literal["negative", "positive", "any"]
Pick = Literal["least-moved", "most-moved", "random"]
Movement = Literal["since_rewind", "since_initial"]
Variant = Literal["lite", "full"]


@dataclass(frozen=True)
class Ticket:
    """What one cycle left.

    Attributes
    ----------
    masks
        What remains.
    pruned, activated
        How many weights went by the host's criterion and by that of activation.
    wanted
        How many were to go by activation; more than `activated` if there were not enough candidates.
    """

    masks: MaskSet
    pruned: int
    activated: int
    wanted: int


@register(
    "ap",
    paper="ap",
    when="during training",
    needs_data=False,
    path=("dense-to-sparse",),
    topology="static",
    criterion=("magnitude", "activation"),
    allocation="global",
    aims=("inference", "quality"),
)
@dataclass(kw_only=True)
class ActivateWhilePruning(Sparsifier):
    """Prune by a host's criterion, and a little by removing negative weights that have barely moved.

    Parameters
    ----------
    sparsity
        In the end, of all targets together.
    host
        What is unimportant: a name (``"magnitude"``, ``"lamp"``, ``"random"``) or a function of a
        :class:`~gossamer.core.rounds.Round`, such as :class:`~gossamer.training.importance.SynFlow`, or
        :class:`~gossamer.training.growing_regularization.GrowingRegularization`, the IGReg of the paper.
    rate
        p: share of the remaining weights that a cycle removes.
    ap_fraction
        q: the part of it, also of the remaining weights, that goes to activation; 0 is the host alone.
    sign, pick
        Which weights activation removes. Other values than the defaults are the paper's controls.
    movement
        From which weights movement counts: those at the start of the cycle, or before the first.
    exclude_first
        Whether activation leaves the first layer alone, whose inputs may be negative.
    variant
        For :meth:`tickets`: ``"full"`` trains once more under a cycle's masks before the next cycle, as the authors
        do; in ``"lite"`` the next cycle's training is that one.
    begin, end
        For :meth:`attach`: steps between which the cycles are spread.
    include, exclude, heads, seed
        As for every :class:`~gossamer.core.sparsifier.Sparsifier`. The authors prune output layers too.

    Raises
    ------
    ConfigurationError
        If q is not below p, or a name is unknown.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> ActivateWhilePruning(sparsity=0.36).tickets(model, lambda model, masks: None)[-1].masks.sparsity
    0.36
    """

    sparsity: float = 0.9
    host: str | Host = "magnitude"
    rate: float = 0.2
    ap_fraction: float = 0.02
    sign: Sign = "negative"
    pick: Pick = "least-moved"
    movement: Movement = "since_rewind"
    exclude_first: bool = False
    variant: Variant = "lite"
    begin: int = 0
    end: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.begin, self.end, 1)
        if not 0 < self.rate < 1 or not 0 <= self.ap_fraction < self.rate:
            raise ConfigurationError(
                f"rate is {self.rate} and ap_fraction {self.ap_fraction}; 0 <= ap_fraction < rate < 1 is needed"
            )
        for name, known in (("sign", Sign), ("pick", Pick), ("movement", Movement), ("variant", Variant)):
            if getattr(self, name) not in get_args(known):
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; use {', '.join(get_args(known))}")
        if isinstance(self.host, str) and self.host not in HOSTS:
            raise ConfigurationError(f"host is {self.host!r}; use {', '.join(HOSTS)}, or a function")

    def sparsities(self) -> list[float]:
        """Sparsity after each cycle: ``1 − (1 − p)^k``, the last one as asked for."""
        cycles = max(1, math.ceil(math.log(1 - self.sparsity) / math.log(1 - self.rate) - 1e-9))
        return [round(1 - (1 - self.rate) ** (cycle + 1), 12) for cycle in range(cycles - 1)] + [self.sparsity]

    def choose(self, ended: Round, sparsity: float) -> tuple[dict[str, Tensor], tuple[int, int, int]]:
        """Steps c and d of a cycle: prune by the host, then remove what keeps neurons silent.

        Returns
        -------
        dict, tuple of int
            Masks by target, and the weights removed by the host, by activation, and wanted by activation. Where there
            are too few candidates for activation, the host removes the rest.
        """
        going = dropped_count(ended.total, sparsity) - (ended.total - ended.remaining)
        if going < 0:
            raise SparsityError(f"sparsity {sparsity} is below that of the weights which remain already")
        wanted = min(going, dropped_count(ended.remaining, self.ap_fraction))
        host = HOSTS[self.host] if isinstance(self.host, str) else self.host
        parts = (host(ended), going - wanted), (self._silencing(ended), wanted)
        masks, (pruned, activated) = drop_in_turn(ended.alive, *parts)
        return masks, (pruned, activated, wanted)

    def _silencing(self, ended: Round) -> Scores:
        """``|w − w_start|`` of the candidates, infinity elsewhere."""
        first = ended.targets[0]

        def score(target: Target) -> Tensor:
            weight = target.matrix()
            moved = ended.movement(target, since="start" if self.movement == "since_rewind" else "initial")
            order = {"least-moved": moved, "most-moved": -moved}.get(self.pick)
            if order is None:
                order = scores.random(weight, ended.generator)
            other = {"negative": weight >= 0, "positive": weight <= 0, "any": torch.zeros_like(weight).bool()}[
                self.sign
            ]
            return order.masked_fill(other | (self.exclude_first and target is first), torch.inf).cpu()

        return {target.name: score(target) for target in ended.targets} if self.ap_fraction else ended.scores(score)

    # ------------------------------------------------------------------------------------------ between trainings

    def tickets(
        self,
        model: nn.Module,
        train: Callable[[nn.Module, MaskSet], Any],
        *,
        rewind: Callable[[nn.Module], Any] | None = None,
        restart: bool = True,
    ) -> list[Ticket]:
        """Run whole cycles: train to the end, prune, activate, go back.

        Parameters
        ----------
        model, train, rewind, restart
            As for :func:`gossamer.core.rounds.prune_in_rounds`: by default the weights return to those of `model` (a
            lottery ticket); with `rewind` to those after a little training; with ``restart=False`` only what `train`
            itself sets anew starts again, such as the learning rate.

        Returns
        -------
        list of Ticket
            One for each cycle; the first is for the sparsity `rate`.

        Raises
        ------
        NonFiniteError
            If training diverged; names the layer.
        """
        goals, counts = self.sparsities(), []

        def choose(ended: Round) -> Mapping[str, Tensor]:
            for target in ended.targets:
                target.check_finite()
            masks, removed = self.choose(ended, goals[ended.number])
            counts.append(removed)
            return masks

        found = prune_in_rounds(
            model,
            train,
            choose,
            len(goals),
            rewind=rewind,
            restart=restart,
            retrain=self.variant == "full",
            seed=self.seed,
            include=self.include,
            exclude=self.exclude,
            heads=self.heads,
        )
        return [Ticket(masks, *removed) for masks, removed in zip(found, counts)]

    # ------------------------------------------------------------------------------------------ within one training

    def start(self, training: SparseTraining) -> None:
        """Remember the first weights."""
        now = _weights(training)
        training.extra |= {"cycle": 0, "activated": 0, "start": now}
        if self.movement == "since_initial":
            training.extra["initial"] = now

    def change(self, training: SparseTraining) -> None:
        """Make the cycles that are due: at equal distances from `begin` to `end`."""
        goals = self.sparsities()
        due = sum(training.step >= self._step(cycle, len(goals)) for cycle in range(len(goals)))
        if due > training.extra["cycle"]:
            self._cycle(training, goals[due - 1], due)

    def finish(self, training: SparseTraining) -> None:
        """Make the last cycle at once if training ended before it."""
        goals = self.sparsities()
        if training.extra["cycle"] < len(goals):
            self._cycle(training, goals[-1], len(goals))

    def phase(self, step: int) -> Phase:
        """Warm-up, ramp, then frozen."""
        return "warm-up" if step <= self.begin else "ramp" if step < self.end else "frozen"

    def _step(self, cycle: int, cycles: int) -> int:
        return self.begin + max(1, round((cycle + 1) / cycles * (self.end - self.begin)))

    def _cycle(self, training: SparseTraining, sparsity: float, number: int) -> None:
        targets: Sequence[Target] = list(training.targets.values())
        alive = {name: training.mask(name).cpu() for name in training.targets}
        start = training.extra["start"]
        initial = training.extra.get("initial", start)
        ended = Round(number - 1, training.model, targets, alive, initial, start, training.generator)
        for target in targets:
            target.check_finite()
        masks, (_, activated, _) = self.choose(ended, sparsity)
        training.assign(masks)
        training.extra |= {"cycle": number, "activated": training.extra["activated"] + activated}
        training.extra["start"] = _weights(training)


def _weights(training: SparseTraining) -> dict[str, Tensor]:
    return {name: training.weight(name).clone() for name in training.targets}

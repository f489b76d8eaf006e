"""Ten Lessons' point, on runs of our own: who is best depends on what is held equal, and zeros alone save no time.

One convolutional network learns handwritten digits with 90 % zeros in seven ways: first with the same number of steps
in each stage of every method, as comparisons by accuracy alone have it, and then with the same training operations for
all. The rules of :mod:`gossamer.measure.fair_comparison` must refuse the first comparison for the stages that it does
not count, and pass the second. Beside that, a network with 90 % of its weights at zero anywhere is timed against one
with half of its channels removed, both in torch's dense kernels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any

import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.sparsifier import Sparsifier
from gossamer.core.taxonomy import Taxonomy
from gossamer.measure import interleave
from gossamer.measure.fair_comparison import Contestant, Violation, check_comparison, needed_overhead
from gossamer.measure.training_cost import TrainingCost
from gossamer.methods import method as specification
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import Recipe, accuracy, convolutional, train_measured
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.pruning.magnitude import Magnitude
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.granet import GraNet
from gossamer.training.random_pruning import RandomPruning
from gossamer.training.rigl import RigL
from gossamer.training.static import Static

SPARSITY = 0.9
TICKET, ONE_SHOT, SMALL = "lottery ticket", "one-shot, then tuned", "small and dense"
_CYCLES = 3
_TRIES, _CLOSE = 3, 0.02
QUICK: dict[str, Any] = {
    "images": 400,
    "batch": 64,
    "channels": [32, 64, 64],
    # in each stage of every method
    "steps": 120,
    # what all methods may spend in the second comparison, in steps of the dense network
    "budget": 50,
    "rounds": 15,
}
FULL: dict[str, Any] = QUICK | {"steps": 600, "budget": 250, "rounds": 51}


@dataclass(frozen=True)
class _Task:
    """What all methods share."""

    training: Digits
    held_out: Digits
    channels: tuple[int, ...]
    batch: int
    seed: int

    def network(self, channels: Sequence[int] | None = None) -> nn.Module:
        torch.manual_seed(self.seed)
        return convolutional(*(channels or self.channels))

    def train(self, model: nn.Module, steps: int, method: Sparsifier | None = None) -> tuple[MaskSet | None, Any]:
        return train_measured(model, self.training, Recipe(steps, self.batch), self.seed, method)


Trained = tuple[nn.Module, MaskSet | None, list[TrainingCost]]
"""A network, what remains of it, and what each stage cost."""


def _at_once(method: Callable[[_Task, int], Sparsifier | None], task: _Task, steps: int) -> Trained:
    model = task.network()
    masks, cost = task.train(model, steps, method(task, steps))
    return model, masks, [cost]


def _ticket(task: _Task, steps: int) -> Trained:
    """Train, prune a part, go back to the start: three times [Frankle and Carbin, 2019, arXiv 1803.03635]."""
    model, masks, costs = task.network(), None, []
    for cycle in range(_CYCLES + 1):
        trained = copy.deepcopy(model)
        method = None if masks is None else Static(masks=masks)
        costs.append(task.train(trained, steps, method)[1])
        if cycle < _CYCLES:
            masks = _largest(trained, 1 - (1 - SPARSITY) ** ((cycle + 1) / _CYCLES))
    return trained, masks, costs


def _one_shot(task: _Task, steps: int) -> Trained:
    model = task.network()
    _, dense = task.train(model, steps)
    masks = _largest(model, SPARSITY)
    _, tuned = task.train(model, steps, Static(masks=masks))
    return model, masks, [dense, tuned]


def _small(task: _Task, steps: int) -> Trained:
    """A dense network with at most as many parameters as a sparse one keeps."""
    size = sum(p.numel() for p in task.network().parameters())
    share = 1.0
    while sum(p.numel() for p in task.network(_scaled(task, share)).parameters()) > (1 - SPARSITY) * size:
        share -= 0.01
    model = task.network(_scaled(task, share))
    return model, None, [task.train(model, steps)[1]]


def _scaled(task: _Task, share: float) -> tuple[int, ...]:
    return tuple(max(1, math.floor(share * width)) for width in task.channels)


def _largest(model: nn.Module, sparsity: float) -> MaskSet:
    return Magnitude(sparsity=sparsity, pattern="unstructured:model").prune(copy.deepcopy(model)).masks


def _snip(task: _Task, steps: int) -> Sparsifier:
    batch = (task.training.images[:256], task.training.labels[:256])
    return RandomPruning(sparsity=SPARSITY, heads=False, allocation="snip", batch=batch, redraw=False)


def _every(steps: int) -> dict[str, int]:
    return {"every": max(1, steps // 24)}


_TRAINED: dict[str, Callable[[_Task, int], Trained]] = {
    SMALL: _small,
    "random": partial(_at_once, lambda task, n: Static(sparsity=SPARSITY)),
    "SNIP": partial(_at_once, _snip),
    "RigL": partial(_at_once, lambda task, n: RigL(sparsity=SPARSITY, end=n * 3 // 4, **_every(n))),
    "GMP": partial(_at_once, lambda task, n: GradualMagnitudePruning(sparsity=SPARSITY, end=n * 3 // 4, **_every(n))),
    "GraNet": partial(_at_once, lambda task, n: GraNet(sparsity=SPARSITY, heads=False, end=n, **_every(n))),
    ONE_SHOT: _one_shot,
    TICKET: _ticket,
}
_PHASES = {ONE_SHOT: ("dense training", "tuning"), TICKET: ("dense training", "earlier cycles", "last cycle")}


def taxonomy(name: str) -> Taxonomy | None:
    """Where a contestant stands."""
    if name == SMALL:
        return None
    if name in (ONE_SHOT, TICKET):
        return replace(specification("magnitude").taxonomy, allocation="global", patterns=("unstructured",))
    registered = {"random": "static", "SNIP": "random-pruning"}.get(name, name.lower())
    found = specification(registered).taxonomy
    return replace(found, criterion=("gradient",), allocation="global") if name == "SNIP" else found


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Both comparisons, and the two times."""
    training, held_out = digits().split(settings["images"], seed)
    task = _Task(training, held_out, tuple(settings["channels"]), settings["batch"], seed)
    dense = task.network()
    cost = task.train(dense, settings["steps"])[1]
    budget = cost.training_flops / settings["steps"] * settings["budget"]
    by_steps, by_operations = {}, {}
    for name, train in progress(_TRAINED.items(), "two budgets"):
        by_steps[name] = _trained(task, train, settings["steps"])
        by_operations[name] = _within(budget, settings["steps"], by_steps[name], partial(_trained, task, train))
    return {
        "dense": accuracy(dense, held_out),
        "by steps": by_steps,
        "by operations": by_operations,
        "speed": _speed(task, settings["rounds"]),
        "curves": {
            title: {"x": list(range(1, len(found) + 1)), "y": [100 * found[name]["quality"] for name in _TRAINED]}
            for title, found in {"equal steps a stage": by_steps, "equal operations": by_operations}.items()
        },
    }


def _trained(task: _Task, train: Callable[[_Task, int], Trained], steps: int) -> dict[str, Any]:
    return _result(task, *train(task, steps))


def _within(budget: float, steps: int, found: dict[str, Any], train: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """Train for as many steps as the budget allows; what is done at a fixed number of them, such as growing by the
    gradient of all weights, makes operations no multiple of steps, so that the number may have to be mended.
    """
    for _ in range(_TRIES):
        steps = max(1, round(steps * budget / found["all operations"]))
        found = train(steps)
        if abs(found["all operations"] - budget) <= _CLOSE * budget:
            break
    return found


def _result(task: _Task, model: nn.Module, masks: MaskSet | None, costs: list[TrainingCost]) -> dict[str, Any]:
    whole = reduce(add, costs)
    pruned = 0 if masks is None else masks.total - masks.kept
    return {
        "quality": accuracy(model, task.held_out),
        "sparsity": 0.0 if masks is None else masks.sparsity,
        "parameters": sum(p.numel() for p in model.parameters()) - pruned,
        "epochs": [cost.units / len(task.training) for cost in costs],
        "operations": [cost.training_flops for cost in costs],
        "all operations": whole.training_flops,
    }


def _speed(task: _Task, rounds: int) -> dict[str, float]:
    """How many times faster than dense in dense kernels: 90 % of weights at zero anywhere, and half of the channels."""
    networks = {"dense": task.network().eval(), "channels": task.network(_scaled(task, 0.5)).eval()}
    networks["anywhere"] = copy.deepcopy(networks["dense"])
    _largest(networks["anywhere"], SPARSITY).apply_(networks["anywhere"])
    images = task.training.images[:256]
    with torch.inference_mode():
        seconds = interleave({name: partial(net, images) for name, net in networks.items()}, rounds)
    return {name: seconds["dense"].median / seconds[name].median for name in ("anywhere", "channels")}


def contestants(observations: Sequence[Observation], budget: str) -> list[Contestant]:
    """The records of one comparison; that by steps counts the last stage of each method only."""
    found = []
    for name in _TRAINED:
        seeds = [observation[budget][name] for observation in observations]
        stage = slice(-1, None) if budget == "by steps" else slice(None)
        stands = taxonomy(name)
        phases = _PHASES.get(name, ("training",))
        found.append(
            Contestant(
                name=name,
                taxonomy=stands,
                quality=tuple(seed["quality"] for seed in seeds),
                sparsity=seeds[0]["sparsity"],
                parameters=seeds[0]["parameters"],
                epochs=_mean([sum(seed["epochs"][stage]) for seed in seeds]),
                training_flops=_mean([sum(seed["operations"][stage]) for seed in seeds]),
                phases=phases,
                included=phases[stage],
                overhead=() if stands is None else tuple(needed_overhead(stands)),
            )
        )
    return found


def refused(observations: Sequence[Observation], budget: str) -> list[Violation]:
    """Rules that a comparison breaks."""
    equal = "epochs" if budget == "by steps" else "training_flops"
    return check_comparison(contestants(observations, budget), equal)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rank(observation: Observation, budget: str) -> int:
    """How many methods are better than the lottery ticket."""
    found = observation[budget]
    return sum(found[name]["quality"] > found[TICKET]["quality"] for name in _TRAINED)


def decide(observations: list[Observation]) -> Verdict:
    """What the ticket loses when its cycles count, what channels gain in time, and what the rules say."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    falls = mean_interval([_rank(o, "by operations") - _rank(o, "by steps") for o in observations])
    faster = mean_interval([math.log(o["speed"]["channels"] / o["speed"]["anywhere"]) for o in observations])
    numbers: dict[str, Interval | float] = {
        "places that the lottery ticket loses at equal operations": falls,
        "log of the speed of half the channels over 90 % of weights anywhere": faster,
    }
    for name in ("anywhere", "channels"):
        numbers[f"times faster than dense, {name}"] = _mean([o["speed"][name] for o in observations])
    for budget in ("by steps", "by operations"):
        for name in _TRAINED:
            numbers[f"accuracy {budget}, {name}"] = _mean([o[budget][name]["quality"] for o in observations])
    left_out = {violation.name for violation in refused(observations, "by steps") if violation.rule == "R2"}
    broken = [violation for violation in refused(observations, "by operations") if violation.rule != "R7"]
    numbers["methods refused when stages are left out"] = float(len(left_out))
    numbers["rules broken at equal operations"] = float(len(broken))
    rules_work = left_out == {ONE_SHOT, TICKET} and not broken
    if falls.above_zero and faster.above_zero and rules_work:
        return Verdict(
            "holds", "the order depends on what is equal, and zeros anywhere save no time by themselves", numbers
        )
    if falls.high <= 0 or faster.below_zero or not rules_work:
        reasons = {
            "the lottery ticket keeps its place": falls.high <= 0,
            "zeros anywhere are faster than half the channels": faster.below_zero,
            f"the rules say otherwise: {'; '.join(map(str, broken)) or sorted(left_out)}": not rules_work,
        }
        return Verdict("does not hold", "; ".join(text for text, true in reasons.items() if true), numbers)
    return Verdict("inconclusive", "an interval reaches across zero", numbers)


experiment = Experiment(
    slug="ten-lessons",
    claim=(
        "Which sparse method is best depends on what a comparison holds equal, and zeros by themselves do not make a "
        "network faster."
    ),
    rule=(
        "holds if, at 95 % over seeds, iterative magnitude pruning with rewinding loses places among eight networks of "
        "equally many parameters when all stages of all of them may spend the same operations instead of the same "
        "steps a stage; half of the channels removed is faster in dense kernels than 90 % of weights at zero; and the "
        "rules of fair comparison refuse exactly the two methods whose first stages are left out, and break nowhere "
        "at equal operations; does not hold if one of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="small, random, SNIP, RigL, GMP, GraNet, one-shot, lottery ticket",
    y_label="accuracy, %",
)

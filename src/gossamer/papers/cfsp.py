"""CFSP against the other pruners of feed-forward channels, at equal channels and on equal data.

All see the same calibration windows of one book and are judged on a stretch of another, at the same number of
channels, aligned alike. The ablations are CFSP's own: budgets for each block against the same share for all of them
(``allocation=uniform``), and the normaliser of the released code, with which only the activation norm decides
(``normalize=hidden``). Then the pruned model is trained a little, once with ranks that follow the importance of the
blocks and once with one rank for all, from the same seed and at the same total rank. What the smaller layers gain in
time is measured in turns with the dense ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gossamer.measure import interleave, ratio
from gossamer.methods import method as specification
from gossamer.models import calibration_batches
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest, case, gap, mean, perplexity_curves
from gossamer.papers.results import Outcome, Verdict
from gossamer.pruning.base import prune
from gossamer.pruning.channels import ChannelPruningResult
from gossamer.pruning.recovery import rank_plan, recover

RIVALS = ("magnitude-sp", "wanda-sp", "flap", "random-channels")
SPARSITY = 0.3


def _cases(sparsity: float) -> list[list[Any]]:
    plain = [case(method, sparsity) for method in ("cfsp", *RIVALS)]
    return [*plain, case("cfsp", sparsity, allocation="uniform"), case("cfsp", sparsity, normalize="hidden")]


QUICK: dict[str, Any] = {
    "model": "demo",
    "calibration": "state-of-the-union",
    "held_out": "moby-dick",
    "sequences": 4,
    "length": 256,
    "tokens": 1536,
    "window": 512,
    "align": 32,
    "cases": _cases(SPARSITY),
    "steps": 16,
    "mean rank": 8,
    "training length": 128,
    "timing rounds": 3,
}
FULL: dict[str, Any] = {
    **QUICK,
    "sequences": 32,
    "length": 512,
    "tokens": 16_384,
    "window": 1024,
    "cases": [case for sparsity in (0.2, SPARSITY, 0.5) for case in _cases(sparsity)],
    "steps": 200,
    "training length": 512,
    "timing rounds": 9,
}
MAIN = f"cfsp at {SPARSITY}"
GUIDED, UNIFORM = "recovered, guided ranks", "recovered, one rank"


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Prune copies with every case, recover two copies of the one that CFSP made, and time its layers."""
    contest = Contest.of(settings, seed)
    windows = contest.windows(settings["sequences"])
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll()}}
    chosen: tuple[nn.Module, ChannelPruningResult] | None = None
    for label, method, options in progress(settings["cases"], "pruning and measuring"):
        model = copy.deepcopy(contest.model)
        data = windows if specification(method).needs_data else None
        result = prune(model, method, calibration=data, progress=False, align=settings["align"], **options)
        points[label] = {
            "nll": contest.nll(model),
            "sparsity": 1 - sum(new for _, new in result.widths.values()) / sum(w for w, _ in result.widths.values()),
            "seconds": result.seconds["total"],
        }
        if label == MAIN:
            chosen = model, result
    assert chosen is not None
    pruned, result = chosen
    length = settings["training length"]
    training = calibration_batches(contest.text, contest.tokenizer, settings["steps"], length, seed + 1000)
    rank = settings["mean rank"]
    for label, ranks in progress(
        [(GUIDED, rank_plan(result.importance, rank)), (UNIFORM, dict.fromkeys(result.importance, rank))], "recovering"
    ):
        model = copy.deepcopy(pruned)
        done = recover(model, training, lora_rank=ranks, steps=settings["steps"], seed=seed, progress=False)
        points[label] = {"nll": contest.nll(model), "trained": done.trained, "lowest": min(ranks.values())}
    gained = _time_gained(contest.model, pruned, result, length, settings["timing rounds"])
    return {"points": points, "time gained": gained, "curves": perplexity_curves(points, settings["cases"])}


@torch.no_grad()
def _time_gained(dense: nn.Module, pruned: nn.Module, result: ChannelPruningResult, tokens: int, rounds: int) -> float:
    """Share of the feed-forward layers' time that is gone, per share of their channels that is gone."""
    modules = {
        name: [layer.module for layer in find_feed_forwards(model) if layer.name in result.widths]
        for name, model in (("dense", dense), ("pruned", pruned))
    }
    hidden = find_feed_forwards(dense)[0].down.shape[0]
    x = torch.randn(1, tokens, hidden, generator=torch.Generator().manual_seed(0))

    def through(name: str) -> None:
        for module in modules[name]:
            module(x)

    timings = interleave({name: (lambda name=name: through(name)) for name in modules}, repeats=rounds)
    before, after = map(sum, zip(*result.widths.values()))
    return (1 - ratio(timings["pruned"], timings["dense"]).median) / (1 - after / before)


def decide(observations: Sequence[Observation]) -> Verdict:
    """Log perplexities at the main sparsity, paired by seed."""
    at = MAIN.removeprefix("cfsp")
    rivals = {f"{rival} − cfsp": gap(observations, rival + at, MAIN) for rival in RIVALS}
    parts = {
        "uniform budgets − cfsp": gap(observations, f"cfsp allocation=uniform{at}", MAIN),
        "one rank − guided ranks": gap(observations, UNIFORM, GUIDED),
    }
    numbers: dict[str, Any] = {**rivals, **parts}
    numbers["normaliser of the released code − cfsp"] = gap(observations, f"cfsp normalize=hidden{at}", MAIN)
    numbers["recovered − cfsp"] = gap(observations, GUIDED, MAIN)
    numbers |= {f"perplexity, {name}": math.exp(mean(observations, name)) for name in observations[0]["points"]}
    shares = sorted(observation["time gained"] for observation in observations)
    numbers["time gained per channel gone"] = shares[len(shares) // 2]
    below = [name for name, interval in (rivals | parts).items() if interval.below_zero]
    outcome: Outcome
    if below:
        outcome, reason = "does not hold", f"wholly below zero: {', '.join(below)}"
    elif all(interval.above_zero for interval in rivals.values()):
        outcome, reason = "holds", "CFSP is ahead of every other method, and its two plans cost nothing"
    else:
        reached = [name for name, interval in rivals.items() if not interval.above_zero]
        outcome, reason = "inconclusive", f"the interval reaches across zero: {', '.join(reached)}"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="cfsp",
    claim=(
        "At equal channels CFSP's perplexity is below that of Magnitude-SP, Wanda-SP and FLAP; budgets and ranks that "
        "follow the importance of the blocks are no worse than uniform ones."
    ),
    rule=(
        "at 30 % of the channels, paired over seeds at 95 %: holds if log perplexity of each rival (and of random "
        "channels) minus CFSP is above zero and neither that of uniform budgets minus CFSP nor that of one rank minus "
        "guided ranks lies wholly below; does not hold if any of them lies wholly below zero"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="share of feed-forward channels removed",
    y_label="perplexity",
    logarithmic=True,
)

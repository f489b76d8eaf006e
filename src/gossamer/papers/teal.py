"""TEAL on a pretrained language model: what thresholds on inputs cost, and what other ways to zero them cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gossamer.activations.chess import Chess
from gossamer.activations.teal import Teal
from gossamer.activations.wina import Wina
from gossamer.core.targets import find_targets
from gossamer.models.activation_functions import relufy
from gossamer.papers.activation_contest import (
    FULL,
    QUICK,
    activation_curves,
    judged,
    matched,
    nll_gap,
    random_rules,
    reported,
    sweep,
)
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest
from gossamer.papers.results import Outcome, Verdict

NEAR = math.log(1.1)
_GREEDY_TOKENS = 128


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Thresholds at several sparsities, and at half of the weights all the other ways."""
    contest = Contest.of(settings, seed)
    windows = contest.windows(settings["sequences"])
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll()}}
    steps = iter(progress(range(6), "thresholds, random, top-k, CATS, greedy, ReLU"))
    next(steps)
    points |= sweep(contest, Teal(), windows, settings["sparsities"], "teal")
    next(steps)
    points["random at 0.5"] = judged(contest, random_rules(contest, 0.5, seed))
    next(steps)
    points |= sweep(contest, Wina(norm_sites=()), windows[:1], [0.5], "top-k")
    next(steps)
    cats = Chess(attention="none", channel_thresholds=False)
    cats.calibrate(contest.model, windows, progress=False)
    # CATS spares up and down only, two thirds of the feed-forward layers, so it must close more gates for as much
    points["cats at 0.4"] = matched(contest, points["teal at 0.4"]["share"], cats.at)
    next(steps)
    short = [window[:, :_GREEDY_TOKENS] for window in windows[: settings["greedy sequences"]]]
    greedy = Teal(allocation="greedy", step=settings["greedy step"])
    greedy.calibrate(contest.model, short, progress=False)
    uniform = Teal()
    uniform.calibrate(contest.model, short, progress=False)
    points["greedy at 0.5"], points["uniform, same data at 0.5"] = (
        judged(contest, method.rules_) for method in (greedy, uniform)
    )
    # on so little data the sparsity that a budget reaches is not what was asked for
    points["uniform, as many weights"] = matched(contest, points["greedy at 0.5"]["share"], uniform.at)
    next(steps)
    points["relu instead"] = {"nll": _with_relu(contest)}
    return {"points": points, "curves": activation_curves(points), "layers": len(find_targets(contest.model))}


def _with_relu(contest: Contest) -> float:
    changed = relufy(contest.model)
    try:
        return contest.nll()
    finally:
        changed.undo()


def decide(observations: Sequence[Observation]) -> Verdict:
    """Four comparisons of log perplexity, paired by seed."""
    price = nll_gap(observations, "teal at 0.4", "dense")
    chance = nll_gap(observations, "random at 0.5", "teal at 0.5")
    budget = nll_gap(observations, "uniform, as many weights", "greedy at 0.5")
    cats = nll_gap(observations, "cats at 0.4", "teal at 0.4")
    numbers: dict[str, Any] = {
        "teal at 0.4 − dense": price,
        "random − teal at 0.5": chance,
        "uniform − greedy, as many weights read": budget,
        "uniform − greedy, both asked for 0.5": nll_gap(observations, "uniform, same data at 0.5", "greedy at 0.5"),
        "cats − teal, as many weights read as at 0.4": cats,
        "top-k − teal at 0.5": nll_gap(observations, "top-k at 0.5", "teal at 0.5"),
        "ReLU instead of the activation − dense": nll_gap(observations, "relu instead", "dense"),
        **reported(observations),
    }
    outcome: Outcome
    if price.high < NEAR and chance.above_zero and cats.above_zero and not budget.below_zero:
        outcome, reason = "holds", "40% of the weights skipped for less than a tenth of perplexity, and rivals pay more"
    elif price.low > NEAR or chance.below_zero or cats.below_zero or budget.below_zero:
        outcome, reason = "does not hold", "a comparison lies wholly on the other side of its bound"
    else:
        outcome, reason = "inconclusive", "an interval reaches across its bound"
    return Verdict(outcome, reason, numbers)


_QUICK = {**QUICK, "greedy sequences": 1, "greedy step": 0.25}
experiment = Experiment(
    slug="teal",
    claim=(
        "Without training, thresholds on the inputs of all layers skip 40% of a language model's weights at little "
        "cost in perplexity, less than random channels or thresholds on gates alone; greedy budgets are no "
        "worse than one "
        "sparsity for all layers."
    ),
    rule=(
        "holds if, paired over seeds at 95%, log perplexity at 40% minus dense is below log 1.1, random minus TEAL at "
        "50% above zero, CATS minus TEAL at equal weights read above zero, and uniform minus greedy at equal weights "
        "read not wholly below zero; does not hold if any lies wholly on the other side"
    ),
    run=run,
    decide=decide,
    budgets={"quick": _QUICK, "full": {**FULL, "greedy sequences": 10, "greedy step": 0.05}},
    seeds=3,
    x_label="sparsity of the treated layers that was asked for",
    y_label="perplexity",
    logarithmic=True,
)

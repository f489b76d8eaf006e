"""Magnitude pruning as the baseline: better than chance, worse than whatever has seen data, monotone in sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gossamer.papers.experiment import Experiment, Observation
from gossamer.papers.one_shot_comparison import FULL, QUICK, case, gap, mean, run
from gossamer.papers.results import Verdict

_CASES = [
    case("random", 0.5),
    case("magnitude", 0.3),
    case("magnitude", 0.5),
    case("magnitude", 0.5, pattern="unstructured:row"),
    case("magnitude", 0.5, pattern="unstructured:model"),
    case("magnitude", 0.5, largest=True),
    case("wanda", 0.5),
]
_MORE = [case(m, s) for m in ("magnitude", "random", "wanda") for s in (0.1, 0.2, 0.4, 0.6, 0.7, "2:4", "4:8")]


def decide(observations: Sequence[Observation]) -> Verdict:
    """Order of log perplexities, paired by seed."""
    order = {
        "random − magnitude": gap(observations, "random at 0.5", "magnitude at 0.5"),
        "largest − magnitude": gap(observations, "magnitude largest=True at 0.5", "magnitude at 0.5"),
        "magnitude − wanda": gap(observations, "magnitude at 0.5", "wanda at 0.5"),
        "50 % − 30 %": gap(observations, "magnitude at 0.5", "magnitude at 0.3"),
    }
    numbers = {**order} | {
        f"perplexity, {label}": math.exp(mean(observations, label)) for label in observations[0]["points"]
    }
    if all(value.above_zero for value in order.values()):
        outcome, reason = "holds", "random and the largest are worse, Wanda is better, and more zeros cost more"
    elif any(value.below_zero for value in order.values()):
        outcome, reason = "does not hold", "an ordering is reversed"
    else:
        outcome, reason = "inconclusive", "an interval includes zero"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="magnitude",
    claim="One-shot magnitude pruning of a language model beats chance by far but loses to scores that have seen data.",
    rule=(
        "holds if, paired over seeds at 95 %, log perplexity at 50 % is higher for random pruning and for dropping the "
        "largest than for magnitude, higher for magnitude than for Wanda, and higher at 50 % than at 30 %; does not "
        "hold if any of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": {**QUICK, "cases": _CASES}, "full": {**FULL, "cases": [*_CASES, *_MORE]}},
    seeds=3,
    x_label="sparsity",
    y_label="perplexity",
    logarithmic=True,
)

"""SparseGPT on a pretrained language model: what the weight update is worth, in layer error and in perplexity.

Even the quick budget takes 4,096 calibration tokens, more than the widest layer has inputs: with fewer the Hessian has
no full rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gossamer.papers.experiment import Experiment, Observation
from gossamer.papers.one_shot_comparison import FULL, QUICK, case, gap, mean, run
from gossamer.papers.results import Verdict

_CASES = [
    case("wanda", 0.5),
    case("wanda", 0.7),
    case("sparsegpt", 0.5),
    case("sparsegpt", 0.7),
    case("sparsegpt", 0.5, update=False),
    case("magnitude", 0.5),
]
_MORE = [case(m, s) for m in ("wanda", "sparsegpt", "magnitude") for s in (0.6, "2:4", "4:8")]
_MORE.append(case("dsnot", 0.7))
_MASK_ONLY = "sparsegpt update=False at 0.5"


def decide(observations: Sequence[Observation]) -> Verdict:
    """Order of the layer errors at 50 %, and the gap to Wanda in log perplexity at 50 % and 70 %."""
    errors = {
        "error: mask only − sparsegpt": gap(observations, _MASK_ONLY, "sparsegpt at 0.5", "error"),
        "error: wanda − sparsegpt": gap(observations, "wanda at 0.5", "sparsegpt at 0.5", "error"),
        "error: magnitude − wanda": gap(observations, "magnitude at 0.5", "wanda at 0.5", "error"),
    }
    at_half = gap(observations, "wanda at 0.5", "sparsegpt at 0.5")
    at_seventy = gap(observations, "wanda at 0.7", "sparsegpt at 0.7")
    numbers = {**errors, "wanda − sparsegpt at 50 %": at_half, "wanda − sparsegpt at 70 %": at_seventy}
    numbers |= {
        f"perplexity, {label}": math.exp(mean(observations, label))
        for label in ("dense", "wanda at 0.5", "sparsegpt at 0.5", "wanda at 0.7", "sparsegpt at 0.7")
    }
    if all(value.above_zero for value in errors.values()) and at_seventy.above_zero:
        outcome, reason = "holds", "the layer errors are in order and SparseGPT is ahead of Wanda at 70 %"
    elif any(value.below_zero for value in errors.values()) or at_seventy.below_zero:
        outcome, reason = "does not hold", "a layer error is out of order, or Wanda is ahead at 70 %"
    else:
        outcome, reason = "inconclusive", "an interval includes zero"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="sparsegpt",
    claim="Updating the remaining weights lowers layer errors below any mask alone, and pays most at high sparsity.",
    rule=(
        "holds if, paired over seeds at 95 %, mean layer error at 50 % is lower for SparseGPT than for its own mask "
        "without update and than for Wanda, and for Wanda than for magnitude, and log perplexity of Wanda minus "
        "SparseGPT at 70 % is above zero; does not hold if any of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={
        "quick": {**QUICK, "sequences": 8, "length": 512, "cases": _CASES},
        "full": {**FULL, "cases": [*_CASES, *_MORE]},
    },
    seeds=3,
    x_label="sparsity",
    y_label="perplexity",
    logarithmic=True,
)

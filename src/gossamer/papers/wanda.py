"""Wanda on a pretrained language model: far better than magnitude, and close to SparseGPT without its updates."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gossamer.papers.experiment import Experiment, Observation
from gossamer.papers.one_shot_comparison import FULL, QUICK, case, gap, mean, run
from gossamer.papers.results import Verdict

_CASES = [
    case("magnitude", 0.5),
    case("magnitude", 0.5, pattern="unstructured:row"),
    case("wanda", 0.5),
    case("wanda", 0.5, pattern="unstructured"),
    case("wanda", 0.6),
    case("wanda", "2:4"),
    case("sparsegpt", 0.5),
]
_MORE = [case(m, s) for m in ("magnitude", "random", "ria", "sparsegpt") for s in (0.6, 0.7, "2:4", "4:8")]
_ROW, _LAYER = "magnitude pattern=unstructured:row at 0.5", "wanda pattern=unstructured at 0.5"
NEAR = math.log(1.1)


def decide(observations: Sequence[Observation]) -> Verdict:
    """Three comparisons of log perplexity at 50 %, paired by seed."""
    magnitude = gap(observations, _ROW, "wanda at 0.5")
    surgeon = gap(observations, "wanda at 0.5", "sparsegpt at 0.5")
    scope = gap(observations, _LAYER, "wanda at 0.5")
    numbers = {"magnitude − wanda": magnitude, "wanda − sparsegpt": surgeon, "wanda per layer − per row": scope}
    shares = [mean(observations, "wanda at 0.5", k) for k in ("selection seconds", "total seconds")]
    numbers |= {
        f"perplexity, {label}": math.exp(mean(observations, label))
        for label in ("dense", "magnitude at 0.5", _ROW, "wanda at 0.5", "sparsegpt at 0.5", "wanda at 2:4")
    }
    numbers["selection's share of the time"] = shares[0] / shares[1]
    if magnitude.above_zero and surgeon.high < NEAR:
        outcome, reason = "holds", "Wanda beats magnitude in the same groups and stays within 10 % of SparseGPT"
    elif magnitude.below_zero or surgeon.low > NEAR:
        outcome, reason = "does not hold", "Wanda loses to magnitude, or lies more than 10 % above SparseGPT"
    else:
        outcome, reason = "inconclusive", "an interval reaches across its bound"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="wanda",
    claim="At 50 % sparsity, one shot, Wanda's perplexity is far below magnitude's and close to SparseGPT's.",
    rule=(
        "holds if, paired over seeds at 95 %, log perplexity of magnitude (per row) minus Wanda is above zero and that "
        "of Wanda minus SparseGPT below log 1.1; does not hold if either lies wholly on the other side"
    ),
    run=run,
    decide=decide,
    budgets={"quick": {**QUICK, "cases": _CASES}, "full": {**FULL, "cases": [*_CASES, *_MORE]}},
    seeds=3,
    x_label="sparsity",
    y_label="perplexity",
    logarithmic=True,
)

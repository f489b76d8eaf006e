"""Wanda on a pretrained language model: far better than magnitude, and close to SparseGPT without its updates.

All methods that look at data see the same calibration windows of one book, and are judged on a stretch of another.
Even the quick budget calibrates on 2,048 tokens, more than the widest layers have inputs (1,536): with fewer the
Hessian of SparseGPT has no full rank there, which would make a weak rival of it. The full budget adds higher
sparsities, N:M, the other baselines, and the ablations: statistics of the dense model in one pass instead of block by
block, and fewer or more calibration windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gossamer.methods import create
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest, case, gap, mean, perplexity_curves
from gossamer.papers.results import Outcome, Verdict

_CASES = [
    case("magnitude", 0.5),
    case("magnitude", 0.5, pattern="unstructured:row"),
    case("wanda", 0.5),
    case("wanda", 0.5, pattern="unstructured"),
    case("sparsegpt", 0.5),
]
_ONE_PASS = case("wanda", 0.5, sequential=False)
_MORE = [
    *(case(m, s) for m in ("wanda", "magnitude", "random", "ria", "sparsegpt") for s in (0.6, 0.7, "2:4", "4:8")),
    *(case("wanda", s) for s in (0.3, 0.4)),
    case("wanda", 0.5, adaptive_rows=True),
    case("wanda", 0.7, allocation="outliers"),
    _ONE_PASS,
]
QUICK: dict[str, Any] = {
    "model": "demo",
    "calibration": "state-of-the-union",
    "held_out": "moby-dick",
    "sequences": 8,
    "length": 256,
    "tokens": 1024,
    "window": 512,
    "cases": _CASES,
    "other sequences": [],
}
FULL: dict[str, Any] = {
    **QUICK,
    "sequences": 32,
    "length": 512,
    "tokens": 16_384,
    "window": 1024,
    "cases": [*_CASES, *_MORE],
    "other sequences": [1, 8, 128],
}
_ROW, _LAYER = "magnitude pattern=unstructured:row at 0.5", "wanda pattern=unstructured at 0.5"
_WANDA, _SURGEON = "wanda at 0.5", "sparsegpt at 0.5"
NEAR = math.log(1.1)


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Prune with every case, and measure."""
    contest = Contest.of(settings, seed)
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll()}}
    for label, method, options, count in progress(_plan(settings), "pruning and measuring"):
        points[label] = contest.enter(create(method, **options), contest.windows(count))
    return {"points": points, "curves": perplexity_curves(points, settings["cases"])}


def _plan(settings: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], int]]:
    """Label, method, options and number of calibration windows of every case."""
    plan = [(label, method, options, settings["sequences"]) for label, method, options in settings["cases"]]
    plan += [(f"{_WANDA}, {n} windows", "wanda", {"sparsity": 0.5}, n) for n in settings["other sequences"]]
    return plan


def decide(observations: Sequence[Observation]) -> Verdict:
    """Three comparisons of log perplexity at 50 %, paired by seed."""
    magnitude, surgeon = gap(observations, _ROW, _WANDA), gap(observations, _WANDA, _SURGEON)
    scope = gap(observations, _LAYER, _WANDA)
    numbers: dict[str, Any] = {
        "magnitude − wanda": magnitude,
        "wanda − sparsegpt": surgeon,
        "wanda per layer − per row": scope,
    }
    labels = [label for label in observations[0]["points"] if label != "dense"]
    numbers |= {f"perplexity, {label}": math.exp(mean(observations, label)) for label in ("dense", *labels)}
    seconds = {label: mean(observations, label, "selection seconds") for label in (_WANDA, _SURGEON)}
    numbers["selection's share of the time"] = seconds[_WANDA] / mean(observations, _WANDA, "total seconds")
    numbers["SparseGPT's time beside the forward passes, over Wanda's"] = seconds[_SURGEON] / seconds[_WANDA]
    if _ONE_PASS[0] in labels:
        numbers["one pass − block by block"] = gap(observations, _ONE_PASS[0], _WANDA)
    outcome: Outcome
    if magnitude.above_zero and surgeon.high < NEAR and scope.above_zero:
        outcome, reason = "holds", "Wanda beats magnitude and its own layer-wide ranking, and is near SparseGPT"
    elif magnitude.below_zero or surgeon.low > NEAR or scope.below_zero:
        outcome, reason = "does not hold", "a comparison lies wholly on the other side of its bound"
    else:
        outcome, reason = "inconclusive", "an interval reaches across its bound"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="wanda",
    claim=(
        "At 50 % sparsity, one shot, Wanda's perplexity is far below magnitude's, close to SparseGPT's, and lower "
        "with weights compared within rows than over the layer."
    ),
    rule=(
        "holds if, paired over seeds at 95 %, log perplexity of magnitude (per row) minus Wanda is above zero, that of "
        "Wanda minus SparseGPT below log 1.1, and that of Wanda per layer minus per row above zero; does not hold if "
        "any lies wholly on the other side"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="sparsity",
    y_label="perplexity",
    logarithmic=True,
)

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

import torch

from gossamer.core.targets import find_targets
from gossamer.measure import perplexity
from gossamer.methods import method as specification
from gossamer.models import calibration_batches, evaluation_tokens, load, read_text
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import case, gap, mean
from gossamer.papers.results import Outcome, Verdict
from gossamer.pruning.base import prune

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
    """Prune with every case and measure; the model is restored in between."""
    loaded = load(settings["model"], dtype="float32")
    text = read_text(settings["calibration"])
    held_out = _stretch(evaluation_tokens(read_text(settings["held_out"]), loaded.tokenizer), settings["tokens"], seed)
    targets = find_targets(loaded.model)
    dense = {target.name: target.matrix().clone() for target in targets}

    def loss() -> float:
        return perplexity(loaded.model, held_out, settings["window"], settings["window"], progress=False).nll_per_token

    observed: dict[str, dict[str, float]] = {"dense": {"nll": loss()}}
    for label, method, options, count in progress(_plan(settings), "pruning and measuring"):
        windows = None
        if specification(method).needs_data:
            windows = calibration_batches(text, loaded.tokenizer, count, settings["length"], seed)
        result = prune(loaded.model, method, calibration=windows, progress=False, **options)
        observed[label] = {
            "nll": loss(),
            "sparsity": result.sparsity,
            "selection seconds": result.seconds["selection"] + result.seconds["statistics"],
            "total seconds": result.seconds["total"],
        }
        with torch.no_grad():
            for target in targets:
                target.matrix().copy_(dense[target.name])
    return {"points": observed, "curves": _curves(observed, settings["cases"])}


def _stretch(ids: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    start = count * int(torch.randint(ids.shape[1] // count, (), generator=torch.Generator().manual_seed(seed)))
    # what the tokenizer puts first (some models are lost without it) belongs before every stretch
    return torch.cat([ids[:, :1], ids[:, start + 1 : start + count]], dim=1)


def _plan(settings: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], int]]:
    """Label, method, options and number of calibration windows of every case."""
    plan = [(label, method, options, settings["sequences"]) for label, method, options in settings["cases"]]
    plan += [(f"{_WANDA}, {n} windows", "wanda", {"sparsity": 0.5}, n) for n in settings["other sequences"]]
    return plan


def _curves(observed: dict[str, dict[str, float]], cases: Sequence[Sequence[Any]]) -> dict[str, dict[str, list]]:
    curves: dict[str, dict[str, list]] = {}
    points = [(m, o["sparsity"], observed[label]["nll"]) for label, m, o in cases if set(o) == {"sparsity"}]
    for method, sparsity, nll in sorted(points):
        curve = curves.setdefault(method, {"x": [0.0], "y": [math.exp(observed["dense"]["nll"])]})
        curve["x"].append(sparsity)
        curve["y"].append(math.exp(nll))
    return curves


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

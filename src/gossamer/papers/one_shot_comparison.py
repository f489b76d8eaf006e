"""One-shot pruners side by side on a pretrained language model: same calibration, same held-out text, same layers.

The experiments of the magnitude, Wanda and SparseGPT papers differ only in what they compare and in what they claim.
The quick budget calibrates on 1,024 tokens, fewer than the 1,536 inputs of the widest layers. That is enough for the
norms of Wanda but leaves SparseGPT's Hessian there without full rank, which costs SparseGPT quality: read a quick
comparison with SparseGPT with that in mind, or use the full budget (16,384 tokens). Every seed draws other
calibration windows (from one book) and another stretch of held-out text (from the other).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gossamer.core.targets import find_targets
from gossamer.measure import perplexity
from gossamer.models import calibration_batches, evaluation_tokens, load, read_text
from gossamer.papers.experiment import Observation, Track
from gossamer.papers.statistics import Interval, paired_difference
from gossamer.pruning.base import prune

QUICK: dict[str, Any] = {
    "model": "demo",
    "calibration": "state-of-the-union",
    "held_out": "moby-dick",
    "sequences": 4,
    "length": 256,
    "tokens": 2048,
    "window": 512,
}
FULL: dict[str, Any] = {**QUICK, "sequences": 32, "length": 512, "tokens": 16_384, "window": 1024}


def case(method: str, sparsity: float | str, **options: Any) -> list[Any]:
    """A case in the form that a budget keeps: label, method, options. A sparsity may be an N:M pattern."""
    where = {"pattern": sparsity} if isinstance(sparsity, str) else {"sparsity": sparsity}
    extra = "".join(f" {name}={value}" for name, value in options.items())
    return [f"{method}{extra} at {sparsity}", method, {**where, **options}]


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Prune with every case and measure; the model is restored in between."""
    loaded = load(settings["model"], dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    text = read_text(settings["calibration"])
    windows = calibration_batches(text, tokenizer, settings["sequences"], settings["length"], seed)
    ids = evaluation_tokens(read_text(settings["held_out"]), tokenizer)
    count = settings["tokens"]
    start = count * int(torch.randint(ids.shape[1] // count, (), generator=torch.Generator().manual_seed(seed)))
    # what the tokenizer puts first (some models are lost without it) belongs before every stretch
    held_out = torch.cat([ids[:, :1], ids[:, start + 1 : start + count]], dim=1)
    dense = {target.name: target.matrix().clone() for target in find_targets(model)}
    observed = {"dense": {"nll": _loss(model, held_out, settings["window"]), "error": 0.0}}
    for label, method, options in progress(settings["cases"], "pruning and measuring"):
        result = prune(model, method, calibration=windows, progress=False, **options)
        errors = [report.error for report in result.layers if report.error is not None]
        observed[label] = {
            "nll": _loss(model, held_out, settings["window"]),
            "error": sum(errors) / len(errors),
            "selection seconds": result.seconds["selection"],
            "total seconds": result.seconds["total"],
        }
        with torch.no_grad():
            for target in find_targets(model):
                target.matrix().copy_(dense[target.name])
    return {"points": observed, "curves": _curves(observed, settings["cases"])}


def _loss(model: torch.nn.Module, ids: torch.Tensor, window: int) -> float:
    return perplexity(model, ids, window, window, progress=False).nll_per_token


def _curves(observed: dict[str, dict[str, float]], cases: Sequence[Sequence[Any]]) -> dict[str, dict[str, list]]:
    curves: dict[str, dict[str, list]] = {}
    for label, method, options in cases:
        if "sparsity" in options and len(options) == 1:
            curve = curves.setdefault(method, {"x": [0.0], "y": [_exp(observed["dense"]["nll"])]})
            curve["x"].append(options["sparsity"])
            curve["y"].append(_exp(observed[label]["nll"]))
    return curves


def _exp(loss: float) -> float:
    return float(torch.tensor(loss, dtype=torch.float64).exp())


def gap(observations: Sequence[Observation], worse: str, better: str, measure: str = "nll") -> Interval:
    """How much the first case lies above the second, paired by seed, with its interval."""
    points: Callable[[str], list[float]] = lambda label: [o["points"][label][measure] for o in observations]  # noqa: E731
    return paired_difference(points(worse), points(better))


def mean(observations: Sequence[Observation], label: str, measure: str = "nll") -> float:
    """Mean of a measure over the seeds."""
    return sum(o["points"][label][measure] for o in observations) / len(observations)

"""DSnoT on a pretrained language model: what changing the mask alone gives back, with nothing trained.

The model is pruned with each starting method, once as it is and once refined, on the same calibration windows, and
the perplexity of held-out text from the same book is compared. Beside the method stand its ablations (no variance,
pruning by contribution, growing by magnitude). The full budget also has its strongest peer, exact swaps on the Gram
matrix of the same layers; all layers instead of attention only; and the natural baseline, the start with twice the
calibration data. Every seed draws other calibration windows and another stretch of held-out text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.measure import perplexity
from gossamer.models import calibration_batches, load, read_text
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import dense_again, stretch
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import Interval, mean_interval, paired_difference
from gossamer.pruning.base import LayerwisePruner, PruningResult
from gossamer.pruning.dsnot import DSnoT
from gossamer.pruning.refinement import MaskRefiner
from gossamer.pruning.swap import SwapRefinement

ABLATIONS: dict[str, dict[str, Any]] = {
    "no variance": {"variance_power": 0.0},
    "prune by contribution": {"pruning": "contribution"},
    "grow by magnitude": {"growing": "magnitude"},
}
TENFOLD = 10.0

QUICK = {
    "model": "demo",
    "text": "moby-dick",
    "sequences": 6,
    "length": 128,
    "evaluation_tokens": 1024,
    "window": 512,
    "cases": [
        ["wanda", "unstructured:row", 0.6],
        ["wanda", "unstructured:row", 0.7],
        ["magnitude", "unstructured:row", 0.7],
    ],
    "ablated": ["wanda", "unstructured:row", 0.7],
    "swaps": {"max_rounds": 100},
    "extras": False,
}
FULL = {
    **QUICK,
    "sequences": 64,
    "length": 512,
    "evaluation_tokens": 32_768,
    "cases": [
        [start, pattern, sparsity]
        for start in ("wanda", "magnitude", "sparsegpt")
        for pattern, sparsity in (
            ("unstructured:row", 0.5),
            ("unstructured:row", 0.6),
            ("unstructured:row", 0.7),
            ("2:4", 0.5),
            ("4:8", 0.5),
        )
    ],
    "extras": True,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Load the model and the text, and compare."""
    loaded = load(settings["model"])
    text = read_text(settings["text"])
    before, after = text[: len(text) // 2], text[len(text) // 2 :]
    doubled = 2 * settings["sequences"]
    windows = calibration_batches(before, loaded.tokenizer, doubled, settings["length"], seed)
    held_out = stretch(after, loaded.tokenizer, settings["evaluation_tokens"], seed)
    return compare(loaded.model, windows, held_out, settings, progress)


def compare(
    model: nn.Module, windows: Sequence[Tensor], held_out: Tensor, settings: Mapping[str, Any], progress: Track
) -> Observation:
    """Prune a model in every way that the settings ask for, and measure each time; the model ends dense.

    Parameters
    ----------
    model
        Causal language model.
    windows
        Calibration batches, twice as many as the settings' ``sequences``: only one baseline sees all of them.
    held_out
        Token ids ``(1, n)``.
    settings
        A budget of this experiment.
    progress
        Shows the bar.
    """
    plan = _plan(settings)
    half = list(windows[: settings["sequences"]])

    def quality() -> float:
        return perplexity(model, held_out, settings["window"], settings["window"], progress=False).nll_per_token

    observed: dict[str, dict[str, Any]] = {"dense": {"nll": quality()}}
    for name, (make, whole) in progress(list(plan.items()), "ways to prune"):
        pruner = make()
        with dense_again(model):
            result = pruner.prune(model, windows if whole else half, progress=False)
            observed[name] = {"nll": quality()} | _summary(pruner, result)
    return {
        "ways": observed,
        "cases": settings["cases"],
        "ablated": settings["ablated"],
        "curves": _curves(observed, settings),
    }


def _plan(settings: Mapping[str, Any]) -> dict[str, tuple[Callable[[], LayerwisePruner], bool]]:
    """Name → how to make the pruner, and whether it sees all calibration windows."""
    plan: dict[str, tuple[Callable[[], LayerwisePruner], bool]] = {}

    def add(name: str, kind: Callable[..., LayerwisePruner], whole: bool = False, **options: Any) -> None:
        plan[name] = (lambda: kind(**options), whole)

    for case in settings["cases"]:
        options = _options(case)
        # a start is a refinement that skips every layer: the very same mask, by the very same path
        add(_name(case), DSnoT, **options, skip=("*",))
        add(_name(case, "DSnoT"), DSnoT, **options)
    ablated = settings["ablated"]
    for name, changes in ABLATIONS.items():
        add(_name(ablated, name), DSnoT, **_options(ablated), **changes)
    if settings["extras"]:
        swap = {**_options(ablated), **settings["swaps"]}
        add(_name(ablated, "exact swaps"), SwapRefinement, **swap, skip=DSnoT.skip)
        add(_name(ablated, "DSnoT, all layers"), DSnoT, **_options(ablated), skip=())
        add(_name(ablated, "exact swaps, all layers"), SwapRefinement, **swap)
        add(_name(ablated, "twice the calibration data"), DSnoT, whole=True, **_options(ablated), skip=("*",))
    return plan


def _options(case: Sequence[Any]) -> dict[str, Any]:
    initial, pattern, sparsity = case
    return {"initial": initial, "pattern": pattern, "sparsity": sparsity}


def _name(case: Sequence[Any], method: str = "") -> str:
    initial, pattern, sparsity = case
    shape = f"{sparsity:g}" if pattern.startswith("unstructured") else pattern
    return f"{initial} {shape}" + (f" + {method}" if method else "")


def _summary(pruner: LayerwisePruner, result: PruningResult) -> dict[str, Any]:
    """Reconstruction error of the layers that DSnoT refines by default, and what the refinement says of itself."""
    attention = [r.error for r in result.layers if ".mlp." not in r.name and r.error is not None]
    summary: dict[str, Any] = {
        "sparsity": result.sparsity,
        "layer_error": sum(attention) / max(1, len(attention)),
        "seconds": result.seconds["selection"],
    }
    assert isinstance(pruner, MaskRefiner)
    reports = list(pruner.refinements.values())
    if reports:
        summary["error_before"] = sum(r.error_before for r in reports) / len(reports)
        summary["error_after"] = sum(r.error_after for r in reports) / len(reports)
        summary["swaps_per_row"] = sum(r.swaps_per_row for r in reports) / len(reports)
    return summary


def _curves(
    observed: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for case in settings["cases"]:
        if case[1].startswith("unstructured"):
            for method in ("", "DSnoT"):
                label = f"{case[0]} + {method}" if method else case[0]
                curve = curves.setdefault(label, {"x": [], "y": []})
                curve["x"].append(case[2])
                curve["y"].append(observed[_name(case, method)]["nll"])
    return curves


RULE = (
    "In log-perplexity on held-out text, over the seeds, with 95% intervals: (1) at the highest sparsity DSnoT lowers "
    "it from every start without weight updates; (2) from Wanda the gain at the highest sparsity exceeds that at the "
    "lowest; (3) the mean |ε| of the refined layers falls at least tenfold in every unstructured case from such a "
    "start; (4) no ablation is better than the method. Parts 1 and 2 hold if the interval of the difference lies above "
    "0 and fail if it lies below; part 3 holds if the interval of the factor lies above 10 and fails if it lies below; "
    "part 4 fails if the interval of an ablation's loss lies below 0 and holds otherwise. The claim holds if all "
    "parts do, does not hold if one fails, and is inconclusive otherwise. SparseGPT starts, N:M, exact swaps, other "
    "layers and more calibration data are reported and not judged."
)


def decide(observations: list[Observation]) -> Verdict:
    """Apply the rule."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    parts = {
        "lower perplexity": _lower(observations),
        "gain grows": _grows(observations),
        "expected error": _expected_error(observations),
        "ablations": _ablations(observations),
    }
    outcomes = [outcome for outcome, _ in parts.values()]
    overall: Outcome = "inconclusive"
    if "does not hold" in outcomes:
        overall = "does not hold"
    elif set(outcomes) == {"holds"}:
        overall = "holds"
    numbers = {name: value for _, found in parts.values() for name, value in found.items()}
    reason = "; ".join(f"{name}: {outcome}" for name, (outcome, _) in parts.items())
    reason += "".join(f"; {name} {value}" for name, value in parts["lower perplexity"][1].items())
    return Verdict(overall, reason, numbers | _peers(observations))


Part = tuple[Outcome, dict[str, Interval]]


def _values(observations: Sequence[Observation], name: str, key: str = "nll") -> list[float]:
    return [o["ways"][name][key] for o in observations]


def _gain(observations: Sequence[Observation], case: Sequence[Any]) -> list[float]:
    pairs = zip(_values(observations, _name(case)), _values(observations, _name(case, "DSnoT")), strict=True)
    return [start - refined for start, refined in pairs]


def _judged(observations: Sequence[Observation]) -> list[list[Any]]:
    return [c for c in observations[0]["cases"] if c[1].startswith("unstructured") and c[0] != "sparsegpt"]


def _worst(outcomes: Sequence[Outcome]) -> Outcome:
    return next((o for o in ("does not hold", "inconclusive") if o in outcomes), "holds")


def _side(interval: Interval, limit: float = 0.0) -> Outcome:
    return "holds" if interval.low > limit else "does not hold" if interval.high < limit else "inconclusive"


def _lower(observations: Sequence[Observation]) -> Part:
    cases = _judged(observations)
    highest = [case for case in cases if case[2] == max(c[2] for c in cases if c[0] == case[0])]
    found = {f"gain, {_name(case)}": mean_interval(_gain(observations, case)) for case in cases}
    return _worst([_side(found[f"gain, {_name(case)}"]) for case in highest]), found


def _grows(observations: Sequence[Observation]) -> Part:
    cases = sorted((case for case in _judged(observations) if case[0] == "wanda"), key=lambda case: case[2])
    growth = paired_difference(_gain(observations, cases[-1]), _gain(observations, cases[0]))
    return _side(growth), {"growth of the gain": growth}


def _expected_error(observations: Sequence[Observation]) -> Part:
    found = {}
    for case in _judged(observations):
        name = _name(case, "DSnoT")
        pairs = zip(
            _values(observations, name, "error_before"), _values(observations, name, "error_after"), strict=True
        )
        found[f"fall of |ε|, {_name(case)}"] = mean_interval([before / max(after, 1e-12) for before, after in pairs])
    return _worst([_side(interval, TENFOLD) for interval in found.values()]), found


def _ablations(observations: Sequence[Observation]) -> Part:
    case = observations[0]["ablated"]
    method = _values(observations, _name(case, "DSnoT"))
    found = {f"loss, {n}": paired_difference(_values(observations, _name(case, n)), method) for n in ABLATIONS}
    return ("does not hold" if any(interval.below_zero for interval in found.values()) else "holds"), found


def _peers(observations: Sequence[Observation]) -> dict[str, Interval]:
    """What stands beside the verdict: layer errors and, in the full budget, exact swaps and the other baselines."""
    case = observations[0]["ablated"]
    start, method = _name(case), _name(case, "DSnoT")
    found = {}
    for peer in ("exact swaps", "DSnoT, all layers", "exact swaps, all layers", "twice the calibration data"):
        name = _name(case, peer)
        if name in observations[0]["ways"]:
            found[f"gain, {name}"] = paired_difference(_values(observations, start), _values(observations, name))
    for name in (n for n in (start, method, _name(case, "exact swaps")) if n in observations[0]["ways"]):
        found[f"layer error, {name}"] = mean_interval(_values(observations, name, "layer_error"))
    return found


experiment = Experiment(
    slug="dsnot",
    claim=(
        "Swapping entries of the mask until the expected output error is near zero lowers the perplexity of a pruned "
        "language model without any training, and the more so the sparser it is."
    ),
    rule=RULE,
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    y_label="log-perplexity",
)

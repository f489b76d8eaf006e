"""Essential sparsity on a byte-level language model pretrained on Python's own source.

A causal transformer is pretrained from nothing on three amounts of standard-library source. The smallest weights of
each are removed in one shot, and quality is read in both of the paper's ways: directly, as the accuracy of the next
byte on held-out source (as for its language models), and after fine-tuning under static masks on naming the package
that a snippet comes from (as for its encoders). Controls get the same data, steps and seeds: random weights, random
weights at Erdős–Rényi-kernel densities, magnitude within each layer, and Wanda's score. N:M patterns, lottery tickets
and the monitor of abrupt sparsification (20 checkpoints) run on the model with the most data.

The quick budget takes a tenth of the data, a smaller model and few sparsities for the fine-tuned sweeps.

Not covered: the paper's vision half (self-supervised against supervised pretraining), for which there are no images
in an installed package; it arrives with the vision room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.calibration import InputNorm, observe, per_weight
from gossamer.core.changepoint import fit_knee
from gossamer.core.masks import MaskSet
from gossamer.core.scores import input_weighted
from gossamer.core.targets import Target, find_targets
from gossamer.papers.byte_model import Classifier, PackageTask, next_byte_accuracy, pretrain, spread
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import PythonSource, python_source
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import Interval, mean_interval, paired_difference
from gossamer.pruning.abrupt_sparsification import track_checkpoints
from gossamer.pruning.essential_sparsity import EssentialSparsityResult, essential_sparsity, pattern_ladder
from gossamer.pruning.lottery_tickets import component_profile, iterative_magnitude_pruning, mask_similarity
from gossamer.pruning.one_shot import one_shot_masks
from gossamer.pruning.sweep import Trial

LADDER = ("1:2", "2:4", "4:8", "1:4")
STEEPER = 5.0
TAU = 1e-3

QUICK = {
    "layers": 2,
    "width": 64,
    "length": 64,
    "batch": 16,
    "learning_rate": 3e-3,
    "pretraining_bytes": [30_000, 100_000, 300_000],
    "pretraining_steps": 250,
    "sparsities": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "tolerance": 0.01,
    "classes": 4,
    "training_snippets": 4096,
    "held_out_snippets": 512,
    "held_out_sequences": 256,
    "finetuning_steps": 60,
    "finetuning_batch": 24,
    "finetuned_sparsities": [0.3, 0.6, 0.9],
}
FULL = {
    **QUICK,
    "layers": 4,
    "width": 128,
    "length": 128,
    "batch": 32,
    "learning_rate": 1e-3,
    "pretraining_bytes": [300_000, 1_000_000, 3_000_000],
    "pretraining_steps": 2000,
    "sparsities": [round(0.05 * step, 2) for step in range(1, 20)],
    "classes": 8,
    "training_snippets": 16_384,
    "held_out_snippets": 4096,
    "held_out_sequences": 2048,
    "finetuning_steps": 300,
    "finetuning_batch": 32,
    "finetuned_sparsities": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Pretrain three models, sweep each, and put the controls beside the last."""
    sizes = [str(size) for size in settings["pretraining_bytes"]]
    source = python_source(
        int(sizes[-1]),
        settings["training_snippets"],
        settings["held_out_snippets"],
        settings["length"],
        settings["classes"],
        seed,
    )
    quality = next_byte_accuracy(spread(source.held_out.tokens, settings["held_out_sequences"]))
    by_data: dict[str, EssentialSparsityResult] = {}
    for size in sizes:
        model, checkpoints = _pretrain(settings, source.text[: int(size)], seed, progress)
        by_data[size] = _sweep(settings, model, quality, seed)
    magnitude = by_data[sizes[-1]]
    ladder = pattern_ladder(model, quality, LADDER, seeds=(seed,))
    controls = _control_options(model, source.text[: 128 * settings["length"]].view(128, -1))
    sweeps = {"magnitude": magnitude}
    for name in progress(list(controls), "controls"):
        sweeps[name] = _sweep(settings, model, quality, seed, **controls[name])
    monitor = track_checkpoints(checkpoints, tau=TAU)
    return {
        "curves": {name: _curve(sweep) for name, sweep in sweeps.items()}
        | {f"magnitude, {int(size):,} B": _curve(by_data[size]) for size in sizes[:-1]},
        "es": {name: sweep.es for name, sweep in sweeps.items()},
        "reached": {name: sweep.reached for name, sweep in sweeps.items()},
        "es_by_data": {size: sweep.es for size, sweep in by_data.items()},
        "lowest_density": magnitude.lowest_density,
        "ladder": {point.pattern: [point.sparsity, point.quality[0]] for point in ladder},
        "components": component_profile(one_shot_masks(model, magnitude.es)),
        "monitor": monitor.to_dict() | {"layers": None},
        "downstream": _downstream(settings, model.model, source, seed, progress),
        "packages": source.packages,
    }


def _pretrain(settings: dict[str, Any], text: Tensor, seed: int, progress: Track) -> tuple[Any, dict[float, Any]]:
    shape = {name: settings[name] for name in ("layers", "width", "length", "batch", "learning_rate")}
    return pretrain(text, **shape, steps=settings["pretraining_steps"], seed=seed, progress=progress)


def _sweep(
    settings: dict[str, Any], model: nn.Module, quality: Callable[[nn.Module], float], seed: int, **options: Any
) -> EssentialSparsityResult:
    options = {"sparsities": settings["sparsities"], **options}
    return essential_sparsity(model, quality, tolerance=settings["tolerance"], seeds=(seed,), monotone=True, **options)


def _control_options(model: nn.Module, calibration: Tensor) -> dict[str, dict[str, Any]]:
    with observe(find_targets(model), (InputNorm,)) as stats, torch.no_grad():
        model(input_ids=calibration)

    def wanda(target: Target) -> Tensor:
        return input_weighted(target.matrix(), per_weight(target, stats[target.name][InputNorm].norm))

    return {
        "random": {"score": "random"},
        "random, ERK": {"score": "random", "scope": "erdos-renyi-kernel"},
        "per layer": {"scope": "layer"},
        "Wanda": {"score": wanda, "scope": "row"},
    }


def _downstream(
    settings: dict[str, Any], body: Any, source: PythonSource, seed: int, progress: Track
) -> dict[str, Any]:
    """Fine-tuned sweeps of magnitude and random, and lottery tickets found on the same task."""
    torch.manual_seed(seed)
    model = Classifier(body, settings["width"], settings["classes"])
    task = PackageTask(source, settings["finetuning_steps"], settings["finetuning_batch"], settings["learning_rate"])
    options = {"sparsities": settings["finetuned_sparsities"], "finetune": task.finetune}
    sweeps = {
        score: _sweep(settings, model, task.accuracy, seed, score=score, **options)
        for score in progress(("magnitude", "random"), "fine-tuning")
    }
    return {
        "curves": {name: _curve(sweep) for name, sweep in sweeps.items()},
        "es": {name: sweep.es for name, sweep in sweeps.items()},
        "tickets": _tickets(settings, task, model, seed, sweeps["magnitude"].es),
    }


def _tickets(
    settings: dict[str, Any], task: PackageTask, model: nn.Module, seed: int, essential: float
) -> list[dict[str, float | bool]]:
    """Lottery tickets against one-shot masks of the same sparsity: similarity of the masks, and accuracy."""
    rounds = settings["finetuned_sparsities"]
    tickets = iterative_magnitude_pruning(model, task.finetune, rounds, seed=seed)
    trial = Trial(model, task.accuracy, task.finetune, [seed], varies=False)
    return [
        _compare(ticket, one_shot_masks(model, sparsity))
        | {
            "sparsity": sparsity,
            "inside": sparsity <= essential,
            "accuracy": trial.measure("a ticket", partial(_given, ticket)).quality[0],
        }
        for sparsity, ticket in zip(rounds, tickets)
    ]


def _given(masks: MaskSet, seed: int) -> MaskSet:
    return masks


def _compare(ticket: MaskSet, one_shot: MaskSet) -> dict[str, float]:
    layers = mask_similarity(ticket, one_shot)
    chance = float(np.average([row["chance"] for row in layers], weights=[row["weights"] for row in layers]))
    jaccard = ticket.jaccard(one_shot)
    return {
        "jaccard": jaccard,
        "cosine": ticket.cosine(one_shot),
        "chance": chance,
        "above_chance": (jaccard - chance) / (1 - chance),
        "lowest_layer": min(row["jaccard"] for row in layers),
    }


def _curve(sweep: EssentialSparsityResult) -> dict[str, list[float]]:
    # requested sparsities, which are the same for every method and seed, so that their curves can be averaged
    return {"x": list(sweep.settings["requested"]), "y": sweep.quality[0].tolist()}


RULE = (
    "Over the seeds, with 95% intervals, on the accuracy of the next byte: (1) sharp drop: the 1% essential sparsity "
    "is above 0, every sweep falls below the tolerance, and the two-piece fit of the mean curve is more than "
    f"{STEEPER:g} times steeper, downwards, after its knee; (2) magnitude exceeds random in essential sparsity; "
    "(3) mean essential sparsity rises with each amount of pretraining data and the largest exceeds the smallest; "
    "(4) no N:M pattern lies above the unstructured curve at its sparsity, and their mean difference is at most 0. "
    "After fine-tuning: (5) the Jaccard index of lottery tickets and one-shot masks is higher inside the essential "
    "range than beyond (that of unrelated masks falls too as they get sparser: the index corrected for chance is "
    "reported beside it). Each does not hold if its interval (for 1 also the fit) contradicts it and is inconclusive "
    "otherwise. The claim holds if all five do, does not hold if one does not, and is inconclusive otherwise. Abrupt "
    "sparsification is reported, not judged: minutes of training are no pretraining of BERT."
)


def decide(observations: list[Observation]) -> Verdict:
    """Apply the rule."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    parts = {
        "sharp drop": _sharp(observations),
        "beats random": _beats_random(observations),
        "grows with data": _grows_with_data(observations),
        "N:M below": _ladder_below(observations),
        "tickets part": _tickets_part(observations),
    }
    outcomes = [outcome for outcome, _ in parts.values()]
    overall: Outcome = "inconclusive"
    if "does not hold" in outcomes:
        overall = "does not hold"
    elif set(outcomes) == {"holds"}:
        overall = "holds"
    numbers: dict[str, Interval | float] = {}
    for _, found in parts.values():
        numbers |= found
    numbers |= _finetuned(observations)
    abrupt = sum(o["monitor"]["abrupt"] for o in observations)
    reason = "; ".join(f"{name}: {outcome}" for name, (outcome, _) in parts.items())
    reason += f"; abrupt sparsification in {abrupt} of {len(observations)} runs"
    return Verdict(overall, reason, numbers)


Part = tuple[Outcome, dict[str, Interval | float]]


def _judge(interval: Interval) -> Outcome:
    return "holds" if interval.above_zero else "does not hold" if interval.below_zero else "inconclusive"


def _sharp(observations: Sequence[Observation]) -> Part:
    es = mean_interval([o["es"]["magnitude"] for o in observations])
    curves = [o["curves"]["magnitude"] for o in observations]
    knee = fit_knee(curves[0]["x"], np.mean([curve["y"] for curve in curves], 0))
    steep = knee.right_slope < 0 and -knee.right_slope > STEEPER * abs(knee.left_slope)
    falls = all(o["reached"]["magnitude"] for o in observations)
    numbers: dict[str, Interval | float] = {
        "essential_sparsity": es,
        "knee": knee.position,
        "slope_before": knee.left_slope,
        "slope_after": knee.right_slope,
    }
    if not (steep and falls):
        return "does not hold", numbers
    return ("holds" if es.above_zero else "inconclusive"), numbers


def _beats_random(observations: Sequence[Observation]) -> Part:
    gain = paired_difference([o["es"]["magnitude"] for o in observations], [o["es"]["random"] for o in observations])
    return _judge(gain), {"gain_over_random": gain}


def _grows_with_data(observations: Sequence[Observation]) -> Part:
    sizes = sorted(observations[0]["es_by_data"], key=int)
    rows = [[o["es_by_data"][size] for size in sizes] for o in observations]
    gain = paired_difference([row[-1] for row in rows], [row[0] for row in rows])
    ordered = bool((np.diff(np.mean(rows, 0)) > 0).all())
    outcome = _judge(gain)
    return ("inconclusive" if outcome == "holds" and not ordered else outcome), {"gain_by_data": gain}


def _ladder_below(observations: Sequence[Observation]) -> Part:
    excess: dict[str, list[float]] = {}
    for o in observations:
        for pattern, (sparsity, quality) in o["ladder"].items():
            curve = o["curves"]["magnitude"]
            excess.setdefault(pattern, []).append(quality - float(np.interp(sparsity, curve["x"], curve["y"])))
    intervals = {f"excess_{pattern}": mean_interval(values) for pattern, values in excess.items()}
    if any(interval.above_zero for interval in intervals.values()):
        return "does not hold", dict(intervals)
    mean = float(np.mean([interval.mean for interval in intervals.values()]))
    return ("holds" if mean <= 0 else "inconclusive"), dict(intervals)


def _tickets_part(observations: Sequence[Observation]) -> Part:
    found: dict[str, Interval | float] = {}
    for index in ("jaccard", "above_chance"):
        inside, beyond = [], []
        for o in observations:
            near = [row[index] for row in o["downstream"]["tickets"] if row["inside"]]
            far = [row[index] for row in o["downstream"]["tickets"] if not row["inside"]]
            if near and far:
                inside.append(float(np.mean(near)))
                beyond.append(float(np.mean(far)))
        if len(inside) < 2:
            return "inconclusive", {}
        found[f"ticket_{index}_inside"] = mean_interval(inside)
        found[f"ticket_{index}_fall"] = paired_difference(inside, beyond)
    fall = found["ticket_jaccard_fall"]
    assert isinstance(fall, Interval)
    return _judge(fall), found


def _finetuned(observations: Sequence[Observation]) -> dict[str, Interval | float]:
    """What fine-tuning says, beside the verdict: magnitude over random, and over lottery tickets, in accuracy."""
    rows: dict[str, list[list[float]]] = {"magnitude": [], "random": [], "ticket": []}
    for o in observations:
        for name in ("magnitude", "random"):
            rows[name].append(o["downstream"]["curves"][name]["y"][1:])
        rows["ticket"].append([row["accuracy"] for row in o["downstream"]["tickets"]])
    means = {name: [float(np.mean(row)) for row in values] for name, values in rows.items()}
    return {
        "finetuned_gain_over_random": paired_difference(means["magnitude"], means["random"]),
        "finetuned_gain_over_tickets": paired_difference(means["magnitude"], means["ticket"]),
        "finetuned_essential_sparsity": mean_interval([o["downstream"]["es"]["magnitude"] for o in observations]),
    }


experiment = Experiment(
    slug="essential-sparsity",
    claim=(
        "The smallest weights of a pretrained model can be removed in one shot at no cost up to a sharp drop point, "
        "which lies beyond that of random pruning, moves out with more pretraining data, and up to which one-shot "
        "masks and lottery tickets coincide."
    ),
    rule=RULE,
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    y_label="accuracy of the next byte",
)

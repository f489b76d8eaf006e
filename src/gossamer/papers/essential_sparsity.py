"""Essential sparsity on a byte-level language model pretrained on Python's own source.

A causal transformer is pretrained from nothing on three amounts of standard-library source. The smallest weights of
each are removed in one shot, and quality is read in both of the paper's ways: directly, as the accuracy of the next
byte on held-out source (as for its language models), and after fine-tuning under static masks on naming the package
that a snippet comes from (as for its encoders). Controls get the same data, steps and seeds: random weights, random
weights at Erdős–Rényi-kernel densities, magnitude within each layer, and Wanda's score. N:M patterns, lottery tickets
and the monitor of abrupt sparsification (20 checkpoints) run on the model with the most data.

The vision half, self-supervised against supervised pretraining, and an easier task against a harder one, is in
:mod:`gossamer.papers.essential_vision`; the rule by which all of it is judged in
:mod:`gossamer.papers.essential_verdict`.

The quick budget takes a smaller model, few sparsities for the fine-tuned sweeps, two packages instead of eight, and so
little data that its 200 steps go over each amount about as often as the 2,000 larger steps of the full budget do (27,
8 and 3 times).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.core.calibration import InputNorm, observe, per_weight
from gossamer.core.masks import MaskSet
from gossamer.core.scores import input_weighted
from gossamer.core.targets import Target, find_targets
from gossamer.papers.byte_model import Classifier, PackageTask, next_byte_accuracy, pretrain, spread
from gossamer.papers.essential_verdict import RULE, decide
from gossamer.papers.essential_vision import pretraining_objectives
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import PythonSource, python_source
from gossamer.pruning.abrupt_sparsification import track_checkpoints
from gossamer.pruning.essential_sparsity import EssentialSparsityResult, essential_sparsity, pattern_ladder
from gossamer.pruning.lottery_tickets import component_profile, iterative_magnitude_pruning, mask_similarity
from gossamer.pruning.one_shot import one_shot_masks
from gossamer.pruning.sweep import Trial

LADDER = ("1:2", "2:4", "4:8", "1:4")
TAU = 1e-3

QUICK = {
    "layers": 2,
    "width": 64,
    "length": 64,
    "batch": 16,
    "learning_rate": 3e-3,
    "pretraining_bytes": [8_000, 25_000, 80_000],
    "pretraining_steps": 200,
    "sparsities": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    "tolerance": 0.01,
    "classes": 2,
    "training_snippets": 4096,
    "held_out_snippets": 512,
    "held_out_sequences": 256,
    "finetuning_steps": 50,
    "finetuning_batch": 24,
    "finetuned_sparsities": [0.3, 0.6, 0.9],
    "vision": {
        "networks": 2,
        "pretraining_steps": 250,
        "pretraining_batch": 64,
        "learning_rate": 3e-3,
        "training_images": 100,
        "finetuning_steps": 80,
        "finetuning_batch": 32,
        "sparsities": [0.3, 0.5, 0.7, 0.8, 0.9],
    },
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
    "vision": {
        "networks": 5,
        "pretraining_steps": 1500,
        "pretraining_batch": 64,
        "learning_rate": 3e-3,
        "training_images": 100,
        "finetuning_steps": 200,
        "finetuning_batch": 32,
        "sparsities": [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98],
    },
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
        "vision": pretraining_objectives(settings["vision"], settings["tolerance"], seed, progress),
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


experiment = Experiment(
    slug="essential-sparsity",
    claim=(
        "The smallest weights of a pretrained model can be removed in one shot at no cost up to a sharp drop point, "
        "which lies beyond that of random pruning, moves out with more pretraining data and with self-supervision, and "
        "up to which one-shot masks and lottery tickets coincide."
    ),
    rule=RULE,
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    y_label="accuracy of the next byte",
)

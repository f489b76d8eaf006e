"""GraNet's claims: regrowing while pruning beats pruning alone, from a sparse start too; and why, pruning plasticity.

A perceptron learns handwritten digits and a convolutional network clothes, every time with the same steps and batches,
under seven methods that end at the same sparsity: GraNet from a sparse and from a dense start and with random growth,
gradual magnitude pruning, RigL, SET and a static random mask. Then a dense training is interrupted at several moments
and pruned, with and without regeneration. In the full budget a residual network learns crops of photographs too, and
counts with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gossamer.core.sparsifier import Sparsifier
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.fashion import fashion
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import (
    Recipe,
    accuracy,
    batches,
    convolutional,
    fully_connected,
    optimize,
    train_images,
)
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.papers.textures import residual, textures
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.granet import GraNet
from gossamer.training.plasticity import pruning_plasticity
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.static import Static

HIGH = 0.95  # sparsity from which on the order must hold

QUICK: dict[str, Any] = {
    "digits": {"sparsities": [0.9, 0.95, 0.98], "images": 400, "steps": 400, "batch": 64},
    "clothes": {
        "sparsities": [0.95],
        "images": 500,
        "judged": 300,
        "steps": 400,
        "batch": 64,
        "channels": [16, 32, 64],
    },
    "learning_rate": 0.1,
    "plasticity": {"moments": [0.1, 0.3, 0.5, 0.75], "amounts": [0.9, 0.98], "horizon": 0.25, "exchange": 0.5},
}
FULL: dict[str, Any] = {
    "digits": {**QUICK["digits"], "steps": 2500},
    "clothes": {**QUICK["clothes"], "sparsities": [0.9, 0.95, 0.98], "images": 5000, "judged": 1000, "steps": 5000},
    "textures": {
        "sparsities": [0.9, 0.95, 0.98],
        "images": 500,
        "judged": 300,
        "steps": 3000,
        "batch": 64,
        "width": 16,
        "blocks": 1,
    },
    "learning_rate": 0.1,
    "plasticity": {
        "moments": [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75],
        "amounts": [0.2, 0.5, 0.8, 0.9, 0.98],
        "horizon": 0.25,
        "exchange": 0.5,
    },
}
NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "digits": lambda own: fully_connected(784, 512, 256, 10, normalized=True),
    "clothes": lambda own: convolutional(*own["channels"]),
    "textures": lambda own: residual(own["width"], own["blocks"]),
}


def contestants(sparsity: float, steps: int, seed: int) -> dict[str, Sparsifier]:
    """The methods by name; all update topology equally often, and count the last layer."""
    every = max(1, steps // 30)
    shared = {"sparsity": sparsity, "every": every, "heads": True, "seed": seed}
    ramp = {**shared, "end": steps}
    return {
        "GraNet": GraNet(**ramp),
        "GraNet, dense start": GraNet(**ramp, initial_sparsity=0.0),
        "GraNet, random growth": GraNet(**ramp, growth="random"),
        "gradual magnitude": GradualMagnitudePruning(**shared, end=steps * 11 // 16, scope="model"),
        "RigL": RigL(**shared, end=steps * 3 // 4),
        "SET": SET(**ramp),
        "static": Static(sparsity=sparsity, heads=True, seed=seed),
    }


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Accuracies of all tasks that the settings name, and plasticity on digits."""
    tasks = {"digits": _digits(settings["digits"], seed), "clothes": _clothes(settings["clothes"], seed)}
    if own := settings.get("textures"):
        tasks["textures"] = textures().split(own["images"], own["judged"], seed)
    accuracies: dict[str, float] = {}
    for task, (training, held_out) in tasks.items():
        own = settings[task]
        recipe = Recipe(own["steps"], own["batch"], settings["learning_rate"])
        cases: list[tuple[str, Sparsifier | None]] = [("dense", None)]
        for sparsity in own["sparsities"]:
            methods = contestants(sparsity, own["steps"], seed)
            cases += [(f"{name} at {sparsity}", method) for name, method in methods.items()]
        for label, method in progress(cases, f"{task}: training"):
            torch.manual_seed(seed)
            model = NETWORKS[task](own)
            train_images(model, training, recipe, seed, method)
            accuracies[f"{task}, {label}"] = 100 * accuracy(model, held_out)
    plasticity = _plasticity(settings, *tasks["digits"], seed, progress)
    return {"accuracies": accuracies, "plasticity": plasticity, "curves": _curves(accuracies)}


def _digits(own: dict[str, Any], seed: int) -> tuple[Digits, Digits]:
    return digits().split(own["images"], seed)


def _clothes(own: dict[str, Any], seed: int) -> tuple[Digits, Digits]:
    training, rest = fashion().split(own["images"], seed)
    return _floats(training), _floats(rest.split(own["judged"], seed)[0])


def _floats(data: Digits) -> Digits:
    return Digits(data.images.float().sub_(127.5).div_(64), data.labels)


def _plasticity(
    settings: dict[str, Any], training: Digits, held_out: Digits, seed: int, progress: Track
) -> list[dict[str, Any]]:
    """Rows of every moment, amount and regeneration."""
    own, steps = settings["plasticity"], settings["digits"]["steps"]
    recipe = Recipe(steps, settings["digits"]["batch"], settings["learning_rate"])
    checkpoints: dict[int, tuple[nn.Module, torch.optim.Optimizer]] = {}
    moments = {round(moment * steps): moment for moment in own["moments"]}

    def keep(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step in moments:
            checkpoints[step] = copy.deepcopy((model, optimizer))

    torch.manual_seed(seed)
    model = NETWORKS["digits"](settings["digits"])
    train_images(model, training, recipe, seed, each=keep)
    rows = []
    for first, checkpoint in progress(checkpoints.items(), "plasticity"):

        def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = first) -> float:
            for step, batch in enumerate(batches(training, recipe, seed, first, first + count), first):
                optimize(model, optimizer, batch, recipe.learning_rate * recipe.rate(step))
            return 100 * accuracy(model, held_out)

        found = pruning_plasticity(
            go_on,
            checkpoint,
            own["amounts"],
            horizon=round(own["horizon"] * steps),
            # as many as were pruned, as in the paper; and, harder, without getting any weight back
            regeneration=(0.0, "all", own["exchange"]),
            seed=seed,
        )
        rows += [
            {
                "moment": moments[first],
                "amount": row.amount,
                "regeneration": row.regeneration,
                "plasticity": row.plasticity,
                "against unpruned": row.against_unpruned,
            }
            for row in found
        ]
    return rows


def _curves(accuracies: dict[str, float]) -> dict[str, dict[str, list[float]]]:
    """Of the digits."""
    curves: dict[str, dict[str, list[float]]] = {}
    for label, value in accuracies.items():
        task, _, rest = label.partition(", ")
        name, _, sparsity = rest.rpartition(" at ")
        if task == "digits" and name:
            curve = curves.setdefault(name, {"x": [], "y": []})
            curve["x"].append(float(sparsity))
            curve["y"].append(value)
    return curves


RIVALS = ("gradual magnitude", "RigL", "SET", "GraNet, random growth", "GraNet, dense start")


def decide(observations: list[Observation]) -> Verdict:
    """Means over all tasks at high sparsity, paired by seed; plasticity, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    ours = _high(observations, "GraNet")
    needed = {"GraNet − static": _difference(ours, _high(observations, "static"))} | _plasticity_gains(observations)
    spared = {f"GraNet − {rival}": _difference(ours, _high(observations, rival)) for rival in RIVALS}
    numbers: dict[str, Interval | float] = {**needed, **spared, **_told(observations)}
    wrong = [name for name, value in (needed | spared).items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict(
        "holds", "GraNet beats a static mask, no rival beats it, and regeneration raises plasticity", numbers
    )


def _high(observations: list[Observation], name: str) -> list[float]:
    """Mean accuracy of a method over all tasks and all high sparsities, for every seed."""
    found = []
    for observation in observations:
        values = [
            value
            for label, value in observation["accuracies"].items()
            if label.partition(", ")[2].rpartition(" at ")[0] == name and float(label.rpartition(" ")[2]) >= HIGH
        ]
        found.append(sum(values) / len(values))
    return found


def _difference(ours: list[float], theirs: list[float]) -> Interval:
    return mean_interval([one - other for one, other in zip(ours, theirs, strict=True)])


def _plasticity_gains(observations: list[Observation]) -> dict[str, Interval]:
    """What regeneration adds, over all moments and amounts; and what early pruning has over late pruning."""
    gains, declines = [], []
    for observation in observations:
        rows = observation["plasticity"]
        gains.append(_plasticity_of(rows, "all") - _plasticity_of(rows, 0))
        plain = [row for row in rows if row["regeneration"] == 0]
        first, last = min(r["moment"] for r in plain), max(r["moment"] for r in plain)
        early, late = (_mean([r["against unpruned"] for r in plain if r["moment"] == at]) for at in (first, last))
        declines.append(early - late)
    return {
        "plasticity, with − without regeneration": mean_interval(gains),
        "recovery, early − late": mean_interval(declines),
    }


def _plasticity_of(rows: list[dict[str, Any]], regeneration: float | str) -> float:
    return _mean([row["plasticity"] for row in rows if row["regeneration"] == regeneration])


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    """Every accuracy, every gap to the static mask, and plasticity at every moment."""
    numbers: dict[str, Interval | float] = {}
    for label in observations[0]["accuracies"]:
        values = [observation["accuracies"][label] for observation in observations]
        numbers[f"accuracy, {label}"] = _mean(values)
        name, _, sparsity = label.rpartition(" at ")
        if name.endswith(", GraNet"):
            static = f"{name.partition(', ')[0]}, static at {sparsity}"
            numbers[f"{label} − static"] = _difference(values, [o["accuracies"][static] for o in observations])
    exchanged = max(r["regeneration"] for r in observations[0]["plasticity"] if r["regeneration"] != "all")
    numbers["plasticity, exchange at equal sparsity − none"] = mean_interval(
        [_plasticity_of(o["plasticity"], exchanged) - _plasticity_of(o["plasticity"], 0) for o in observations]
    )
    for index, row in enumerate(observations[0]["plasticity"]):
        label = f"plasticity at {row['moment']}, {row['amount']} pruned, regeneration {row['regeneration']}"
        numbers[label] = _mean([o["plasticity"][index]["plasticity"] for o in observations])
    return numbers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="granet",
    claim=(
        "Pruning gradually while connections regrow where the gradient is large gives better sparse networks than "
        "pruning alone or exchanging alone, even from a sparse start, because regrowth makes pruning less harmful."
    ),
    rule=(
        "holds if, at 95 % over seeds, the mean accuracy over digits and clothes at 95 % zeros or more is higher for "
        "GraNet (sparse start) than for a static random mask, regrowing as many weights as were pruned raises the mean "
        "plasticity, and a network pruned early recovers more of what the unpruned one reaches than one pruned late; "
        "does not hold if one of these is wholly reversed, or gradual magnitude pruning, RigL, SET, random growth or "
        "the dense start is wholly better than GraNet"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=5,
    x_label="sparsity",
    y_label="accuracy on digits, %",
)

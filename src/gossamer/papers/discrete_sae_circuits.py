"""The claim of discrete autoencoders for circuits: codes that only a task's prompts have betray the heads that do it.

The truth is known of a transformer whose weights are written by hand so that some heads continue repeated sequences. Of
a real language model it is found the hard way, by replacing each head by its mean, on tasks that it solves:
indirect objects, greater years, and, where there is time, docstrings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.features.circuit_edges import acdc_scores, edge_attribution, edge_effects, forward_edges
from gossamer.features.circuit_scores import circuit_roc, completeness, faithfulness, random_circuits, top_heads
from gossamer.features.circuit_tasks import CircuitTask, docstring, greater_than
from gossamer.features.circuits import DiscreteSAECircuit, count_unique
from gossamer.features.head_importance import (
    ablation_effects,
    attribution_patching,
    head_gradients,
    mean_difference,
    subnetwork_probing,
)
from gossamer.features.heads import HeadGrid, head_outputs, mean_heads
from gossamer.features.indirect_object import indirect_object
from gossamer.models import load
from gossamer.models.packages import cache_directory
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.language_features import locked
from gossamer.papers.planted_circuit import PlantedTransformer, repeated_prompts
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

AUC = 0.85  # that the paper reaches on all its tasks
CLOSE = 0.05  # of an area that counts as none
PLANTED = "repetition"
CODES, EDGES, SHUFFLED = "codes", "codes, by edges", "codes, labels shuffled"
PRIOR = ("ACDC", "gradients of heads", "subnetwork probing")
TASKS: dict[str, Callable[..., CircuitTask]] = {
    "indirect object": indirect_object,
    "greater than": greater_than,
    "docstring": docstring,
}

QUICK: dict[str, Any] = {
    "vocabulary": 40,
    "length": 32,
    "heads": 8,
    "noise": 0.05,
    "prompts": 60,
    "examples": 10,
    "trials": 3,
    "truth": 0.1,
    "thresholds": [0.003, 0.03, 0.3],
    "gate_steps": 60,
    "tasks": ["indirect object", "greater than"],
    "real_prompts": 30,
    "real_truth_prompts": 8,
    "l1": [0.002, 0.2],
    "codes": [50, 400],
    "numbers": [2, 10, 40],
}
FULL: dict[str, Any] = {
    **QUICK,
    "prompts": 250,
    "trials": 10,
    "real_prompts": 250,
    "real_truth_prompts": 50,
    "tasks": ["indirect object", "greater than", "docstring"],
    "thresholds": [0.003, 0.01, 0.03, 0.1, 0.3],
    "gate_steps": 200,
    "l1": [0.002, 0.005, 0.02, 0.05, 0.2],
    "codes": [25, 50, 100, 200, 400],
    "numbers": [2, 5, 10, 40, 100],
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Find the circuit of a transformer written by hand, and those of a real model's tasks."""
    sizes = {key: settings[key] for key in ("vocabulary", "length")}
    model = PlantedTransformer(**sizes, heads=settings["heads"], noise=settings["noise"], seed=seed)
    task = repeated_prompts(**sizes, count=settings["prompts"], seed=seed).only_solved(model, settings["prompts"] // 2)
    found = {PLANTED: _small(model, task, settings, seed)}
    loaded = load("demo", dtype="bfloat16")
    for name in progress(settings["tasks"], "tasks of a real model"):
        found[name] = _real(loaded.model, loaded.tokenizer, name, TASKS[name], settings, seed)
    sweeps = _sweeps(model, task, settings, seed, found[PLANTED]["truth"])
    curves = {
        name: {"x": [row["auc"] for row in part], "y": [row["faithfulness"] for row in part]}
        for name, part in _points(found).items()
    }
    return {"tasks": found, "sweeps": sweeps, "curves": curves}


# ------------------------------------------------------------------------------------------------ a planted model


def _small(model: PlantedTransformer, task: CircuitTask, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    means = mean_heads(model, task.prompts)
    effects, ablating = _timed(lambda: ablation_effects(model, task, means))
    truth = model.truth
    scores, seconds = _scores(model, task, settings, seed, settings["trials"])
    few = task.part(range(min(settings["examples"], len(task))))
    (by_cutting, runs), seconds["ACDC"] = _timed(lambda: acdc_scores(model, few, settings["thresholds"]))
    scores["ACDC"] = [by_cutting]
    gates = {"steps": settings["gate_steps"], "seed": seed}
    probed, seconds["subnetwork probing"] = _timed(lambda: subnetwork_probing(model, few, means, **gates))
    scores["subnetwork probing"] = [probed]
    scores["ablation"] = [effects]
    found = _judged(model, task, means, scores, truth, seed)
    edges = _edges(model, few, scores[EDGES + " matrix"][0])
    return found | {"seconds": {**seconds, "ablation": ablating}, "runs of ACDC": runs, "edges": edges}


def _edges(model: nn.Module, task: CircuitTask, by_codes: Tensor) -> dict[str, float]:
    """How well edges between heads are found, against those whose cut alone moves predictions most."""
    grid = HeadGrid.of(model)
    between = forward_edges(grid)[:, :-1]
    effects = edge_effects(model, task)[:, :-1][between]
    truth = effects >= effects.quantile(0.9)
    ours, theirs = by_codes[between], edge_attribution(model, task)[:, :-1][between].abs()
    return {"codes": circuit_roc(ours, truth).auc, "edge attribution": circuit_roc(theirs, truth).auc}


def _sweeps(
    model: nn.Module, task: CircuitTask, settings: dict[str, Any], seed: int, heads: list[int]
) -> dict[str, list[list[float]]]:
    """Area for several penalties, numbers of codes, and of examples; and with few prompts to count on as well."""
    outputs, labels = head_outputs(model, task.prompts), task.labels
    truth = torch.zeros(outputs.shape[1], dtype=torch.bool)
    truth[heads] = True

    def area(rows: Tensor | None = None, **changes: Any) -> float:
        chosen = slice(None) if rows is None else rows
        circuit = DiscreteSAECircuit(**{"n_examples": settings["examples"], "rescale": True, "seed": seed, **changes})
        return circuit_roc(circuit.fit(outputs[chosen], labels[chosen]).node_scores_, truth).auc

    few = {
        number: torch.cat([side.nonzero()[: number // 2, 0] for side in (labels, ~labels)])
        for number in settings["numbers"]
    }
    return {
        "penalty": [[value, area(l1=value)] for value in settings["l1"]],
        "codes": [[value, area(n_codes=value)] for value in settings["codes"]],
        "examples": [[value, area(n_examples=value)] for value in settings["numbers"]],
        "prompts in all": [[value, area(rows, n_examples=value)] for value, rows in few.items()],
        "unit of coordinates": [[0, area(unit="coordinates")]],
        "not rescaled": [[value, area(rescale=False, l1=value)] for value in settings["l1"]],
    }


# --------------------------------------------------------------------------------------------------- a real model


def _real(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    make: Callable[..., CircuitTask],
    settings: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    known = _known(model, tokenizer, name, make, settings)
    task = make(tokenizer, 2 * settings["real_prompts"], seed + 1).only_solved(model, settings["real_prompts"] // 2)
    task = task.part(range(min(len(task), settings["real_prompts"])))
    few = task.part(range(min(settings["examples"], len(task))))
    scores, seconds = _scores(model, task, settings, seed, 1)
    found = _judged(model, few, known["means"], scores, known["truth"], seed)
    return found | {"seconds": {**seconds, "ablation": known["seconds"]}, "solved": len(task)}


def _known(
    model: nn.Module, tokenizer: Any, name: str, make: Callable[..., CircuitTask], settings: dict[str, Any]
) -> dict[str, Any]:
    """The heads that matter, found once by ablating each, and kept in the cache."""
    count = settings["real_truth_prompts"]
    file = cache_directory() / "circuits" / f"smollm2-{name.replace(' ', '-')}-{count}.pt"
    with locked(file):
        if not file.exists():
            task = make(tokenizer, 4 * count, 0).only_solved(model, count).part(range(count))
            means = mean_heads(model, task.prompts)
            effects, seconds = _timed(lambda: ablation_effects(model, task, means))
            torch.save({"effects": effects, "means": means, "seconds": seconds}, file)
    known = torch.load(file, weights_only=True)
    truth = known["effects"] > settings["truth"]
    # a task that is spread thinly still has heads that matter most
    least = max(5, round(0.02 * len(truth)))
    return known | {"truth": truth if int(truth.sum()) >= least else top_heads(known["effects"], least)}


# -------------------------------------------------------------------------------------------------------- scores


def _scores(
    model: nn.Module, task: CircuitTask, settings: dict[str, Any], seed: int, trials: int
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Every method's scores of heads, and the seconds that one took; codes are tried several times."""
    outputs, reading = _timed(lambda: head_outputs(model, task.prompts))
    labels = task.labels
    shuffled = labels[torch.randperm(len(labels), generator=generator_for("shuffled labels", seed))]
    scores: dict[str, list[Tensor]] = {
        name: [] for name in (CODES, "codes, normalised", EDGES, EDGES + " matrix", SHUFFLED)
    }
    seconds: dict[str, float] = {}
    for trial in range(trials):
        circuit = DiscreteSAECircuit(n_examples=settings["examples"], rescale=True, seed=1000 * seed + trial)
        _, took = _timed(partial(circuit.fit, outputs, labels))
        seconds[CODES] = seconds.get(CODES, reading) + took / trials
        unique, distinct = count_unique(circuit.codes_, labels)
        scores[CODES].append(circuit.node_scores_)
        scores["codes, normalised"].append(unique / distinct)
        scores[EDGES].append(circuit.edge_node_scores_)
        scores[EDGES + " matrix"].append(circuit.edge_scores_)
        scores[SHUFFLED].append(count_unique(circuit.codes_, shuffled)[0].float())
    scores["mean difference"] = [mean_difference(outputs, labels)]
    few = task.part(range(min(settings["examples"], len(task))))
    for name, method in (("attribution patching", attribution_patching), ("gradients of heads", head_gradients)):
        found, seconds[name] = _timed(partial(method, model, few))
        scores[name] = [found.float()]
    return scores, seconds


def _judged(
    model: nn.Module,
    task: CircuitTask,
    means: Sequence[Tensor],
    scores: dict[str, list[Tensor]],
    truth: Tensor,
    seed: int,
) -> dict[str, Any]:
    """Areas, and how faithful the best third of all heads is, by every method and drawn at random."""
    size = len(truth) // 3
    marks: dict[str, dict[str, float]] = {}
    for name, found in scores.items():
        if name.endswith("matrix"):
            continue
        rocs = [circuit_roc(one, truth) for one in found]
        chosen = [top_heads(one, size) for one in found]
        marks[name] = {
            "auc": sum(roc.auc for roc in rocs) / len(rocs),
            "best_f1": sum(roc.best_f1 for roc in rocs) / len(rocs),
            "faithfulness": sum(faithfulness(model, one, task, means) for one in chosen) / len(chosen),
            "completeness": sum(completeness(model, one, task, means) for one in chosen) / len(chosen),
        }
    drawn = random_circuits(top_heads(scores[CODES][0], size), 5, seed)
    return {
        "marks": marks,
        "truth": truth.nonzero()[:, 0].tolist(),
        "heads": len(truth),
        "random faithfulness": sum(faithfulness(model, one, task, means) for one in drawn) / len(drawn),
    }


def _points(found: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    names = {name: None for task in found.values() for name in task["marks"]}
    return {name: [task["marks"][name] for task in found.values() if name in task["marks"]] for name in names}


def _timed(what: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    return what(), time.perf_counter() - begin


# ------------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Means over tasks, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {
        f"area − {AUC}": mean_interval([_mean(row, CODES) - AUC for row in observations]),
        "area − with labels shuffled": mean_interval(
            [_mean(row, CODES) - _mean(row, SHUFFLED) for row in observations]
        ),
        f"area − best of prior methods + {CLOSE}": mean_interval(
            [CLOSE + _mean_gap(row, PRIOR) for row in observations]
        ),
        "faithfulness − of random heads": mean_interval(
            [
                _mean(row, CODES, "faithfulness")
                - sum(t["random faithfulness"] for t in _tasks(row)) / len(_tasks(row))
                for row in observations
            ]
        ),
    }
    numbers: dict[str, Interval | float] = dict(needed)
    numbers["area − mean difference"] = mean_interval([_mean_gap(row, ("mean difference",)) for row in observations])
    numbers["area − attribution patching"] = mean_interval(
        [_mean_gap(row, ("attribution patching",)) for row in observations]
    )
    for task in observations[0]["tasks"]:
        rows = [row["tasks"][task] for row in observations]
        for name in rows[0]["marks"]:
            numbers[f"{task}: area of {name}"] = _average(row["marks"][name]["auc"] for row in rows)
        numbers[f"{task}: faithfulness of codes"] = _average(row["marks"][CODES]["faithfulness"] for row in rows)
        numbers[f"{task}: faithfulness of random heads"] = _average(row["random faithfulness"] for row in rows)
        numbers[f"{task}: heads in truth"] = _average(len(row["truth"]) for row in rows)
        numbers[f"{task}: times quicker than ablation"] = _average(
            row["seconds"]["ablation"] / row["seconds"][CODES] for row in rows
        )
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict("holds", "codes find the heads of circuits as well as what looks inside the model", numbers)


def _tasks(row: Observation) -> list[dict[str, Any]]:
    return list(row["tasks"].values())


def _mean(row: Observation, name: str, part: str = "auc") -> float:
    return _average(task["marks"][name][part] for task in _tasks(row))


def _mean_gap(row: Observation, rivals: Sequence[str]) -> float:
    """How far codes are ahead of the best of several methods, mean over tasks on which one was run."""
    gaps = []
    for task in _tasks(row):
        known = [task["marks"][name]["auc"] for name in rivals if name in task["marks"]]
        gaps.append(task["marks"][CODES]["auc"] - max(known))
    return _average(gaps)


def _average(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


experiment = Experiment(
    slug="discrete-sae-circuits",
    claim=(
        "The heads of a circuit are found by counting the discrete codes that only prompts of the task have, with an "
        "autoencoder trained on ten prompts, as well as by cutting edges, gradients of heads or learned gates."
    ),
    rule=(
        "holds if, on the mean over all tasks and paired over seeds at 95 %, the area under the curve of the codes' "
        "scores is above 0.85, above that with labels shuffled, and at most 0.05 below the best of ACDC, gradients of "
        "heads and subnetwork probing where they were run, and the best third of the heads is more faithful than a "
        "random third; does not hold if one of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="area under the curve",
    y_label="faithfulness of the best heads",
)

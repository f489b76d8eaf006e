"""Landscapes of linear mode connectivity: does curvature along the line say how high the ridge is, and where?

Pairs of networks part at several steps of their training and go on with digits in different orders. Barriers of loss
and error are measured between their ends, and set against what derivatives say: the exact identity, and predictions
from half-way, the ends, the fork and the trace of the Hessian; in whole and layer by layer. Along the way the ridge is
watched as it rises. Networks of different initialisations are compared before and after their units are matched, at two
widths. And the link to sparsity: copies of one pruned network are retrained from the trained weights, from higher
rates, and from earlier steps, and copies under different masks too: is their mean good exactly where there is no
barrier between them?
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.averaging import average_models, recalibrate_batch_norm
from gossamer.core.permutations import align_permutation
from gossamer.core.retraining_rates import retraining_rates
from gossamer.measure.barrier_theory import barrier_curvature, predict_barrier
from gossamer.measure.landscape_forks import Fork, connected_from, fork_experiment
from gossamer.measure.loss_surface import LossSurface, between
from gossamer.measure.mode_connectivity import barrier, error_rate, layerwise_barrier, rank_correlation
from gossamer.measure.soups import quality
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.image_soups import NETWORKS, SIDE, Retraining, SoupTask
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import fully_connected
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.pruning.soup_branches import Branch, branch_seed
from gossamer.pruning.sparse_model_soups import SparseModelSoup

CONNECTED = 2.0  # points of error up to which a pair counts as connected, after Frankle et al.
SPOILED = 0.5  # points of accuracy by which a mean may fall short of what it is made of
PREDICTIONS = ("midpoint", "endpoints", "fork", "trace")

QUICK: dict[str, Any] = {
    "training_images": 200,
    "validation_images": 50,
    "looked_at": 1000,
    "networks": {
        "perceptron": {"steps": 400, "rate": 0.3, "batch": 32, "forks": [0, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5]},
        "convolutional": {"steps": 120, "rate": 0.4, "batch": 32, "forks": [0, 0.25], "looks": 2},
    },
    "pairs": 1,
    "looks": 7,
    "points": 9,
    "nodes": 32,
    "identity": {"steps": 400, "rate": 0.4},  # a rate at which there is a barrier to be told
    "widths": [32, 256],
    "sparse": {"steps": 300, "sparsity": 0.9, "models": 3, "rates": [0.1, 0.4], "rewinds": [0.0, 0.02, 0.25]},
}
FULL: dict[str, Any] = {
    **QUICK,
    "networks": {
        name: {"steps": 2000, "rate": 0.3, "batch": 32, "forks": [0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5]}
        for name in ("perceptron", "convolutional")
    },
    "pairs": 5,
    "points": 25,
    "widths": [32, 128, 512],
    "sparse": {**QUICK["sparse"], "steps": 2000, "models": 5, "rates": [0.1, 0.2, 0.4, 0.8]},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Barriers, predictions, layers, ridges, alignment and soups."""
    task = SoupTask.drawn(settings["training_images"], settings["validation_images"], 32, seed)
    observed: Observation = {"forks": [], "layers": [], "identity": {}, "alignment": {}, "soups": []}
    for network, own in settings["networks"].items():
        for pair in progress(range(settings["pairs"]), f"{network}: pairs"):
            _pairs(observed, settings, task, network, own, seed, pair)
    own = settings["networks"]["perceptron"]
    observed["identity"] = _identity(settings, task, {**own, **settings["identity"]}, seed)
    for width in progress(settings["widths"], "alignment"):
        observed["alignment"][str(width)] = _alignment(settings, task, own, width, seed)
    observed["soups"] = _soups(settings, task, seed, progress)
    return {**observed, "curves": _curves(observed)}


def _looked_at(settings: dict[str, Any], task: SoupTask) -> list[tuple[Tensor, Tensor]]:
    every = max(1, len(task.training) // settings["looked_at"])
    return [(task.training.images[::every], task.training.labels[::every])]


def _training(task: SoupTask, own: dict[str, Any], seed: int) -> Any:
    """Training in pieces, with a rate that falls straight to zero over the whole: a :data:`Train`."""
    rates = tuple(retraining_rates("llr", [own["rate"]], own["steps"]))
    retraining = Retraining(task.training, own["batch"])

    def train(model: nn.Module, first: int, last: int, order: int, memory: Any) -> Any:
        branch = Branch(0, 0, branch_seed(seed, 1000, order), 1e-4, rates)
        optimizer = retraining.optimizer(model, branch.weight_decay)
        if memory is not None:
            optimizer.load_state_dict(memory)
        retraining.steps(model, optimizer, branch, first, last)
        return optimizer.state_dict()

    return train


def _pairs(
    observed: Observation,
    settings: dict[str, Any],
    task: SoupTask,
    network: str,
    own: dict[str, Any],
    seed: int,
    pair: int,
) -> None:
    """Part at every step that is asked for, and measure everything between the ends."""
    torch.manual_seed(1000 * pair + seed)
    model = NETWORKS[network]()
    seen = _looked_at(settings, task)
    surface = LossSurface(model, nn.functional.cross_entropy, seen, statistics="batch")
    places = [round(share * own["steps"]) for share in own["forks"]]
    forks = fork_experiment(
        model,
        _training(task, own, seed),
        own["steps"],
        places,
        surface,
        looks=own.get("looks", settings["looks"]),
        pair=pair,
    )
    for fork in forks:
        observed["forks"].append(
            {"network": network, "pair": pair, **_ends(settings, task, surface, seen, model, fork)}
        )
        rows = layerwise_barrier(model, fork.a, fork.b, nn.functional.cross_entropy, seen, n=3)
        observed["layers"] += [{"network": network, "fork": fork.step, **row} for row in rows]


def _ends(
    settings: dict[str, Any],
    task: SoupTask,
    surface: LossSurface,
    seen: Sequence[tuple[Tensor, Tensor]],
    model: nn.Module,
    fork: Fork,
) -> dict[str, Any]:
    n = settings["points"]
    held_out = [(task.held_out.images[::2], task.held_out.labels[::2])]
    loss = barrier(model, fork.a, fork.b, nn.functional.cross_entropy, seen, n=n, refine=4)
    middle = surface.value(between(fork.a, fork.b, 0.5)) - (surface.value(fork.a) + surface.value(fork.b)) / 2
    return {
        "fork": fork.step,
        "loss": loss.height,
        "error": 100 * barrier(model, fork.a, fork.b, error_rate, seen, n=n, refine=0).height,
        "held-out error": 100 * barrier(model, fork.a, fork.b, error_rate, held_out, n=n, refine=0).height,
        "middle": middle,
        "ridge step": fork.ridge_step,
        "barrier step": fork.barrier_step,
        **{
            f"predicted from {kind}": predict_barrier(surface, fork.a, fork.b, kind, fork=fork.parent, samples=4)
            for kind in PREDICTIONS
        },
        "records": [vars(record) for record in fork.records],
    }


def _identity(settings: dict[str, Any], task: SoupTask, own: dict[str, Any], seed: int) -> dict[str, float]:
    """Relative error of the identity between two runs that parted at once: smooth, and with ReLU's kinks."""
    seen, found = _looked_at(settings, task), {}
    for name, activation, order in (("smooth", nn.Tanh, 2), ("relu", nn.ReLU, 1), ("relu, second order", nn.ReLU, 2)):
        torch.manual_seed(seed)
        layers = [activation() if isinstance(m, nn.ReLU) else m for m in fully_connected(SIDE * SIDE, 64, 64, 10)]
        model = nn.Sequential(*layers)
        surface = LossSurface(model, nn.functional.cross_entropy, seen)
        (fork,) = fork_experiment(model, _training(task, own, seed), own["steps"], [0], surface, looks=1)
        true = surface.value(between(fork.a, fork.b, 0.5)) - (surface.value(fork.a) + surface.value(fork.b)) / 2
        told = barrier_curvature(surface, fork.a, fork.b, nodes=settings["nodes"], order=order).barrier  # type: ignore[arg-type]
        found[name] = abs(told - true) / abs(true)
    return found


def _alignment(
    settings: dict[str, Any], task: SoupTask, own: dict[str, Any], width: int, seed: int
) -> dict[str, float]:
    """Barrier between networks of different initialisations, before and after their units are matched."""
    ends = []
    for number in (0, 1):
        torch.manual_seed(10_000 * (number + 1) + seed)
        model = fully_connected(SIDE * SIDE, width, width, 10)
        _training(task, own, seed)(model, 0, own["steps"], 500 + number, None)
        ends.append(model)
    seen, cross = _looked_at(settings, task), nn.functional.cross_entropy
    matched = align_permutation(*ends)
    return {
        "before": barrier(ends[0], *ends, cross, seen, n=settings["points"], refine=4).height,
        "after": barrier(ends[0], ends[0], matched, cross, seen, n=settings["points"], refine=4).height,
    }


def _soups(settings: dict[str, Any], task: SoupTask, seed: int, progress: Track) -> list[dict[str, Any]]:
    """Means of retrained copies under one mask or several, and the barriers between the copies."""
    own = settings["sparse"]
    train = _training(task, {"steps": own["steps"], "rate": max(own["rates"]), "batch": 32}, seed)
    torch.manual_seed(seed)
    model, memory, at, states = NETWORKS["perceptron"](), None, 0, {}
    for place in [*sorted(round(share * own["steps"]) for share in own["rewinds"]), own["steps"]]:
        memory, at = train(model, at, place, 900, memory), place
        states[place] = copy.deepcopy(model)
    method = SparseModelSoup(
        sparsity=own["sparsity"], phases=1, n_models=own["models"], steps=own["steps"], warm_up=0.0, seed=seed
    )
    retraining, trained = Retraining(task.training, 32), states.pop(own["steps"])
    found = []
    for rate in progress(own["rates"], "soups"):
        result = replace(method, rates=[rate]).fit(trained, retraining)
        found.append(_soup_row(settings, task, f"trained, rate {rate}", result.candidates()))
    masks = result.masks
    for place, early in states.items():
        start = copy.deepcopy(early)
        masks.apply_(start)
        phase = replace(method, rates=[max(own["rates"])]).soup(start, masks, retraining)
        made = [copy.deepcopy(start) for _ in phase.candidates]
        for one, state in zip(made, phase.candidates):
            one.load_state_dict(state)
        found.append(_soup_row(settings, task, f"rewound to step {place}", made))
    blind = [replace(method, scope="random", n_models=1, seed=n, rates=[0.1]) for n in range(own["models"])]
    others = [each.fit(trained, retraining).model for each in blind]
    found.append(_soup_row(settings, task, "different masks", others))
    return found


def _soup_row(settings: dict[str, Any], task: SoupTask, name: str, candidates: list[nn.Module]) -> dict[str, Any]:
    mean = average_models(candidates, require_same_mask=False)
    recalibrate_batch_norm(mean, task.batches())
    seen, data = _looked_at(settings, task), task.held_out
    heights = [
        100 * barrier(mean, a, b, error_rate, seen, n=settings["points"], refine=0).height
        for a, b in combinations(candidates, 2)
    ]
    each = [quality(one, data.images, data.labels).accuracy for one in candidates]
    return {
        "condition": name,
        "barrier": max(heights),
        "gain": 100 * (quality(mean, data.images, data.labels).accuracy - sum(each) / len(each)),
        "candidates": 100 * sum(each) / len(each),
    }


def _curves(observed: Observation) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for row in observed["forks"]:
        curve = curves.setdefault(f"{row['network']}, pair {row['pair']}", {"x": [], "y": []})
        curve["x"].append(row["fork"])
        curve["y"].append(row["loss"])
    return curves


def decide(observations: list[Observation]) -> Verdict:
    """The parts of the picture, one after the other."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    numbers = _numbers(observations)
    failed = []
    for name, limit in (("identity, smooth", 0.02), ("identity, relu", 0.05)):
        if numbers[name] > limit:  # type: ignore[operator]
            failed.append(f"{name}: {numbers[name]:.3g} is above {limit}")
    connected = numbers["error barrier of the latest fork, points"]
    if connected > CONNECTED:  # type: ignore[operator]
        failed.append(f"the latest fork still has a barrier of {connected:.3g} points")
    if numbers["soups that succeed exactly where there is no barrier"] < 0.9:  # type: ignore[operator]
        failed.append("soups do not succeed exactly where there is no barrier")
    needed = {
        "barrier of the first fork − of the latest": 0.0,
        "rank correlation of layers, from the ends": 0.7,
        "ridges seen no later than barriers": 0.9,
    }
    wrong = [name for name, limit in needed.items() if numbers[name].high < limit]  # type: ignore[union-attr]
    open_ = [
        name
        for name, limit in needed.items()
        if not (numbers[name].low > limit or numbers[name].low == numbers[name].high >= limit)  # type: ignore[union-attr]
    ]
    if failed or wrong:
        return Verdict("does not hold", "; ".join([*failed, *wrong]), numbers)
    if open_:
        return Verdict("inconclusive", f"not settled: {', '.join(open_)}", numbers)
    return Verdict(
        "holds", "barriers fall with the fork, follow from curvature, and decide whether soups work", numbers
    )


def _numbers(observations: list[Observation]) -> dict[str, Interval | float]:
    forks = [[row for row in o["forks"] if row["network"] == "perceptron"] for o in observations]
    first = [_mean(rows, "loss", min(row["fork"] for row in rows)) for rows in forks]
    latest = [_mean(rows, "loss", max(row["fork"] for row in rows)) for rows in forks]
    found: dict[str, Interval | float] = {
        "barrier of the first fork − of the latest": mean_interval([a - b for a, b in zip(first, latest)]),
        "error barrier of the latest fork, points": max(
            _mean(rows, "error", max(row["fork"] for row in rows)) for rows in forks
        ),
        **{f"identity, {name}": max(o["identity"][name] for o in observations) for name in observations[0]["identity"]},
    }
    for kind, name in (("endpoints", "from the ends"), ("midpoint", "from half-way"), ("start", "from one end")):
        values = [rank_correlation(*(_column(o["layers"], key) for key in ("middle", kind))) for o in observations]
        found[f"rank correlation of layers, {name}"] = mean_interval(values)
    for kind in PREDICTIONS:
        values = [rank_correlation(_column(rows, "middle"), _column(rows, f"predicted from {kind}")) for rows in forks]
        found[f"rank correlation of whole barriers, {kind}"] = mean_interval(values)
    ridges = [
        [row["ridge step"] is not None and row["ridge step"] <= row["barrier step"] for row in o["forks"]
         if row["barrier step"] is not None and row["error"] > CONNECTED]
        for o in observations
    ]  # fmt: skip
    shares = [sum(seen) / len(seen) for seen in ridges if seen]
    found["ridges seen no later than barriers"] = mean_interval(shares) if len(shares) > 1 else Interval(0, 0, 1)
    for number, rows in enumerate(forks):
        places = sorted({row["fork"] for row in rows})
        start = connected_from({place: _mean(rows, "error", place) for place in places}, CONNECTED)
        if start is not None:
            found[f"k*, seed {number}"] = start
    for width in observations[0]["alignment"]:
        pairs = [o["alignment"][width] for o in observations]
        left = [p["after"] / p["before"] if p["before"] else 1.0 for p in pairs]
        found[f"share of the barrier left after alignment, width {width}"] = mean_interval(left)
    return {**found, **_joint(observations)}


def _joint(observations: list[Observation]) -> dict[str, Interval | float]:
    """Whether means succeed exactly where there is no barrier; a third of the cases at least must be of each kind."""
    rows = [row for o in observations for row in o["soups"]]
    apart = [row["barrier"] > CONNECTED for row in rows]
    spoiled = [row["gain"] < -SPOILED for row in rows]
    agreed = sum(a == b for a, b in zip(apart, spoiled)) / len(rows)
    both = min(sum(apart), len(apart) - sum(apart)) >= len(rows) / 5
    found: dict[str, Interval | float] = {
        "soups that succeed exactly where there is no barrier": agreed if both else 0.0,
        "share of soups with a barrier": sum(apart) / len(rows),
        "rank correlation of barrier and gain": rank_correlation(_column(rows, "barrier"), _column(rows, "gain")),
    }
    for name in dict.fromkeys(row["condition"] for row in rows):
        own = [row for row in rows if row["condition"] == name]
        found[f"barrier, {name}, points"] = sum(_column(own, "barrier")) / len(own)
        found[f"gain, {name}, points"] = sum(_column(own, "gain")) / len(own)
    return found


def _column(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows]


def _mean(rows: Sequence[dict[str, Any]], key: str, fork: int) -> float:
    values = [row[key] for row in rows if row["fork"] == fork]
    return sum(values) / len(values)


experiment = Experiment(
    slug="lmc-landscape",
    claim=(
        "Whether two networks are linearly connected is decided by a ridge that training has or has not carried them "
        "to different sides of; its height follows from curvature along the line, which also predicts layer-wise "
        "connectivity, and tells where averages of sparse networks work."
    ),
    rule=(
        "holds if, at 95 % over seeds, perceptrons that part at step 0 have a higher barrier than those that part "
        "half-way, whose error barrier is at most 2 points; the identity with 32 nodes gives B(1/2) "
        "within 2 % (smooth) and 5 % (ReLU, first order); predictions from the ends rank the layers' B(1/2) with a "
        "Spearman correlation above 0.7; in at least 90 % of the pairs that end with a barrier, the loss along the "
        "line bends down half-way no later than the middle rises for good; and at least 90 % of soups lose more than "
        "half a point against their candidates if and only if an error barrier above 2 points lies between these, each "
        "kind being a fifth or more; does not hold if one of these fails or is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="step of the fork",
    y_label="barrier of the training loss, nats",
)

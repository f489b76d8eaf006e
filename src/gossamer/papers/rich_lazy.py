"""The claim of rich and lazy learning: the lower the rank of the first weights, the more a network changes.

First on the smallest network, two linear layers, whose theory also predicts a number. Then recurrent networks learn
tasks that animals are given, and digits row by row, from first weights of one norm and different ranks and structures;
they are compared when they have learnt equally well. Gains of the weights, masks and a worm's connectome are told
beside the ranks, and so is what is left of a first task after a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.core.effective_rank import effective_rank, truncate_rank
from gossamer.core.randomness import generator_for
from gossamer.measure.laziness import LazinessProbe
from gossamer.papers.connectome import worm_connectome
from gossamer.papers.digits import digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.feedforward_laziness import feedforward_laziness
from gossamer.papers.linear_laziness import linear_laziness
from gossamer.papers.random_pruning import rank_correlation
from gossamer.papers.recurrent_runs import Finished, Weights, decisions, single, take, train_until
from gossamer.papers.recurrent_tasks import TASKS, Trials, draw_trials, row_digits
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.training import rich_lazy as first
from gossamer.training.ctrnn import CTRNN

QUICK: dict[str, Any] = {
    "hidden": 100,
    "ranks": [1, 10, 30, 100],
    "gains": [0.6, 2.5],
    "density": 0.1,
    "tasks": {
        "2AF": {"target": 0.039, "steps": 700},
        "DMS": {"target": 0.002, "steps": 900},
        "digits": {"target": 1.0, "steps": 500, "ranks": [5, 30, 100], "gain": 1.0, "pool": 2},
    },
    "structured": ["2AF"],
    "structured gain": 0.7,
    "rates": [0.01, 0.03, 0.003],
    "batch": 32,
    "held_out": 1000,
    "probe": 16,
    "feed-forward": {"width": 100, "ranks": [1, 10, 30, 100], "target": 0.4, "steps": 600, "rate": 0.02, "probe": 20},
    "linear": {
        "size": 40,
        "samples": 400,
        "ranks": [1, 3, 10],
        "scales": [1.0, 2.0],
        "readout": 0.01,
        "small": 1e-3,
        "draws": 6,
    },
}
FULL: dict[str, Any] = {
    **QUICK,
    "hidden": 300,
    "ranks": [1, 10, 30, 100, 300],
    "tasks": {
        "2AF": {"target": 0.035, "steps": 10000},
        "DMS": {"target": 0.001, "steps": 10000},
        "CXT": {"target": 0.02, "steps": 10000},
        "digits": {"target": 0.3, "steps": 5000, "ranks": [5, 30, 300], "gain": 1.0, "pool": 1},
    },
    "structured": ["2AF", "DMS", "CXT"],
    "rates": [0.003, 0.01, 0.03, 0.001],
}
RANKED = ("2AF", "DMS")  # tasks on which the claim is judged
MEASURES = {"kernel_alignment": 1, "representation_alignment": 1, "weight_change": -1}
CLEAR = 0.7  # rank correlation


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Rows of all networks, by task and first weights; the linear network; and forgetting."""
    rows: list[dict[str, Any]] = []
    kept: dict[str, tuple[list[str], Finished, Tensor]] = {}
    for task in progress(settings["tasks"], "tasks"):
        found, kept[task] = _learn(settings, task, seed)
        rows += found
    rows += feedforward_laziness(settings["feed-forward"], seed)
    return {
        "rows": rows,
        "linear": linear_laziness(settings["linear"], seed),
        "forgetting": _forgetting(settings, kept["2AF"], seed),
        "curves": _curves(settings, rows),
    }


# ---------------------------------------------------------------------------------------------- recurrent networks


def first_weights(settings: dict[str, Any], task: str, seed: int) -> dict[str, tuple[Tensor, Tensor | None]]:
    """First recurrent weights by name, each with a mask if its zeros stay; ranks have one norm, structures another."""
    n, density = settings["hidden"], settings["density"]

    def draw() -> torch.Generator:
        return generator_for("recurrent weights", seed)

    own = settings["tasks"][task]
    full = first.gaussian(n, own.get("gain", first.GAIN), draw())
    chosen: dict[str, tuple[Tensor, Tensor | None]] = {
        f"rank {rank}": (truncate_rank(full, rank), None) for rank in own.get("ranks", settings["ranks"])
    }
    if task not in settings["structured"]:
        return chosen
    chosen |= {f"gain {gain}": (full * (gain / first.GAIN), None) for gain in settings["gains"]}
    worm = worm_connectome()[1]
    structures: dict[str, Tensor] = {
        "unstructured": full,
        "Dale": first.dale(n, generator=draw()),
        "cell types": first.cell_types(n, generator=draw()),
        "chain motifs": first.motifs(n, chain=0.1, generator=draw()),
        "reciprocal motifs": first.motifs(n, reciprocal=0.5, generator=draw()),
        "worm": first.like_connectome(worm, n, generator=draw()),
        "worm, shuffled": first.like_connectome(worm, n, randomize=True, generator=draw()),
    }
    masked = {
        "sparse": first.sparse(n, density, generator=draw()),
        "modules": first.modular(n, round(1 / density), generator=draw()),
        "one block": first.one_block(n, density, generator=draw()),
    }
    # smaller than the ranks: a mean or a cluster makes an eigenvalue so large that eight steps explode
    norm = settings["structured gain"] * n**0.5
    chosen |= {name: (first.match_norm(weights, norm), None) for name, weights in structures.items()}
    return chosen | {name: (first.match_norm(weights, norm), weights != 0) for name, weights in masked.items()}


def _trials(settings: dict[str, Any], task: str, seed: int) -> tuple[Callable[[], Trials], Trials]:
    """Draw of the next batch, and held-out trials."""
    generator = generator_for(f"trials of {task}", seed)
    if task in TASKS:
        held_out = draw_trials(task, settings["held_out"], generator_for(f"held-out trials of {task}", seed))
        return lambda: draw_trials(task, settings["batch"], generator), held_out
    (training, rest), pool = digits().split(400, seed), settings["tasks"][task]["pool"]
    chosen = torch.randperm(len(rest), generator=generator)[: settings["held_out"]]
    return (
        lambda: row_digits(training, torch.randint(len(training), (settings["batch"],), generator=generator), pool),
        row_digits(rest, chosen, pool),
    )


def _stack(weights: Tensor, mask: Tensor | None, sizes: tuple[int, int], seed: int) -> CTRNN:
    """Networks that differ in nothing but their recurrent weights."""
    n = weights.shape[-1]
    shared = CTRNN(sizes[0], n, sizes[1], generator=generator_for("input and readout weights", seed))
    model = CTRNN(sizes[0], n, sizes[1], weights, copies=(len(weights),), mask=mask)
    with torch.no_grad():
        model.input.copy_(shared.input.expand_as(model.input))
        model.readout.copy_(shared.readout.expand_as(model.readout))
    return model


def _learn(
    settings: dict[str, Any], task: str, seed: int
) -> tuple[list[dict[str, Any]], tuple[list[str], Finished, Tensor]]:
    own = settings["tasks"][task]
    chosen = first_weights(settings, task, seed)
    names = list(chosen)
    weights = torch.stack([matrix for matrix, _ in chosen.values()])
    mask = torch.stack([torch.ones_like(matrix, dtype=torch.bool) if m is None else m for matrix, m in chosen.values()])
    draw, held_out = _trials(settings, task, seed)
    sizes = held_out.inputs.shape[2], int(held_out.targets.max()) + 1
    model = _stack(weights, mask, sizes, seed)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    finished, rates = _train(settings, start, mask, draw, held_out, own)
    probe = Trials(held_out.inputs[:, : settings["probe"]], held_out.targets[:, : settings["probe"]])
    rows = []
    for place, name in enumerate(names):
        learnt = finished.steps[place] >= 0
        measured = _measure(start, finished.weights, place, mask, probe, held_out) if learnt else {}
        rows.append(
            {
                "task": task,
                "first weights": name,
                "effective rank": effective_rank(weights[place]),
                "norm": float(weights[place].norm()),
                "masked": not bool(mask[place].all()),
                "steps": int(finished.steps[place]),
                "rate": float(rates[place]),
                "loss": float(finished.loss[place]) if finished.loss[place].isfinite() else None,
                **measured,
            }
        )
    return rows, (names, finished, rates)


def _train(
    settings: dict[str, Any],
    start: Weights,
    mask: Tensor,
    draw: Callable[[], Trials],
    held_out: Trials,
    own: dict[str, Any],
) -> tuple[Finished, Tensor]:
    """Train all at the first learning rate, and those that it leaves above the target at the next."""
    count = len(mask)
    pending = list(range(count))
    weights = {name: value.clone() for name, value in start.items()}
    steps, loss, rates = torch.full((count,), -1), torch.full((count,), torch.nan), torch.zeros(count)
    for rate in settings["rates"]:
        if not pending:
            break
        part = train_until(
            take(start, pending, mask), draw, held_out, torch.full((len(pending),), rate), own["target"], own["steps"]
        )
        for name in weights:
            weights[name][pending] = part.weights[name]
        steps[pending], loss[pending], rates[pending] = part.steps, part.loss, rate
        pending = [place for place in pending if steps[place] < 0]
    return Finished(weights, steps, loss), rates


def _measure(
    before: Weights, after: Weights, place: int, mask: Tensor, probe: Trials, held_out: Trials
) -> dict[str, float]:
    model = single(before, place, mask)
    last = bool((probe.targets[:-1] < 0).all())  # only the last step has an answer
    looked = LazinessProbe(
        model,
        probe.inputs,
        ["recurrent"],
        activity=lambda net, _: net(held_out.inputs[:, :200])[1][-1],
        select=lambda result: result[0][-1] if last else result[0],
        batch_dim=1,
    )
    looked.start()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(after[name][place])
    return looked.stop()


def _forgetting(
    settings: dict[str, Any], learnt: tuple[list[str], Finished, Tensor], seed: int
) -> list[dict[str, Any]]:
    """The second task learnt by the networks that know the first: what is left of the first."""
    names, finished, _ = learnt
    ranked = [place for place, name in enumerate(names) if name.startswith("rank ")]
    model = take(finished.weights, ranked)
    _, known = _trials(settings, "2AF", seed)
    draw, held_out = _trials(settings, "DMS", seed + 1)
    before = decisions(model, known)
    own, rate = settings["tasks"]["DMS"], settings["rates"][0]
    after = train_until(model, draw, held_out, torch.full((len(ranked),), rate), own["target"], own["steps"])
    left = decisions(take(after.weights, list(range(len(ranked)))), known)
    return [
        {"first weights": names[place], "before": float(b), "after": float(a), "steps": int(s)}
        for place, b, a, s in zip(ranked, before, left, after.steps)
    ]


def _curves(settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Kernel alignment over the rank, for each task."""
    curves: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        name, _, rank = row["first weights"].partition(" ")
        if name == "rank" and "kernel_alignment" in row:
            curve = curves.setdefault(f"{row['task']}, kernel alignment", {"x": [], "y": []})
            curve["x"].append(int(rank) / settings["hidden"])
            curve["y"].append(row["kernel_alignment"])
    return curves


# ---------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Signs of rank correlations and of full against rank one, over seeds."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed: dict[str, Interval] = _linear_differences(observations)
    clear: dict[str, Interval] = {}
    for task in RANKED:
        for measure, sign in MEASURES.items():
            clear[f"{task}, rank correlation of laziness by {measure}"] = mean_interval(
                [_correlation(observation, task, measure, sign) for observation in observations]
            )
            needed[f"{task}, full − rank 1, laziness by {measure}"] = mean_interval(
                [sign * _full_against_one(observation, task, measure) for observation in observations]
            )
    numbers: dict[str, Interval | float] = {**clear, **needed, **_told(observations)}
    wrong = [name for name, value in needed.items() if value.below_zero]
    weak = [name for name, value in needed.items() if not value.above_zero]
    weak += [name for name, value in clear.items() if value.mean < CLEAR]
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    if weak:
        return Verdict("inconclusive", f"not clear: {', '.join(weak)}", numbers)
    return Verdict("holds", "laziness rises with the rank by every measure, and one aligned direction is lazy", numbers)


def _rows(observation: Observation, task: str) -> dict[str, dict[str, Any]]:
    """First weights → what was measured, of the networks that have learnt the task."""
    return {row["first weights"]: row for row in observation["rows"] if row["task"] == task and row["steps"] >= 0}


def _ranked(observation: Observation, task: str) -> dict[int, dict[str, Any]]:
    rows = _rows(observation, task)
    return {int(name.removeprefix("rank ")): row for name, row in rows.items() if name.startswith("rank ")}


def _correlation(observation: Observation, task: str, measure: str, sign: int) -> float:
    rows = _ranked(observation, task)
    if len(rows) < 2:
        return 0.0  # too few have learnt the task to tell
    return sign * rank_correlation(list(rows), [row[measure] for row in rows.values()])


def _full_against_one(observation: Observation, task: str, measure: str) -> float:
    rows = _ranked(observation, task)
    return rows[max(rows)][measure] - rows[min(rows)][measure] if rows else 0.0


def _linear_differences(observations: list[Observation]) -> dict[str, Interval]:
    """Least change of a low rank minus that of full rank; and a tenth of full minus that of the aligned direction."""
    low, aligned = [], []
    for observation in observations:
        for change in observation["linear"]["change"].values():
            ranks = [value for name, value in change.items() if name.startswith("rank ")]
            low.append(min(ranks) - change["full"])
            aligned.append(change["full"] / 10 - change["aligned"])
    return {
        "linear, change of the least low rank − full": mean_interval(low),
        "linear, a tenth of the change of full − aligned": mean_interval(aligned),
    }


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    """Means of everything else."""
    numbers: dict[str, Interval | float] = {}
    for name in observations[0]["linear"]["theory"]:
        values = [observation["linear"]["theory"][name] for observation in observations]
        for key in ("predicted", "found"):
            numbers[f"linear, alignment of {name}, {key}"] = _mean([value[key] for value in values])
    for change in observations[0]["linear"]["change"]:
        for name in observations[0]["linear"]["change"][change]:
            values = [observation["linear"]["change"][change][name] for observation in observations]
            numbers[f"linear, change of {name} at scale {change}"] = _mean(values)
    for row in observations[0]["rows"]:
        task, name = row["task"], row["first weights"]
        found = [rows[name] for rows in (_rows(each, task) for each in observations) if name in rows]
        numbers[f"{task}, {name}, share that learnt it"] = len(found) / len(observations)
        for key in (*MEASURES, "centred_kernel_alignment", "sign_similarity", "plasticity_cost", "effective rank"):
            if found:
                numbers[f"{task}, {name}, {key}"] = _mean([each[key] for each in found])
    for measure, sign in MEASURES.items():
        values = [_among_structures(observation, measure, sign) for observation in observations]
        numbers[f"structures, rank correlation of effective rank with laziness by {measure}"] = mean_interval(values)
    for place, row in enumerate(observations[0]["forgetting"]):
        lost = [o["forgetting"][place]["before"] - o["forgetting"][place]["after"] for o in observations]
        numbers[f"forgetting, {row['first weights']}"] = mean_interval(lost)
    return numbers


def _among_structures(observation: Observation, measure: str, sign: int) -> float:
    """Over all first weights of one norm whose zeros do not stay, and that are no cut of another."""
    rows = [
        row
        for row in observation["rows"]
        if row["steps"] >= 0 and not row["first weights"].startswith(("rank ", "gain ")) and not row["masked"]
    ]
    if len(rows) < 2:
        return 0.0
    return rank_correlation([row["effective rank"] for row in rows], [sign * row[measure] for row in rows])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="rich-lazy",
    claim=(
        "At one norm, first weights of high rank make a network change little (lazy) and those of low rank make it "
        "change much (rich), unless the few directions are those of the task."
    ),
    rule=(
        "holds if, at 95 % over seeds, the first of two linear layers changes less from full than from any low rank, "
        "and from an aligned direction by less than a tenth of full; and in recurrent networks on both the "
        "two-alternative and the matching task, at equal loss, tangent-kernel alignment and representation alignment "
        "are higher and the change of weights is smaller at full rank than at rank one, with a mean rank correlation "
        "over the ranks of at least 0.7; does not hold if one of the differences is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=5,
    x_label="rank of the first weights, share of full",
    y_label="alignment",
)

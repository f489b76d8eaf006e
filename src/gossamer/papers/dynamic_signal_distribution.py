"""The claim that sparse and shared connections save samples, on the task that was made to show it, and on digits.

Fully connected, locally connected and convolutional networks learn to tell the sign of a signal that hides in one of k
noisy patches. How many samples each needs for a target error is searched by bisection, for growing k and d. Whether
gradient descent is blind to rotations, as the proofs need, is checked beside it, and so is whether a fully connected
network finds a local mask by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gossamer.core.randomness import generator_for
from gossamer.measure.equivariance import check_equivariance
from gossamer.measure.sample_complexity import geometric_grid, log_slope, sample_complexity
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.sparse_runs import accuracy
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.training.dynamic_signal_bounds import dsd_bounds
from gossamer.training.dynamic_signal_distribution import (
    PatchNet,
    PatchTraining,
    error_rate,
    make_dsd,
    oracle_labels,
    random_directions,
)
from gossamer.training.learned_locality import learn_local, locality
from gossamer.training.locally_connected import LocallyConnected2d

KINDS = ("cnn", "lcn", "fcn")
GROUPS = {"fcn": "orthogonal", "lcn": "block", "cnn": "shared-block"}
SEARCHES = ("rigl", "hebbian", "l1", "static")

QUICK: dict[str, Any] = {
    "sigma": 0.2,
    "target": 0.2,
    "patches": [4, 8, 16],
    "size": 96,
    "sizes": [48, 192],
    "middle": 8,
    "grid": [1, 4096],
    "repetitions": 5,
    "test": 400,
    "steps": 300,
    "rates": [0.03, 0.1, 0.3, 1.0],
    "pilot": {"cnn": 8, "lcn": 64, "fcn": 128},
    "searches": 2,
    "digits": {"samples": [100, 800], "channels": 8, "steps": 200, "batch": 64, "rates": [0.03, 0.1]},
}
FULL: dict[str, Any] = {
    **QUICK,
    "patches": [4, 8, 16, 24],
    "sizes": [24, 48, 192, 384],
    "grid": [1, 32768],
    "repetitions": 10,
    "test": 2000,
    "searches": 5,
    "digits": {**QUICK["digits"], "samples": [50, 100, 200, 400, 800, 1600, 4000], "steps": 2000},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Sample complexities of all tasks, with what is checked beside them."""
    rates = _tune(settings, seed)
    middle, size = settings["middle"], settings["size"]
    tasks = [(k, size, True) for k in settings["patches"]]
    tasks += [(middle, d, True) for d in settings["sizes"]] + [(middle, size, False)]
    rows = []
    for k, d, dynamic in progress(tasks, "sample complexities"):
        for kind in KINDS:

            def errors(n: int, kind: str = kind, k: int = k, d: int = d, dynamic: bool = dynamic) -> list[float]:
                return _errors(settings, kind, n, k, d, rates, seed, dynamic)

            found = sample_complexity(errors, geometric_grid(*settings["grid"]), settings["target"])
            rows.append(
                {"kind": kind, "k": k, "d": d, "dynamic": dynamic, "n": found.n, "bracket": list(found.bracket)}
            )
    return {
        "rows": rows,
        "rates": rates,
        "oracle": {str(k): _oracle(settings, k, seed) for k in settings["patches"]},
        "floors": {kind: bound.n for kind, bound in dsd_bounds(middle, size, settings["sigma"], seed=seed).items()},
        "rotations": _rotations(seed),
        "searches": _searches(settings, rows, rates, seed),
        "digits": _digits(settings["digits"], seed, progress),
        "curves": _curves(rows, settings["size"]),
    }


# ---------------------------------------------------------------------------------------------- the task


def _data(
    settings: dict[str, Any], n: int, k: int, d: int, seed: int, dynamic: bool, purpose: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Signals, training and test data of all repetitions; the same for every network."""
    generator = generator_for(f"{purpose}: {n} samples of {k} patches of {d}, {dynamic}", seed)
    signals = random_directions((settings["repetitions"],), d, generator)
    x, y, _ = make_dsd(n, k, d, settings["sigma"], signals, dynamic, generator)
    test, labels, _ = make_dsd(settings["test"], k, d, settings["sigma"], signals, dynamic, generator)
    return signals, x, y, test, labels


def _errors(
    settings: dict[str, Any],
    kind: str,
    n: int,
    k: int,
    d: int,
    rates: dict[str, float],
    seed: int,
    dynamic: bool = True,
    purpose: str = "task",
) -> list[float]:
    """Test errors of all repetitions, trained side by side."""
    _, x, y, test, labels = _data(settings, n, k, d, seed, dynamic, purpose)
    model = PatchNet(k, d, kind, copies=(settings["repetitions"],))
    model.reset_parameters(generator=generator_for("first weights", seed))
    PatchTraining(settings["steps"], learning_rate=rates[kind]).fit(model, x, y)
    with torch.inference_mode():
        return error_rate(model(test), labels).tolist()


def _tune(settings: dict[str, Any], seed: int) -> dict[str, float]:
    """Learning rate of each network: the one with the least error on a task of its own."""
    k, d = settings["middle"], settings["size"]
    return {
        kind: min(
            settings["rates"],
            key=lambda rate, kind=kind: sum(
                _errors(settings, kind, settings["pilot"][kind], k, d, {kind: rate}, seed, purpose="pilot")
            ),
        )
        for kind in KINDS
    }


def _oracle(settings: dict[str, Any], k: int, seed: int) -> float:
    """Error of one who knows the signal."""
    signals, _, _, test, labels = _data(settings, 1, k, settings["size"], seed, True, "oracle")
    return float((oracle_labels(test, signals) != labels).double().mean())


def _rotations(seed: int) -> dict[str, float]:
    """Largest relative change of a prediction under rotations, for gradient descent and for Adam."""
    k, d = 4, 8
    x, y, _ = make_dsd(40, k, d, 0.3, seed=seed)
    test, _, _ = make_dsd(50, k, d, 0.3, seed=seed + 1000)
    found = {}
    for kind, group in GROUPS.items():
        initial = PatchNet(k, d, kind).reset_parameters(1e-2, generator_for("rotated weights", seed)).weight
        for name, options in {"gd": {}, "adam": {"learning_rate": 0.01}}.items():
            training = PatchTraining(steps=60, optimizer=name, **options)

            def learner(
                x: Tensor, y: Tensor, initial: Tensor, kind: str = kind, training: PatchTraining = training
            ) -> Callable[[Tensor], Tensor]:
                model = PatchNet(k, d, kind).double()
                with torch.no_grad():
                    model.weight.copy_(initial)
                training.fit(model, x, y)
                return lambda sample: model(sample).detach()

            found[f"{kind}, {name}"] = check_equivariance(
                learner, x.double(), y.double(), test.double(), initial.detach().double(), group, seed=seed
            )
    return found


def _searches(
    settings: dict[str, Any], rows: list[dict[str, Any]], rates: dict[str, float], seed: int
) -> list[dict[str, Any]]:
    """Errors of masks that are looked for, with as many samples as suffice for the mask that is given."""
    k, d = settings["middle"], settings["size"]
    own = next(r for r in rows if (r["kind"], r["k"], r["d"], r["dynamic"]) == ("lcn", k, d, True))
    if own["n"] is None:
        return []
    n = max(2, round(own["n"]))
    _, x, y, test, labels = _data(settings, n, k, d, seed, True, "searches")
    found = []
    for search in SEARCHES:
        errors, places = [], []
        for one in range(min(settings["searches"], len(x))):
            training = PatchTraining(settings["steps"], learning_rate=rates["fcn"])
            predict, mask = learn_local(x[one], y[one], search, training, seed=seed + one)
            errors.append(float(error_rate(predict(test[one]), labels[one])))
            places.append(locality(mask, d))
        found.append({"search": search, "n": n, "error": _mean(errors), "locality": _mean(places)})
    for kind in ("lcn", "fcn"):
        errors = _errors(settings, kind, n, k, d, rates, seed, purpose="searches")
        found.append({"search": f"none ({kind})", "n": n, "error": _mean(errors), "locality": None})
    return found


# ---------------------------------------------------------------------------------------------- digits


def digit_network(kind: str, channels: int) -> nn.Sequential:
    """Windows of 8 × 8 at 36 places, `channels` units for each, and a linear layer; all kinds are equally wide."""
    width = 36 * channels
    bodies: dict[str, Callable[[], list[nn.Module]]] = {
        "cnn": lambda: [nn.Conv2d(1, channels, 8, stride=4), nn.ReLU(), nn.Flatten()],
        "lcn": lambda: [LocallyConnected2d(1, channels, 28, kernel_size=8, stride=4), nn.ReLU(), nn.Flatten()],
        "fcn": lambda: [nn.Flatten(), nn.Linear(28 * 28, width), nn.ReLU()],
    }
    return nn.Sequential(*bodies[kind](), nn.Linear(width, 10))


def _digits(own: dict[str, Any], seed: int, progress: Track) -> dict[str, float]:
    """Errors in percent, by kind, number of samples, and whether pixels are in their places."""
    training, held_out = digits().split(max(400, max(own["samples"]) // 10), seed)
    order = torch.randperm(28 * 28, generator=generator_for("order of the pixels", seed))
    found = {}
    for n in progress(own["samples"], "digits"):
        chosen = torch.randperm(len(training), generator=generator_for(f"{n} digits", seed))[:n]
        few = Digits(training.images[chosen], training.labels[chosen])
        for name, change in {"": lambda images: images, ", permuted": lambda images: _permuted(images, order)}.items():
            train, test = (Digits(change(data.images) - 0.13, data.labels) for data in (few, held_out))
            for kind in KINDS:
                errors = [_digit_error(own, kind, train, test, rate, seed) for rate in own["rates"]]
                found[f"{kind}, {n}{name}"] = min(errors)
    return found


def _permuted(images: Tensor, order: Tensor) -> Tensor:
    return images.flatten(1)[:, order].view_as(images)


def _digit_error(own: dict[str, Any], kind: str, train: Digits, test: Digits, rate: float, seed: int) -> float:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = digit_network(kind, own["channels"])
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    generator = generator_for("batches of digits", seed)
    for step in range(own["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / own["steps"])) / 2
        rows = torch.randint(len(train), (own["batch"],), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(train.images[rows]), train.labels[rows]).backward()
        optimizer.step()
    return 100 * (1 - accuracy(model, test))


def _curves(rows: list[dict[str, Any]], size: int) -> dict[str, dict[str, list[float]]]:
    """Sample complexity over the number of patches."""
    curves: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["dynamic"] and row["d"] == size and row["n"] is not None:
            curve = curves.setdefault(row["kind"], {"x": [], "y": []})
            curve["x"].append(row["k"])
            curve["y"].append(row["n"])
    return curves


# ---------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Differences of exponents, paired by seed; the order in every task; and rotations."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    slopes = {kind: [_slope(observation, kind, "k") for observation in observations] for kind in KINDS}
    gaps = {
        f"exponent in k, {more} − {less}": _difference(slopes[more], slopes[less])
        for less, more in (("cnn", "lcn"), ("lcn", "fcn"))
    }
    needed = {name: gap for name, gap in gaps.items() if gap is not None}
    numbers: dict[str, Interval | float] = {**needed, **_told(observations)}
    disorder = _disorder(observations)
    wrong = [name for name, value in needed.items() if value.below_zero] + disorder
    blind = max(v for o in observations for name, v in o["rotations"].items() if name.endswith("gd"))
    seeing = min(v for o in observations for name, v in o["rotations"].items() if name.endswith("adam"))
    numbers |= {"rotations, largest change under gradient descent": blind, "rotations, least under Adam": seeing}
    if blind > 1e-5 or seeing < 1e-2:
        wrong.append("rotations")
    if wrong:
        return Verdict("does not hold", f"reversed: {', '.join(wrong)}", numbers)
    open_ = [name for name in gaps if name not in needed or not needed[name].above_zero]
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {', '.join(open_)}", numbers)
    return Verdict("holds", "each step of connectivity lowers the exponent in the number of patches", numbers)


def _of(observation: Observation, kind: str, dynamic: bool = True) -> dict[tuple[int, int], dict[str, Any]]:
    return {(r["k"], r["d"]): r for r in observation["rows"] if r["kind"] == kind and r["dynamic"] == dynamic}


def _slope(observation: Observation, kind: str, variable: str) -> float | None:
    """Exponent in k or in d, through the tasks that share the other one; None if fewer than two have a crossing."""
    rows = _of(observation, kind)
    keys = list(rows)
    other = 1 if variable == "k" else 0
    shared = max({key[other] for key in keys}, key=lambda value: sum(key[other] == value for key in keys))
    pairs = [(key[1 - other], row["n"]) for key, row in rows.items() if key[other] == shared and row["n"] is not None]
    return log_slope([x for x, _ in pairs], [n for _, n in pairs]) if len(pairs) > 1 else None


def _difference(more: list[float | None], less: list[float | None]) -> Interval | None:
    pairs = [a - b for a, b in zip(more, less, strict=True) if a is not None and b is not None]
    return mean_interval(pairs) if len(pairs) > 1 else None


def _disorder(observations: list[Observation]) -> list[str]:
    """Tasks in which a network with fewer connections needs more samples, on average over seeds."""
    found = []
    for less, more in (("cnn", "lcn"), ("lcn", "fcn")):
        for task in _of(observations[0], less):
            gaps = [_log_n(_of(o, more)[task]) - _log_n(_of(o, less)[task]) for o in observations]
            if not _mean(gaps) > 0:
                found.append(f"{less} before {more} at k = {task[0]}, d = {task[1]}")
    return found


def _log_n(row: dict[str, Any]) -> float:
    """Logarithm of the sample complexity; one that is censored counts as the end of the grid."""
    if row["n"] is not None:
        return math.log(row["n"])
    low, high = row["bracket"]
    return math.log(high / 2 if low is None else low * 2)


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    """Means of everything: sample complexities, exponents, oracle, floors, searches and digits."""
    numbers: dict[str, Interval | float] = {}
    for place, row in enumerate(observations[0]["rows"]):
        values = [o["rows"][place]["n"] for o in observations if o["rows"][place]["n"] is not None]
        task = f"n of {row['kind']} at k = {row['k']}, d = {row['d']}{'' if row['dynamic'] else ', static'}"
        if values:
            numbers[task] = math.exp(_mean([math.log(value) for value in values]))
    for kind in KINDS:
        for variable in ("k", "d"):
            values = [_slope(o, kind, variable) for o in observations]
            known = [value for value in values if value is not None]
            if len(known) > 1:
                numbers[f"exponent of {kind} in {variable}"] = mean_interval(known)
    for part in ("oracle", "floors"):
        for name in observations[0][part]:
            label = f"error of the oracle at k = {name}" if part == "oracle" else f"floor under n of {name}"
            numbers[label] = _mean([o[part][name] for o in observations])
    for name in sorted({row["search"] for o in observations for row in o["searches"]}):
        rows = [row for o in observations for row in o["searches"] if row["search"] == name]
        numbers[f"error with a mask by {name}"] = _mean([row["error"] for row in rows])
        if rows[0]["locality"] is not None:
            numbers[f"locality of a mask by {name}"] = _mean([row["locality"] for row in rows])
    for name in observations[0]["digits"]:
        numbers[f"digits, error of {name}"] = _mean([o["digits"][name] for o in observations])
        kind, _, rest = name.partition(", ")
        if kind != "fcn":
            gap = [o["digits"][f"fcn, {rest}"] - o["digits"][name] for o in observations]
            numbers[f"digits, fcn − {kind}, {rest}"] = mean_interval(gap)
    return numbers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="dynamic-signal-distribution",
    claim=(
        "To find a signal in one of k noisy patches, a convolutional network needs fewer samples than a locally "
        "connected one and that fewer than a fully connected one, by factors that grow with k."
    ),
    rule=(
        "holds if, at 95 % over seeds, the exponent with which the samples for an error of 0.2 grow with k is larger "
        "for locally connected than for convolutional and for fully connected than for locally connected networks, and "
        "in every task the samples have this order on average; does not hold if an interval lies wholly below zero, an "
        "order is reversed, or gradient descent notices rotations (relative change above 1e-5) or Adam does not (below "
        "1e-2)"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=5,
    x_label="patches",
    y_label="samples for an error of 0.2",
    logarithmic=True,
)

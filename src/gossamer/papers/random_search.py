"""Random search's claim: choosing among many random sub-networks before training is no better than taking one.

Perceptrons for two sets of handwritten digits lose nodes in four ways: one at random, the best of T random ones by the
loss before training, and, to see whether the comparison could tell a good choice from chance at all, the nodes that
turn out important when the whole network is trained. All train by one recipe from the same initial weights on the same
data in the same order.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.papers.byte_model import train
from gossamer.papers.digits import Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.power import minimum_detectable_effect
from gossamer.papers.results import Verdict
from gossamer.papers.small_digits import small_digits
from gossamer.papers.statistics import Interval, bootstrap_interval
from gossamer.training.random_search import Batches, RandomSearch, SearchResult
from gossamer.training.searchers import LearningCurve, NodeImportance, Searcher, compare_searchers

EQUIVALENT = 0.5  # points of accuracy
SURVIVES = 0.9  # share of the dense network's accuracy that a random tenth of the nodes must keep

_IMAGES: dict[str, tuple[Callable[[], Digits], int]] = {"mnist": (digits, 400), "digits": (small_digits, 140)}
QUICK: dict[str, Any] = {
    "images": ["mnist", "digits"],
    "width": 1024,
    "sparsities": [0.5, 0.9, 0.98],
    "trials": [1, 10, 100],
    "random": 2,
    "scored": 256,
    "steps": 400,
    "batch": 32,
    "learning_rate": 3e-3,
    "measured_every": 40,
}
FULL: dict[str, Any] = {**QUICK, "trials": [1, 10, 100, 1000], "random": 5, "steps": 1200}


@dataclass(kw_only=True)
class Watched(RandomSearch):
    """A random search that remembers the losses of all its candidates, by sparsity."""

    seen: dict[float, Tensor] = field(default_factory=dict)

    def search(self, model: nn.Module, data: Batches | None = None) -> SearchResult:
        """Search, and remember."""
        found = super().search(model, data)
        self.seen[self.sparsity] = found.scores
        return found


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Rows of all trials, and how far the best of T lies below the mean of the losses before training."""
    rows: list[dict[str, Any]] = []
    depths: dict[str, list[float]] = {}
    for images in progress(settings["images"], "training"):
        search = Watched(n_trials=max(settings["trials"]))
        rows += [{"images": images, **row} for row in _compare(settings, images, seed, search)]
        for sparsity, losses in search.seen.items():
            depths[f"{images} {sparsity}"] = [best_depth(losses, count) for count in settings["trials"]]
    return {"rows": rows, "depths": depths, "trials": settings["trials"], "curves": _curves(rows)}


def _compare(settings: dict[str, Any], images: str, seed: int, search: RandomSearch) -> list[dict[str, Any]]:
    recipe = _recipe(settings, images)
    searchers: dict[str, Searcher] = {
        "random search": search,
        "node importance": NodeImportance(train=recipe),
    }
    searchers |= {f"random {k}": RandomSearch(n_trials=1, stream=k + 1) for k in range(settings["random"])}
    rows = compare_searchers(
        searchers,
        lambda seed: _parent(settings, images, seed),
        lambda seed: _scored(settings, images, seed),
        settings["sparsities"],
        [seed],
        recipe,
    )
    # a NaN is no JSON value
    return [
        {**row, "initial_score": None if math.isnan(row["initial_score"]) else row["initial_score"]} for row in rows
    ]


def _split(images: str, seed: int) -> tuple[Digits, Digits]:
    load, count = _IMAGES[images]
    return load().split(count, seed)


def _parent(settings: dict[str, Any], images: str, seed: int) -> nn.Module:
    pixels, width = _IMAGES[images][0]().images[0].numel(), settings["width"]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        hidden = [nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def _scored(settings: dict[str, Any], images: str, seed: int) -> Batches:
    """Some images of the training set."""
    training, _ = _split(images, seed)
    rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[: settings["scored"]]
    return training.images[rows], training.labels[rows]


def _recipe(settings: dict[str, Any], images: str) -> Callable[[nn.Module, int], LearningCurve]:
    def fit(model: nn.Module, seed: int) -> LearningCurve:
        training, held_out = _split(images, seed)
        steps, metrics = [], []

        def measure(step: int) -> None:
            if (step + 1) % settings["measured_every"] == 0 or step + 1 == settings["steps"]:
                with torch.no_grad():
                    right = model(held_out.images).argmax(1) == held_out.labels
                steps.append(step + 1)
                metrics.append(float(right.double().mean()))

        order = torch.randint(len(training), (settings["steps"], settings["batch"]))
        batches = ((training.images[rows], training.labels[rows]) for rows in order)
        loss = nn.functional.cross_entropy
        train(model, batches, lambda b: loss(model(b[0]), b[1]), settings["steps"], settings["learning_rate"], measure)
        return LearningCurve(steps, metrics)

    return fit


def best_depth(losses: Tensor, count: int) -> float:
    """How many standard deviations the best of the first `count` lies below the mean of all."""
    return float((losses.mean() - losses[:count].min()) / losses.std())


def normal_depth(count: int) -> float:
    """The same to be expected of independent normal losses: about ``√(2 ln T)`` for large T (Blom's formula)."""
    return float(torch.special.ndtri(torch.tensor((count - 0.375) / (count + 0.25), dtype=torch.float64)))


def _kind(searcher: str) -> str:
    return "random" if searcher.startswith("random ") and searcher[7:].isdigit() else searcher


def _mean(rows: Sequence[dict[str, Any]], column: str, **wanted: Any) -> float:
    """Mean of a column over the rows with these values."""
    return statistics.fmean(
        row[column]
        for row in rows
        if all((_kind(row[key]) if key == "searcher" else row[key]) == value for key, value in wanted.items())
    )


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    kinds = dict.fromkeys((row["images"], _kind(row["searcher"])) for row in rows if row["searcher"] != "dense")
    for images, kind in kinds:
        x = sorted({row["sparsity"] for row in rows if row["searcher"] != "dense"})
        y = [100 * _mean(rows, "metric", images=images, searcher=kind, sparsity=sparsity) for sparsity in x]
        curves[f"{images}, {kind}"] = {"x": x, "y": y}
    return curves


def _lifts(observations: list[Observation], searcher: str, column: str) -> dict[str, list[float]]:
    """Points by which a searcher is ahead of chance: images and sparsity → one number a seed; and the mean of all."""
    lifts: dict[str, list[float]] = {}
    cases = dict.fromkeys((r["images"], r["sparsity"]) for r in observations[0]["rows"] if r["searcher"] != "dense")
    for images, sparsity in cases:
        case = {"images": images, "sparsity": sparsity}
        lifts[f"{images} {sparsity}"] = [
            100
            * (
                _mean(o["rows"], column, searcher=searcher, **case)
                - _mean(o["rows"], column, searcher="random", **case)
            )
            for o in observations
        ]
    lifts["mean"] = [statistics.fmean(values) for values in zip(*lifts.values())]
    return lifts


def decide(observations: list[Observation]) -> Verdict:
    """Equal to chance within half a point, by a comparison that sees a real advantage."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    numbers: dict[str, Interval | float] = {}
    for searcher in ("random search", "node importance"):
        for column, name in (("metric", "points"), ("area", "area")):
            for case, values in _lifts(observations, searcher, column).items():
                numbers[f"{searcher} − random, {name}, {case}"] = bootstrap_interval(values)
    accuracy = _as_interval(numbers["random search − random, points, mean"])
    speed = _as_interval(numbers["random search − random, area, mean"])
    informed = _as_interval(numbers["node importance − random, points, mean"])
    smallest = minimum_detectable_effect(_lifts(observations, "random search", "metric")["mean"])
    numbers["smallest effect that would be found, points"] = smallest
    kept = _survival(observations, numbers)
    falls = _depths(observations, numbers)
    if accuracy.above_zero or speed.above_zero:
        return Verdict("does not hold", "the best of many random networks is better than one of them", numbers)
    if not informed.above_zero:
        return Verdict("inconclusive", "the comparison does not see the advantage of important nodes either", numbers)
    if max(-accuracy.low, accuracy.high) > EQUIVALENT or not falls or not kept:
        return Verdict("inconclusive", f"no advantage, but equality within {EQUIVALENT} points is not shown", numbers)
    return Verdict("holds", "no better than chance, where important nodes are better", numbers)


def _as_interval(number: Interval | float) -> Interval:
    return number if isinstance(number, Interval) else Interval(number, number, number)


def _survival(observations: list[Observation], numbers: dict[str, Interval | float]) -> bool:
    """Whether random networks of a tenth of the nodes keep most of the accuracy."""
    for images in dict.fromkeys(row["images"] for row in observations[0]["rows"]):
        dense = [_mean(o["rows"], "metric", images=images, searcher="dense") for o in observations]
        sparsities = dict.fromkeys(r["sparsity"] for r in observations[0]["rows"] if r["searcher"] != "dense")
        for sparsity in sparsities:
            own = [
                _mean(o["rows"], "metric", images=images, searcher="random", sparsity=sparsity) for o in observations
            ]
            numbers[f"accuracy over dense, {images} {sparsity}"] = statistics.fmean(a / b for a, b in zip(own, dense))
    return all(value >= SURVIVES for name, value in numbers.items() if name.endswith(" 0.9") and "over" in name)  # type: ignore[operator]


def _depths(observations: list[Observation], numbers: dict[str, Interval | float]) -> bool:
    """Whether the best initial loss falls with the number of trials."""
    means = []
    for place, count in enumerate(observations[0]["trials"]):
        means.append(statistics.fmean(d[place] for o in observations for d in o["depths"].values()))
        numbers[f"best of {count} below the mean, deviations"] = means[-1]
        numbers[f"the same of normal numbers, {count}"] = normal_depth(count)
    return all(later > earlier for earlier, later in pairwise(means))


experiment = Experiment(
    slug="random-search",
    claim=(
        "The best of many random sub-networks by their loss before training performs no better and converges no faster "
        "than a random one, and random ones keep much of the accuracy at high sparsity."
    ),
    rule=(
        "holds if, over seeds and in the mean of two sets of digits and three sparsities, the 95 % bootstrap intervals "
        "of random search less random do not lie above zero, for accuracy (within half a point) and for the area under "
        "the learning curve, while important nodes are ahead of random ones, the best initial loss falls with the "
        "number of trials, and a random tenth of the nodes keeps 90 % of the accuracy; does not hold if random search "
        "is ahead; inconclusive otherwise"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=10,
    x_label="share of nodes removed",
    y_label="accuracy, %",
)

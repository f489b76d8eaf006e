"""The journey's claim: the average number of active parameters predicts the loss of a model pruned in pretraining.

Byte-level transformers with blocks of several sizes, between embeddings of one size, are pretrained on Python's
source, dense and for several lengths; the law is fitted to these runs alone. Then larger ones are pruned while they
train, along several schedules, and the law has to predict their losses from their average size; from their first or
their final size it should not. Dense models of the average size, and random masks of that size which are there from
the start, are trained on the same text.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gossamer.core.sparsifier import Sparsifier
from gossamer.errors import ConfigurationError
from gossamer.measure.scaling_law import LawFit, fit_scaling_law
from gossamer.papers.byte_language import ByteGPT, Pretrained, pretrain
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import python_source
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, bootstrap_interval, mean_interval
from gossamer.training.journey_matters import PretrainingSchedule
from gossamer.training.static import Static

EQUAL = 0.01  # relative difference in loss of a matched pair
NEAR = 0.005  # relative difference in loss from the best schedule
_SPARSEST = 0.99
REFERENCE = "25 % to 75 %"
EARLY, LATE = "0 % to 25 %", "75 % to 95 %"
_SCHEDULES = {EARLY: (0.0, 0.25), REFERENCE: (0.25, 0.75), "50 % to 75 %": (0.5, 0.75), LATE: (0.75, 0.95)}

QUICK: dict[str, Any] = {
    "bytes": 2_800_000,
    "held_out": 256,
    "length": 64,
    "batch": 16,
    "learning_rate": 1e-2,
    "layers": 2,
    "width": 32,
    "heads": 2,
    "inner": [4, 32, 64],
    "steps": [100, 200, 400],
    # inner width, steps, sparsity of runs along the schedule of the paper
    "sparse": [[64, 200, 0.5], [32, 200, 0.8], [64, 400, 0.8]],
    "sweep": [64, 200, 0.8],
    "schedules": _SCHEDULES,
    # inner width at first, that of the dense model of the same average size, steps
    "pairs": [[64, 32, 200]],
    "choices": 50,
}
FULL: dict[str, Any] = {
    **QUICK,
    "bytes": 8_000_000,
    "held_out": 1024,
    "length": 128,
    "learning_rate": 5e-3,
    "layers": 4,
    "width": 128,
    "heads": 4,
    # 0.1, 0.2, 0.4, 0.8 and 1.6 million weights in the blocks
    "inner": [16, 32, 64, 128, 256],
    "steps": [1000, 2000, 4000],
    "sparse": [
        [inner, steps, sparsity]
        for inner, steps in ((128, 2000), (256, 2000), (128, 4000), (256, 4000))
        for sparsity in (0.5, 0.8)
    ],
    "sweep": [128, 2000, 0.8],
    "schedules": {
        f"{round(100 * start)} % to {round(100 * stop)} %": (start, stop)
        for start in (0.0, 0.25, 0.5, 0.75)
        for stop in (0.25, 0.5, 0.75, 0.95)
        if start < stop
    },
    "pairs": [[64, 32, 2000], [128, 64, 2000], [256, 128, 2000]],
    "choices": 100,
}


class _Laboratory:
    """Text, sizes and the one way in which every model of a seed is trained."""

    def __init__(self, settings: dict[str, Any], seed: int):
        self.settings, self.seed = settings, seed
        length, count = settings["length"], settings["held_out"]
        # the same text for every seed, so that the runs of all seeds follow one law
        source = python_source(settings["bytes"] + length * count, 2, 2, length, 2, seed=0)
        self.text: Tensor = source.text[: settings["bytes"]]
        self.held_out: Tensor = source.text[settings["bytes"] :].view(count, length)

    def model(self, inner: int) -> ByteGPT:
        """A new model; equal sizes and seeds start from equal weights."""
        torch.manual_seed(self.seed)
        layers, width, heads = (self.settings[name] for name in ("layers", "width", "heads"))
        return ByteGPT(layers, width, heads, self.settings["length"], inner)

    def train(self, inner: int, steps: int, method: Sparsifier | None = None) -> Pretrained:
        """One run."""
        batch, rate = self.settings["batch"], self.settings["learning_rate"]
        return pretrain(self.model(inner), self.text, self.held_out, steps, batch, rate, method, self.seed)

    def schedule(self, inner: int, steps: int, sparsity: float, start: float = 0.25, stop: float = 0.75) -> Any:
        """Pruning between two shares of the compute."""
        return PretrainingSchedule(
            sparsity=sparsity,
            total=steps,
            start_compute=start,
            stop_compute=stop,
            fixed_cost=self.model(inner).flops().fixed_share,
            every=max(1, steps // self.settings["choices"]),
        )

    def matched(self, inner: int, dense_inner: int, steps: int) -> tuple[Any, Static]:
        """The schedule, and the random mask, with the average size of a dense model."""
        first, dense = (_prunable(self.model(each)) for each in (inner, dense_inner))
        wanted = 1 - dense / first
        low, high = 0.0, _SPARSEST
        for _ in range(40):
            middle = (low + high) / 2
            reached = self.schedule(inner, steps, middle).path.average_sparsity()
            low, high = (middle, high) if reached < wanted else (low, middle)
        if high == _SPARSEST:
            raise ConfigurationError(
                f"no schedule brings the average of {inner} down to {dense_inner}; pair sizes that are less far apart"
            )
        return self.schedule(inner, steps, low), Static(sparsity=wanted, allocation="uniform", seed=self.seed)

    def steps_of_equal_compute(self, inner: int, steps: int, method: Any, reference: Any) -> int:
        """Steps that cost as much as those of the reference."""
        flops = self.model(inner).flops()
        costs = [flops.at(each.path.average_density()).forward for each in (reference, method)]
        return round(steps * costs[0] / costs[1])


def _prunable(model: ByteGPT) -> int:
    return sum(parameter.numel() for parameter in model.blocks.parameters() if parameter.dim() == 2)


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Dense runs, sparse runs, a sweep of schedules at equal compute, and matched pairs."""
    laboratory = _Laboratory(settings, seed)
    dense = {}
    for inner, steps in progress([(w, s) for w in settings["inner"] for s in settings["steps"]], "dense"):
        dense[inner, steps] = laboratory.train(inner, steps)
    sparse: dict[str, Pretrained] = {}
    for inner, steps, sparsity in progress(settings["sparse"], "pruned"):
        label = f"inner {inner}, {steps} steps, {sparsity}"
        sparse[label] = laboratory.train(inner, steps, laboratory.schedule(inner, steps, sparsity))
    swept = _sweep(laboratory, progress)
    pairs = _pairs(laboratory, dense, progress)
    sparse |= {f"schedule {label}": found for label, found in swept.items()}
    sparse |= {f"matched to {label}": pair["pruned"] for label, pair in pairs.items()}
    card = {"dense, average size": next(iter(pairs.values()))["dense"]} | next(iter(pairs.values()))
    return {
        "dense": [_point(found) for found in dense.values()],
        "sparse": {label: _point(found) for label, found in sparse.items()},
        "schedules": {label: found.loss for label, found in swept.items()},
        "pairs": {label: {name: each.loss for name, each in pair.items()} for label, pair in pairs.items()},
        "runs": {n: {"quality": r.loss, "cost": r.cost.to_dict()} for n, r in card.items() if n != "dense"},
        "equal": ["units", "average_parameters"],
        "curves": _curves(dense, sparse, settings),
    }


def _sweep(laboratory: _Laboratory, progress: Track) -> dict[str, Pretrained]:
    inner, steps, sparsity = laboratory.settings["sweep"]
    schedules = laboratory.settings["schedules"]
    reference = laboratory.schedule(inner, steps, sparsity, *schedules[REFERENCE])
    found = {}
    for label, (start, stop) in progress(schedules.items(), "schedules"):
        method = laboratory.schedule(inner, steps, sparsity, start, stop)
        equal = laboratory.steps_of_equal_compute(inner, steps, method, reference)
        found[label] = laboratory.train(inner, equal, laboratory.schedule(inner, equal, sparsity, start, stop))
    return found


def _pairs(
    laboratory: _Laboratory, dense: dict[tuple[int, int], Pretrained], progress: Track
) -> dict[str, dict[str, Pretrained]]:
    found = {}
    for inner, dense_inner, steps in progress(laboratory.settings["pairs"], "matched pairs"):
        schedule, static = laboratory.matched(inner, dense_inner, steps)
        found[f"inner {dense_inner}, {steps} steps"] = {
            "dense": dense[dense_inner, steps],
            "pruned": laboratory.train(inner, steps, schedule),
            "static": laboratory.train(inner, steps, static),
        }
    return found


def _point(found: Pretrained) -> dict[str, float]:
    cost = found.cost
    return {
        "average": cost.average_parameters,
        "final": cost.active_parameters,
        "initial": cost.parameters,
        "tokens": cost.units,
        "loss": found.loss,
    }


def _curves(
    dense: dict[tuple[int, int], Pretrained], sparse: dict[str, Pretrained], settings: dict[str, Any]
) -> dict[str, dict[str, list[float]]]:
    steps = settings["sweep"][1]
    size = settings["batch"] * settings["length"]
    points = sorted((_point(found) for found in sparse.values()), key=lambda point: point["average"])
    own = [point for point in points if point["tokens"] == steps * size]
    curves = {"dense": [_point(dense[inner, steps]) for inner in settings["inner"]]}
    lines = {label: {"x": [p["average"] for p in row], "y": [p["loss"] for p in row]} for label, row in curves.items()}
    lines["pruned, at its average size"] = {"x": [p["average"] for p in own], "y": [p["loss"] for p in own]}
    own.sort(key=lambda point: point["final"])
    lines["pruned, at its final size"] = {"x": [p["final"] for p in own], "y": [p["loss"] for p in own]}
    return lines


def fit_dense(observations: list[Observation]) -> LawFit:
    """The law of the dense runs of all seeds."""
    return fit_scaling_law([point for observation in observations for point in observation["dense"]], "average")


def law_errors(observations: list[Observation], law: LawFit, size: str) -> list[float]:
    """For every sparse run, mean over seeds: relative error of the law with one of the three sizes in it."""
    found = []
    for label in observations[0]["sparse"]:
        points = [observation["sparse"][label] for observation in observations]
        errors = [abs(float(law.predict(p[size], p["tokens"])) / p["loss"] - 1) for p in points]
        found.append(sum(errors) / len(errors))
    return found


def decide(observations: list[Observation]) -> Verdict:
    """Apply the rule."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    law = fit_dense(observations)
    errors = {size: law_errors(observations, law, size) for size in ("average", "final", "initial")}
    ours = errors["average"]
    excess, gain = (
        {
            size: bootstrap_interval([theirs - factor * own for theirs, own in zip(errors[size], ours)])
            for size in ("final", "initial")
        }
        for factor in (2, 1)
    )
    pair = mean_interval([_mean_ratio(o["pairs"], "pruned", "dense") for o in observations])
    control = mean_interval([_mean_ratio(o["pairs"], "static", "pruned") for o in observations])
    behind = {label: _behind(observations, label) for label in observations[0]["schedules"] if label != REFERENCE}
    best = min(behind, key=lambda label: behind[label].mean)
    numbers: dict[str, Interval | float] = {
        **{f"error with the {size} size": sum(values) / len(values) for size, values in errors.items()},
        **{f"error with the {size} size, less twice that with the average": value for size, value in excess.items()},
        "R² of the law on dense runs": _explained(observations, law),
        "exponent of the size": law.alpha,
        "exponent of the text": law.beta,
        "log loss, pruned − dense of the average size": pair,
        "log loss, random mask of the average size − pruned": control,
        **{f"log loss, {label} − {REFERENCE}": value for label, value in behind.items()},
    }
    claims = {
        "the final size predicts better": (excess["final"].above_zero, gain["final"].below_zero),
        "the initial size predicts better": (excess["initial"].above_zero, gain["initial"].below_zero),
        "matched pairs differ": (pair.low > -EQUAL and pair.high < EQUAL, pair.low > EQUAL or pair.high < -EQUAL),
        "a random mask is as good": (control.above_zero, control.below_zero),
        f"{best} is better": (behind[best].low > -NEAR, behind[best].high < -NEAR),
        "pruning early is better": (behind[EARLY].above_zero, behind[EARLY].below_zero),
        "pruning late is better": (behind[LATE].above_zero, behind[LATE].below_zero),
    }
    wrong = [name for name, (_, reversed_) in claims.items() if reversed_]
    if wrong:
        return Verdict("does not hold", "; ".join(wrong), numbers)
    open_ = [name for name, (held, _) in claims.items() if not held]
    if open_:
        return Verdict("inconclusive", f"not excluded: {'; '.join(open_)}", numbers)
    return Verdict(
        "holds", "the average size predicts the loss, and the schedule of the paper is near the best", numbers
    )


def _mean_ratio(pairs: dict[str, dict[str, float]], above: str, below: str) -> float:
    return sum(math.log(pair[above] / pair[below]) for pair in pairs.values()) / len(pairs)


def _behind(observations: list[Observation], label: str) -> Interval:
    return mean_interval([math.log(o["schedules"][label] / o["schedules"][REFERENCE]) for o in observations])


def _explained(observations: list[Observation], law: LawFit) -> float:
    points = [point for observation in observations for point in observation["dense"]]
    return law.score(*([point[name] for point in points] for name in ("average", "tokens", "loss")))


experiment = Experiment(
    slug="journey-matters",
    claim=(
        "The loss of a model that is pruned while it is pretrained follows the scaling law of dense models with its "
        "average number of active parameters, and pruning between 25 % and 75 % of the compute is near the best."
    ),
    rule=(
        "a law is fitted to the dense runs of all seeds. Holds if its mean error on pruned runs is less than half as "
        "large with the average size as with the final and with the initial one (95 %, resampling the pruned runs); "
        "and if, at 95 % over seeds, pruned models differ by less than 1 % in loss from dense ones of their average "
        "size on the same text, and beat random masks of that size; at equal compute no schedule beats that from 25 % "
        "to 75 % by more than 0.5 %, and those from 0 % to 25 % and from 75 % to 95 % are worse; does not hold if one "
        "of these is wholly reversed, which for the errors means that another size predicts better"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="parameters in the blocks",
    y_label="loss, nats a byte",
)

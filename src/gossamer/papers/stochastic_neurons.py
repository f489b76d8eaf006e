"""The claims about stochastic neurons: four ways to train them work, and gates that are mostly shut cost little.

Two experiments. In the first, networks are so small that every state of their units can be enumerated; estimates of
the gradient are held against the exact one. In the second, a perceptron of wide layers in blocks learns handwritten
digits, and a gater that is trained by each estimator opens one block in ten; beside it the same network without gates,
with gates drawn by chance or frozen, with dropout, and a narrow one that computes as little.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.estimator_lab import StochasticNetwork, estimator_quality, exact_gradient, sampled_gradients
from gossamer.activations.stochastic_neurons import GatedMLP, StochasticGate
from gossamer.activations.stochastic_units import (
    BinaryUnit,
    GumbelUnit,
    NoisyRectifier,
    ReinforceUnit,
    StochasticUnit,
    STSUnit,
)
from gossamer.core.randomness import generator_for
from gossamer.measure.speed import interleave, ratio
from gossamer.papers.byte_model import train
from gossamer.papers.digits import SIDE, Digits, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

FAMILIES = {"st": "straight-through", "sts": "smooth times stochastic", "noisy-rectifier": "injected noise"}
FAMILIES["reinforce"] = "likelihood ratio"
NEAR = 2.0  # points of accuracy that count as near
ABOVE = 2.0  # times that the baseline has to lower the variance
OFF = 2.0  # squared standard errors; an unbiased estimate is off by 1 on average
OPEN = 0.15  # share of open gates that counts as around a tenth

QUICK: dict[str, Any] = {
    "lab": {"widths": [[6], [3], [3, 3, 3]], "networks": 3, "samples": 6000},
    "gates": {
        "images": 350,
        "halved": True,
        "width": 400,
        "layers": 2,
        "blocks": 40,
        "hidden": 64,
        "rate": 0.1,
        "weight": 20.0,
        "steps": 800,
        "batch": 64,
        "learning_rate": 6e-3,
        "estimators": ["st", "sts", "noisy-rectifier", "reinforce", "gumbel", "top-k"],
    },
    "timing": {"width": 2048, "blocks": 32, "repeats": 9},
}
FULL: dict[str, Any] = {
    **QUICK,
    "lab": {"widths": [[6], [3], [12], [3, 3, 3], [4, 4, 4]], "networks": 20, "samples": 100_000},
    "gates": {**QUICK["gates"], "halved": False, "hidden": 400, "width": 2000, "steps": 4000},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Qualities of the estimators, accuracies of the gated networks, and what skipping saves."""
    lab = _lab(settings["lab"], seed, progress)
    gated = _gated(settings["gates"], seed, progress)
    curves = {
        name: {"x": [modes["sample"]["rate"]], "y": [100 * modes["sample"]["accuracy"]]}
        for name, modes in gated.items()
        if "sample" in modes
    }
    return {"lab": lab, "gated": gated, "timing": _timing(settings["timing"], seed), "curves": curves}


# ---------------------------------------------------------------------------------------------------- enumeration


def _lab(own: dict[str, Any], seed: int, progress: Track) -> list[dict[str, Any]]:
    units: dict[str, tuple[str, Callable[[], StochasticUnit]]] = {
        "likelihood ratio, best baseline": ("binary", ReinforceUnit),
        "likelihood ratio, mean baseline": ("binary", lambda: ReinforceUnit("mean")),
        "likelihood ratio, no baseline": ("binary", lambda: ReinforceUnit("none")),
        "straight-through": ("binary", BinaryUnit),
        "straight-through, tempered": ("binary", lambda: BinaryUnit(temper=True)),
        "relaxed coins": ("binary", GumbelUnit),
        "smooth times stochastic": ("sts", STSUnit),
        "injected noise": ("noisy-rectifier", NoisyRectifier),
    }
    rows = []
    cases = [(widths, number) for widths in own["widths"] for number in range(own["networks"])]
    for widths, number in progress(cases, "enumerating"):
        generator = generator_for(f"network {widths} {number}", seed)
        network = StochasticNetwork.draw(widths, generator)
        exact = {law: exact_gradient(network, law) for law in ("binary", "sts")}  # type: ignore[arg-type]
        if network.units <= 3:
            exact["noisy-rectifier"] = exact_gradient(network, "noisy-rectifier")
        for name, (law, make) in units.items():
            if law in exact:
                estimates = sampled_gradients(network, make(), own["samples"], generator)
                found = estimator_quality(estimates, exact[law])
                rows.append({"widths": widths, "network": number, "estimator": name, **vars(found)})
    return rows


# ---------------------------------------------------------------------------------------------------------- gates


def _pixels(own: dict[str, Any]) -> int:
    return (SIDE // 2) ** 2 if own.get("halved") else SIDE * SIDE


def _images(own: dict[str, Any], seed: int) -> tuple[Digits, Digits]:
    """To learn from and to judge by; perhaps at half the resolution."""
    parts = digits().split(own["images"], seed)
    if not own["halved"]:
        return parts
    first, rest = (Digits(nn.functional.avg_pool2d(part.images, 2), part.labels) for part in parts)
    return first, rest


def _perceptron(own: dict[str, Any], width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    before = _pixels(own)
    for _ in range(own["layers"]):
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.Linear(before, 10))


def _gated(own: dict[str, Any], seed: int, progress: Track) -> dict[str, dict[str, dict[str, float]]]:
    training, held_out = _images(own, seed)
    torch.manual_seed(seed)
    start = _perceptron(own, own["width"])
    open_blocks = round(own["rate"] * own["blocks"])
    narrow = _perceptron(own, own["width"] * open_blocks // own["blocks"])
    found = {}
    for name, model in (("no gates", copy.deepcopy(start)), ("narrow", narrow)):
        _train(model, training, own, seed, lambda x, y, m=model: nn.functional.cross_entropy(m(x), y))
        found[name] = {"all": {"accuracy": _accuracy(model, held_out)}}
    for estimator in progress(own["estimators"], "gates"):
        found[estimator] = _with_gater(start, estimator, training, held_out, own, seed)
    found["frozen"] = _with_gater(start, "top-k", training, held_out, own, seed, frozen=True)
    found["dropout"] = _dropout(start, training, held_out, own, seed)
    return found


def _train(
    model: nn.Module, data: Digits, own: dict[str, Any], seed: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    order = torch.randint(len(data), (own["steps"], own["batch"]), generator=generator_for("batches", seed))
    batches = ((data.images[rows], data.labels[rows]) for rows in order)
    model.train()
    train(model, batches, lambda batch: loss(*batch), own["steps"], own["learning_rate"])
    model.eval()


def _with_gater(
    start: nn.Sequential,
    estimator: str,
    training: Digits,
    held_out: Digits,
    own: dict[str, Any],
    seed: int,
    frozen: bool = False,
) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    gates = own["layers"] * own["blocks"]
    gater = StochasticGate(_pixels(own), gates, estimator, own["rate"], hidden=own["hidden"], seed=seed)
    model = GatedMLP(copy.deepcopy(start), gater, own["blocks"])
    if frozen:
        gater.requires_grad_(False)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(model(images), labels, reduction="none")
        return losses.mean() if frozen else model.objective(losses, own["weight"])

    _train(model, training, own, seed, loss)
    found = {}
    for mode in ("sample", "threshold", "mean"):
        gater.test_mode = mode
        found[mode] = {"accuracy": _accuracy(model, held_out), **_use(model, held_out)}
    return found


@torch.inference_mode()
def _use(model: GatedMLP, data: Digits) -> dict[str, float]:
    """Shares of open gates, of products left in the main network, and of examples without an open block."""
    gates = model.gates(data.images.flatten(1))
    products = model.multiplications(gates).mean() / model.dense_multiplications()
    empty = (gates == 0).all(2).any(1).double().mean()
    used = (gates != 0).double().mean(0)
    return {
        "rate": float((gates != 0).double().mean()),
        "products": float(products),
        "products with gater": float(products) + model.gater_multiplications() / model.dense_multiplications(),
        "empty": float(empty),
        "deviation of a block's rate": float(used.std()),
    }


def _dropout(
    start: nn.Sequential, training: Digits, held_out: Digits, own: dict[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """Blocks that are on by chance: a tenth of them and ten times as strong, or all of them in the end."""
    gater = StochasticGate(_pixels(own), own["layers"] * own["blocks"], hidden=0)
    model = GatedMLP(copy.deepcopy(start), gater, own["blocks"])
    rate, generator = own["rate"], generator_for("dropout", seed)

    def drawn(images: Tensor) -> Tensor:
        chances = torch.rand(len(images), own["layers"], own["blocks"], generator=generator)
        return (chances < rate).float() / rate

    _train(model, training, own, seed, lambda x, y: nn.functional.cross_entropy(model.dense(x.flatten(1), drawn(x)), y))
    images, labels = held_out.images, held_out.labels
    found = {}
    for mode, gates in (("sample", drawn(images)), ("mean", torch.ones(len(images), own["layers"], own["blocks"]))):
        with torch.inference_mode():
            hits = model.dense(images.flatten(1), gates).argmax(1) == labels
        found[mode] = {"accuracy": float(hits.double().mean()), "rate": float((gates != 0).double().mean())}
    return found


def _accuracy(model: nn.Module, data: Digits) -> float:
    with torch.inference_mode():
        return float((model(data.images).argmax(1) == data.labels).double().mean())


def _timing(own: dict[str, Any], seed: int) -> dict[str, float]:
    """How many times as long one example takes without skipping, with a tenth of the gates open."""
    torch.manual_seed(seed)
    main = _perceptron({"layers": 2}, own["width"])
    gater = StochasticGate(SIDE * SIDE, 2 * own["blocks"], hidden=100, test_mode="sample", seed=seed)
    model = GatedMLP(main, gater, own["blocks"]).eval()
    image = torch.rand(1, SIDE * SIDE)
    with torch.inference_mode():
        gates = model.gates(image)
        times = interleave(
            {
                "dense": lambda: main(image),
                "gated layers": lambda: model.skipping(image, gates),
                "with gater": lambda: model(image),
            },
            own["repeats"],
        )
    return {
        "gated layers": ratio(times["dense"], times["gated layers"]).median,
        "with gater": ratio(times["dense"], times["with gater"]).median,
        "open": float((gates != 0).double().mean()),
    }


# -------------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Over seeds; accuracies are those with sampled gates, which skip."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    best, none = "likelihood ratio, best baseline", "likelihood ratio, no baseline"
    needed = {
        "lab: squared standard errors allowed − found, likelihood ratio": mean_interval(
            [OFF - _mean([row["deviation"] for row in o["lab"] if row["estimator"] == best]) for o in observations]
        ),
        "lab: log of the variance without a baseline over that with one, over a factor of 2": mean_interval(
            [_log_ratio(o["lab"], none, best) - math.log(ABOVE) for o in observations]
        ),
    }
    for estimator, family in FAMILIES.items():
        gained = [100 * (_sampled(o, estimator) - _sampled(o, "dropout")) for o in observations]
        needed[f"{family} − gates drawn by chance, points"] = mean_interval(gained)
        spare = [OPEN - o["gated"][estimator]["sample"]["rate"] for o in observations]
        needed[f"{family}, spare share of open gates"] = mean_interval(spare)
    beside = [100 * _beside_dense(o, "st") + NEAR for o in observations]
    needed[f"straight-through − no gates + {NEAR:g} points"] = mean_interval(beside)
    rivals = [max(_sampled(o, other) for other in FAMILIES if other != "st") for o in observations]
    competitive = [100 * (_sampled(o, "st") - rival) + NEAR for o, rival in zip(observations, rivals)]
    needed[f"straight-through − best of the others + {NEAR:g} points"] = mean_interval(competitive)
    numbers: dict[str, Interval | float] = {**needed, **_told(observations)}
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict(
        "holds", "all four families train gates that are mostly shut, and the simplest is competitive", numbers
    )


def _beside_dense(observation: Observation, name: str) -> float:
    return _sampled(observation, name) - observation["gated"]["no gates"]["all"]["accuracy"]


def _sampled(observation: Observation, name: str) -> float:
    return observation["gated"][name]["sample"]["accuracy"]


def _log_ratio(rows: list[dict[str, Any]], one: str, other: str) -> float:
    variance = {
        name: {(str(row["widths"]), row["network"]): row["variance"] for row in rows if row["estimator"] == name}
        for name in (one, other)
    }
    return _mean([math.log(variance[one][case] / variance[other][case]) for case in variance[one]])


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    """Everything else: qualities of every estimator, accuracy and use in every mode, and times."""
    numbers: dict[str, Interval | float] = {}
    kinds = sorted({row["estimator"] for row in observations[0]["lab"]})
    for name in kinds:
        for quality in ("cosine", "bias", "bias_without_scale", "deviation"):
            found = [_mean([row[quality] for row in o["lab"] if row["estimator"] == name]) for o in observations]
            numbers[f"lab: {name}, {quality.replace('_', ' ')}"] = _mean(found)
    for name, modes in observations[0]["gated"].items():
        for mode, values in modes.items():
            for kind in values:
                found = [o["gated"][name][mode][kind] for o in observations]
                numbers[f"{name}, {mode}, {kind}"] = _mean(found)
    for estimator, family in FAMILIES.items():
        beside = [100 * _beside_dense(o, estimator) for o in observations]
        numbers[f"{family} − no gates, points"] = mean_interval(beside)
    numbers["straight-through − narrow network, points"] = mean_interval(
        [100 * (_sampled(o, "st") - o["gated"]["narrow"]["all"]["accuracy"]) for o in observations]
    )
    numbers["straight-through − likelihood ratio, points"] = mean_interval(
        [100 * (_sampled(o, "st") - _sampled(o, "reinforce")) for o in observations]
    )
    for name in observations[0]["timing"]:
        numbers[f"time of one example, dense over skipped, {name}"] = _mean([o["timing"][name] for o in observations])
    return numbers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="stochastic-neurons",
    claim=(
        "Units with hard random outputs can be trained by a likelihood ratio, by a smooth factor, by injected noise "
        "and straight through; the last is biased but competitive, and gates trained so need to be open only around a "
        "tenth of the time."
    ),
    rule=(
        "holds if, at 95 % over seeds, the likelihood ratio is off the enumerated gradient by less than 2 squared "
        "standard errors and the best baseline at least halves its variance; with sampled gates of which at most 15 % "
        "are open, all four families beat gates drawn by chance, and straight-through stays within 2 points of the "
        "network without gates and of the best of the others; does not hold if one of these is wholly reversed. "
        "Injected noise beside no gates, a narrow network that computes as little, frozen gates, other estimators, "
        "modes of testing, and times are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="share of open gates",
    y_label="accuracy on digits, %",
)

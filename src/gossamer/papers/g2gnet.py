"""G2GNet's claim: wired by groups, with three quarters of its weights missing, a network is better than dense.

Perceptrons learn to tell photographs of clothes apart from few images, dense or wired in one of many ways with as many
edges: by groups of neighbouring, random or mixed units, at random with equal or unequal shares for the layers, in
separate blocks, or narrow and dense. Dense and grouped networks get the same choice of regularisation, made on images
of their own. A fixed shuffle of the pixels takes away what neighbouring pixels have in common: if grouping neighbours
helps because of that, it then helps no longer. Wirings that move while training (by magnitude, chance, gradient or
correlation) exchange as many edges equally often. The full budget repeats all of it on random convolutional features,
and on crops of photographs: their pixels, and such features of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.randomness import generator_for
from gossamer.core.sparsifier import Sparsifier
from gossamer.measure import interleave, ratio
from gossamer.papers.digits import Digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.fashion import fashion
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, paired_difference
from gossamer.papers.textures import textures
from gossamer.training.g2g_layers import G2GLinear
from gossamer.training.g2g_measures import group_measures
from gossamer.training.g2gnet import G2G, widen
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.static import Static

GROUPS, P_INTER = 8, 0.15
SPARSITY = (1 - 1 / GROUPS) * (1 - P_INTER)
CLASSES = 10
_SHUFFLE = 12345  # of the pixels, the same for everything
_FOLLOWED = ("inter_fraction", "modularity")

QUICK: dict[str, Any] = {
    "images": 100,
    "validation": 50,
    "held_out": 200,
    "hidden": [256, 256, 256],
    "steps": 240,
    "batch": 64,
    "learning_rate": 1e-3,
    "regularisation": [[0.0, 0.0], [0.3, 0.0], [0.0, 0.1]],
    "p_inter": [0.0, 0.3],
    "rewiring": [["hebbian", "hebbian"], ["set", "hebbian"]],
    "exchanges": 8,
    "exchange": 0.1,
    "features": ["pixels"],
    "speed": {"width": 2048, "batch": 128, "rounds": 5},
}
FULL: dict[str, Any] = {
    **QUICK,
    "images": 500,
    "validation": 300,
    "held_out": 3000,
    "hidden": [2048, 2048, 2048],
    "steps": 4000,
    "batch": 128,
    "p_inter": [0.0, 0.05, 0.3, 0.6],
    "rewiring": [[prune, grow] for prune in ("hebbian", "set", "random") for grow in ("hebbian", "random", "gradient")],
    "exchanges": 12,
    "crops": {"images": 400, "validation": 200, "held_out": 600},
    "features": ["pixels", "random convolution", "texture pixels", "texture random convolution"],
    "speed": {"width": 2048, "batch": 128, "rounds": 15},
}


@dataclass(frozen=True)
class Case:
    """One way to wire and train a network.

    Attributes
    ----------
    method
        What makes it sparse; None for dense.
    narrow
        Whether it has as few parameters as the sparse ones, by being narrow.
    shuffled
        Whether pixels are shuffled.
    dropout, weight_decay
        Its regularisation.
    """

    method: Sparsifier | None = None
    narrow: bool = False
    shuffled: bool = False
    dropout: float = 0.0
    weight_decay: float = 0.0


def cases(settings: dict[str, Any], seed: int) -> dict[str, Case]:
    """All that are compared, by name; dense and grouped ones in every regularisation."""
    every = max(1, settings["steps"] // (settings["exchanges"] + 1))
    wired = {"groups": GROUPS, "p_inter": P_INTER, "seed": seed}
    moving = {"every": every, "end": settings["steps"] * 9 // 10, "exchange": settings["exchange"]}
    random_wiring = {"sparsity": SPARSITY, "seed": seed, "allocation": "uniform"}
    found = {}
    for number, (dropout, decay) in enumerate(settings["regularisation"]):
        found[f"dense #{number}"] = Case(dropout=dropout, weight_decay=decay)
        found[f"index #{number}"] = Case(G2G(**wired), dropout=dropout, weight_decay=decay)
    for grouping in ("random", "mixer"):
        found[grouping] = Case(G2G(**wired, grouping=grouping))
    for p_inter in settings["p_inter"]:
        found[f"index, p′ = {p_inter}"] = Case(G2G(groups=GROUPS, p_inter=p_inter, seed=seed))
    found["blocks alone, as many edges"] = Case(G2G(groups=GROUPS // 2, p_inter=0.0, seed=seed))
    found["uniform"] = Case(Static(**random_wiring))
    found["erdos-renyi"] = Case(Static(sparsity=SPARSITY, seed=seed))
    found["narrow"] = Case(narrow=True)
    found["index, shuffled pixels"] = Case(G2G(**wired), shuffled=True)
    found["random, shuffled pixels"] = Case(G2G(**wired, grouping="random"), shuffled=True)
    for prune, growth in settings["rewiring"]:
        found[f"index, {prune} and {growth}"] = Case(G2G(**wired, **moving, prune=prune, growth=growth))
    found["set"] = Case(SET(**random_wiring, **moving))
    found["rigl"] = Case(RigL(**random_wiring, **moving, last_exchange=settings["exchange"]))
    return found


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Accuracy of every case, on every kind of features, and the speed of a layer."""
    accuracy: dict[str, dict[str, float]] = {}
    wiring: dict[str, dict[str, float]] = {}
    for features in settings["features"]:
        data = _data(settings, features, seed)
        for name, case in progress(cases(settings, seed).items(), features):
            network, measures = _train(settings, data, case, seed)
            parts = {part: _accuracy(network, *data[part], case.shuffled) for part in ("validation", "held_out")}
            accuracy[f"{features}: {name}"] = parts
            if measures:
                wiring[f"{features}: {name}"] = measures
    speed = _speed(**settings["speed"], seed=seed)
    return {"accuracy": accuracy, "wiring": wiring, "speed": speed, "curves": _curves(settings, accuracy)}


def _data(settings: dict[str, Any], features: str, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Part → features ``(n, units)``, and labels."""
    pixels = features.endswith("pixels")
    turn = partial(torch.flatten, start_dim=1) if pixels else _random_convolution(seed)
    split = _crops if features.startswith("texture ") else _clothes
    parts = {name: (turn(part.images), part.labels) for name, part in split(settings, seed).items()}
    if not pixels:
        mean, deviation = parts["training"][0].mean(0), parts["training"][0].std(0) + 1e-6
        parts = {name: ((values - mean) / deviation, labels) for name, (values, labels) in parts.items()}
    return parts


def _clothes(settings: dict[str, Any], seed: int) -> dict[str, Digits]:
    training, rest = fashion().split(settings["images"], seed)
    validation, rest = rest.split(settings["validation"], seed)
    held_out, _ = rest.split(settings["held_out"], seed)
    parts = {"training": training, "validation": validation, "held_out": held_out}
    return {name: Digits(part.images.float().sub(127.5).div(64), part.labels) for name, part in parts.items()}


def _crops(settings: dict[str, Any], seed: int) -> dict[str, Digits]:
    """Of photographs: those for choosing come from the squares to learn from."""
    own, found = settings["crops"], textures()
    training, rest = found.training.split(own["images"], seed)
    validation, _ = rest.split(own["validation"], seed)
    held_out, _ = found.held_out.split(own["held_out"], seed)
    return {"training": training, "validation": validation, "held_out": held_out}


def _random_convolution(seed: int) -> Callable[[Tensor], Tensor]:
    """A layer of random filters, never trained: ``(n, 1, side, side)`` → ``(n, 512)``, a filter's places together."""
    filters = torch.randn(32, 1, 5, 5, generator=generator_for("random filters", seed)) / 5

    def turn(images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(torch.relu(nn.functional.conv2d(images, filters)), 4).flatten(1)

    return turn


def _train(
    settings: dict[str, Any], data: dict[str, tuple[Tensor, Tensor]], case: Case, seed: int
) -> tuple[nn.Sequential, dict[str, float]]:
    """A trained network, and, where edges moved, what its wiring has become."""
    inputs, labels = data["training"]
    torch.manual_seed(seed)
    network = perceptron(inputs.shape[1], settings["hidden"], case.dropout, SPARSITY if case.narrow else 0.0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings["learning_rate"], weight_decay=case.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings["steps"])
    followed = case.method.attach(network, optimizer) if case.method else None
    if followed:
        widen(followed)
    order = torch.randint(len(labels), (settings["steps"], settings["batch"]), generator=generator_for("batches", seed))
    inputs = inputs[:, pixel_shuffle(inputs.shape[1])] if case.shuffled else inputs
    network.train()
    for rows in order:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    network.eval()
    measures: dict[str, float] = {}
    if isinstance(case.method, G2G) and case.method.every is not None:
        found = group_measures(followed)
        for key in _FOLLOWED:
            measures[key] = sum(layer[key] for layer in found.values()) / len(found)
    if followed:
        followed.finalize()
    return network, measures


def perceptron(inputs: int, hidden: list[int], dropout: float = 0.0, sparsity: float = 0.0) -> nn.Sequential:
    """Hidden layers of rectified units, and a linear head; with a sparsity, all as much narrower as saves as much."""
    widths = hidden
    if sparsity:
        wanted = (1 - sparsity) * _weights([inputs, *hidden])
        shares = [share / 1000 for share in range(1, 1001)]
        scaled = {share: [max(1, round(share * width)) for width in hidden] for share in shares}
        widths = min(scaled.values(), key=lambda of: abs(_weights([inputs, *of]) - wanted))
    layers: list[nn.Module] = []
    for before, width in zip([inputs, *widths], widths):
        layers += [nn.Linear(before, width), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def _weights(sizes: list[int]) -> int:
    return sum(before * after for before, after in pairwise(sizes))


def pixel_shuffle(units: int) -> Tensor:
    """A fixed order of the inputs that has nothing to do with where they lie."""
    return torch.randperm(units, generator=torch.Generator().manual_seed(_SHUFFLE))


def _accuracy(network: nn.Module, inputs: Tensor, labels: Tensor, shuffled: bool) -> float:
    inputs = inputs[:, pixel_shuffle(inputs.shape[1])] if shuffled else inputs
    with torch.inference_mode():
        return float((network(inputs).argmax(1) == labels).double().mean())


def _speed(width: int, batch: int, rounds: int, seed: int) -> dict[str, float]:
    """How many times faster than a dense layer under a mask, and than a dense one, forward and backward."""
    layer = G2GLinear(width, width, GROUPS, P_INTER, generator=generator_for("wiring", seed))
    linear, mask = layer.to_linear(), layer.mask().float()
    x = torch.randn(batch, width, generator=generator_for("inputs", seed)).requires_grad_()

    def train(forward: Callable[[Tensor], Tensor]) -> None:
        forward(x).sum().backward()

    runs = {
        "groups": partial(train, layer),
        "masked": partial(train, lambda x: nn.functional.linear(x, linear.weight * mask, linear.bias)),
        "dense": partial(train, linear),
    }
    timings = interleave(runs, repeats=rounds)
    return {name: ratio(timings[name], timings["groups"]).median for name in ("masked", "dense")}


def _curves(settings: dict[str, Any], accuracy: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    curves = {}
    for features in settings["features"]:
        shares = sorted([*settings["p_inter"], P_INTER])
        names = [f"{features}: index #0" if p == P_INTER else f"{features}: index, p′ = {p}" for p in shares]
        values = [accuracy[name]["held_out"] for name in [*names, f"{features}: dense #0"]]
        curves[features] = {"x": [*shares, 1.0], "y": [100 * value for value in values]}
    return curves


def decide(observations: list[Observation]) -> Verdict:
    """The rule: differences of held-out accuracy, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    kinds = list(dict.fromkeys(name.partition(":")[0] for name in observations[0]["accuracy"]))
    decisive: dict[str, Interval] = {}
    numbers: dict[str, Interval | float] = {}
    for kind in kinds:
        rows = [_chosen(o["accuracy"], kind) for o in observations]
        for name, one, other in _DECISIVE:
            decisive[f"{kind}: {name}"] = _gap(rows, one, other)
        for name, one, other in _REPORTED:
            numbers[f"{kind}: {name}"] = _gap(rows, one, other)
        for name in rows[0]:
            numbers[f"{kind}: accuracy, {name}"] = sum(row[name] for row in rows) / len(rows)
        numbers |= _shuffle_test(rows, kind)
    for name in observations[0]["wiring"]:
        for key in _FOLLOWED:
            values = [o["wiring"][name][key] for o in observations]
            numbers[f"{key} in the end, {name}"] = sum(values) / len(values)
    for name in observations[0]["speed"]:
        values = [o["speed"][name] for o in observations]
        numbers[f"times faster than {name}, training pass of a layer"] = sum(values) / len(values)
    numbers = {**decisive, **numbers}
    wrong = [name for name, value in decisive.items() if value.below_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    open_ = [name for name, value in decisive.items() if not value.above_zero]
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict("holds", "groups are better than dense, than chance and than a narrow network", numbers)


_DECISIVE = [
    ("groups − dense, both regularised", "index, chosen", "dense, chosen"),
    ("groups − uniform", "index #0", "uniform"),
    ("groups − narrow", "index #0", "narrow"),
]
_REPORTED = [
    ("groups − dense, neither regularised", "index #0", "dense #0"),
    ("mixed groups − uniform", "mixer", "uniform"),
    ("groups − Erdős–Rényi", "index #0", "erdos-renyi"),
    ("groups − groups that do not communicate", "index #0", "index, p′ = 0.0"),
    ("groups − blocks alone with as many edges", "index #0", "blocks alone, as many edges"),
    ("neighbours grouped − random groups", "index #0", "random"),
    ("neighbours grouped − random groups, shuffled pixels", "index, shuffled pixels", "random, shuffled pixels"),
    ("rewired by correlation − static", "index, hebbian and hebbian", "index #0"),
    ("rewired by correlation − SET", "index, hebbian and hebbian", "set"),
    ("rewired by correlation − RigL", "index, hebbian and hebbian", "rigl"),
]


def _chosen(accuracy: dict[str, dict[str, float]], kind: str) -> dict[str, float]:
    """Held-out accuracies by name, with those of the regularisation that is best on the images for choosing."""
    own = {name.partition(": ")[2]: parts for name, parts in accuracy.items() if name.startswith(f"{kind}:")}
    found = {name: parts["held_out"] for name, parts in own.items()}
    for base in ("dense", "index"):
        best = max((name for name in own if name.startswith(f"{base} #")), key=lambda name: own[name]["validation"])
        found[f"{base}, chosen"] = found[best]
    return found


def _gap(rows: list[dict[str, float]], one: str, other: str) -> Interval:
    return paired_difference([row[one] for row in rows], [row[other] for row in rows])


def _shuffle_test(rows: list[dict[str, float]], kind: str) -> dict[str, Interval]:
    """How much of the advantage of grouping neighbours a shuffle of the pixels takes away."""
    plain = [row["index #0"] - row["random"] for row in rows]
    shuffled = [row["index, shuffled pixels"] - row["random, shuffled pixels"] for row in rows]
    return {f"{kind}: advantage of neighbours that shuffling takes": paired_difference(plain, shuffled)}


experiment = Experiment(
    slug="g2gnet",
    claim=(
        "A perceptron wired by groups, with three quarters of its weights missing, is more accurate than the dense "
        "one, than random wiring with as many edges, and than a narrow dense network with as many parameters."
    ),
    rule=(
        "holds if, at 95 %, paired over seeds, held-out accuracy on Fashion-MNIST of 8 groups of neighbouring units "
        "with p′ = 0.15 is higher than that of the dense network, both with the best of three regularisations on other "
        "images; than that of uniform random wiring of the same sparsity; and than that of a narrow dense network "
        "with as many weights; does not hold if one of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=5,
    x_label="probability of an edge between groups",
    y_label="accuracy, %",
)

"""Activate-while-pruning's claim: fewer silent neurons at equal sparsity, and no worse a network.

Networks for handwritten digits are pruned in cycles of a fifth of what is left, with rewinding, by a host alone or with
a tenth of each cycle's budget spent on negative weights that hardly moved. Controls spend it on weights at random, on
positive weights that hardly moved, and, in the full budget, on negative ones that moved most. After each cycle the
network is trained once, by the authors' recipe in small; accuracy and the dynamic dead neuron rate are those of images
held out. The full budget has more hosts, and a small VGG for crops of photographs.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.masking import static_masks
from gossamer.core.masks import MaskSet
from gossamer.measure.dead_neurons import dead_neuron_rate
from gossamer.papers.digits import SIDE, Digits, digits, perceptron
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval
from gossamer.papers.textures import textures, vgg
from gossamer.training.ap import ActivateWhilePruning
from gossamer.training.growing_regularization import GrowingRegularization
from gossamer.training.importance import Host, SynFlow

LOW_DENSITY = 0.1
_RATE = 0.2

#: who prunes, and what the share of activation goes to
VARIANTS: dict[str, dict[str, Any]] = {
    "host": {"ap_fraction": 0.0},
    "activation": {},
    "random": {"sign": "any", "pick": "random"},
    "positive": {"sign": "positive"},
    "most moved": {"pick": "most-moved"},
    "inner layers": {"exclude_first": True},
    "1 %": {"ap_fraction": 0.01},
    "5 %": {"ap_fraction": 0.05},
    "10 %": {"ap_fraction": 0.1},
}
QUICK: dict[str, Any] = {
    "runs": {
        "perceptron, magnitude": ["host", "activation", "random", "positive"],
        "perceptron, lamp": ["host", "activation"],
        "convolutional, magnitude": ["host", "activation"],
    },
    "sparsity": {"perceptron": 0.95, "convolutional": 0.9},
    "steps": {"perceptron": 120, "convolutional": 80},
    "training": 400,
    "batch": 64,
    "learning_rate": 0.1,
    "restart": True,
}
FULL: dict[str, Any] = {
    **QUICK,
    "runs": {
        "perceptron, magnitude": list(VARIANTS),
        "perceptron, lamp": ["host", "activation", "random", "positive"],
        "perceptron, synflow": ["host", "activation"],
        "perceptron, growing regularisation": ["host", "activation"],
        "convolutional, magnitude": ["host", "activation", "random", "positive"],
        "convolutional, lamp": ["host", "activation"],
        "vgg, magnitude": ["host", "activation", "random", "positive"],
        "vgg, lamp": ["host", "activation"],
        "vgg, growing regularisation": ["host", "activation"],
    },
    "sparsity": {"perceptron": 0.97, "convolutional": 0.97, "vgg": 0.97},
    "steps": {"perceptron": 1500, "convolutional": 1000, "vgg": 1500},
    "width of vgg": 8,
    "crops": {"training": 500, "judged": 200},
    "growing regularisation": {"penalty_step": 2e-4, "penalty_every": 10, "penalty_limit": 1e-2, "learning_rate": 1e-2},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Accuracy and dead neuron rate at every density."""
    points: list[dict[str, Any]] = []
    cases = [(*name.split(", "), variant) for name, variants in settings["runs"].items() for variant in variants]
    for network, host, variant in progress(cases, "pruning in cycles"):
        training, held_out = _data(settings, network, seed)
        watch = _Cycles(settings, network, training, held_out)
        method = ActivateWhilePruning(
            sparsity=settings["sparsity"][network],
            rate=_RATE,
            host=_host(settings, host, training),
            heads=True,
            seed=seed,
            **VARIANTS[variant],
        )
        torch.manual_seed(seed)
        tickets = method.tickets(_network(settings, network), watch.train, restart=settings["restart"])
        watch.last(method.seed, tickets[-1].masks)
        case = {"network": network, "host": host, "variant": variant}
        points += [{**case, **point} for point in watch.points]
    return {"points": points, "curves": _curves(points)}


def _data(settings: dict[str, Any], network: str, seed: int) -> tuple[Digits, Digits]:
    """Images to learn from, and others to be judged by."""
    if network == "vgg":
        return textures().split(settings["crops"]["training"], settings["crops"]["judged"], seed)
    return digits().split(settings["training"], seed)


def _host(settings: dict[str, Any], name: str, training: Digits) -> str | Host:
    if name == "synflow":
        return SynFlow((1, SIDE, SIDE))
    if name != "growing regularisation":
        return name

    def loss(model: nn.Module) -> Tensor:
        rows = torch.randint(len(training), (settings["batch"],))
        return nn.functional.cross_entropy(model(training.images[rows]), training.labels[rows])

    return GrowingRegularization(loss, **settings[name])


def _network(settings: dict[str, Any], kind: str) -> nn.Module:
    if kind == "perceptron":
        return perceptron()
    if kind == "vgg":
        return vgg(settings["width of vgg"])
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for before, after in ((1, 8), (8, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if before == after else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 3 * 3, 32), nn.ReLU(), nn.Linear(32, 10))


class _Cycles:
    """Training under masks, and a record of what came out each time."""

    def __init__(self, settings: dict[str, Any], network: str, training: Digits, held_out: Digits):
        self.steps, self.batch, self.rate = settings["steps"][network], settings["batch"], settings["learning_rate"]
        self.training, self.held_out, self.restart = training, held_out, settings["restart"]
        self.points: list[dict[str, float]] = []
        self.trained: nn.Module | None = None

    def train(self, model: nn.Module, masks: MaskSet) -> None:
        """SGD with momentum; the rate warms up, and falls to a tenth after 1/2 and after 0.64 of the steps."""
        self.trained = model
        if not self.points:
            self.first = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        model.train()
        for rows in torch.randint(len(self.training), (self.steps, self.batch)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(self.training.images[rows]), self.training.labels[rows]).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = model(self.held_out.images).argmax(1) == self.held_out.labels
        self.points.append(
            {
                "density": masks.density,
                "accuracy": float(right.double().mean()),
                "dead": dead_neuron_rate(model, self.held_out.images).total,
                "static": dead_neuron_rate(model, self.held_out.images, "static").total,
            }
        )

    def last(self, seed: int, masks: MaskSet) -> None:
        """Train once more, under the masks of the last cycle."""
        assert self.trained is not None
        model = self.trained
        if self.restart:
            model.load_state_dict(self.first)
        torch.manual_seed(seed)
        with static_masks(model, masks):
            self.train(model, masks)

    def _factor(self, step: int) -> float:
        progress = step / self.steps
        return min(1.0, (progress + 1 / self.steps) / 0.2) if progress < 0.5 else 0.1 if progress < 0.64 else 0.01


def _curves(points: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for point in points:
        label = f"{point['network']}, {point['host']}, {point['variant']}"
        curve = curves.setdefault(label, {"x": [], "y": []})
        curve["x"].append(1 - point["density"])
        curve["y"].append(100 * point["dead"])
    return curves


def _differences(
    observations: list[Observation],
    network: str,
    host: str,
    variant: str,
    key: str,
    up_to: float,
    other: str = "host",
) -> list[float]:
    """Points by which a variant is above another, in the mean over densities below 1 up to `up_to`, by seed."""

    def mean(observation: Observation, wanted: str) -> float:
        return statistics.fmean(
            100 * point[key]
            for point in observation["points"]
            if (point["network"], point["host"], point["variant"]) == (network, host, wanted)
            and point["density"] < min(1.0, up_to + 1e-3)
        )

    return [mean(observation, variant) - mean(observation, other) for observation in observations]


def decide(observations: list[Observation]) -> Verdict:
    """Fewer dead neurons for every network and host, accuracy not below it, controls without the effect."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    numbers: dict[str, Interval | float] = {}
    wrong, open_ = [], []
    cases = dict.fromkeys((p["network"], p["host"], p["variant"]) for p in observations[0]["points"])
    for network, host, variant in cases:
        if variant == "host":
            continue
        label = f"{variant} − host, {network}, {host}"
        dead = mean_interval(_differences(observations, network, host, variant, "dead", 1.0))
        low = mean_interval(_differences(observations, network, host, variant, "accuracy", LOW_DENSITY))
        numbers[f"dead neurons, {label}, points"] = dead
        numbers[f"accuracy at ≤ 10 % density, {label}, points"] = low
        if variant == "activation":
            wrong += [f"more dead neurons: {network}, {host}"] if dead.above_zero else []
            wrong += [f"less accurate: {network}, {host}"] if low.below_zero else []
            open_ += [] if dead.below_zero else [f"dead neurons of {network}, {host}"]
        elif variant in ("random", "positive"):
            open_ += [f"the control {variant} lowers the rate too: {network}, {host}"] if dead.below_zero else []
            beyond = _differences(observations, network, host, "activation", "dead", 1.0, other=variant)
            numbers[f"dead neurons, activation − {variant}, {network}, {host}, points"] = mean_interval(beyond)
    numbers |= _levels(observations)
    if wrong:
        return Verdict("does not hold", "; ".join(wrong), numbers)
    if open_:
        return Verdict("inconclusive", "not shown: " + "; ".join(open_), numbers)
    return Verdict("holds", "fewer dead neurons than by the host alone, no less accurate; controls do nothing", numbers)


def _levels(observations: list[Observation]) -> dict[str, Interval | float]:
    """Means over seeds at the ends: dense, and the lowest density."""
    levels: dict[str, Interval | float] = {}
    cases = dict.fromkeys((p["network"], p["host"], p["variant"]) for p in observations[0]["points"])
    for case in cases:
        own = [[p for p in o["points"] if (p["network"], p["host"], p["variant"]) == case] for o in observations]
        for key, word in (("dead", "dead neurons"), ("accuracy", "accuracy")):
            if case[2] == "host":
                levels[f"{word} dense, {', '.join(case)}, %"] = 100 * statistics.fmean(each[0][key] for each in own)
            levels[f"{word} sparsest, {', '.join(case)}, %"] = 100 * statistics.fmean(each[-1][key] for each in own)
    return levels


experiment = Experiment(
    slug="ap",
    claim=(
        "Pruning a few negative weights that hardly moved, in place of some that the host would remove, lowers the "
        "rate of dead neurons at equal sparsity, and the network is no less accurate."
    ),
    rule=(
        "holds if, at 95 % over seeds, for every network and host the dynamic dead neuron rate, in the mean over all "
        "densities below 1, is lower with activation than with the host alone, accuracy at densities of at most 10 % "
        "is not wholly lower, and neither random nor positive weights lower the rate; does not hold if activation "
        "raises the rate or lowers the accuracy of one; inconclusive otherwise"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL, "without rewinding": {**QUICK, "restart": False}},
    seeds=4,
    x_label="sparsity",
    y_label="dead neurons, %",
)

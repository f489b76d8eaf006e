"""The claims about entropy and activations: the worst one is known, and CRReLU is better than the corrections of ReLU.

First the theory, by numbers: the variation of the entropy against finite differences, the cumulative distribution
function against random increasing ones, and steps along the correction. Then training: perceptrons on five tables and
on images, and a small vision transformer, with every activation the same steps from the same weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.activations.eafo import CRReLU, EAFOActivation, without_decay
from gossamer.activations.output_entropy import (
    activation_entropy,
    eafo_correction,
    first_variation,
    inverse_entropy,
    search_activations,
    worst_activation,
)
from gossamer.core.randomness import generator_for
from gossamer.models.activation_functions import swap_activations
from gossamer.papers.digits import SIDE, digits
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.results import Verdict
from gossamer.papers.small_tables import Table, small_tables
from gossamer.papers.statistics import Interval, mean_interval

CORRECTIONS = ("leaky ReLU", "PReLU", "ELU", "GELU", "SiLU", "Mish")
CLOSE = 1e-3  # relative error of a variation that counts as none
SMALL = 1e-3  # below which an activation could be skipped

QUICK: dict[str, Any] = {
    "theory": {"rivals": 1000, "directions": 3},
    "tables": {"share": 0.6, "widths": [64, 64], "steps": 150, "batch": 32, "learning_rate": 3e-3},
    "images": {"images": 350, "widths": [256, 256], "steps": 200, "batch": 64, "learning_rate": 2e-3},
    "transformer": {
        "share": 0.6,
        "width": 32,
        "layers": 2,
        "heads": 2,
        "steps": 150,
        "batch": 64,
        "learning_rate": 3e-3,
    },
    "update_every": 25,
    "weight_decay": 0.05,
}
FULL: dict[str, Any] = {
    **QUICK,
    "tables": {**QUICK["tables"], "steps": 1000},
    "images": {**QUICK["images"], "steps": 3000},
    "transformer": {**QUICK["transformer"], "width": 64, "layers": 4, "steps": 3000},
    "update_every": 100,
}


class Wrapped(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.function(x)


def contestants(update_every: int) -> dict[str, Callable[[], nn.Module]]:
    """Activations by name."""
    worst = worst_activation(torch.special.ndtr, -1.0, 1.0)
    return {
        "ReLU": nn.ReLU,
        "leaky ReLU": nn.LeakyReLU,
        "PReLU": nn.PReLU,
        "ELU": nn.ELU,
        "GELU": nn.GELU,
        "SiLU": nn.SiLU,
        "Mish": nn.Mish,
        "CRReLU": CRReLU,
        "CRReLU, normal density followed": lambda: EAFOActivation("relu", "gaussian", update_every),
        "CRReLU, density followed": lambda: EAFOActivation("relu", "kde", update_every),
        "sigmoid": nn.Sigmoid,
        "worst": lambda: Wrapped(worst),
    }


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """What the theory predicts, accuracies of every activation on every task, and shares of small values."""
    tasks = _tasks(settings, seed)
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, make in progress(list(contestants(settings["update_every"]).items()), "activations"):
        rows[name] = {
            task: _trained(start, make, first, rest, own, settings["weight_decay"], seed)
            for task, (start, first, rest, own) in tasks.items()
        }
    curves = {
        name: {"x": list(range(len(row))), "y": [100 * v["accuracy"] for v in row.values()]}
        for name, row in rows.items()
    }
    return {"theory": _theory(settings["theory"], seed), "rows": rows, "curves": curves}


# --------------------------------------------------------------------------------------------------------- theory


def _normal(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * torch.exp(-x.abs())


def _mixture(x: Tensor) -> Tensor:
    return 0.4 * _normal((x + 1.5) / 0.6) / 0.6 + 0.6 * _normal((x - 1) / 0.8) / 0.8


DENSITIES = {"normal": _normal, "Laplace": _laplace, "mixture": _mixture}
INVERSES: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "sigmoid": (torch.logit, 0.01, 0.99),
    "tanh": (torch.atanh, -0.98, 0.98),
    "softplus": (lambda x: x + torch.log(-torch.expm1(-x)), 0.02, 5.0),
    "leaky ReLU": (lambda x: torch.where(x > 0, x, x / 0.1), -0.5, 5.0),
}
ZEROS = {"sigmoid": 0.5, "tanh": 0.0, "softplus": math.log(2), "leaky ReLU": 0.0}  # outputs for 0


def _theory(own: dict[str, Any], seed: int) -> dict[str, Any]:
    """Worst error of a variation, entropy of the best rival of each distribution function, and steps that lower it."""
    generator = generator_for("directions", seed)
    errors, steps = [], {}
    for density, pdf in DENSITIES.items():
        for name, (inverse, low, high) in INVERSES.items():
            if name != "leaky ReLU":  # whose slope jumps, where the formula says nothing
                for _ in range(own["directions"]):
                    errors.append(_variation_error(inverse, pdf, low, high, generator))
            # above zero only: where slopes of the density or the activation jump, so does the correction
            correction, step, zero = eafo_correction(inverse, pdf), 1e-4, ZEROS[name]
            span = _bump((zero + high) / 2, (high - zero) / 2)
            steps[f"{name}, {density}"] = _moved_entropy(inverse, correction, span, pdf, low, high, step) / step
    rivals = {name: _best_rival(pdf, own["rivals"], generator) for name, pdf in DENSITIES.items()}
    search = search_activations(_normal)
    return {
        "variation error": max(errors),
        "entropy changes": steps,
        "rivals": rivals,
        "search": {c.base: {"slope": c.slope, "epsilon": c.epsilon, "gain": c.entropy - c.corrected} for c in search},
        "entropy of CRReLU − ReLU, x > 0": activation_entropy(CRReLU(0.1), _normal, low=1e-9)
        - activation_entropy(torch.relu, _normal, low=1e-9),
    }


def _bump(centre: float, reach: float) -> Callable[[Tensor], Tensor]:
    """Smooth, and zero at a distance of `reach` and beyond."""

    def bump(x: Tensor) -> Tensor:
        inside = (1 - ((x - centre) / reach).square()).clamp(min=0)
        return inside.pow(3)

    return bump


def _variation_error(
    inverse: Callable[[Tensor], Tensor], pdf: Callable[[Tensor], Tensor], low: float, high: float, generator: Any
) -> float:
    """Of the formula against a central difference, relative to the size of what is integrated."""
    share = float(torch.rand((), generator=generator))
    centre = low + (high - low) * (0.3 + 0.4 * share)
    bump = _bump(centre, 0.28 * (high - low))
    step = 1e-4
    above, below = (
        inverse_entropy(lambda x, s=s: inverse(x) + s * step * bump(x), pdf, low, high) for s in (1.0, -1.0)
    )
    x = torch.linspace(low, high, 4001, dtype=torch.float64)
    size = float(torch.trapezoid((bump(x) * eafo_correction(inverse, pdf)(x)).abs(), x))
    return abs((above - below) / (2 * step) - first_variation(inverse, bump, pdf, low, high)) / size


def _moved_entropy(inverse: Any, correction: Any, span: Any, pdf: Any, low: float, high: float, step: float) -> float:
    """What a step along the correction adds to the entropy; slopes are differences."""
    x = torch.linspace(low, high, 20_001, dtype=torch.float64)
    entropies = []
    for size in (step, 0.0):
        y = inverse(x) + size * (correction(x) * span(x)).detach()
        (slope,) = torch.gradient(y, spacing=float(x[1] - x[0]))
        density = (pdf(y) * slope).clamp(min=1e-300)
        entropies.append(-float(torch.trapezoid(density * density.log(), x)))
    return entropies[0] - entropies[1]


def _best_rival(pdf: Callable[[Tensor], Tensor], count: int, generator: torch.Generator) -> float:
    """Highest entropy of random increasing functions onto [0, 1]; that of the distribution function is 0."""
    x = torch.linspace(-8, 8, 801, dtype=torch.float64)
    knots = torch.randn(count, 1, 12, generator=generator, dtype=torch.float64) * torch.linspace(
        0.05, 3, count, dtype=torch.float64
    ).view(-1, 1, 1)
    log_factor = nn.functional.interpolate(knots, size=801, mode="linear", align_corners=True)[:, 0]
    # around the density itself, from hardly different to wildly so
    slope = (pdf(x) + 1e-6) * log_factor.exp()
    slope = slope / torch.trapezoid(slope, x).unsqueeze(1)
    weight = pdf(x) / torch.trapezoid(pdf(x), x)
    return float((-torch.trapezoid(weight * (weight.clamp(min=1e-300) / slope).log(), x)).max())


# ------------------------------------------------------------------------------------------------------- training

Task = tuple[nn.Module, Table, Table, dict[str, Any]]


class Block(nn.Module):
    """A layer of a transformer that normalises first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        normed = self.before(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.after(x))


class SmallViT(nn.Module):
    """A vision transformer for 8 × 8 pixels in patches of 2 × 2 [Dosovitskiy et al., 2021, arXiv 2010.11929]."""

    def __init__(self, width: int, layers: int, heads: int, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 64)`` to logits."""
        tokens = self.patches(x.view(-1, 1, 8, 8)).flatten(2).mT + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def _perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:]))


def _tasks(settings: dict[str, Any], seed: int) -> dict[str, Task]:
    """A network with ReLU for each, what it learns from, what it is judged by, and how."""
    torch.manual_seed(seed)
    own, found = settings["tables"], {}
    for name, table in small_tables().items():
        first, rest = table.split(own["share"], seed)
        widths = (table.values.shape[1], *own["widths"], int(table.labels.max()) + 1)
        found[name] = (_perceptron(*widths), first, rest, own)
    own = settings["images"]
    training, held_out = digits().split(own["images"], seed)
    parts = [Table(part.images.flatten(1), part.labels) for part in (training, held_out)]
    found["images"] = (_perceptron(SIDE * SIDE, *own["widths"], 10), parts[0], parts[1], own)
    own = settings["transformer"]
    first, rest = small_tables()["digits"].split(own["share"], seed)
    found["transformer"] = (SmallViT(own["width"], own["layers"], own["heads"]), first, rest, own)
    return found


def _trained(
    start: nn.Module,
    make: Callable[[], nn.Module],
    first: Table,
    rest: Table,
    own: dict[str, Any],
    weight_decay: float,
    seed: int,
) -> dict[str, float]:
    model = copy.deepcopy(start)
    if isinstance(model, SmallViT):
        swap_activations(model, nn.ReLU, make)
    else:
        for place, layer in enumerate(model):  # type: ignore[arg-type]
            if isinstance(layer, nn.ReLU):
                model[place] = make()  # type: ignore[index]
    optimizer = torch.optim.AdamW(without_decay(model, weight_decay), lr=own["learning_rate"], fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, own["steps"])
    order = torch.randint(len(first.labels), (own["steps"], own["batch"]), generator=generator_for("batches", seed))
    model.train()
    for rows in order:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(first.values[rows]), first.labels[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    return _measured(model, rest)


def _measured(model: nn.Module, rest: Table) -> dict[str, float]:
    """Accuracy, loss, share of small activations, and the mean factor where one is learned."""
    kinds = (nn.ReLU, CRReLU, EAFOActivation)
    small: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    handles = [layer.register_forward_hook(lambda m, i, o: small.append(o.abs() < SMALL)) for layer in layers]
    with torch.inference_mode():
        logits = model(rest.values)
    for handle in handles:
        handle.remove()
    found = {
        "accuracy": float((logits.argmax(1) == rest.labels).double().mean()),
        "loss": float(nn.functional.cross_entropy(logits.double(), rest.labels)),
    }
    if small:
        found["small"] = float(torch.cat([part.flatten() for part in small]).double().mean())
    factors = [float(layer.eps.detach()) for layer in layers if isinstance(layer, (CRReLU, EAFOActivation))]
    if factors:
        found["factor"] = _mean(factors)
    return found


# -------------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Means over tasks, paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    ranks = [mean_ranks(o["rows"]) for o in observations]
    theory = [o["theory"] for o in observations]
    needed = {
        "CRReLU − ReLU, points": mean_interval([_points(o, "CRReLU", "ReLU") for o in observations]),
        "mean rank of the other corrections − that of CRReLU": mean_interval(
            [_mean([row[name] for name in CORRECTIONS]) - row["CRReLU"] for row in ranks]
        ),
        "ReLU − worst, points": mean_interval([_points(o, "ReLU", "worst") for o in observations]),
    }
    wrong_theory = (
        max(t["variation error"] for t in theory) > CLOSE
        or max(max(t["rivals"].values()) for t in theory) > 1e-6
        or max(max(t["entropy changes"].values()) for t in theory) > 0
    )
    numbers: dict[str, Interval | float] = {**needed, **_told(observations, ranks)}
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong_theory:
        return Verdict("does not hold", "the variation of the entropy is not what its formula says", numbers)
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict("holds", "CRReLU beats ReLU and ranks above its other corrections, and the worst is worse", numbers)


def mean_ranks(rows: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Rank of every activation by accuracy, 1 for the best, ties shared, mean over tasks."""
    names = list(rows)
    total = np.zeros(len(names))
    tasks = list(rows[names[0]])
    for task in tasks:
        values = np.array([rows[name][task]["accuracy"] for name in names])
        better = (values[:, None] < values[None, :]).sum(1)
        equal = (values[:, None] == values[None, :]).sum(1)
        total += better + (equal + 1) / 2
    return dict(zip(names, (total / len(tasks)).tolist()))


def _points(observation: Observation, one: str, other: str) -> float:
    rows = observation["rows"]
    return _mean([100 * (rows[one][task]["accuracy"] - rows[other][task]["accuracy"]) for task in rows[one]])


def _told(observations: list[Observation], ranks: list[dict[str, float]]) -> dict[str, Interval | float]:
    numbers: dict[str, Interval | float] = {}
    for name in observations[0]["rows"]:
        numbers[f"{name}, mean rank"] = _mean([row[name] for row in ranks])
        if name != "ReLU":
            numbers[f"{name} − ReLU, points"] = mean_interval([_points(o, name, "ReLU") for o in observations])
        for task, values in observations[0]["rows"][name].items():
            for kind in values:
                numbers[f"{name}, {task}, {kind}"] = _mean([o["rows"][name][task][kind] for o in observations])
    theory = [o["theory"] for o in observations]
    numbers["largest relative error of a variation"] = max(t["variation error"] for t in theory)
    for name in theory[0]["rivals"]:
        numbers[f"entropy of the best rival of the distribution function, {name}"] = max(
            t["rivals"][name] for t in theory
        )
    for name in theory[0]["entropy changes"]:
        numbers[f"entropy along the correction, {name}"] = max(t["entropy changes"][name] for t in theory)
    for name, values in theory[0]["search"].items():
        for kind, value in values.items():
            numbers[f"search, {name}, {kind}"] = value
    numbers["entropy of CRReLU with ε = 0.1 − ReLU, x > 0"] = theory[0]["entropy of CRReLU − ReLU, x > 0"]
    return numbers


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


experiment = Experiment(
    slug="eafo",
    claim=(
        "The activation of highest output entropy is the worst, and the correction of ReLU away from it, CRReLU, "
        "trains better networks than ReLU and than its other corrections."
    ),
    rule=(
        "holds if the variation of the entropy, the distribution function as its maximum, and steps along the "
        "correction are numerically as derived, and, at 95 % over seeds and in the mean over five tables, images by a "
        "perceptron and digits by a transformer, CRReLU is more accurate than ReLU, ranks above the mean of leaky "
        "ReLU, PReLU, ELU, GELU, SiLU and Mish, and the distribution function is less accurate than ReLU; does not "
        "hold if one of these is wholly reversed. Each rival, dynamic densities, and the share of small values are "
        "reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=4,
    x_label="task",
    y_label="accuracy, %",
)

"""All ways to train sparse, on one task and one budget: python -m benchmarks.training_quality --json FILE.

What is in FILE already is not trained again, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from gossamer.core.progress import track
from gossamer.core.sparsifier import Sparsifier
from gossamer.measure import describe_machine
from gossamer.measure.report_card import Run, report_card
from gossamer.measure.training_cost import TrainingCost
from gossamer.papers.digits import Digits, digits
from gossamer.papers.sparse_runs import Recipe, accuracy, fully_connected, train_measured
from gossamer.storage.atomic import write_json
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.granet import GraNet
from gossamer.training.iss_p import IterativeSoftShrinkage
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.static import Static

WIDTHS = (784, 300, 100, 10)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
EVERY = 20


def _ramp(steps: int, **more: Any) -> dict[str, Any]:
    return {"begin": steps // 10, "end": steps * 3 // 4, "every": EVERY, "heads": True, **more}


METHODS: dict[str, Callable[[float, int], Sparsifier]] = {
    "static, uniform": lambda s, n: Static(sparsity=s, heads=True, allocation="uniform"),
    "static, ERK": lambda s, n: Static(sparsity=s, heads=True),
    "SET": lambda s, n: SET(sparsity=s, heads=True, every=EVERY, end=n * 3 // 4),
    "RigL": lambda s, n: RigL(sparsity=s, heads=True, every=EVERY, end=n * 3 // 4),
    "one-shot magnitude": lambda s, n: GradualMagnitudePruning(sparsity=s, begin=n // 2, end=n // 2, heads=True),
    "GMP": lambda s, n: GradualMagnitudePruning(sparsity=s, **_ramp(n)),
    "GMP, whole model": lambda s, n: GradualMagnitudePruning(sparsity=s, scope="model", **_ramp(n)),
    "GMP, random": lambda s, n: GradualMagnitudePruning(sparsity=s, score="random", **_ramp(n)),
    "GraNet, dense start": lambda s, n: GraNet(sparsity=s, initial_sparsity=0.0, every=EVERY, end=n),
    "GraNet, half start": lambda s, n: GraNet(sparsity=s, initial_sparsity=0.5, every=EVERY, end=n),
    "ISS-P": lambda s, n: IterativeSoftShrinkage(sparsity=s, end=n * 3 // 4, heads=True),
}
SMALL = "small and dense"


def widths_of(sparsity: float) -> tuple[int, ...]:
    """Hidden widths of a dense network with as many weights as the sparse one keeps."""
    wanted = (1 - sparsity) * sum(a * b for a, b in pairwise(WIDTHS))
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        sizes = _scaled(share)
        low, high = (share, high) if sum(a * b for a, b in pairwise(sizes)) <= wanted else (low, share)
    return _scaled(low)


def _scaled(share: float) -> tuple[int, ...]:
    return WIDTHS[0], *(max(1, math.floor(width * share)) for width in WIDTHS[1:-1]), WIDTHS[-1]


def train(
    method: Sparsifier | None, widths: tuple[int, ...], data: tuple[Digits, Digits], recipe: Recipe, seed: int
) -> dict[str, Any]:
    """Train one network and say how good it is and what it cost."""
    torch.manual_seed(seed)
    model = fully_connected(*widths)
    masks, cost = train_measured(model, data[0], recipe, seed, method)
    kept = sum(p.numel() for p in model.parameters()) if masks is None else masks.kept
    return {"quality": accuracy(model, data[1]), "kept": kept, "cost": cost.to_dict()}


def measure(known: dict[str, Any], seeds: int, recipe: Recipe, save: Callable[[], None]) -> None:
    """Fill `known`, ``"method, sparsity" → seed → result``, and `save()` after each."""
    cells = [("dense", 0.0), *((name, s) for s in SPARSITIES for name in (*METHODS, SMALL))]
    for seed in range(seeds):
        data = digits().split(400, seed)
        for name, sparsity in track(cells, f"seed {seed}"):
            results = known.setdefault(f"{name}, {sparsity:g}", {})
            if str(seed) in results:
                continue
            method = METHODS[name](sparsity, recipe.steps) if name in METHODS else None
            widths = widths_of(sparsity) if name == SMALL else WIDTHS
            results[str(seed)] = train(method, widths, data, recipe, seed)
            save()


def cards(known: dict[str, Any]) -> list[str]:
    """The equal-budget report card of every sparsity."""

    def run(name: str, sparsity: float) -> Run:
        found = list(known[f"{name}, {sparsity:g}"].values())
        costs = [TrainingCost.from_dict(result["cost"]) for result in found]
        return Run(name, [result["quality"] for result in found], costs)

    found = []
    for sparsity in SPARSITIES:
        runs = [run("dense", 0.0), *(run(name, sparsity) for name in (*METHODS, SMALL))]
        found.append(f"{sparsity:.0%} zero\n{report_card(runs, 'accuracy', ('steps', 'units'))}")
    return found


def draw(known: dict[str, Any], file: Path) -> None:
    """Accuracy over sparsity, a line for each method, with 95 % intervals."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from gossamer.papers.statistics import mean_interval

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    dense = mean_interval([result["quality"] for result in known["dense, 0"].values()])
    axis.axhspan(dense.low, dense.high, color="#bbbbbb", alpha=0.5, label="dense")
    places = range(len(SPARSITIES))
    names = (*METHODS, SMALL)
    colours = colormaps["tab20"].colors
    for number, name in enumerate(names):
        found = [mean_interval([r["quality"] for r in known[f"{name}, {s:g}"].values()]) for s in SPARSITIES]
        middle = [each.mean for each in found]
        ends = [[m - each.low for m, each in zip(middle, found)], [each.high - m for m, each in zip(middle, found)]]
        shift = [place + 0.045 * (number - len(names) / 2) for place in places]
        axis.errorbar(
            shift,
            middle,
            ends,
            color=colours[number],
            marker="osD^vPX*<>hd"[number],
            capsize=2,
            linewidth=1,
            label=name,
        )
    axis.set(xlabel="sparsity", ylabel="accuracy", ylim=(0.8, None))
    axis.set_xticks(list(places), [f"{s:.0%}" for s in SPARSITIES])
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    figure.savefig(file, dpi=130)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    recipe = Recipe(arguments.steps, 100)
    settings = {"steps": recipe.steps, "batch": recipe.batch, "learning_rate": recipe.learning_rate, "widths": WIDTHS}
    settings = json.loads(json.dumps(settings))
    stored = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    known = stored.get("results", {}) if stored.get("settings") == settings else {}

    def save() -> None:
        if arguments.json:
            write_json(arguments.json, {"settings": settings, "machine": describe_machine(), "results": known})

    measure(known, arguments.seeds, recipe, save)
    print("\n".join(cards(known)))
    if arguments.picture:
        draw(known, arguments.picture)


if __name__ == "__main__":
    main()

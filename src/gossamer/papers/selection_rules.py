"""All rules of selection in one picture: what is explained, what the model keeps, and what is dead, over L0.

``python -m gossamer.papers.selection_rules docs/features-l0`` trains an autoencoder with each rule at several numbers
of active features on the shared activations of the demo model, and writes marks (``.json``) and picture (``.png``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.papers.feature_contest import (
    BATCH_TOPK,
    FEATURE,
    GRADIENT,
    JUMP,
    MATRYOSHKA,
    MUTUAL,
    PURSUIT,
    RELU,
    TOPK,
    compared,
    contender,
)
from gossamer.papers.language_features import Source, language_features
from gossamer.papers.results import read_json
from gossamer.storage.atomic import atomic_file, write_json

COUNTED = (TOPK, BATCH_TOPK, MUTUAL, FEATURE, GRADIENT, MATRYOSHKA, PURSUIT)
PENALTIES = {RELU: (0.002, 0.004, 0.007), JUMP: (0.003, 0.01, 0.03)}
KS = (8, 24, 64)
PLAN: dict[str, Any] = {
    "features": 1024,
    "steps": 200,
    "batch_size": 256,
    "learning_rate": 2e-3,
    "dead_after": 20_000,
    "documents": 2,
}
PANELS = {
    "explained variance": lambda marks: 1 - marks["unexplained"],
    "loss recovered": lambda marks: marks["recovered"],
    "dead features, share": lambda marks: marks["dead"],
}


def measure(
    plan: Mapping[str, Any] = PLAN, ks: tuple[int, ...] = KS, source: Source | None = None, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Marks of every rule at every number of features: ``rule, k`` → marks, with the ``rule`` among them."""
    steps, features = plan["steps"], plan["features"]
    entries = {(rule, f"k={k}"): contender(rule, k, steps, features) for rule in COUNTED for k in ks}
    entries |= {
        (rule, f"weight {weight:g}"): contender(rule, 0, steps, features, weight)
        for rule, weights in PENALTIES.items()
        for weight in weights
    }
    named = {f"{rule}, {setting}": entry for (rule, setting), entry in entries.items()}
    _, marks = compared(language_features(source or Source()), named, plan, seed, gradients=True)
    return {f"{rule}, {setting}": {"rule": rule, **marks[f"{rule}, {setting}"]} for rule, setting in entries}


def draw(marks: Mapping[str, Mapping[str, Any]], path: Path | str) -> None:
    """Three panels over the active features of a token, a line for each rule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(PANELS))
    for axes, (label, value) in zip(panels, PANELS.items()):
        for number, rule in enumerate(dict.fromkeys(one["rule"] for one in marks.values())):
            points = sorted((one["active"], value(one)) for one in marks.values() if one["rule"] == rule)
            axes.plot(*zip(*points), marker="osD^vP*Xh"[number % 9], markersize=4.5, linewidth=1.2, label=rule)
        axes.set(xlabel="active features of a token (L0)", ylabel=label, xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=130)


def main(target: str) -> None:
    """Measure, unless marks are there already, and draw."""
    file = Path(target).with_suffix(".json")
    if not file.exists():
        write_json(file, measure())
    draw(read_json(file, "delete it to measure again"), file.with_suffix(".png"))


if __name__ == "__main__":
    main(sys.argv[1])

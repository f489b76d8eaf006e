"""The standard picture of an experiment: quality against x, one line for each method, a band for its seeds.

An experiment without curves is drawn by the intervals its verdict rests on.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gossamer.papers.results import Result
from gossamer.papers.statistics import Interval
from gossamer.storage.atomic import atomic_file

# distinguishable with any kind of colour vision, and by marker in print
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
MARKERS = "osD^vPX*"


def draw_result(
    result: Result,
    path: str | os.PathLike[str],
    x_label: str = "sparsity",
    y_label: str = "quality",
    logarithmic: bool = False,
) -> bool:
    """Draw a result into a PNG file, which appears whole or not at all.

    Parameters
    ----------
    result
        What to draw.
    path
        The file.
    x_label, y_label
        Axes of the curves.
    logarithmic
        Whether the vertical axis of the curves is.

    Returns
    -------
    bool
        False, and no file, if the result has neither curves nor intervals.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    curves = collect_curves(result.observations)
    intervals = {name: value for name, value in result.verdict.numbers.items() if isinstance(value, Interval)}
    if not curves and not intervals:
        return False
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if curves:
        _draw_curves(axes, curves, len(result.seeds))
        axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if logarithmic else "linear")
    else:
        _draw_intervals(axes, intervals)
    axes.set_title(f"{result.slug}: {result.verdict.outcome} (budget {result.budget})", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
    return True


def collect_curves(observations: Iterable[Mapping[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Gather the curves of all seeds: method → x → the y of every seed that has one there.

    A y of None, for a run that gave no finite number, is left out.
    """
    curves: dict[str, dict[float, list[float]]] = {}
    for observation in observations:
        for method, curve in observation.get("curves", {}).items():
            points = curves.setdefault(method, defaultdict(list))
            for x, y in zip(curve["x"], curve["y"], strict=True):
                if y is not None:
                    points[x].append(y)
    return {method: dict(sorted(points.items())) for method, points in curves.items() if points}


def _draw_curves(axes: Axes, curves: dict[str, dict[float, list[float]]], seeds: int) -> None:
    for index, (method, points) in enumerate(curves.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        x = list(points)
        axes.plot(x, [sum(y) / len(y) for y in points.values()], color=colour, marker=marker, label=method)
        if seeds > 1:
            low, high = zip(*((min(y), max(y)) for y in points.values()), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    band = f"mean of {seeds} seeds; band: smallest to largest" if seeds > 1 else "one seed"
    axes.legend(frameon=False, fontsize=9, title=band, title_fontsize=8)


def _draw_intervals(axes: Axes, intervals: dict[str, Interval]) -> None:
    for row, interval in enumerate(intervals.values()):
        colour = COLOURS[row % len(COLOURS)]
        axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=3, alpha=0.5)
        axes.plot([interval.mean], [row], color=colour, marker="o")
    axes.set_yticks(range(len(intervals)), [name.replace("_", " ") for name in intervals])
    axes.set_ylim(len(intervals) - 0.5, -0.5)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("mean and confidence interval")

"""All training-free activation sparsity in one picture: perplexity over the weights that a token reads.

    python -m gossamer.report.activation_picture FILE

drawn from the stored results of TEAL, WINA, CHESS and R-Sparse, in which all see the same data with the same seeds.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gossamer.errors import CheckpointError
from gossamer.papers.draw import COLOURS, MARKERS
from gossamer.papers.results import Result, stored_result
from gossamer.storage.atomic import atomic_file

LINES = {
    "TEAL": ("teal", "teal"),
    "WINA, by norm": ("wina", "by norm"),
    "WINA, rotated": ("wina", "by norm, rotated"),
    "CHESS, gates and q, o": ("chess", "chess and q, o"),
    "CATS, gates": ("chess", "cats"),
    "R-Sparse, α = 0.9": ("r-sparse", "alpha 0.9"),
}


def curve(result: Result, label: str) -> tuple[list[float], list[float]]:
    """Weights read (share of the model's) and perplexity of one method, means over seeds, from most to least."""
    names = [name for name in result.observations[0]["points"] if name.rpartition(" at ")[0] == label]
    read, perplexity = [1.0], [_mean(result, "dense", "nll")]
    for name in names:
        read.append(_mean(result, name, "share"))
        perplexity.append(_mean(result, name, "nll"))
    order = sorted(range(len(read)), key=lambda i: -read[i])
    return [read[i] for i in order], [math.exp(perplexity[i]) for i in order]


def _mean(result: Result, name: str, quantity: str) -> float:
    values: list[Any] = [observation["points"][name][quantity] for observation in result.observations]
    return sum(values) / len(values)


def draw(file: Path) -> None:
    """Draw the picture.

    Raises
    ------
    CheckpointError
        If a result is not stored yet.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, (slug, label)) in enumerate(LINES.items()):
        result = stored_result(slug)
        if result is None:
            raise CheckpointError(f"there is no stored result of {slug}; run gossamer reproduce {slug}")
        axes.plot(*curve(result, label), marker=MARKERS[index], color=COLOURS[index], label=name)
    axes.set(xlabel="weights read for a token, share of the model", ylabel="perplexity", yscale="log")
    axes.invert_xaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8)
    with atomic_file(file) as part:
        figure.savefig(part, format="png", dpi=150)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))

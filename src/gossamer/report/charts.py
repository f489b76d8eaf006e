"""Where every mark of the page's pictures goes.

The template draws, this module only measures: horizontal positions are percentages of the plot's width and
vertical ones are pixels, so that a picture stretches from a phone to a printed page while its lettering keeps
its size. Colours are left to the style sheet, which knows whether the reader's screen is light or dark.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CURVE_HEIGHT = 320
LABEL_GAP = 17
ROW_HEIGHT = 22
MARKERS = 6


def number(value: object) -> float | None:
    """Return `value` as a float, or None unless it is a real, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis (per cent of the width, or pixels from the top)."""

    position: float
    label: str


@dataclass(frozen=True)
class Point:
    """One measurement: `x` in per cent of the width, `y` in pixels from the top, and its values in words."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """The points of one method, from sparse to sparser; `label_y` is where its name stands at the right."""

    name: str
    points: list[Point]
    marker: int
    label_y: float
    highlighted: bool


@dataclass(frozen=True)
class Curve:
    """Perplexity (logarithmic) against sparsity, one line per method, beside the same numbers as a table."""

    height: int
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    dense_y: float | None
    dense_label_y: float | None
    table: list[tuple[float, list[float | None]]]


@dataclass(frozen=True)
class Cell:
    """One layer of a heat map; `level` runs from 0 (lowest value) to 1 (highest), None where unknown."""

    x: float
    y: float
    level: float | None
    value: float | None
    name: str


@dataclass(frozen=True)
class HeatMap:
    """A quantity by kind of layer (rows) and depth in the model (columns)."""

    quantity: str
    height: int
    cell_width: float
    cells: list[Cell]
    rows: list[tuple[Tick, float | None]]
    columns: list[Tick]
    low: float
    high: float

    @property
    def flat(self) -> bool:
        """Whether all layers have the same value, to within half a per cent of the whole scale."""
        return self.high - self.low < 0.005


@dataclass(frozen=True)
class Bar:
    """One bar, its spread and its limit, all in per cent of the track; None where not measured."""

    width: float | None
    low: float | None
    high: float | None
    limit: float | None


def spread_labels(positions: Sequence[float], gap: float, bottom: float) -> list[float]:
    """Move labels apart so that neighbours are at least `gap` pixels from each other.

    Parameters
    ----------
    positions
        Wanted positions in pixels, in any order.
    gap
        Smallest distance between two labels.
    bottom
        Position that no label may pass, unless there are more labels than room.

    Returns
    -------
    list of float
        Positions in the order given.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = list(positions)
    for above, below in itertools.pairwise(order):
        placed[below] = max(placed[below], placed[above] + gap)
    ceiling = bottom
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def log_ticks(low: float, high: float) -> list[float]:
    """Round values from `low` to `high` that divide a logarithmic axis: 1-2-5 steps, or decades on a long one.

    Examples
    --------
    >>> log_ticks(12.0, 150.0)
    [20.0, 50.0, 100.0]
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    stride = max(1, len(decades) // 6)
    values = [float(f"{step}e{decade}") for decade in decades[::stride] for step in steps]
    return [value for value in values if low <= value <= high]


def tick_label(value: float) -> str:
    """Write a tick of a logarithmic axis, from a million on as a power of ten."""
    if value < 1e6:
        return f"{value:,.6g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def quality_curve(curve: Sequence[Mapping], method: str, dense: float | None) -> Curve | None:
    """Lay out perplexity against sparsity for every method measured.

    Parameters
    ----------
    curve
        Rows with `method`, `sparsity` in [0, 1) and `perplexity`; others are skipped.
    method
        Name of the method of this run, whose line is highlighted.
    dense
        Perplexity of the dense model, or None.

    Returns
    -------
    Curve or None
        None if no row can be drawn.
    """
    series: dict[str, dict[float, float]] = {}
    for row in curve:
        sparsity, perplexity = number(row.get("sparsity")), number(row.get("perplexity"))
        if sparsity is not None and perplexity is not None and perplexity > 0:
            series.setdefault(str(row.get("method", "n/a")), {})[sparsity] = perplexity
    if not series:
        return None

    sparsities = sorted({sparsity for values in series.values() for sparsity in values})
    known_dense = dense if dense is not None and dense > 0 else None
    heights = [y for values in series.values() for y in values.values()]
    heights += [known_dense] if known_dense else []
    low, high = min(heights) / 1.15, max(heights) * 1.15
    left, width = sparsities[0], sparsities[-1] - sparsities[0]

    def x_of(sparsity: float) -> float:
        return round(4 + 92 * (sparsity - left) / width, 2) if width else 50.0

    def y_of(perplexity: float) -> float:
        return round(CURVE_HEIGHT * math.log(high / perplexity) / math.log(high / low), 1)

    dense_y = y_of(known_dense) if known_dense else None
    ends = [y_of(values[max(values)]) for values in series.values()]
    ends += [dense_y] if dense_y is not None else []
    label_ys = [round(y, 1) for y in spread_labels(ends, LABEL_GAP, CURVE_HEIGHT)]
    lines = []
    for index, (name, label_y) in enumerate(zip(series, label_ys)):
        points = [
            Point(x_of(x), y_of(y), f"{name} at {x:.0%} sparsity: perplexity {y:.4g}")
            for x, y in sorted(series[name].items())
        ]
        highlighted = name.casefold() == method.casefold()
        lines.append(Line(name, points, index % MARKERS, label_y, highlighted))
    lines.sort(key=lambda line: line.highlighted)

    tenths = [tenth / 10 for tenth in range(10) if left <= tenth / 10 <= sparsities[-1]]
    marked = sparsities if len(sparsities) <= 8 else tenths
    return Curve(
        height=CURVE_HEIGHT,
        x_ticks=[Tick(x_of(sparsity), f"{100 * sparsity:.3g}%") for sparsity in marked],
        y_ticks=[Tick(y_of(value), tick_label(value)) for value in log_ticks(low, high)],
        lines=lines,
        dense_y=dense_y,
        dense_label_y=label_ys[-1] if dense_y is not None else None,
        table=[(sparsity, [series[line.name].get(sparsity) for line in lines]) for sparsity in sparsities],
    )


def split_name(name: str) -> tuple[str, int] | None:
    """Take a parameter name apart into the kind of layer and its depth, or None if it has no number.

    The first number in the name is the depth; further ones (experts) become `*`.

    Examples
    --------
    >>> split_name("model.layers.12.mlp.down_proj.weight")
    ('model.layers.mlp.down_proj', 12)
    """
    parts = name.removesuffix(".weight").split(".")
    depth = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if depth is None:
        return None
    rest = [re.sub(r"^\d+$", "*", part) for part in parts[depth + 1 :]]
    return ".".join(parts[:depth] + rest) or "layer", int(parts[depth])


def short_kinds(kinds: Sequence[str]) -> list[str]:
    """Shorten each kind to as few of its last parts as tell it from all the others.

    Examples
    --------
    >>> short_kinds(["layers.attn.q", "layers.mlp.up"])
    ['q', 'up']
    >>> short_kinds(["encoder.attn.q", "decoder.attn.q"])
    ['encoder.attn.q', 'decoder.attn.q']
    """
    for length in range(1, max((kind.count(".") for kind in kinds), default=0) + 1):
        short = [".".join(kind.split(".")[-length:]) for kind in kinds]
        if len(set(short)) == len(kinds):
            return short
    return list(kinds)


def heat_map(layers: Sequence[Mapping], quantity: str) -> HeatMap | None:
    """Lay out one quantity of all layers by kind and depth.

    Parameters
    ----------
    layers
        Rows with a parameter `name` and the `quantity`. Names without a number have no depth and are
        left out; several layers of one kind at one depth (experts) are averaged.
    quantity
        `"sparsity"`, `"error"` or any other numeric key of the rows.

    Returns
    -------
    HeatMap or None
        None if fewer than two layers have a depth and a value.
    """
    grid: dict[str, dict[int, list[float]]] = {}
    for layer in layers:
        place = split_name(str(layer.get("name", "")))
        if place is not None:
            values = grid.setdefault(place[0], {}).setdefault(place[1], [])
            if (value := number(layer.get(quantity))) is not None:
                values.append(value)
    means = {
        kind: {depth: sum(values) / len(values) if values else None for depth, values in row.items()}
        for kind, row in grid.items()
    }
    known = [value for row in means.values() for value in row.values() if value is not None]
    if len(known) < 2:
        return None

    depths = sorted({depth for row in means.values() for depth in row})
    column = {depth: index for index, depth in enumerate(depths)}
    width = 100 / len(depths)
    low, high = min(known), max(known)
    cells, rows = [], []
    for index, (label, (kind, row)) in enumerate(zip(short_kinds(list(means)), means.items())):
        for depth, value in sorted(row.items()):
            level = None if value is None else (value - low) / (high - low) if high > low else 0.5
            x, name = round(column[depth] * width, 3), f"{kind}, depth {depth}"
            cells.append(Cell(x, index * ROW_HEIGHT, level, value, name))
        finite = [value for value in row.values() if value is not None]
        mean = sum(finite) / len(finite) if finite else None
        rows.append((Tick(index * ROW_HEIGHT + ROW_HEIGHT / 2, label), mean))
    stride = max(1, math.ceil(len(depths) / 6 / 5) * 5) if len(depths) > 8 else 1
    columns = [Tick(round((column[depth] + 0.5) * width, 3), str(depth)) for depth in depths[::stride]]
    return HeatMap(quantity, len(rows) * ROW_HEIGHT, round(width, 3), cells, rows, columns, low, high)


def bars(rows: Sequence[Mapping[str, float | None]]) -> list[Bar]:
    """Scale bars to a common track that starts at zero and ends at the largest value, spread or limit.

    Parameters
    ----------
    rows
        One mapping per bar with `value` and, where measured, `low`, `high` and `limit`.

    Returns
    -------
    list of Bar
        In the same order.
    """
    keys = ("value", "low", "high", "limit")
    measured = [[number(row.get(key)) for key in keys] for row in rows]
    longest = max((value for row in measured for value in row if value is not None), default=0.0)

    def share(value: float | None) -> float | None:
        return None if value is None or longest <= 0 else round(100 * max(value, 0.0) / longest, 2)

    return [Bar(*map(share, row)) for row in measured]

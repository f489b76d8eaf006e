"""Accuracy for the operations that it costs: whether a large sparse model beats a small dense one.

Operations of a prompt of n tokens: 2 N n for the weights, 4 · width for each of the n (n + 1) / 2 pairs of every layer
that are computed, and what choosing them costs. Of a decoded token: 2 N, 4 · width for each of the n pairs of every
layer, and the choosing, unless a method evicts: it chooses once, when the prompt has been read, which is a part of the
prompt's price however many tokens are decoded. The formula is reconstructed from the paper's description, not from its
code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from gossamer.errors import ConfigurationError
from gossamer.measure.long_context.frontier import DENSE, Frontier, Row

Phase = Literal["prefill", "decode"]

EVICTING = frozenset({"snap-kv", "ada-snap-kv"})
"""Methods that choose once a prompt, and not once a decoded token."""


@dataclass(frozen=True)
class IsoPoint:
    """A model with a method at a sparsity, at its price.

    Attributes
    ----------
    model, method, sparsity, length
        Which.
    flops
        Of the prompt in prefill, of a token in decoding.
    accuracy
        Mean over tasks.
    efficient
        Whether no cheaper or equally dear point is better.
    """

    model: str
    method: str
    sparsity: float
    length: int
    flops: float
    accuracy: float
    efficient: bool = False


@dataclass(frozen=True)
class IsoFlops:
    """All points of a phase at a length.

    Attributes
    ----------
    phase, length
        Which.
    points
        By price.
    large_sparse_wins
        Pairs (dense point of a smaller model, sparse point of a larger one that is no dearer and more accurate).
    small_dense_wins
        Pairs (sparse point of a larger model, dense point of a smaller one that is no dearer and more accurate).
    """

    phase: Phase
    length: int
    points: tuple[IsoPoint, ...]
    large_sparse_wins: tuple[tuple[IsoPoint, IsoPoint], ...]
    small_dense_wins: tuple[tuple[IsoPoint, IsoPoint], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def flops(row: Row, phase: Phase) -> float:
    """Operations of a row's prompt, or of a token decoded after it.

    Raises
    ------
    ConfigurationError
        If the phase is neither ``prefill`` nor ``decode``.
    """
    if phase not in ("prefill", "decode"):
        raise ConfigurationError(f"phase is {phase!r}; it must be 'prefill' or 'decode'")
    kept = 1 - (row.realised or 0.0) if row.phase == phase else 1.0
    chosen_in = "prefill" if row.method in EVICTING else row.phase
    choosing = row.selection_flops if chosen_in == phase else 0.0
    width = row.heads * row.head_size
    pairs = row.length * (row.length + 1) / 2 if phase == "prefill" else row.length
    tokens = row.length if phase == "prefill" else 1
    return 2.0 * row.parameters * tokens + 4.0 * width * row.layers * pairs * kept + choosing


def isoflops(frontier: Frontier, phase: Phase) -> list[IsoFlops]:
    """Accuracy against operations at every length, means over tasks.

    Parameters
    ----------
    frontier
        Of several models of one family.
    phase
        Whose operations, and whose methods.
    """
    return [_at(frontier.where(length=length), phase, length) for length in frontier.values("length")]


def _at(part: Frontier, phase: Phase, length: int) -> IsoFlops:
    sizes = {row.model: row.parameters for row in part.rows}
    points = []
    for model in part.values("model"):
        for method in part.where(model=model).values("method"):
            mine = part.where(model=model, method=method)
            if mine.rows[0].phase not in (DENSE, phase):
                continue
            for sparsity in mine.values("sparsity"):
                rows = [row for row in mine.where(sparsity=sparsity).rows if row.scores]
                if rows:
                    price = sum(flops(row, phase) for row in rows) / len(rows)
                    points.append(IsoPoint(model, method, sparsity, length, price, Frontier(tuple(rows)).accuracy))
    marked = _marked(points)
    dense = [point for point in marked if point.method == DENSE]
    sparse = [point for point in marked if point.method != DENSE]
    pairs = [(small, large) for small in dense for large in sparse if sizes[small.model] < sizes[large.model]]
    large_wins = tuple((s, g) for s, g in pairs if g.flops <= s.flops and g.accuracy > s.accuracy)
    small_wins = tuple((g, s) for s, g in pairs if s.flops <= g.flops and s.accuracy > g.accuracy)
    return IsoFlops(phase, length, tuple(marked), large_wins, small_wins)


def _marked(points: list[IsoPoint]) -> list[IsoPoint]:
    """By price, the efficient ones marked."""
    best, found = -1.0, []
    for point in sorted(points, key=lambda p: (p.flops, -p.accuracy)):
        found.append(IsoPoint(**{**asdict(point), "efficient": point.accuracy > best}))
        best = max(best, point.accuracy)
    return found

"""Rows, a table and JSON for all benchmarks; the timing itself is gossamer.measure.interleave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gossamer.measure import describe_machine, interleave, ratio


@dataclass
class Row:
    """One comparison; times in seconds, `ratio` is how many times faster than the peer we are."""

    operation: str
    case: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    limit: float | None
    fraction_of_limit: float | None
    bar: float
    met: bool
    unit: str = "s"


def compare(
    operation: str,
    case: str,
    ours: Callable[[], object],
    peer: str,
    theirs: Callable[[], object],
    bar: float,
    limit: float | None = None,
    repeats: int = 7,
) -> Row:
    """Time both, taking turns. `limit` is the shortest possible time in seconds, where there is one to state."""
    timings = interleave({"ours": ours, "theirs": theirs}, repeats=repeats)
    faster = ratio(timings["theirs"], timings["ours"])
    mine, other = timings["ours"].median, timings["theirs"].median
    return Row(
        operation,
        case,
        peer,
        mine,
        other,
        faster.median,
        faster.low,
        faster.high,
        limit,
        limit / mine if limit else None,
        bar,
        faster.median >= bar,
    )


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table("operation", "case", "peer", "ours, ms", "theirs, ms", "ratio", "of limit", "bar")
    for row in rows:
        table.add_row(
            row.operation,
            row.case,
            row.peer,
            f"{row.ours * 1e3:.1f}",
            f"{row.theirs * 1e3:.1f}",
            f"{row.ratio:.2f} ({row.ratio_low:.2f} … {row.ratio_high:.2f})",
            f"{row.fraction_of_limit:.0%}" if row.fraction_of_limit else "",
            f"{row.bar:g} {'met' if row.met else 'missed'}",
        )
    Console().print(table)


def main(measure: Callable[[], list[Row]]) -> None:
    """Run one benchmark script from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    rows = measure()
    show(rows)
    if arguments.json:
        content = {"machine": describe_machine(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")

"""Rows, a table and JSON for all benchmarks; the timing itself is gossamer.measure.interleave."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gossamer.errors import ConfigurationError
from gossamer.measure import Timing, describe_machine, interleave, ratio
from gossamer.storage.atomic import write_json


@dataclass(frozen=True)
class Options:
    """What the command line of every benchmark says.

    Attributes
    ----------
    quick
        Small sizes and few rounds: shows that a benchmark runs, and its figures mean nothing.
    peer_python
        Interpreter of an environment in which llm-compressor is installed.
    """

    quick: bool = False
    peer_python: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: less is better, and `ratio` is how many times less we take than the peer.

    Attributes
    ----------
    operation, case, peer
        What was done, on what, and what it is compared with.
    ours, theirs
        Medians.
    ratio, ratio_low, ratio_high
        Median and quartiles over the rounds of theirs / ours.
    limit, fraction_of_limit
        The least that is physically possible, where there is one to state, and its share of ours.
    bar, met
        What the ratio must reach, and whether it does.
    rounds
        How often both were measured.
    unit
        Of `ours`, `theirs` and `limit`.
    note
        What must be known beside the figures, such as the quality of both results.
    group
        What many cases have in common; the documentation then sums them up in a row.
    """

    operation: str
    case: str
    peer: str
    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    bar: float
    met: bool
    limit: float | None = None
    fraction_of_limit: float | None = None
    rounds: int = 1
    unit: str = "s"
    note: str = ""
    group: str = ""


def compare(
    operation: str,
    case: str,
    ours: Callable[[], object],
    peer: str,
    theirs: Callable[[], object],
    bar: float,
    limit: float | None = None,
    repeats: int = 7,
    group: str = "",
) -> Row:
    """Time both, taking turns. `limit` is the shortest possible time in seconds, where there is one to state."""
    timings = interleave({"ours": ours, "theirs": theirs}, repeats=repeats)
    return paired(operation, case, timings["ours"], peer, timings["theirs"], bar, limit, group=group)


def paired(
    operation: str,
    case: str,
    ours: Timing,
    peer: str,
    theirs: Timing,
    bar: float,
    limit: float | None = None,
    note: str = "",
    group: str = "",
) -> Row:
    """A row from times that were measured in turns."""
    faster = ratio(theirs, ours)
    return Row(
        operation=operation,
        case=case,
        peer=peer,
        ours=ours.median,
        theirs=theirs.median,
        ratio=faster.median,
        ratio_low=faster.low,
        ratio_high=faster.high,
        bar=bar,
        met=faster.median >= bar,
        limit=limit,
        fraction_of_limit=limit / ours.median if limit else None,
        rounds=ours.repeats,
        note=note,
        group=group,
    )


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table("operation", "case", "peer", "ours", "theirs", "ratio", "of limit", "bar")
    for row in rows:
        table.add_row(
            row.operation,
            f"{row.case}; {row.note}" if row.note else row.case,
            row.peer,
            f"{row.ours:.4g} {row.unit}",
            f"{row.theirs:.4g} {row.unit}",
            f"{row.ratio:.2f} ({row.ratio_low:.2f} … {row.ratio_high:.2f})",
            f"{row.fraction_of_limit:.0%}" if row.fraction_of_limit else "",
            f"{row.bar:.3g} {'met' if row.met else 'missed'}",
        )
    console = Console()
    console.width = max(console.width, 160)  # also in a file or a narrow window a row must stay readable
    console.print(table)


def main(measure: Callable[[Options], list[Row]]) -> None:
    """Run benchmarks from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--quick", action="store_true", help="small and short, only to see that it runs")
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with llm-compressor")
    parser.add_argument("--merge", action="store_true", help="keep the rows of the file that are not measured now")
    arguments = parser.parse_args()
    merged = arguments.json if arguments.merge else None
    machine = describe_machine()
    earlier = earlier_rows(merged, machine, arguments.quick) if merged else []
    rows = measure(Options(arguments.quick, arguments.peer_python))
    show(rows)
    if arguments.json:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        content = {"date": today, "machine": machine, "quick": arguments.quick}
        measured = {row.operation for row in rows}
        kept = [row for row in earlier if row["operation"] not in measured]
        fresh = [{**asdict(row), "date": today} for row in rows]
        write_json(arguments.json, {**content, "rows": [*kept, *fresh]})


def earlier_rows(file: Path, machine: Mapping[str, Any], quick: bool) -> list[dict[str, Any]]:
    """Rows that a file of figures has already, each with the day it was measured.

    Raises
    ------
    ConfigurationError
        If they were measured on another machine, or with other sizes, so that they cannot stand beside new ones.
    """
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    for part, there, here in [
        *((part, found["machine"].get(part), machine.get(part)) for part in ("cpu", "cores", "torch_threads", "torch")),
        ("quick", found["quick"], quick),
    ]:
        if there != here:
            raise ConfigurationError(
                f"{file} was measured with {part} = {there!r}, and this run has {here!r}; "
                f"write to another file, such as {file.stem}-NAME.json beside it"
            )
    return [{"date": found["date"], **row} for row in found["rows"]]

"""Commands that say what there is: the machine, methods, papers and their experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gossamer.cli.common import (
    AsJson,
    Overwrite,
    app,
    console,
    print_values,
)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, which kernels are in use, and what bounds them."""
    from gossamer.runtime.doctor import examine

    print_values(examine(), as_json)


@app.command()
def methods(
    where: Annotated[
        list[str] | None,
        typer.Option(help="only these: during, static, sparse-to-sparse, gradient, …; may be repeated"),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="only those whose zeros can take it, such as 2:4")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="say where each method stands")] = False,
    as_json: AsJson = False,
) -> None:
    """All methods, or those that stand where you say."""
    from gossamer.methods import methods as registered

    specs = [
        spec
        for spec in registered().values()
        if all(spec.taxonomy.matches(word) for word in where or ()) and (not pattern or spec.taxonomy.takes(pattern))
    ]
    if as_json:
        print(json.dumps([spec.to_dict() for spec in specs], indent=1))
        return
    if explain:
        for spec in specs:
            console.print(f"[bold]{spec.name}[/bold]: {spec.taxonomy.explain()}")
        return
    table = Table("method", "room", "when", "zeros in", "what it does")
    for spec in specs:
        table.add_row(spec.name, spec.room, spec.when, spec.granularity, spec.summary)
    console.print(table)


@app.command()
def papers(
    room: Annotated[str | None, typer.Option(help="only this room")] = None,
    status: Annotated[str | None, typer.Option(help="only none, partial or works")] = None,
    as_json: AsJson = False,
) -> None:
    """The catalogue of papers, with what works and what the experiments found."""
    from gossamer.papers import rows

    chosen = [r for r in rows() if (room is None or r["room"] == room) and (status is None or r["status"] == status)]
    if as_json:
        print(json.dumps(chosen, indent=1))
        return
    table = Table("slug", "room", "status", "verdict", "title")
    for row in chosen:
        table.add_row(row["slug"], row["room"], row["status"], row["verdict"] or "", row["title"])
    console.print(table)


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="paper, as in `gossamer papers`")],
    budget: Annotated[str, typer.Option(help="quick (about 5 minutes) or full")] = "quick",
    seeds: Annotated[int | None, typer.Option(help="number of seeds; default the experiment's own")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="directory for the result")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a paper's experiment and store its verdict."""
    from gossamer.measure.report_card import observed_card
    from gossamer.papers import reproduce as run

    result = run(slug, budget=budget, seeds=seeds, output=output, overwrite=overwrite)
    card = observed_card(result.observations)
    if card is not None:
        console.print(card.table())
    console.print(f"[bold]{result.verdict.outcome}[/bold]: {result.verdict.reason}")

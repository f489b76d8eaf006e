"""What sparse attention costs a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from gossamer.cli.common import AsJson, Model, Overwrite, app, console, numbers_of, print_values, words_of


@app.command("attention-eval")
def attention_eval(
    model: Model,
    methods: Annotated[str | None, typer.Option(help="separated by commas; by default all")] = None,
    sparsities: Annotated[str, typer.Option(help="shares of attention to leave out, in (0, 1)")] = "0.5,0.75,0.9",
    lengths: Annotated[str, typer.Option(help="tokens of prompts")] = "1024",
    tasks: Annotated[
        str, typer.Option(help="what is asked of the model: names of gossamer.measure.long_context.TASKS")
    ] = ("needle,variable-tracking,common-words,story-retrieval"),
    samples: Annotated[
        int, typer.Option(help="prompts for each task and length; 86 to call a sparsity safe on four tasks")
    ] = 10,
    seed: Annotated[int, typer.Option(help="of the prompts, which are the same for all methods")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="directory for rows and a picture; an interrupted run goes on")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="prompts that are answered together")] = 1,
    tolerance: Annotated[float, typer.Option(help="loss of accuracy that counts as safe")] = 0.05,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="let the model reason before it answers")] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Sparse attention on tasks of long context: accuracy at equal sparsity, by method, length and phase."""
    from gossamer.attention.budget_solver import ALL_RULES
    from gossamer.report.attention_job import evaluate_attention

    found = evaluate_attention(
        model,
        tuple(ALL_RULES) if methods is None else words_of(methods),
        numbers_of(sparsities, float, "sparsities"),
        numbers_of(lengths, int, "lengths"),
        words_of(tasks),
        samples,
        seed,
        output,
        batch_size=batch_size,
        tolerance=tolerance,
        reasoning=reasoning,
        overwrite=overwrite,
        progress=not as_json,
        say=(lambda line: None) if as_json else console.print,
    )
    if as_json:
        print_values(found.to_dict(), as_json=True)
        return
    table = Table("method", "phase", "tokens", "sparsity", "realised", "accuracy", "dense", "safe")
    for row in found.table():
        table.add_row(
            row["method"],
            row["phase"],
            str(row["length"]),
            f"{row['sparsity']:.1%}",
            _share(row["realised"]),
            _share(row["accuracy"]),
            _share(row["dense"]),
            {True: "yes", False: "no", None: "unknown"}[row["safe"]],
        )
    console.print(table)
    if found.unknown:
        console.print(found.unknown, soft_wrap=True)
    if output is not None:
        console.print(f"{output / 'attention.json'}, {output / 'attention.png'}", soft_wrap=True)


def _share(value: float) -> str:
    """A share in percent; a dash where a method cannot go as far as was asked."""
    return f"{value:.1%}" if math.isfinite(value) else "–"

"""Commands that make a model sparse, and end in a page."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.common import (
    Dtype,
    Model,
    Output,
    Overwrite,
    TextName,
    app,
    console,
    create_method,
    print_sides,
    print_values,
    read_options,
)
from gossamer.errors import CheckpointError


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="demo (SmolLM2-135M) or gemma (Gemma 3 270M)")] = "demo",
    output: Output = Path("demo-output"),
    method: Annotated[str, typer.Option(help="a method of `gossamer methods`")] = "wanda",
    sparsity: Annotated[float, typer.Option(help="fraction of zeros")] = 0.5,
) -> None:
    """The main job on a real language model: prune, measure, save, reload, write, and show a page."""
    from gossamer.report.main_job import MainJob, command_line

    job = MainJob(
        source=model,
        output=output,
        method=method,
        parameters={"sparsity": sparsity},
        overwrite=True,
        command=command_line(sys.argv[1:]),
        say=console.print,
    )
    record = job.run()
    print_sides(record)
    console.print(f"page:  {output / 'report.html'}\nmodel: {output / 'model'}")


@app.command()
def prune(
    model: Model,
    output: Output,
    method: Annotated[str, typer.Option(help="a method of `gossamer methods`")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="fraction of zeros in [0, 1)")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured[:row|layer|model], 2:4, 16x1, rows, columns")
    ] = None,
    calibration: TextName = "state-of-the-union",
    sequences: Annotated[int, typer.Option(help="calibration windows")] = 16,
    length: Annotated[int, typer.Option(help="tokens in each")] = 512,
    seed: Annotated[int, typer.Option(help="of the choice of windows")] = 0,
    allocation: Annotated[str | None, typer.Option(help="uniform, erdos-renyi, erdos-renyi-kernel, outliers")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="any other parameter of the method: name=value; may be repeated")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="glob on module names; may be repeated")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="glob on module names; may be repeated")] = None,
    dtype: Dtype = "auto",
    device: Annotated[str | None, typer.Option(help="where blocks run, such as cuda")] = None,
    offload: Annotated[str | None, typer.Option(help="cpu or disk: keep the model there")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Prune a model and save it in the packed format. An interrupted run goes on where it stopped."""
    from gossamer.methods import method as specification
    from gossamer.models import load
    from gossamer.pruning.base import prune as prune_model
    from gossamer.report.main_job import Calibration
    from gossamer.storage import atomic_directory, save, size_report

    spec = specification(method)
    given = {"sparsity": sparsity, "pattern": pattern, "allocation": allocation, "include": include, "exclude": exclude}
    parameters = {name: value for name, value in given.items() if value is not None}
    parameters |= read_options(options or [])
    pruner = create_method(method, parameters)
    workspace = output.parent / f".{output.name}.unfinished"
    # entered before the work, so that an output that cannot be written is known at once
    with atomic_directory(output, overwrite=overwrite) as directory:
        loaded = load(model, dtype=dtype, offload=offload)
        if loaded.licence:
            console.print(loaded.licence)
        text = Calibration(calibration, sequences, length, seed)
        batches = text.batches(loaded.tokenizer) if spec.needs_data else None
        result = prune_model(loaded.model, pruner, calibration=batches, device=device, workspace=workspace)
        settings = {"source": model, **result.settings, "calibration": dataclasses.asdict(text) if batches else None}
        save(loaded.model, directory, loaded.tokenizer, settings=settings, overwrite=True)
    shutil.rmtree(workspace, ignore_errors=True)
    sizes = size_report(output)
    console.print(str(result))
    console.print(
        f"{output}: {sizes.packed_bytes / 1e6:.1f} MB, {sizes.ratio:.3f} of the dense {sizes.dense_bytes / 1e6:.1f} MB"
    )


@app.command()
def sparsify(
    model: Model,
    output: Output,
    activations: Annotated[str, typer.Option(help="teal, wina, chess, r-sparse, ppl-p")] = "teal",
    sparsity: Annotated[float | None, typer.Option(help="share of channels that a token skips, in [0, 1)")] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="turn the model first, as WINA does")] = False,
    calibration: TextName = "state-of-the-union",
    sequences: Annotated[int, typer.Option(help="calibration windows")] = 8,
    length: Annotated[int, typer.Option(help="tokens in each")] = 512,
    seed: Annotated[int, typer.Option(help="of the choice of windows")] = 0,
    tokens: Annotated[int, typer.Option(help="of the text by which quality is judged")] = 4096,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="any other parameter of the method: name=value; may be repeated")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compute only what fires: calibrate rules that skip activations, measure them, and show a page."""
    from gossamer.report.activation_job import ActivationJob
    from gossamer.report.main_job import Calibration, Evaluation, command_line

    parameters = read_options(options or [])
    if sparsity is not None:
        parameters["sparsity"] = sparsity
    record = ActivationJob(
        source=model,
        output=output,
        method=activations,
        parameters=parameters,
        rotate=rotate,
        calibration=Calibration(calibration, sequences, length, seed),
        evaluation=Evaluation(tokens=tokens),
        overwrite=overwrite,
        command=command_line(sys.argv[1:]),
        say=console.print,
    ).run()
    found = record["activations"]
    print_values(
        {
            "perplexity, dense": record["dense"]["perplexity"],
            "perplexity, sparse": record["sparse"]["perplexity"],
            "sparsity asked for": found["requested"],
            "sparsity realised": found["realised"],
            "weights read for a token, share of the model": found["weights_read"],
            "share in layers that stay dense": found["dense_share"],
            "decoding can be faster by at most": found["decode_limit"],
            "page": str(output / "report.html"),
        },
        as_json=False,
    )


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="record.json of a run, or the directory that holds it")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="page to write")] = None,
) -> None:
    """Write the page of an earlier run again."""
    from gossamer.report.page import write_page

    source = run / "record.json" if run.is_dir() else run
    try:
        record = json.loads(source.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{source} does not exist; `gossamer demo` writes one") from error
    except ValueError as error:
        raise CheckpointError(f"{source} is not a run record: {error}") from error
    console.print(str(write_page(record, output or source.with_name("report.html"))))

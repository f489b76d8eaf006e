"""The command line: parses, calls, prints. Everything it does is a few lines of Python."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gossamer import __version__
from gossamer.errors import CheckpointError, ConfigurationError, GossamerError

app = typer.Typer(help="Make models sparse, and make sparse pay.", no_args_is_help=True, add_completion=False)
console = Console()

Model = Annotated[str, typer.Argument(help="demo, gemma, a directory, a hub id, or a GGUF file")]
Output = Annotated[Path, typer.Option("--output", "-o", help="directory to create")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")]
Device = Annotated[str, typer.Option(help="where the model computes, such as cuda")]
Storage = Annotated[
    str, typer.Option("--compress", help="weights become exact, bfloat16, int8 or int4; off: run by Hugging Face")
]
Head = Annotated[str, typer.Option(help="the output head becomes int8, int4, bfloat16, or keep")]
Rules = Annotated[
    Path | None, typer.Option("--activations", help="rules.safetensors of `gossamer sparsify`: read what fires only")
]
Inputs = Annotated[str, typer.Option(help="float, or int8: inputs of layers in whole numbers too, for int8 and int4")]
TextName = Annotated[str, typer.Option(help="moby-dick, state-of-the-union, or a text file")]


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
    _print_sides(record)
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
    parameters |= _read_options(options or [])
    pruner = _create(method, parameters)
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

    parameters = _read_options(options or [])
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
    _print_values(
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


@app.command("eval")
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option(help="a dense model to compare with")] = None,
    text: TextName = "moby-dick",
    tokens: Annotated[int, typer.Option(help="how many")] = 16384,
    window: Annotated[int, typer.Option(help="context of the sliding window")] = 1024,
    stride: Annotated[int, typer.Option(help="step of the sliding window")] = 512,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, separated by commas")] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Perplexity, divergence from a dense model, and density."""
    from gossamer.measure import density, divergence, evaluate_tasks, perplexity
    from gossamer.models import load
    from gossamer.report.main_job import Evaluation

    loaded = load(model, dtype=dtype, device=device)
    if tasks:
        scores = evaluate_tasks(loaded.model, loaded.tokenizer, tasks.split(","))
        console.print_json(json.dumps(scores.scores, default=str))
        return
    ids = Evaluation(text, tokens, window, stride).ids(loaded.tokenizer)
    found: dict[str, Any] = {}
    if against:
        both = divergence(load(against, dtype=dtype, device=device).model, loaded.model, ids, window, stride)
        found = {"perplexity": both.sparse.value, "dense perplexity": both.dense.value}
        found |= {"KL from dense (nats)": both.kl, "top-1 agreement": both.top1_agreement}
    else:
        words = perplexity(loaded.model, ids, window, stride)
        found = {"perplexity": words.value, "tokens": words.tokens}
    share = density(loaded.model)
    found |= {f"density of {name}": share.total(name).density for name in ("prunable", "all")}
    _print_values(found, as_json)


@app.command()
def compress(
    model: Model,
    output: Output,
    storage: Annotated[str, typer.Option("--format", help="of weights: exact, bfloat16, int8 or int4")] = "exact",
    head: Head = "int8",
    group: Annotated[int | None, typer.Option(help="columns that share a scale, for int8 and int4")] = None,
    inputs: Inputs = "float",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Give every layer the storage that is fastest on this machine, and save the model like that."""
    from gossamer.models import load
    from gossamer.runtime import compress as compress_model
    from gossamer.runtime.compress import check_formats
    from gossamer.storage import atomic_directory, save, size_report

    wanted = None if storage == "exact" else storage
    check_formats(wanted, head, inputs)
    with atomic_directory(output, overwrite=overwrite) as directory:
        loaded = load(model, dtype=dtype)
        if loaded.licence:
            console.print(loaded.licence)
        found = compress_model(loaded.model, wanted, head=head, group=group, activations=inputs)
        save(loaded.model, directory, loaded.tokenizer, settings=found.to_dict(), overwrite=True)
    sizes = size_report(output)
    console.print(f"{found}\n{output}: {sizes.file_bytes / 1e6:.1f} MB")


@app.command()
def bench(
    model: Model,
    against: Annotated[str | None, typer.Option(help="a dense model to compare with")] = None,
    storage: Storage = "exact",
    head: Head = "int8",
    activations: Rules = None,
    inputs: Inputs = "float",
    prompt_tokens: Annotated[int, typer.Option(help="length of the prompt")] = 128,
    new_tokens: Annotated[int, typer.Option(help="tokens to write")] = 64,
    repeats: Annotated[int, typer.Option(help="measurements; the median counts")] = 5,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Prefill and decode speed, memory, and the limit that the machine's memory sets."""
    from gossamer.measure import read_bandwidth
    from gossamer.models import load
    from gossamer.runtime.engine import Engine, check_engine

    check_engine(storage, head, inputs)
    found: dict[str, Any] = {}
    for label, source in (("", model), ("dense ", against)):
        if source is None:
            continue
        loaded = load(source, dtype=dtype, device=device)
        options: dict[str, Any] = {"context": prompt_tokens + new_tokens}
        if label:  # what is compared with is what people have now
            engine = Engine.of(loaded.model, loaded.tokenizer, "off", **options)
        else:
            options |= {"activations": inputs, "thresholds": _thresholds(activations, loaded.model)}
            engine = Engine.of(loaded.model, loaded.tokenizer, storage, head, **options)
        speed = engine.speed(prompt_tokens, new_tokens, repeats)
        for phase in ("prefill", "decode"):
            timing = getattr(speed, phase)
            found[f"{label}{phase} tokens/s"] = timing.median
            found[f"{label}{phase} spread"] = f"{timing.low:.1f} … {timing.high:.1f}"
        found[f"{label}MB in memory"] = engine.nbytes / 1e6
        found[f"{label}decode limit tokens/s"] = read_bandwidth() / engine.nbytes
        found[f"{label}run by"] = str(engine)
    _print_values(found, as_json)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="what to continue")] = "The most important thing to know about whales is",
    tokens: Annotated[int, typer.Option(help="most tokens to write")] = 64,
    storage: Storage = "exact",
    head: Head = "int8",
    activations: Rules = None,
    inputs: Inputs = "float",
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token")] = 0.0,
    top_k: Annotated[int, typer.Option(help="choose among so many tokens; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(help="choose among the fewest tokens of this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the choice")] = 0,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Write a continuation, as it comes."""
    from gossamer.models import load
    from gossamer.models.prompts import encode_prompt
    from gossamer.runtime import Sampling
    from gossamer.runtime.engine import Engine, check_engine

    sampling = Sampling(temperature, top_k, top_p, seed)
    check_engine(storage, head, inputs)
    loaded = load(model, dtype=dtype, device=device)
    context = len(encode_prompt(loaded.tokenizer, prompt)) + max(tokens, 1)
    sparse = _thresholds(activations, loaded.model)
    engine = Engine.of(
        loaded.model, loaded.tokenizer, storage, head, activations=inputs, context=context, thresholds=sparse
    )
    _, found = engine.write(prompt, tokens, sampling, on_text=lambda text: print(text, end="", flush=True))
    print()
    Console(stderr=True).print(f"{len(found.tokens)} tokens, {found.tokens_per_second:.1f} a second, {engine}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine has, which kernels are in use, and what bounds them."""
    from gossamer.runtime.doctor import examine

    _print_values(examine(), as_json)


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


def _read_options(options: list[str]) -> dict[str, Any]:
    """Values as JSON where they are JSON (numbers, lists, true, null), as text otherwise."""
    found = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--set {option} is not of the form name=value, such as block_size=64")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[name.replace("-", "_")] = value
    return found


def _thresholds(rules: Path | None, model: Any) -> Any:
    if rules is None:
        return None
    from gossamer.activations.rules import ActivationRules
    from gossamer.models.rotation import orthogonalise

    found = ActivationRules.load(rules / "rules.safetensors" if rules.is_dir() else rules)
    if found.settings.get("rotated"):
        orthogonalise(model)
    return found.thresholds(model)


def _create(method: str, parameters: dict[str, Any]) -> Any:
    from gossamer.methods import create

    return create(method, **parameters)


def _print_values(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=1))
        return
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def _print_sides(record: dict[str, Any]) -> None:
    table = Table("", "dense", "sparse")
    dense, sparse = record["dense"], record["sparse"]
    table.add_row("perplexity", f"{dense['perplexity']:.2f}", f"{sparse['perplexity']:.2f}")
    table.add_row("file, MB", f"{dense['file_bytes'] / 1e6:.1f}", f"{sparse['file_bytes'] / 1e6:.1f}")
    for phase in ("prefill", "decode"):
        key = f"{phase}_tokens_per_second"
        table.add_row(f"{phase}, tokens/s", f"{dense[key]['median']:.1f}", f"{sparse[key]['median']:.1f}")
    table.add_row("weights kept, pruned layers", "100%", f"{sparse['density']:.1%}")
    table.add_row("top-1 agreement", "", f"{sparse['top1_agreement']:.1%}")
    console.print(table)
    if record["engines"]:
        table = Table("compressed and compiled", "MB", "perplexity", "prefill, tokens/s", "decode, tokens/s")
        for row in record["engines"]:
            numbers = [row[key] for key in ("perplexity", "prefill_tokens_per_second", "decode_tokens_per_second")]
            label = f"{row['model']}, {row['storage']}"
            table.add_row(label, f"{row['megabytes']:.1f}", *(f"{value:.1f}" for value in numbers))
        console.print(table)


def _version(value: bool) -> None:
    if value:
        print(f"gossamer {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Set up what all commands share."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    """Run the command line; a deliberate error becomes one line and exit status 2."""
    try:
        app()
    except GossamerError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {error}", markup=True, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

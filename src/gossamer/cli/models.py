"""Commands that run, measure and store models."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from gossamer.cli.common import (
    AsJson,
    Device,
    Dtype,
    Head,
    Inputs,
    Model,
    Output,
    Overwrite,
    Rules,
    Storage,
    TextName,
    app,
    console,
    print_values,
    read_thresholds,
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
    print_values(found, as_json)


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
            options |= {"activations": inputs, "thresholds": read_thresholds(activations, loaded.model)}
            engine = Engine.of(loaded.model, loaded.tokenizer, storage, head, **options)
        speed = engine.speed(prompt_tokens, new_tokens, repeats)
        for phase in ("prefill", "decode"):
            timing = getattr(speed, phase)
            found[f"{label}{phase} tokens/s"] = timing.median
            found[f"{label}{phase} spread"] = f"{timing.low:.1f} … {timing.high:.1f}"
        found[f"{label}MB in memory"] = engine.nbytes / 1e6
        found[f"{label}decode limit tokens/s"] = read_bandwidth() / engine.nbytes
        found[f"{label}run by"] = str(engine)
    print_values(found, as_json)


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
    sparse = read_thresholds(activations, loaded.model)
    engine = Engine.of(
        loaded.model, loaded.tokenizer, storage, head, activations=inputs, context=context, thresholds=sparse
    )
    _, found = engine.write(prompt, tokens, sampling, on_text=lambda text: print(text, end="", flush=True))
    print()
    Console(stderr=True).print(f"{len(found.tokens)} tokens, {found.tokens_per_second:.1f} a second, {engine}")

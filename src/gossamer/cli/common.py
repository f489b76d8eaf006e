"""What commands have in common: the application, arguments and options, and how values are printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from gossamer import __version__
from gossamer.errors import ConfigurationError

Number = TypeVar("Number", int, float)

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


def read_options(options: list[str]) -> dict[str, Any]:
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


def words_of(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def numbers_of(text: str, kind: Callable[[str], Number], name: str) -> tuple[Number, ...]:
    """Numbers between commas.

    Raises
    ------
    ConfigurationError
        If one of them is none.
    """
    try:
        return tuple(kind(word) for word in words_of(text))
    except ValueError:
        raise ConfigurationError(f"{name} is {text!r}; give numbers separated by commas, such as 0.5,0.9") from None


def read_thresholds(rules: Path | None, model: Any) -> Any:
    """Thresholds of a model from the file that ``gossamer sparsify`` has written, or None."""
    if rules is None:
        return None
    from gossamer.activations.rules import ActivationRules
    from gossamer.models.rotation import orthogonalise

    found = ActivationRules.load(rules / "rules.safetensors" if rules.is_dir() else rules)
    if found.settings.get("rotated"):
        orthogonalise(model)
    return found.thresholds(model)


def create_method(method: str, parameters: dict[str, Any]) -> Any:
    """A method by name, with parameters checked."""
    from gossamer.methods import create

    return create(method, **parameters)


def print_values(values: dict[str, Any], as_json: bool) -> None:
    """Print names and values, as a table or as JSON."""
    if as_json:
        print(json.dumps(values, indent=1))
        return
    table = Table(show_header=False)
    for name, value in values.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


def print_sides(record: dict[str, Any]) -> None:
    """Print what was measured of the dense and of the sparse model side by side."""
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

"""Looking at what a model computes with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.common import AsJson, Device, Dtype, Output, Overwrite, app, console, numbers_of, print_values
from gossamer.errors import ConfigurationError


@app.command()
def features(
    model: Annotated[str, typer.Argument(help="demo, gemma, a directory, a hub id, or a GGUF file")] = "demo",
    layer: Annotated[int | None, typer.Option(help="number of the block whose output is explained")] = None,
    site: Annotated[str | None, typer.Option(help="or the name of any module, such as model.layers.9.mlp")] = None,
    output: Output = Path("features-output"),
    sae: Annotated[str | None, typer.Option(help="directory of an autoencoder in the format of SAELens")] = None,
    width: Annotated[int | None, typer.Option(help="features; by default eight times the activation's size")] = None,
    k: Annotated[int, typer.Option(help="features that are active on a token")] = 32,
    rule: Annotated[
        str, typer.Option(help="topk, batch-topk, feature-choice, phased, matching-pursuit, relu, jumprelu")
    ] = "topk",
    sparsity: Annotated[float, typer.Option(help="weight of the penalty of relu and jumprelu")] = 3e-3,
    tokens: Annotated[int, typer.Option(help="of text to train on and to look at")] = 100_000,
    text: Annotated[
        list[str] | None, typer.Option(help="moby-dick, state-of-the-union, or a text file; may be repeated")
    ] = None,
    length: Annotated[int, typer.Option(help="tokens of a document")] = 256,
    steps: Annotated[int, typer.Option(help="of training")] = 2000,
    batch_size: Annotated[int, typer.Option(help="activations of a step")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="of training")] = 1e-3,
    seed: Annotated[int, typer.Option(help="of the text, the training and the steered texts")] = 0,
    explanations: Annotated[Path | None, typer.Option(help="file of explanations; by default made offline")] = None,
    explain: Annotated[int, typer.Option(help="features to explain, spread over all")] = 100,
    steer: Annotated[
        str | None, typer.Option(help="numbers of features to steer, separated by commas; by default some are chosen")
    ] = None,
    strengths: Annotated[str, typer.Option(help="of steering, in units of the strongest activation")] = "1,2",
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue with steering; may be repeated")] = None,
    dtype: Dtype = "float32",
    stored: Annotated[str, typer.Option(help="type of stored activations, float16 or float32")] = "float16",
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """The features of a layer: train or load a sparse autoencoder, and write a page to explore it."""
    from gossamer.features.prepared import DictionarySettings
    from gossamer.features.steering import PROMPTS
    from gossamer.report.features_job import FeaturesJob
    from gossamer.report.main_job import command_line

    if (layer is None) == (site is None):
        raise ConfigurationError("give either --layer, such as --layer 9, or --site with the name of a module")
    words = sys.argv[1:]
    record = FeaturesJob(
        dictionary=DictionarySettings(
            model=model,
            site=site if layer is None else layer,
            sae=sae,
            width=width,
            k=k,
            rule=rule,
            sparsity=sparsity,
            tokens=tokens,
            length=length,
            texts=tuple(text) if text else ("moby-dick", "state-of-the-union"),
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            device=device,
            dtype=dtype,
            stored=stored,
        ),
        output=output,
        explanations=explanations,
        explain=explain,
        steer=None if steer is None else numbers_of(steer, int, "steer"),
        strengths=numbers_of(strengths, float, "strengths"),
        prompts=tuple(prompt) if prompt else PROMPTS,
        overwrite=overwrite,
        command=command_line(words),
        more=f"{command_line(_without_steering(words))} --overwrite --steer {{feature}}",
        say=(lambda line: None) if as_json else console.print,
        progress=not as_json,
    ).run()
    if as_json:
        print_values(record, as_json=True)
        return
    quality = record["quality"]
    print_values(
        {
            "variance explained": f"{1 - quality['unexplained']:.1%}",
            "loss recovered": f"{quality['recovered']:.1%}",
            "active on a token": quality["active"],
            "never active": record["dictionary"]["never active"],
            "explained": record["explained"],
        },
        as_json=False,
    )
    console.print(f"page: {output / 'features.html'}\nsae:  {output / 'sae'}", soft_wrap=True)


def _without_steering(words: list[str]) -> list[str]:
    """The command without what the command for more steering says itself."""
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and word != "--overwrite" and not word.startswith("--steer=") and word != "--steer":
            kept.append(word)
        skip = word == "--steer"
    return kept

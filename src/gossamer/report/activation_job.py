"""Making a language model's activations sparse: calibrate, measure, keep the rules, show what became of it."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.activations.base import install
from gossamer.activations.rules import ActivationRules
from gossamer.core.channel_rules import TopK
from gossamer.core.progress import track
from gossamer.errors import ConfigurationError, ModelError
from gossamer.measure import describe_machine, perplexity
from gossamer.measure.weights_read import WeightsRead
from gossamer.methods import create
from gossamer.methods import method as specification
from gossamer.models import load
from gossamer.models.rotation import orthogonalise
from gossamer.papers import paper
from gossamer.report.main_job import PROMPTS, Calibration, Evaluation, generate, short_name
from gossamer.report.page import write_page
from gossamer.storage import atomic_directory, write_json


@dataclass
class ActivationJob:
    """Everything the job needs to know.

    Attributes
    ----------
    source
        Model: packaged name, directory, hub id or GGUF file.
    output
        Directory for the rules, the record and the page.
    method, parameters
        Name of a method at inference, and its hyper-parameters.
    rotate
        Whether to turn the model first so that keys and gates have orthogonal columns.
    curve
        Sparsities of the quality curve; empty leaves it out.
    """

    source: str
    output: Path
    method: str = "teal"
    parameters: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=lambda: Calibration(sequences=8))
    evaluation: Evaluation = field(default_factory=Evaluation)
    rotate: bool = False
    curve: Sequence[float] = (0.25, 0.4, 0.65)
    new_tokens: int = 48
    overwrite: bool = False
    command: str = ""
    say: Callable[[str], None] = print

    def run(self) -> dict[str, Any]:
        """Do the job and return its record; the output directory appears only when all of it is done.

        Raises
        ------
        ConfigurationError
            If the method does not make activations sparse at inference.
        OutputError
            If the output directory is in use.
        """
        check_method(self.method)
        chosen = create(self.method, **self.parameters)
        started = time.perf_counter()
        with atomic_directory(self.output, overwrite=self.overwrite) as directory:
            loaded = load(self.source, dtype="float32")
            if loaded.licence:
                self.say(loaded.licence)
            if self.rotate:
                orthogonalise(loaded.model)
            rules = chosen.calibrate(loaded.model, self.calibration.batches(loaded.tokenizer))
            rules.save(directory / "rules.safetensors")
            record = self._record(loaded, chosen, rules)
            record["seconds"] = {"whole job": time.perf_counter() - started}
            write_json(directory / "record.json", record)
            write_page(record, directory / "report.html")
        return record

    def _record(self, loaded: Any, chosen: Any, rules: ActivationRules) -> dict[str, Any]:
        model, tokenizer = loaded.model, loaded.tokenizer
        dense_texts = [
            generate(model, tokenizer, prompt, self.new_tokens) for prompt in track(PROMPTS, "writing, dense")
        ]
        ids = self.evaluation.ids(tokenizer)
        words = perplexity(model, ids, self.evaluation.window, self.evaluation.stride)
        with install(model, rules, chosen.dense_prefill) as installed:
            sparse = perplexity(model, ids, self.evaluation.window, self.evaluation.stride)
            read, realised = installed.weights_read, installed.realised
            texts = [
                generate(model, tokenizer, prompt, self.new_tokens) for prompt in track(PROMPTS, "writing, sparse")
            ]
        described = paper(specification(self.method).paper)
        layers = [
            {"name": f"{name}.weight", "sparsity": share, "requested": rules.requested.get(name)}
            for name, share in realised.items()
        ]
        return {
            "title": f"{short_name(self.source)} with sparse activations by {self.method}",
            "command": self.command,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": {
                "name": short_name(self.source),
                "source": self.source,
                "licence": loaded.licence,
                "parameters": loaded.parameters,
                "dtype": "float32",
            },
            "method": {
                "name": self.method,
                "paper": {f: getattr(described, f) for f in ("title", "authors", "year", "arxiv")},
                "settings": rules.settings,
            },
            "dense": {"perplexity": words.value, "perplexity_error": words.standard_error},
            "sparse": {"perplexity": sparse.value, "perplexity_error": sparse.standard_error},
            "activations": _shares(model, rules, realised, read),
            "layers": layers,
            "curve": self._curve(model, tokenizer, chosen),
            "engines": [],
            "generations": [
                {"prompt": prompt, "dense": before, "sparse": after}
                for prompt, before, after in zip(PROMPTS, dense_texts, texts)
            ],
            "calibration": dataclasses.asdict(self.calibration),
            "evaluation": dataclasses.asdict(self.evaluation),
            "machine": describe_machine(),
            "notes": _notes(read, chosen.dense_prefill, rules, realised, _running(model, rules)),
        }

    def _curve(self, model: nn.Module, tokenizer: Any, chosen: Any) -> list[dict[str, Any]]:
        """Perplexity against sparsity on a shorter text, where the method can take another sparsity."""
        if not self.curve or not hasattr(chosen, "at") or not _is_uniform(chosen):
            return []
        wanted = chosen.sparsity
        ids = dataclasses.replace(self.evaluation, tokens=min(2048, self.evaluation.tokens)).ids(tokenizer)

        def measured() -> float:
            return perplexity(model, ids, self.evaluation.window, self.evaluation.window, progress=False).value

        points = [{"method": self.method, "sparsity": 0.0, "perplexity": measured()}]
        for sparsity in track(sorted({*self.curve, wanted}), "quality against sparsity"):
            with install(model, chosen.at(sparsity), chosen.dense_prefill):
                points.append({"method": self.method, "sparsity": sparsity, "perplexity": measured()})
        chosen.at(wanted)
        return points


def _is_uniform(chosen: Any) -> bool:
    return getattr(chosen, "allocation", "uniform") == "uniform" and getattr(chosen, "alpha", 1) != "search"


def _shares(
    model: nn.Module, rules: ActivationRules, realised: dict[str, float], read: WeightsRead
) -> dict[str, float | None]:
    """What was asked for and what was realised, means weighted by the sizes of the layers; and what a token reads."""
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in realised}
    asked = [name for name in realised if name in rules.requested]
    total = sum(sizes[name] for name in asked)
    return {
        "requested": sum(rules.requested[name] * sizes[name] for name in asked) / total if asked else None,
        "realised": sum(share * sizes[name] for name, share in realised.items()) / sum(sizes.values()),
        "weights_read": read.share,
        "dense_share": read.dense_share,
        "decode_limit": 1 / read.share,
    }


def check_method(name: str) -> None:
    """Check that a method makes activations sparse at inference.

    Raises
    ------
    UnknownNameError
        If there is no such method.
    ConfigurationError
        If it does something else.
    """
    spec = specification(name)
    if spec.when != "at inference" or not hasattr(spec.factory, "calibrate"):
        raise ConfigurationError(
            f"{name} acts {spec.when} on {spec.granularity}; for sparse activations give 'teal', 'wina', 'chess' or "
            f"'r-sparse'"
        )


def _running(model: nn.Module, rules: ActivationRules) -> str:
    """What can be done with the file of rules."""
    try:
        rules.thresholds(model)
    except ModelError as error:
        largest = any(isinstance(rule.selection, TopK) for rule in [*rules.inputs.values(), *rules.gates.values()])
        setting = "alpha=1" if rules.low_rank else "gate=threshold" if largest else ""
        hint = f" `gossamer sparsify --set {setting}` makes rules that it can." if setting else ""
        return f"The rules are in rules.safetensors. `gossamer generate` cannot run them: {error}.{hint}"
    return "The rules are in rules.safetensors: `gossamer generate MODEL --activations` runs them."


def _notes(
    read: WeightsRead, prefill: float, rules: ActivationRules, realised: dict[str, float], running: str
) -> list[str]:
    gaps = [abs(realised[name] - rules.requested[name]) for name in realised if name in rules.requested]
    far = f"; the layer farthest from what was asked is off by {max(gaps):.3f}" if gaps else ""
    return [
        f"{read}. Sparsity is that of the channels of a token, measured on the evaluation text{far}.",
        f"The first {prefill:.0%} of every prompt stays dense. Prompts are read no faster: only decoding reads less.",
        running,
    ]

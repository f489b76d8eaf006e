"""The main job, from a model to a page: prune, measure dense beside sparse, save, reload, write, show."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.core.progress import track
from gossamer.errors import GossamerError
from gossamer.measure import (
    Timing,
    bytes_in_memory,
    density,
    describe_machine,
    divergence,
    generation_speed,
    perplexity,
    read_bandwidth,
)
from gossamer.methods import method as specification
from gossamer.models import LoadedModel, calibration_batches, evaluation_tokens, load, read_text
from gossamer.models.prompts import encode_prompt
from gossamer.papers import paper
from gossamer.pruning.base import LayerReport, PruningResult, prune
from gossamer.report.page import write_page
from gossamer.runtime.engine import Engine
from gossamer.storage import atomic_directory, save, size_report, write_json

PROMPTS = (
    "The most important thing to know about whales is",
    "Explain in two sentences why the sky is blue.",
    "A short recipe for tomato soup:",
)


@dataclass
class Calibration:
    """Which text a method sees.

    Attributes
    ----------
    text
        Name of a bundled text or path of a file.
    sequences, length
        Number of windows and tokens in each.
    seed
        Of the choice of windows.
    """

    text: str = "state-of-the-union"
    sequences: int = 16
    length: int = 512
    seed: int = 0

    def batches(self, tokenizer: Any) -> list[torch.Tensor]:
        """Windows of token ids, ``(1, length)`` each."""
        return calibration_batches(read_text(self.text), tokenizer, self.sequences, self.length, self.seed)


@dataclass
class Evaluation:
    """On which text quality is measured.

    Attributes
    ----------
    text
        Name of a bundled text or path of a file.
    tokens
        How many of its tokens.
    window, stride
        Of the sliding window.
    """

    text: str = "moby-dick"
    tokens: int = 4096
    window: int = 1024
    stride: int = 512

    def ids(self, tokenizer: Any) -> torch.Tensor:
        """Token ids, ``(1, tokens)``."""
        return evaluation_tokens(read_text(self.text), tokenizer, self.tokens)


@dataclass
class MainJob:
    """Everything the main job needs to know.

    Attributes
    ----------
    source
        Model: packaged name, directory, hub id or GGUF file.
    method, parameters
        Name of a pruner and its hyper-parameters.
    output
        Directory for the sparse model, the record and the page.
    curve
        Sparsities of the quality curve, for the method and for magnitude; empty leaves it out.
    """

    source: str
    output: Path
    method: str = "wanda"
    parameters: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: Evaluation = field(default_factory=Evaluation)
    curve: Sequence[float] = (0.3, 0.7)
    new_tokens: int = 48
    overwrite: bool = False
    command: str = ""
    say: Callable[[str], None] = print

    def run(self) -> dict[str, Any]:
        """Do the job and return its record; the output directory appears only when all of it is done.

        Raises
        ------
        OutputError
            If the output directory is in use.
        """
        started = time.perf_counter()
        with atomic_directory(self.output, overwrite=self.overwrite) as directory:
            loaded = load(self.source, dtype="float32")
            if loaded.licence:
                self.say(loaded.licence)
            dense, tokenizer = loaded.model, loaded.tokenizer
            sparse = copy.deepcopy(dense)
            result = prune(sparse, self.method, calibration=self._batches(tokenizer), **self.parameters)
            self.say(str(result))
            save(sparse, directory / "model", tokenizer, settings=self._settings(result))
            reloaded = load(str(directory / "model"), dtype="float32").model
            _check_identical(sparse, reloaded)
            record = self._record(loaded, reloaded, result, directory)
            record["seconds"]["whole job"] = time.perf_counter() - started
            write_json(directory / "record.json", record)
            write_page(record, directory / "report.html")
        return record

    def _batches(self, tokenizer: Any) -> list[torch.Tensor] | None:
        return self.calibration.batches(tokenizer) if specification(self.method).needs_data else None

    def _settings(self, result: PruningResult) -> dict[str, Any]:
        return {"source": self.source, **result.settings, "calibration": dataclasses.asdict(self.calibration)}

    def _record(self, loaded: LoadedModel, sparse: nn.Module, result: PruningResult, directory: Path) -> dict[str, Any]:
        dense, tokenizer = loaded.model, loaded.tokenizer
        ids = self.evaluation.ids(tokenizer)
        quality = divergence(dense, sparse, ids, self.evaluation.window, self.evaluation.stride)
        # the method decides which layers are prunable, and so the denominator
        share = density(sparse, prunable=[name for name, _ in sparse.named_parameters() if name in result.masks])
        speeds = _speeds({"dense": dense, "sparse": sparse}, tokenizer)
        sizes = size_report(directory / "model")
        bandwidth = read_bandwidth()
        described = paper(specification(self.method).paper)
        sides = {}
        for name, model, words in (("dense", dense, quality.dense), ("sparse", sparse, quality.sparse)):
            sides[name] = {
                "perplexity": words.value,
                "perplexity_error": words.standard_error,
                "file_bytes": sizes.dense_bytes if name == "dense" else sizes.file_bytes,
                "memory_bytes": bytes_in_memory(model),
                "prefill_tokens_per_second": _spread(speeds[name]["prefill"]),
                "decode_tokens_per_second": _spread(speeds[name]["decode"]),
            }
        sides["sparse"] |= {
            "kl": quality.kl,
            "top1_agreement": quality.top1_agreement,
            "density": 1 - result.sparsity,
            "overall_density": share.total("all").density,
        }
        return {
            "title": f"{short_name(loaded.source)} made sparse with {self.method}",
            "command": self.command,
            "python": self._python(result),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "model": {
                "name": short_name(loaded.source),
                "source": loaded.source,
                "licence": loaded.licence,
                "parameters": loaded.parameters,
                "prunable_parameters": result.masks.total,
                "dtype": "float32",
            },
            "method": {
                "name": self.method,
                "paper": {
                    "title": described.title,
                    "authors": described.authors,
                    "year": described.year,
                    "arxiv": described.arxiv,
                },
                "settings": result.settings,
            },
            **sides,
            "limit": {
                "read_bandwidth_bytes_per_second": bandwidth,
                "decode_limit_dense": bandwidth / bytes_in_memory(dense),
                "decode_limit_sparse": bandwidth / bytes_in_memory(sparse),
            },
            "layers": [_layer(report) for report in result.layers],
            "curve": self._curve(dense, sparse, tokenizer),
            "engines": self._engines(dense, sparse, tokenizer),
            "generations": self._generations(dense, sparse, tokenizer),
            "calibration": dataclasses.asdict(self.calibration),
            "evaluation": dataclasses.asdict(self.evaluation),
            "seconds": result.seconds,
            "machine": describe_machine(),
            "notes": [
                f"The denominator of the sparsity is the {result.masks.total:,} weights of the pruned layers, not the "
                f"{loaded.parameters:,} of the whole model.",
                "Dense beside sparse, speed is that of the ordinary dense kernels of torch on the same weights in "
                "float32. Compressed and compiled, every layer has the storage that was measured fastest for it here.",
            ],
        }

    def _engines(self, dense: nn.Module, sparse: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        """Quality, size and speed of both models compressed and compiled, on a shorter text."""
        ids = dataclasses.replace(self.evaluation, tokens=min(1024, self.evaluation.tokens)).ids(tokenizer)
        window, found = self.evaluation.window, []
        cases = (("dense", dense, "bfloat16"), ("sparse", sparse, "bfloat16"), ("sparse", sparse, "int8"))
        for label, model, storage in track(cases, "compressing and compiling"):
            engine = Engine.of(copy.deepcopy(model), tokenizer, storage, progress=False)
            if engine.program is None:
                self.say(f"not compiled: {engine.reason}")
                return []
            speed = engine.speed(new_tokens=32, repeats=5)
            found.append(
                {
                    "model": label,
                    "storage": storage,
                    "layers": str(engine.report),
                    "perplexity": perplexity(engine.model, ids, window, window, progress=False).value,
                    "megabytes": engine.nbytes / 1e6,
                    "prefill_tokens_per_second": speed.prefill.median,
                    "decode_tokens_per_second": speed.decode.median,
                }
            )
        return found

    def _curve(self, dense: nn.Module, sparse: nn.Module, tokenizer: Any) -> list[dict[str, Any]]:
        """Perplexity against sparsity on a shorter text, with a shorter calibration for the method's other points."""
        if not self.curve:
            return []
        ids = dataclasses.replace(self.evaluation, tokens=min(2048, self.evaluation.tokens)).ids(tokenizer)
        few = dataclasses.replace(self.calibration, sequences=min(4, self.calibration.sequences)).batches(tokenizer)
        window = self.evaluation.window

        def measured(model: nn.Module) -> float:
            return perplexity(model, ids, window, window, progress=False).value

        level = measured(dense)
        points = [{"method": name, "sparsity": 0.0, "perplexity": level} for name in (self.method, "magnitude")]
        if not self.parameters.get("pattern"):
            points.append(
                {
                    "method": self.method,
                    "sparsity": self.parameters.get("sparsity", 0.5),
                    "perplexity": measured(sparse),
                }
            )
        contenders = [(self.method, s) for s in self.curve] + [("magnitude", s) for s in (0.3, 0.5, 0.6)]
        for name, sparsity in track(contenders, "quality against sparsity"):
            model = copy.deepcopy(dense)
            data = few if specification(name).needs_data else None
            prune(model, name, calibration=data, sparsity=sparsity, progress=False)
            points.append({"method": name, "sparsity": sparsity, "perplexity": measured(model)})
        return sorted(points, key=lambda point: (point["method"], point["sparsity"]))

    def _generations(self, dense: nn.Module, sparse: nn.Module, tokenizer: Any) -> list[dict[str, str]]:
        return [
            {
                "prompt": prompt,
                "dense": generate(dense, tokenizer, prompt, self.new_tokens),
                "sparse": generate(sparse, tokenizer, prompt, self.new_tokens),
            }
            for prompt in track(PROMPTS, "writing")
        ]

    def _python(self, result: PruningResult) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.parameters.items())
        return (
            f"loaded = gossamer.load({self.source!r})\n"
            f"text = gossamer.read_text({self.calibration.text!r})\n"
            f"batches = gossamer.calibration_batches(text, loaded.tokenizer, {self.calibration.sequences}, "
            f"{self.calibration.length}, seed={self.calibration.seed})\n"
            f"gossamer.prune(loaded.model, {self.method!r}, calibration=batches{options})\n"
            f'gossamer.save(loaded.model, "sparse-model", loaded.tokenizer)'
        )


@torch.inference_mode()
def generate(model: nn.Module, tokenizer: Any, prompt: str, new_tokens: int = 48) -> str:
    """Greedy continuation of a prompt (with mild protection against loops), without the prompt.

    Parameters
    ----------
    model, tokenizer
        From :func:`gossamer.load`.
    prompt
        Text; put through the chat template where the tokenizer has one.
    new_tokens
        Most tokens to write.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=device)
    written = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def command_line(words: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(["gossamer", *words])


def _check_identical(saved: nn.Module, reloaded: nn.Module) -> None:
    after = dict(reloaded.named_parameters())
    for name, parameter in saved.named_parameters():
        if not torch.equal(parameter, after[name]):
            raise GossamerError(f"{name} differs after saving and loading; please report this")


def _speeds(models: dict[str, nn.Module], tokenizer: Any, rounds: int = 4) -> dict[str, dict[str, Timing]]:
    """Prefill and decode speeds, the models taking turns so that a busy machine disturbs both alike."""
    samples: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for turn in track(range(rounds), "measuring speed"):
        for name, model in models.items():
            speed = generation_speed(model, tokenizer, 128, 32, repeats=1, warmup=1 if turn == 0 else 0)
            samples[name]["prefill"] += speed.prefill.samples
            samples[name]["decode"] += speed.decode.samples
    return {
        name: {phase: Timing.of(values, "tokens/s") for phase, values in phases.items()}
        for name, phases in samples.items()
    }


def _spread(timing: Timing) -> dict[str, float]:
    return {"median": timing.median, "low": timing.low, "high": timing.high}


def _layer(report: LayerReport) -> dict[str, Any]:
    return {"name": report.name, "shape": list(report.shape), "sparsity": report.sparsity, "error": report.error}


def short_name(source: str) -> str:
    """What to call a model on a page."""
    names = {"demo": "SmolLM2-135M-Instruct", "smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma 3 270M"}
    return names.get(source, Path(source).name or source)

"""Whole-model decoding of both demo models: against Hugging Face in bfloat16, and against llama.cpp's quantisations.

``python -m benchmarks.decode --llama-python PYTHON --json FILE --picture FILE`` measures size, quality and speed of
every storage here and of every quantisation that llama.cpp's own quantiser makes of the same weights. All contenders
take turns. Checkpoints made by ``gossamer prune`` or ``gossamer compress`` take part with ``--also LABEL=DIRECTORY``.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness import Row, paired, show
from benchmarks.llama_peer import FILE_TYPES, LlamaCpp
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.integer import IntegerDenseMatrix
from gossamer.kernels.matrix import PackedMatrix
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.measure import Timing, describe_machine, interleave, read_bandwidth
from gossamer.measure.speed import prompt_ids
from gossamer.models import evaluation_tokens, load, read_text
from gossamer.models.demo import demo_gguf, demo_model
from gossamer.runtime.program import DecodeProgram
from gossamer.storage.atomic import write_json

PROMPT, STEPS, WINDOW = 64, 32, 512
BARS = {"demo": (4.0, 1.0), "gemma": (3.0, 1.0)}  # against Hugging Face, and against the packaged GGUF file

Pack = Callable[[str, torch.Tensor], PackedMatrix | None]


def _int8_head(layers: Callable[[torch.Tensor], PackedMatrix], head: str) -> Pack:
    return lambda name, weight: DenseMatrix.from_dense(weight, "int8") if name == head else layers(weight)


def storages(head: str) -> dict[str, Pack]:
    """Every storage of dense weights that is tried; the head is tied to the embedding in both models."""
    return {
        "bfloat16": lambda _, weight: DenseMatrix.from_dense(weight.bfloat16()),
        "int8": lambda _, weight: DenseMatrix.from_dense(weight, "int8"),
        "int8, activations int8": lambda _, weight: IntegerDenseMatrix.from_dense(weight),
        "W4, head int8": _int8_head(NibbleMatrix.from_dense, head),
        "W4": lambda _, weight: NibbleMatrix.from_dense(weight),
        "W4 without offsets": lambda _, weight: NibbleMatrix.from_dense(weight, offsets=False),
        "W4 in groups of 64": lambda _, weight: NibbleMatrix.from_dense(weight, 64),
    }


@dataclass
class Point:
    """One contender.

    Attributes
    ----------
    label
        What it is.
    ours
        Whether gossamer runs it.
    megabytes
        Of its weights, or of its file.
    nll
        Nats a token.
    tokens_per_second, low, high
        Median and quartiles.
    """

    label: str
    ours: bool
    megabytes: float
    nll: float
    tokens_per_second: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def dominated_by(self, other: Point) -> bool:
        """Whether the other is at least as small, as good and as fast, and better in one of these."""
        mine = (self.megabytes, self.nll, -self.tokens_per_second)
        its = (other.megabytes, other.nll, -other.tokens_per_second)
        return all(a <= b for a, b in zip(its, mine)) and its != mine


def measure(
    name: str, llama: LlamaCpp | None, rounds: int, tokens: int, also: dict[str, str]
) -> tuple[list[Row], list[Point]]:
    """All contenders on one model."""
    loaded = load(name)
    model, tokenizer = loaded.model, loaded.tokenizer
    head = next(key for key, module in model.named_modules() if module is model.get_output_embeddings())
    prompt = prompt_ids(model, tokenizer, PROMPT)[0].tolist()
    ids = evaluation_tokens(read_text("moby-dick"), tokenizer, tokens)
    windows = [window.tolist() for window in ids.flatten().split(WINDOW) if len(window) > 1]
    programs = {label: DecodeProgram.of(model, 1024, pack, verify=False) for label, pack in storages(head).items()}
    programs |= {label: DecodeProgram.of(load(directory).model, 1024) for label, directory in also.items()}
    points = {
        label: Point(label, True, program.nbytes / 1e6, _nll(program, windows)) for label, program in programs.items()
    }
    runs: dict[str, Callable[[], float]] = {label: _ours(program, prompt) for label, program in programs.items()}
    half = copy.deepcopy(model).bfloat16()
    runs["Hugging Face"] = lambda: _hugging_face(half, prompt)
    with tempfile.TemporaryDirectory() as folder:
        if llama is not None:
            for label, path in _quantisations(name, llama, Path(folder)).items():
                points[label] = Point(label, False, path.stat().st_size / 1e6, llama.nll(path, windows))
                runs[label] = lambda path=path: llama.decode(path, prompt, STEPS)  # type: ignore[misc]
        timings = _in_turns(runs, rounds)
    for label, point in points.items():
        speeds = Timing.of([STEPS / seconds for seconds in timings[label].samples], "tokens/s")
        point.tokens_per_second, point.low, point.high = speeds.median, speeds.low, speeds.high
    return _rows(name, points, programs, timings), list(points.values())


def _in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Seconds that each run reports of itself, round after round."""
    found: dict[str, list[float]] = {label: [] for label in runs}

    def once(label: str) -> None:
        found[label].append(runs[label]())

    interleave({label: (lambda label=label: once(label)) for label in runs}, repeats=rounds)  # type: ignore[misc]
    return {label: Timing.of(seconds[1:]) for label, seconds in found.items()}  # the first was a warm-up


def _ours(program: DecodeProgram, prompt: list[int]) -> Callable[[], float]:
    def run() -> float:
        session = program.session(PROMPT + STEPS)
        session.feed(prompt)
        begin = time.perf_counter()
        for _ in range(STEPS):
            session.feed([session.best])
        return time.perf_counter() - begin

    return run


@torch.inference_mode()
def _hugging_face(model: nn.Module, prompt: list[int]) -> float:
    output = model(torch.tensor([prompt]), use_cache=True)
    begin = time.perf_counter()
    for _ in range(STEPS):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return time.perf_counter() - begin


def _nll(program: DecodeProgram, windows: list[list[int]]) -> float:
    total, count = 0.0, 0
    for window in windows:
        logits = program.session(len(window)).feed(window, every=True)[:-1]
        total += float(nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="sum"))
        count += len(logits)
    return total / count


def _quantisations(name: str, llama: LlamaCpp, folder: Path) -> dict[str, Path]:
    packaged = demo_gguf(demo_model(name), folder)
    found = {"packaged GGUF": packaged}
    for file_type in FILE_TYPES:
        path = folder / f"{file_type}.gguf"
        llama.quantise(packaged, path, file_type)
        found[f"GGUF {file_type}"] = path
    return found


def _rows(
    name: str, points: dict[str, Point], programs: dict[str, DecodeProgram], timings: dict[str, Timing]
) -> list[Row]:
    bandwidth, rows = read_bandwidth(), []
    peers = [("Hugging Face", "Hugging Face, bfloat16", BARS[name][0])]
    if "packaged GGUF" in timings:
        peers.append(("packaged GGUF", "llama.cpp, packaged GGUF", BARS[name][1]))
    for label, program in programs.items():
        point = points[label]
        for key, peer, bar in peers:
            rows.append(
                paired(
                    f"decode {STEPS} tokens",
                    f"{name}, {label}, {torch.get_num_threads()} threads",
                    timings[label],
                    peer,
                    timings[key],
                    bar,
                    STEPS * program.nbytes / bandwidth,
                    note=f"{point.tokens_per_second:.1f} tokens/s, {point.megabytes:.1f} MB, {point.nll:.4f} nats",
                )
            )
    return rows


def draw(points: dict[str, list[Point]], file: Path) -> None:
    """Quality and speed over size, one column for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(points), figsize=(6.5 * len(points), 9), squeeze=False, layout="constrained")
    for column, (name, found) in enumerate(points.items()):
        for line, (quantity, title) in enumerate((("nll", "nats a token"), ("tokens_per_second", "tokens a second"))):
            axis = axes[line][column]
            for ours, colour, who in ((True, "#0b6e4f", "gossamer"), (False, "#b3541e", "llama.cpp")):
                side = sorted((p for p in found if p.ours is ours), key=lambda point: point.megabytes)
                if not side:
                    continue
                sizes = [point.megabytes for point in side]
                axis.plot(sizes, [getattr(point, quantity) for point in side], "o", color=colour, label=who)
                for point in side:
                    axis.annotate(
                        point.label, (point.megabytes, getattr(point, quantity)), fontsize=7, color=colour,
                        xytext=(4, 4), textcoords="offset points",
                    )  # fmt: skip
            axis.set(xlabel="megabytes", ylabel=title, title=name)
            axis.legend()
            axis.grid(alpha=0.25)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo", "gemma"])
    parser.add_argument("--llama-python", type=Path, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=2048, help="of Moby Dick that are read for quality")
    parser.add_argument("--also", action="append", default=[], help="LABEL=DIRECTORY of a compressed demo model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="size, quality and speed, as PNG or SVG")
    arguments = parser.parse_args()
    also = dict(text.split("=", 1) for text in arguments.also)
    llama = LlamaCpp(arguments.llama_python, torch.get_num_threads()) if arguments.llama_python else None
    rows, points = [], {}
    for name in arguments.models:
        found, points[name] = measure(name, llama, arguments.rounds, arguments.tokens, also if name == "demo" else {})
        rows += found
    show(rows)
    for name, found in points.items():
        theirs = [point for point in found if not point.ours]
        for point in found:
            free = point.ours and theirs and not any(point.dominated_by(other) for other in theirs)
            print(
                f"{name:6s} {point.label:22s} {point.megabytes:7.1f} MB {point.nll:.4f} nats "
                f"{point.tokens_per_second:6.1f} tokens/s {'dominated by no GGUF file' if free else ''}"
            )
    if arguments.json:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        content = {"date": today, "machine": describe_machine(), "quick": False}
        kept = {name: [asdict(point) for point in found] for name, found in points.items()}
        write_json(arguments.json, {**content, "rows": [asdict(row) for row in rows], "points": kept})
    if arguments.picture:
        draw(points, arguments.picture)


if __name__ == "__main__":
    main()

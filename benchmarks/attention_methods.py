"""Time against length for every training-free method of sparse attention, in a real model.

    python -m benchmarks.attention_methods --json FILE --picture docs/attention-time.png

Phases and lengths can be measured one after the other with ``--merge``; the picture shows all rows of the file.

The demo language model reads real text with dense attention and with each method, choice included, at nine tenths of
the attention left out; of a method that cannot leave out as much at a length this is told. Prompts are timed as a
whole model, all layers and products included; decoding is timed behind them, a few tokens at a time. All take turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import DynamicCache

from gossamer.attention.base import Installed, SparseAttention
from gossamer.attention.budget_solver import ALL_RULES, budget_for
from gossamer.attention.double_sparsity import DoubleSparsity
from gossamer.core.progress import track
from gossamer.errors import SparsityError
from gossamer.measure import Timing, describe_machine, ratio
from gossamer.models import calibration_batches, load, read_text
from gossamer.storage.atomic import atomic_file, write_json

SPARSITY, TOKENS = 0.9, 8  # left out; decoded in a round
CALIBRATED = 4096  # tokens of the longest text by which parameters are found
DENSE, PHASES = "dense", ("prefill", "decode")


@dataclass
class Cell:
    """Times of one method at one length.

    Attributes
    ----------
    times
        Of a prompt, or of a decoded token, in seconds, by round.
    density
        Share of the attention that was computed in the phase.
    """

    times: list[float]
    density: float = 1.0


Cells = dict[str, Cell]
Row = dict[str, Any]


def contenders(model: nn.Module, windows: Sequence[Tensor], length: int, phase: str) -> dict[str, Any]:
    """Methods of a phase, ready for prompts of a length; None is dense."""
    found: dict[str, SparseAttention | None] = {DENSE: None}
    for name, rule in ALL_RULES.items():
        if rule.phase == phase:
            try:
                found[name] = budget_for(name, length, SPARSITY, model, windows if rule.adaptive else None)
            except SparsityError as error:
                print(error)
    return found


@contextmanager
def _active(method: SparseAttention | None, model: nn.Module) -> Iterator[Installed | None]:
    with nullcontext() if method is None else method.active(model) as installed:
        yield installed


def _cache(method: SparseAttention | None, model: nn.Module) -> Any:
    return method.make_cache(model) if isinstance(method, DoubleSparsity) else DynamicCache(config=model.config)


@torch.inference_mode()
def timed(method: SparseAttention | None, model: nn.Module, ids: Tensor, phase: str) -> tuple[float, float]:
    """Seconds of a prompt or of a decoded token, and the density of the phase."""
    with _active(method, model) as installed:
        cache = _cache(method, model)
        start = time.perf_counter()
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        seconds = time.perf_counter() - start
        if phase == "decode":
            start = time.perf_counter()
            for _ in range(TOKENS):
                logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
            seconds = (time.perf_counter() - start) / TOKENS
        density = 1.0 if installed is None else installed.report().density(phase)  # type: ignore[arg-type]
    return seconds, density


def measure(model: nn.Module, text: Callable[[int], list[Tensor]], length: int, phase: str, rounds: int) -> Cells:
    """All methods of a phase at a length, in turns; the first round does not count."""
    prompt = text(length)[0]
    methods = contenders(model, text(min(length, CALIBRATED))[:1], length, phase)
    cells = {name: Cell([]) for name in methods}
    for turn in range(rounds + 1):
        for name in list(methods) if turn % 2 else list(methods)[::-1]:
            seconds, cells[name].density = timed(methods[name], model, prompt, phase)
            if turn:
                cells[name].times.append(seconds)
    return cells


def draw(listed: list[Row], title: str, path: Path) -> None:
    """Time against length, a picture for each phase, both axes logarithmic."""
    figure = Figure(figsize=(12.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    labels = {"prefill": "time of a prompt, seconds", "decode": "time of a decoded token, seconds"}
    for axes, phase in zip(figure.subplots(1, len(PHASES)), PHASES):
        part = sorted((row for row in listed if row["phase"] == phase), key=lambda row: row["length"])
        for index, name in enumerate(dict.fromkeys(row["method"] for row in part)):
            x, y = zip(*((row["length"], row["seconds"]) for row in part if row["method"] == name))
            style: dict[str, Any] = {"color": "#444444", "linestyle": "--"} if name == DENSE else {}
            axes.plot(x, y, marker="os^Dv"[index % 5], label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel=labels[phase], title=phase)
        lengths = sorted({row["length"] for row in part})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=130)


def rows(found: dict[str, dict[int, Cells]]) -> list[Row]:
    """Plain values: medians, and how many times as fast as dense with quartiles over the rounds."""
    listed = []
    for phase, by_length in found.items():
        for length, cells in by_length.items():
            dense = Timing.of(cells[DENSE].times)
            for name, cell in cells.items():
                own = Timing.of(cell.times)
                faster = ratio(dense, own)
                row = {"phase": phase, "length": length, "method": name, "seconds": own.median}
                row |= {"density": cell.density, "times as fast": faster.median, "rounds": own.repeats}
                listed.append(row | {"low": faster.low, "high": faster.high})
    return listed


def main() -> None:
    """Measure, print, store and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--lengths", default="1024,2048,4096,8064", help="of prompts, in tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merge", action="store_true", help="keep the rows of the file that are not measured anew")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    lengths = [int(part) for part in arguments.lengths.split(",") if part]
    phases = [part for part in arguments.phases.split(",") if part]
    loaded = load(arguments.model, dtype="float32")
    book = read_text("moby-dick")

    def text(length: int) -> list[Tensor]:
        return calibration_batches(book, loaded.tokenizer, 2, length)

    found: dict[str, dict[int, Cells]] = {phase: {} for phase in phases}
    for phase, length in track([(phase, length) for phase in phases for length in lengths], "methods"):
        found[phase][length] = measure(loaded.model, text, length, phase, arguments.rounds)
    listed = rows(found)
    show(listed)
    if arguments.merge and arguments.json.exists():
        listed = merged(json.loads(arguments.json.read_text())["rows"], listed)
    if arguments.json:
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        write_json(arguments.json, {"date": today, "machine": describe_machine(), "rows": listed})
    if arguments.picture:
        draw(listed, f"{arguments.model}: whole model, {torch.get_num_threads()} threads, float32", arguments.picture)


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """Old rows of other phases, lengths and methods, and the new ones."""

    def place(row: Row) -> tuple[str, int, str]:
        return row["phase"], row["length"], row["method"]

    fresh = {place(row) for row in new}
    return [row for row in old if place(row) not in fresh] + new


def show(listed: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table("phase", "tokens", "method", "seconds", "computed", "times as fast as dense")
    for row in listed:
        spread = f"{row['times as fast']:.2f} ({row['low']:.2f} … {row['high']:.2f})"
        cells = (row["phase"], f"{row['length']:,}", row["method"], f"{row['seconds']:.4g}", f"{row['density']:.1%}")
        table.add_row(*cells, spread)
    Console().print(table)


if __name__ == "__main__":
    main()

"""What sparse attention costs a model: methods, sparsities and lengths on tasks of long context, in one call.

``gossamer attention-eval MODEL`` calls :func:`evaluate_attention`.
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gossamer.attention.budget_solver import ALL_RULES, rule_of
from gossamer.attention.evaluation import chosen_tasks, contender
from gossamer.errors import ConfigurationError, OutputError
from gossamer.measure.long_context import (
    Frontier,
    IsoFlops,
    SafeSparsity,
    Subject,
    frontier,
    isoflops,
    max_safe_sparsity,
)
from gossamer.measure.long_context.frontier import DENSE
from gossamer.measure.machine import describe_machine
from gossamer.models import load
from gossamer.storage.atomic import atomic_file, write_json

PHASES = ("prefill", "decode")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class AttentionEvaluation:
    """Accuracy against sparsity, and what may be concluded from it.

    Attributes
    ----------
    model, settings
        What was evaluated, and how.
    frontier
        A row for every method, sparsity, length and task.
    safe
        Largest safe sparsities; see :func:`gossamer.measure.long_context.max_safe_sparsity`.
    machine, date
        Where and when.
    """

    model: str
    settings: dict[str, Any]
    frontier: Frontier
    safe: tuple[SafeSparsity, ...]
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""

    @property
    def isoflops(self) -> dict[str, list[IsoFlops]]:
        """Accuracy against operations, by phase."""
        return {phase: isoflops(self.frontier, phase) for phase in PHASES}  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for what is not finite."""
        plain = {
            "model": self.model,
            "settings": self.settings,
            "rows": self.frontier.to_dict(),
            "safe": [found.to_dict() for found in self.safe],
            "isoflops": {phase: [part.to_dict() for part in parts] for phase, parts in self.isoflops.items()},
            "machine": self.machine,
            "date": self.date,
        }
        return _finite(plain)

    def table(self) -> list[dict[str, Any]]:
        """Rows to print: method, length, sparsity asked for and realised, accuracy, that of dense attention, safe.

        The last is None where prompts are too few to tell, or dense attention does none of the tasks.
        """
        rows = []
        safe = {(one.method, one.length): one for one in self.safe}
        for length in self.frontier.values("length"):
            part = self.frontier.where(length=length)
            dense = part.where(method=DENSE).accuracy
            for method in part.values("method"):
                for sparsity in part.where(method=method).values("sparsity"):
                    cell = part.where(method=method, sparsity=sparsity)
                    row = {"method": method, "phase": cell.rows[0].phase, "length": length, "sparsity": sparsity}
                    row |= {"realised": cell.realised, "accuracy": cell.accuracy, "dense": dense}
                    rows.append(row | {"safe": method == DENSE or safe[method, length].safe_at(sparsity)})
        return rows

    @property
    def unknown(self) -> str:
        """Why of some sparsities it is not known whether they are safe; empty if it is known of all."""
        if all(row["safe"] is not None for row in self.table()):
            return ""
        reasons = dict.fromkeys(f"{task} ({why})" for one in self.safe for task, why in one.left_out.items())
        return f"safe or not is unknown on {', '.join(reasons)}" if reasons else ""

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw accuracy against realised sparsity, a picture for each phase and length.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        lengths = self.frontier.values("length")
        figure = Figure(figsize=(6.4 * len(PHASES), 3.8 * len(lengths)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(lengths), len(PHASES), squeeze=False, sharey=True)
        for row, length in enumerate(lengths):
            for column, phase in enumerate(PHASES):
                _draw(grid[row][column], self.frontier.where(length=length), phase, f"{phase}, {length} tokens")
        figure.suptitle(f"{self.model}: accuracy on {len(self.frontier.values('task'))} tasks", x=0.01, ha="left")
        with atomic_file(path) as part:
            figure.savefig(part, format="png", dpi=150)


def evaluate_attention(
    model: str,
    methods: Sequence[str] = tuple(ALL_RULES),
    sparsities: Sequence[float] = (0.5, 0.75, 0.9),
    lengths: Sequence[int] = (1024,),
    tasks: Sequence[str] = ("needle", "variable-tracking", "common-words", "story-retrieval"),
    samples: int = 10,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 1,
    tolerance: float = 0.05,
    reasoning: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> AttentionEvaluation:
    """Evaluate sparse attention in a model on tasks of long context.

    Parameters
    ----------
    model
        Packaged name, directory, hub id or GGUF file.
    methods
        Names that :func:`gossamer.attention.budget_solver.budget_for` knows.
    sparsities, lengths
        Shares of attention to leave out, in (0, 1), and tokens of prompts.
    tasks
        Names in :data:`gossamer.measure.long_context.TASKS`.
    samples, seed
        Prompts for each task and length, the same for all methods. To call a sparsity safe takes as many as
        :func:`gossamer.measure.long_context.prompts_needed` says: 86 for four tasks and a tolerance of 0.05.
    output
        Folder for ``attention.json``, ``attention.png`` and ``journal.jsonl``, with which a run that was interrupted
        goes on; nothing is written without it.
    batch_size
        Prompts that are answered together.
    tolerance
        Loss of accuracy that counts as safe.
    reasoning
        Whether the model is to reason before it answers; see :class:`gossamer.measure.long_context.Task`.
    overwrite
        Whether an evaluation in the folder, finished or interrupted, is replaced.
    progress, say
        Whether to show a bar, and what is told of the model's licence.

    Returns
    -------
    AttentionEvaluation

    Raises
    ------
    UnknownNameError
        If there is no such method, task or model.
    ConfigurationError
        If a number is out of range, or prompts are longer than the model can read.
    OutputError
        If the folder holds a finished evaluation, or cannot be written.
    """
    for name in methods:
        rule_of(name)
    chosen = chosen_tasks(tasks, **({"reasoning": True} if reasoning else {}))
    _check_numbers(lengths, sparsities, samples, batch_size, tolerance)
    folder = None if output is None else _folder(Path(output), overwrite)
    loaded = load(model, dtype="float32")
    if loaded.licence:
        say(loaded.licence)
    _check_positions(loaded.model, lengths, 320 if reasoning else 64)
    subject = Subject(loaded.model, loaded.tokenizer)
    contenders = {name: contender(name, list(chosen.values()), seed) for name in methods}
    rows = frontier(
        {Path(model).name: subject}, contenders, chosen, lengths, sparsities, samples=samples, seed=seed,
        batch_size=batch_size, journal=None if folder is None else folder / "journal.jsonl", progress=progress,
    )  # fmt: skip
    settings = {"methods": list(methods), "sparsities": list(sparsities), "lengths": list(lengths)}
    settings |= {"tasks": list(tasks), "samples": samples, "seed": seed, "tolerance": tolerance, "reasoning": reasoning}
    safe = tuple(max_safe_sparsity(rows, tolerance=tolerance))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = AttentionEvaluation(Path(model).name, settings, rows, safe, describe_machine(), today)
    if folder is not None:
        result.draw(folder / "attention.png")
        write_json(folder / "attention.json", result.to_dict())
    return result


def _check_numbers(
    lengths: Sequence[int], sparsities: Sequence[float], samples: int, batch_size: int, tolerance: float
) -> None:
    for length in lengths:
        if length < 64:
            raise ConfigurationError(f"a length is {length}; prompts need 64 tokens or more")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise ConfigurationError(f"a sparsity is {sparsity}; each must be in (0, 1), such as 0.75")
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigurationError(f"{name} is {value}; at least 1 prompt is needed")
    if not 0 <= tolerance < 1:
        raise ConfigurationError(f"tolerance is {tolerance}; it must be in [0, 1), such as 0.05")


def _check_positions(model: Any, lengths: Sequence[int], answer: int) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and max(lengths) + answer > most:
        raise ConfigurationError(
            f"a length is {max(lengths)}, but the model reads {most} tokens, answer included; give at most "
            f"{most - answer}"
        )


def _folder(path: Path, overwrite: bool) -> Path:
    if (path / "attention.json").exists() and not overwrite:
        raise OutputError(f"{path} holds a finished evaluation; choose another folder or allow overwriting it")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be created ({error.strerror}); choose another output folder") from None
    if overwrite:
        (path / "journal.jsonl").unlink(missing_ok=True)
    return path


def _draw(axes: Any, part: Frontier, phase: str, title: str) -> None:
    dense = part.where(method=DENSE).accuracy
    axes.axhline(dense, color="#999999", linewidth=0.8, linestyle="--", label="dense")
    for index, method in enumerate(part.where(phase=phase).values("method")):
        mine = part.where(method=method)
        cells = [mine.where(sparsity=sparsity) for sparsity in sorted(mine.values("sparsity"))]
        points = [(cell.realised, cell.accuracy) for cell in cells if math.isfinite(cell.accuracy)]
        if points:
            x, y = zip(*[(0.0, dense), *points], strict=True)
            axes.plot(x, y, color=_COLOURS[index % len(_COLOURS)], marker="os^D"[index % 4], label=method)
    axes.set(xlabel="realised sparsity of the phase", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def _finite(value: Any) -> Any:
    """None in place of what JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value

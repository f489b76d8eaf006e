"""What sparse attention costs: methods, sparsities, lengths and tasks, all on the same prompts.

Every cell of the grid is a row: one model, one method at one sparsity, one task at one length. The same prompts go to
dense attention and to every method, so that differences can be paired. A journal on disk keeps finished rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from gossamer.core.progress import track
from gossamer.errors import CheckpointError, ConfigurationError, SparsityError
from gossamer.measure.long_context.prediction import answers
from gossamer.measure.long_context.sample import Sample
from gossamer.measure.long_context.tasks import Task

Phase = Literal["prefill", "decode"]
DENSE = "dense"
_WEIGHTS_SEEN = 64  # of every matrix, for a fingerprint


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is evaluated.

    Attributes
    ----------
    model, tokenizer
        A Hugging Face causal language model, and what makes its tokens.
    """

    model: nn.Module
    tokenizer: Any

    @property
    def parameters(self) -> int:
        """Weights, embeddings included."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """Of the configuration and a few values of every weight: other models have another one."""
        digest = hashlib.sha256(json.dumps(self.model.config.to_dict(), sort_keys=True, default=str).encode())  # type: ignore[operator,union-attr]
        for name, weight in [*self.model.named_parameters(), *self.model.named_buffers()]:
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // _WEIGHTS_SEEN)].to("cpu", torch.float64)
            digest.update(f"{name}{tuple(weight.shape)}".encode() + some.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def geometry(self) -> dict[str, int]:
        """Layers, heads, and size of a head."""
        config: Any = self.model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        heads = config.num_attention_heads
        return {
            "layers": config.num_hidden_layers,
            "heads": heads,
            "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        }


class Method(Protocol):
    """What :func:`frontier` asks of a sparse attention method; see :mod:`gossamer.attention.base`."""

    def active(self, model: nn.Module) -> Any:
        """Context in which the method is at work; it yields an object whose ``report()`` knows ``density(phase)``."""

    def selection_flops(self, length: int, heads: int, size: int) -> float:
        """Operations of one layer that go into choosing."""


@dataclass(frozen=True, eq=False)
class Contender:
    """A method that can be had at any sparsity.

    Attributes
    ----------
    phase
        What it makes sparse.
    at
        ``at(subject, length, sparsity)`` gives the method; raises SparsityError where it cannot reach the sparsity.
    options
        What `at` was made with, in words: a journal does not take rows with other options for these.
    """

    phase: Phase
    at: Callable[[Subject, int, float], Method]
    options: str = ""


@dataclass(frozen=True)
class Row:
    """One cell of the grid.

    Attributes
    ----------
    model, parameters, layers, heads, head_size
        Name and shape of the model.
    method, phase
        ``dense``, or the method and what it makes sparse.
    task, length
        Kind of prompt, and its tokens.
    sparsity, realised
        Asked for, and measured over all layers and prompts; None where the method cannot go there.
    scores
        One number from 0 to 1 a prompt; empty where the method cannot go there.
    selection_flops
        Operations of all layers that go into choosing: for a prompt, or for a token that is decoded; of methods that
        evict, once for a prompt.
    note
        Why there are no scores.
    """

    model: str
    parameters: int
    layers: int
    heads: int
    head_size: int
    method: str
    phase: str
    task: str
    length: int
    sparsity: float
    realised: float | None
    scores: tuple[float, ...]
    selection_flops: float = 0.0
    note: str = ""

    @property
    def accuracy(self) -> float:
        """Mean score; NaN without any."""
        return math.fsum(self.scores) / len(self.scores) if self.scores else float("nan")


@dataclass(frozen=True)
class Frontier:
    """All rows, and ways to look at them.

    Attributes
    ----------
    rows
        In the order in which they were made.
    """

    rows: tuple[Row, ...] = field(default=())

    def where(self, **wanted: Any) -> Frontier:
        """Rows whose fields have these values."""
        kept = tuple(row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items()))
        return Frontier(kept)

    def values(self, name: str) -> list[Any]:
        """Different values of a field, in order of appearance."""
        return list(dict.fromkeys(getattr(row, name) for row in self.rows))

    @property
    def accuracy(self) -> float:
        """Mean over rows that have scores; NaN if none has."""
        found = [row.accuracy for row in self.rows if row.scores]
        return math.fsum(found) / len(found) if found else float("nan")

    @property
    def realised(self) -> float:
        """Mean realised sparsity; NaN if there is none."""
        found = [row.realised for row in self.rows if row.realised is not None]
        return math.fsum(found) / len(found) if found else float("nan")

    def dense_twin(self, row: Row) -> Row | None:
        """The row of dense attention on the same prompts."""
        found = self.where(model=row.model, task=row.task, length=row.length, method=DENSE).rows
        return found[0] if found else None

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain values, for JSON."""
        return [asdict(row) | {"scores": list(row.scores), "accuracy": _plain(row.accuracy)} for row in self.rows]


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def frontier(
    models: Mapping[str, Subject],
    methods: Mapping[str, Contender],
    tasks: Mapping[str, Task],
    lengths: Sequence[int],
    sparsities: Sequence[float],
    *,
    samples: int = 20,
    seed: int = 0,
    batch_size: int = 8,
    journal: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Frontier:
    """Accuracy of every method at every sparsity, length and task, beside dense attention.

    Parameters
    ----------
    models, methods, tasks
        By name; ``dense`` is always among the methods.
    lengths
        Tokens of prompts.
    sparsities
        In (0, 1); dense attention needs no 0.
    samples
        Prompts for a task and length, the same for all methods.
    seed
        Of the prompts.
    batch_size
        Prompts that are answered together.
    journal
        File that keeps finished rows, one a line; a run that finds it goes on where it stopped. Rows of another model
        of the same name, or of a method with other options, are not taken for these.
    progress
        Whether to show a bar.

    Raises
    ------
    ConfigurationError
        If there is nothing to do, or a number is out of range.
    CheckpointError
        If the journal is of another run.
    """
    _check(models, methods, tasks, lengths, sparsities, samples)
    shown = {name: f"{task!r}{' with reasoning' if task.reasoning else ''}" for name, task in tasks.items()}
    settings = {"tasks": shown, "samples": samples, "seed": seed}
    kept = _Journal(journal, settings)
    cells = list(_cells(models, methods, tasks, lengths, sparsities))
    rows = []
    solved: dict[tuple[Any, ...], Method | str] = {}
    for cell in track(cells, "sparse attention", enabled=progress):
        subject, contender, task = models[cell[0]], methods.get(cell[1]), tasks[cell[2]]
        key = f"{subject.fingerprint} {contender.options if contender else ''} {cell!r}"
        row = kept.find(key)
        if row is None:
            prompts = draw(task, subject.tokenizer, cell[3], samples, seed)
            row = _run(cell, subject, contender, task, prompts, batch_size, solved)
            kept.add(key, row)
        rows.append(row)
    return Frontier(tuple(rows))


def draw(task: Task, tokenizer: Any, length: int, samples: int, seed: int) -> list[Sample]:
    """The prompts of a task at a length: the same for the same seed, whatever else is evaluated."""
    digest = hashlib.sha256(f"{task!r}:{length}:{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    return [task.sample(rng, length, tokenizer) for _ in range(samples)]


Cell = tuple[str, str, str, int, float]


def _cells(
    models: Iterable[str], methods: Iterable[str], tasks: Iterable[str], lengths: Sequence[int], sparsities: Any
) -> Iterable[Cell]:
    """In an order in which parameters that were found once can be used again."""
    for model in models:
        for length in lengths:
            yield from ((model, DENSE, task, length, 0.0) for task in tasks)
            for method in methods:
                yield from ((model, method, task, length, float(s)) for s in sparsities for task in tasks)


def _run(
    cell: Cell,
    subject: Subject,
    contender: Contender | None,
    task: Task,
    prompts: list[Sample],
    batch_size: int,
    solved: dict[tuple[Any, ...], Method | str],
) -> Row:
    model, name, named, length, sparsity = cell
    shape = {"model": model, "parameters": subject.parameters, **subject.geometry}
    shape |= {"method": name, "task": named, "length": length, "sparsity": sparsity}
    if contender is None:
        given = answers(subject.model, prompts, subject.tokenizer, batch_size)
        return Row(**shape, phase=DENSE, realised=0.0, scores=_scores(task, given, prompts))
    place = (model, name, length, sparsity)
    if place not in solved:
        try:
            solved[place] = contender.at(subject, length, sparsity)
        except SparsityError as error:
            solved[place] = str(error)
    method = solved[place]
    if isinstance(method, str):
        return Row(**shape, phase=contender.phase, realised=None, scores=(), note=method)
    with method.active(subject.model) as installed:
        # what is sparse while decoding is to find the whole answer, what is sparse while reading its beginning
        decoded = int(contender.phase == "decode")
        given = answers(subject.model, prompts, subject.tokenizer, batch_size, decoded)
        realised = 1 - installed.report().density(contender.phase)
    geometry = subject.geometry
    cost = geometry["layers"] * method.selection_flops(length, geometry["heads"], geometry["head_size"])
    scores = _scores(task, given, prompts)
    return Row(**shape, phase=contender.phase, realised=realised, scores=scores, selection_flops=cost)


def _scores(task: Task, given: Sequence[str], prompts: Sequence[Sample]) -> tuple[float, ...]:
    return tuple(float(task.judge(answer, prompt.gold)) for answer, prompt in zip(given, prompts, strict=True))


def _check(models: Any, methods: Any, tasks: Any, lengths: Any, sparsities: Any, samples: int) -> None:
    for name, given in (("models", models), ("tasks", tasks), ("lengths", lengths)):
        if not given:
            raise ConfigurationError(f"{name} is empty; give at least one")
    if DENSE in methods:
        raise ConfigurationError("a method is called 'dense'; that name is taken by attention over everything")
    if samples < 1:
        raise ConfigurationError(f"samples is {samples}; at least 1 prompt is needed")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise ConfigurationError(f"a sparsity is {sparsity!r}; each must be in (0, 1), such as 0.75")


class _Journal:
    """Finished rows on disk, one a line; the first line says of which run."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.found: dict[str, Row] = {}
        head = json.dumps(settings, sort_keys=True)
        if self.path is None:
            return
        if not self.path.exists():
            self.path.write_text(head + "\n", "utf-8")
            return
        first, *lines = self.path.read_text("utf-8").split("\n")
        if first != head:
            raise CheckpointError(f"{self.path} is the journal of a run with other tasks, samples or seed; delete it")
        for number, line in enumerate(lines, 2):
            if not line:
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                if number == len(lines) + 1:  # cut off in the middle of a line: that row is made again
                    break
                raise CheckpointError(f"{self.path} line {number} is damaged; delete the file") from None
            self.found[entry["cell"]] = Row(**entry["row"] | {"scores": tuple(entry["row"]["scores"])})
        self._rewrite(head)

    def find(self, key: str) -> Row | None:
        return self.found.get(key)

    def add(self, key: str, row: Row) -> None:
        self.found[key] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(key, row) + "\n")

    def _rewrite(self, head: str) -> None:
        assert self.path is not None
        lines = [_line(cell, row) for cell, row in self.found.items()]
        whole = self.path.with_name(f".{self.path.name}.partial")
        whole.write_text("\n".join([head, *lines]) + "\n", "utf-8")
        os.replace(whole, self.path)


def _line(cell: str, row: Row) -> str:
    return json.dumps({"cell": cell, "row": asdict(row)})

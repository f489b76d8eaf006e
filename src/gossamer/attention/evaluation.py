"""Sparse attention methods as contenders on tasks of long context: by name, at any sparsity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gossamer.attention.base import SparseAttention
from gossamer.attention.budget_solver import budget_for, rule_of
from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.measure.long_context import TASKS, Contender, Subject, Task, draw
from gossamer.measure.long_context.words import batch_of

_CALIBRATION_PROMPTS = 2


def contender(name: str, tasks: Iterable[Task], seed: int = 0, **options: Any) -> Contender:
    """A method by name, for :func:`gossamer.measure.long_context.frontier`.

    Parameters
    ----------
    name
        That :func:`gossamer.attention.budget_solver.budget_for` knows.
    tasks
        Of whose prompts a few are used to find parameters that depend on the text; others than those evaluated.
    seed
        Of those prompts.
    **options
        Hyper-parameters of the method.
    """
    rule = rule_of(name)
    kinds = list(tasks)

    def at(subject: Subject, length: int, sparsity: float) -> SparseAttention:
        data: list[Tensor] | None = None
        if rule.adaptive:
            prompts = [draw(task, subject.tokenizer, length, _CALIBRATION_PROMPTS, seed + 7919) for task in kinds]
            data = [batch_of([sample.prompt[:-1] for sample in part]) for part in prompts]
        return budget_for(name, length, sparsity, subject.model, data, **options)

    said = f"{sorted(options.items())!r}"
    if rule.adaptive:
        said += f", found on {kinds!r} with seed {seed}"
    return Contender(rule.phase, at, said)


def chosen_tasks(names: Sequence[str], **options: Any) -> dict[str, Task]:
    """Tasks by name, with the same options for all.

    Raises
    ------
    UnknownNameError
        If there is no such task.
    ConfigurationError
        If there is none at all.
    """
    if not names:
        raise ConfigurationError(f"tasks is empty; give some of {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            raise UnknownNameError("task", name, TASKS)
    return {name: TASKS[name](**options) for name in names}

"""Accuracy on public tasks, through the lm-evaluation-harness.

The harness brings the tasks and their scoring; gossamer brings the model that is already in memory, so that
a sparse model is scored exactly as it stands, packed layers and all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError, MissingDependencyError, UnknownNameError
from gossamer.measure.windows import evaluation_mode

_CLIENTS = ("aiohttp", "datasets", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group of tasks.

    Attributes
    ----------
    task, metric, filter
        Names as the harness gives them, such as ``arc_easy``, ``acc_norm`` and ``none``.
    value
        The metric.
    standard_error
        Its standard error, or None where the harness knows none.
    shots
        Number of solved examples in front of each question, or None for groups.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    shots: int | None


@dataclass(frozen=True)
class TaskScores:
    """Scores of a model on several tasks.

    Attributes
    ----------
    scores
        One row for each task and metric, groups included.
    versions
        Task name to version of the task, to be stated with every score.
    raw
        Everything the harness returned.
    """

    scores: tuple[TaskScore, ...]
    versions: dict[str, Any]
    raw: dict[str, Any] = field(repr=False)

    def value(self, task: str, metric: str = "acc") -> float:
        """Return one metric of one task.

        Raises
        ------
        UnknownNameError
            If the task has no such metric.
        """
        for score in self.scores:
            if (score.task, score.metric) == (task, metric):
                return score.value
        known = (f"{score.task}/{score.metric}" for score in self.scores)
        raise UnknownNameError("score", f"{task}/{metric}", known)


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    shots: int | None = None,
    limit: int | float | None = None,
    batch_size: int | str = 1,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    include_path: str | None = None,
    seed: int = 0,
) -> TaskScores:
    """Score a loaded model on tasks of the lm-evaluation-harness (extra ``evaluation``).

    Parameters
    ----------
    model, tokenizer
        A Hugging Face model and its tokenizer.
    tasks
        Names of tasks, groups or tags, or paths of task files; wildcards are expanded.
    shots
        Solved examples in front of each question; by default what the task says.
    limit
        Questions of each task: a number, or a share below 1. For trying things out only.
    batch_size
        Questions at a time, or ``"auto"``.
    max_length
        Longest input in tokens; by default the model's.
    apply_chat_template
        Whether questions are put into the tokenizer's chat template.
    include_path
        Directory with task files of your own.
    seed
        Seed of the choice of examples. The harness also sets the global generators of Python, NumPy and torch
        to it.

    Returns
    -------
    TaskScores

    Raises
    ------
    MissingDependencyError
        If the harness is not installed.
    UnknownNameError
        If there is no such task.
    CalibrationError
        If the data of a task cannot be reached.
    ConfigurationError
        If no tasks are named.
    """
    lm_eval, manager_class, wrapper = _import_harness()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise ConfigurationError("tasks is empty; name at least one task, such as 'arc_easy'")
    manager = manager_class(include_path=include_path)
    loaded = _load(manager, _expand(manager, names))
    # The harness switches the model to evaluation and would leave it there.
    with evaluation_mode(model):
        results = lm_eval.simple_evaluate(
            model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length),
            tasks=loaded,
            num_fewshot=shots,
            batch_size=batch_size,
            limit=limit,
            apply_chat_template=apply_chat_template,
            task_manager=manager,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return TaskScores(tuple(_scores(results)), dict(results.get("versions", {})), results)


def _import_harness() -> tuple[ModuleType, Any, Any]:
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingDependencyError("lm-eval", "evaluation", "scoring on tasks") from error
    return lm_eval, TaskManager, HFLM


def _expand(manager: Any, names: Iterable[str]) -> list[str]:
    """Replace wildcards by the tasks that match; leave paths of task files alone."""
    found: list[str] = []
    for name in names:
        matches = [name] if name.endswith((".yaml", ".yml")) else manager.match_tasks([name])
        if not matches:
            # Thousands of tasks: offer the nearest few instead of listing them all.
            raise UnknownNameError("task", name, get_close_matches(name, manager.all_tasks, n=5, cutoff=0.3))
        found += [match for match in matches if match not in found]
    return found


def _load(manager: Any, names: Sequence[str]) -> list[Any]:
    """Build the tasks, which downloads their data, and say plainly when that fails."""
    loaded: list[Any] = []
    for name in names:
        try:
            built = manager.load([name])
        except Exception as error:
            if not _is_data_failure(error):
                raise
            raise CalibrationError(
                f"the data of task {name!r} cannot be reached ({_one_line(error)}); "
                "check the network, or download the data set once where there is one"
            ) from error
        # Top-level groups hold their tasks; handing over both would score tasks twice.
        group = built["groups"].get(name)
        loaded += [group] if group is not None else list(built["tasks"].values())
    return loaded


def _is_data_failure(error: BaseException | None) -> bool:
    """Return whether an exception, or one that caused it, comes from the disk, the network or their clients."""
    while error is not None:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _CLIENTS:
            return True
        if isinstance(error, ValueError) and "Couldn't find cache" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _one_line(error: BaseException, length: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[: length - 1] + "…"


def _scores(results: dict[str, Any]) -> Iterator[TaskScore]:
    """Turn the harness's ``{task: {"metric,filter": value}}`` into rows."""
    shots = results.get("n-shot", {})
    groups = results.get("groups", {})
    tables = {**results.get("results", {}), **groups}
    for task, values in tables.items():
        for key, value in values.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            yield TaskScore(
                task=task,
                metric=metric,
                filter=filter_name,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                shots=None if task in groups else shots.get(task),
            )

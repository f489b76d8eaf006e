"""Experiments: a claim of a paper, made executable, with a rule that decides before anybody has seen the numbers.

An experiment is a module of this package named after its paper (hyphens become underscores) with one object called
``experiment``::

    experiment = Experiment(
        slug="wanda",
        claim="At 50% sparsity Wanda loses less perplexity than magnitude pruning.",
        rule="holds if the 95% interval of the paired difference lies above zero",
        run=run,          # run(settings, seed, progress) -> observation
        decide=decide,    # decide(observations) -> Verdict
        budgets={"quick": {"sequences": 16}, "full": {"sequences": 128}},
    )

The engine runs it for several seeds. Each finished seed is stored at once, so that a run which was interrupted goes
on where it stopped; the verdict, the machine and the time are stored with the observations.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import pkgutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import gossamer
from gossamer.core.progress import track
from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError, OutputError, UnknownNameError
from gossamer.papers.catalogue import paper, papers
from gossamer.papers.draw import draw_result
from gossamer.papers.results import Result, Verdict, load_result, read_json, results_directory
from gossamer.storage.atomic import write_json

Observation = dict[str, Any]
_SEED_PARTS = ("observation", "seconds")


class Track(Protocol):
    """What a run receives to show its progress: ``for batch in progress(batches, "calibrating"): ...``."""

    def __call__(self, items: Iterable[Any], description: str) -> Iterator[Any]:
        """Yield the items, with a bar if bars are wanted."""


@dataclass(frozen=True)
class Experiment:
    """A claim, the way to test it, and the rule by which the test is read.

    Attributes
    ----------
    slug
        The paper's slug.
    claim, rule
        One sentence each: what the paper says, and when that counts as holding.
    run
        ``run(settings, seed, progress)`` makes one observation: a dictionary of JSON values with named numbers and,
        if wanted, curves under ``"curves"``: method → ``{"x": [...], "y": [...]}``. `settings` is a copy of the
        budget's values.
    decide
        ``decide(observations)`` applies the rule and returns a :class:`~gossamer.papers.results.Verdict`.
    budgets
        Name → settings, which are JSON values; ``quick`` takes at most five minutes on two cores.
    seeds
        How many seeds are run unless told otherwise.
    x_label, y_label
        Axes of the curves.
    logarithmic
        Whether the vertical axis is.
    """

    slug: str
    claim: str
    rule: str
    run: Callable[[dict[str, Any], int, Track], Observation]
    decide: Callable[[list[Observation]], Verdict]
    budgets: Mapping[str, Mapping[str, Any]]
    seeds: int = 3
    x_label: str = "sparsity"
    y_label: str = "quality"
    logarithmic: bool = False

    @property
    def fingerprint(self) -> str:
        """Digest of the source of the module in which `run` is defined."""
        source = Path(sys.modules[self.run.__module__].__file__ or "")
        return hashlib.sha256(source.read_bytes()).hexdigest()[:16]

    def settings(self, budget: str) -> dict[str, Any]:
        """Return what has to be equal for an observation to be reused."""
        if budget not in self.budgets:
            raise UnknownNameError(f"budget of {self.slug}", budget, self.budgets)
        values = json.loads(json.dumps(dict(self.budgets[budget])))
        return {"values": values, "fingerprint": self.fingerprint, "gossamer": gossamer.__version__}


def experiments() -> list[str]:
    """Return the slugs of the papers that have an experiment."""
    package = importlib.import_module("gossamer.papers")
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    return [entry.slug for entry in papers() if entry.slug.replace("-", "_") in modules]


def find_experiment(slug: str) -> Experiment:
    """Return the experiment of a paper.

    Raises
    ------
    UnknownNameError
        If there is no such paper, or it has no experiment yet.
    """
    known = experiments()
    if paper(slug).slug not in known:
        raise UnknownNameError("experiment", slug, known)
    return importlib.import_module(f"gossamer.papers.{slug.replace('-', '_')}").experiment


def reproduce(
    slug: str,
    budget: str = "quick",
    seeds: int | Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Result:
    """Test the claim of a paper and store the result.

    Parameters
    ----------
    slug
        The paper.
    budget
        ``quick`` or ``full``, or another that the experiment names.
    seeds
        How many (0, 1, 2, …) or which; None means the experiment's own number.
    output
        Directory of the result; see :func:`gossamer.papers.results.results_directory`.
    progress
        Whether to show bars.
    overwrite
        Whether a finished result of other settings may be replaced, and one of the same settings is made anew.

    Raises
    ------
    UnknownNameError
        If the paper, its experiment, or the budget is unknown.
    OutputError
        If another run is writing the same result, or a result of other settings is there.
    CheckpointError
        If the stored observations cannot be read.

    Examples
    --------
    >>> result = reproduce("wanda", budget="quick")  # doctest: +SKIP
    >>> print(result.verdict.outcome)  # doctest: +SKIP
    holds
    """
    return run_experiment(find_experiment(slug), budget, seeds, output, progress, overwrite)


def run_experiment(
    experiment: Experiment,
    budget: str = "quick",
    seeds: int | Sequence[int] | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Result:
    """Run an experiment that is at hand; otherwise as :func:`reproduce`.

    Seeds observed before with the same settings are not run again, and stay part of the result even if fewer are
    asked for now.
    """
    settings = experiment.settings(budget)
    wanted = _seeds(experiment.seeds if seeds is None else seeds)
    directory = _prepared(results_directory(output))
    final, partial = directory / f"{experiment.slug}.json", directory / f"{experiment.slug}.partial.json"
    with _sole_writer(directory / f".{experiment.slug}.lock", final):
        earlier = _earlier(final, settings, overwrite)
        finished = _finished(earlier, partial, settings)
        if earlier and set(map(str, wanted)) | finished.keys() == set(map(str, earlier.seeds)):
            return earlier
        _run_missing(experiment, settings, wanted, finished, partial, progress)
        result = _conclude(experiment, budget, settings, finished)
        draw_result(result, final.with_suffix(".png"), experiment.x_label, experiment.y_label, experiment.logarithmic)
        # last, so that a result that is there is complete
        write_json(final, result.to_dict())
        partial.unlink(missing_ok=True)
    return result


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    valid = chosen and len(set(chosen)) == len(chosen)
    if not valid or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in chosen):
        raise ConfigurationError(f"seeds is {seeds!r}; give a positive number, or different whole numbers from 0 up")
    return chosen


def _prepared(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be created ({error.strerror}); choose another output directory"
        ) from None
    return directory


def _earlier(final: Path, settings: dict[str, Any], overwrite: bool) -> Result | None:
    """Return the finished result that may be extended, if there is one."""
    if overwrite or not final.exists():
        return None
    earlier = load_result(final)
    if earlier.settings != settings:
        raise OutputError(
            f"{final} holds a finished run with other settings (budget {earlier.budget!r}, {earlier.date}); "
            "choose another output directory or allow overwriting it"
        )
    return earlier


def _finished(earlier: Result | None, partial: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Seed → its observation and seconds, from a finished and from an interrupted run with the same settings."""
    found: dict[str, Any] = {}
    if earlier:
        share = earlier.seconds / len(earlier.seeds)
        for seed, observation in zip(earlier.seeds, earlier.observations, strict=True):
            found[str(seed)] = {"observation": observation, "seconds": share}
    if partial.exists():
        remedy = "delete it to start the unfinished run again"
        stored = read_json(partial, remedy)
        try:
            if stored["settings"] == settings:
                found |= {str(int(seed)): {k: run[k] for k in _SEED_PARTS} for seed, run in stored["seeds"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{partial} lacks a part or is altered ({error!r}); {remedy}") from None
    return found


def _run_missing(
    experiment: Experiment,
    settings: dict[str, Any],
    seeds: list[int],
    finished: dict[str, Any],
    partial: Path,
    progress: bool,
) -> None:
    def show(items: Iterable[Any], description: str) -> Iterator[Any]:
        return track(items, description, enabled=progress)

    missing = [seed for seed in seeds if str(seed) not in finished]
    for seed in track(missing, f"{experiment.slug}: seeds", enabled=progress):
        start = time.perf_counter()
        observed = experiment.run(json.loads(json.dumps(settings["values"])), seed, show)
        seconds = time.perf_counter() - start
        finished[str(seed)] = {"observation": _plain(experiment.slug, seed, observed), "seconds": seconds}
        write_json(partial, {"settings": settings, "seeds": finished})


def _conclude(experiment: Experiment, budget: str, settings: dict[str, Any], finished: dict[str, Any]) -> Result:
    seeds = sorted(map(int, finished))
    observations = [finished[str(seed)]["observation"] for seed in seeds]
    return Result(
        slug=experiment.slug,
        claim=experiment.claim,
        rule=experiment.rule,
        budget=budget,
        settings=settings,
        seeds=seeds,
        observations=observations,
        verdict=_plain_numbers(experiment.slug, experiment.decide(json.loads(json.dumps(observations)))),
        machine=_machine(),
        seconds=round(sum(finished[str(seed)]["seconds"] for seed in seeds), 3),
        date=datetime.now(UTC).date().isoformat(),
    )


def _plain(slug: str, seed: int, observed: Observation) -> Observation:
    """Turn an observation into what reading it back will give, so that a resumed run sees exactly the same."""
    _check_finite(f"{slug}, seed {seed}", observed)
    try:
        return json.loads(json.dumps(observed))
    except TypeError as error:
        raise ConfigurationError(f"the observation of {slug}, seed {seed}, is not plain JSON: {error}") from None


def _plain_numbers(slug: str, verdict: Verdict) -> Verdict:
    numbers = dict(verdict.numbers)
    _check_finite(f"{slug}, verdict", {n: asdict(v) if is_dataclass(v) else v for n, v in numbers.items()})
    return replace(verdict, numbers=numbers)


def _check_finite(where: str, value: Any, name: str = "") -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise NonFiniteError(f"{where}: {name.lstrip('.')} is {value}; record null where there is no finite number")
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_finite(where, part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            _check_finite(where, part, f"{name}[{index}]")


def _machine() -> dict[str, Any]:
    from gossamer.measure import describe_machine

    described = describe_machine()
    return asdict(described) if is_dataclass(described) else dict(described)


@contextmanager
def _sole_writer(lock: Path, final: Path) -> Iterator[None]:
    """Hold a lock that the operating system gives up even if the process is killed."""
    import fcntl

    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"{final} cannot be written ({error.strerror}); choose another output directory") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # a run that ended between these two calls removed the file: someone else may hold a lock on a new one
        if not lock.exists() or not os.path.samestat(os.fstat(descriptor), lock.stat()):
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise OutputError(
            f"{final} is in use: another run is writing it; wait or choose another output directory"
        ) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)

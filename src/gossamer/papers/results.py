"""Stored results of experiments: what was run, on which machine, what came out, and the verdict.

A result is one JSON file, ``<slug>.json``. The results that the tables and ``gossamer papers`` report are shipped
with the package, in ``gossamer/papers/results``. A run writes elsewhere: into the directory it is given, or that
named by the environment variable ``GOSSAMER_RESULTS``, or else ``gossamer-results`` in the working directory. To
replace a shipped result, run in a checkout with ``--output src/gossamer/papers/results --overwrite``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.papers.catalogue import paper, papers
from gossamer.papers.statistics import Interval

FORMAT = 1
ENVIRONMENT = "GOSSAMER_RESULTS"
Outcome = Literal["holds", "does not hold", "inconclusive"]
Number = float | int | Interval


@dataclass(frozen=True)
class Verdict:
    """What the stated rule says about the claim.

    Attributes
    ----------
    outcome
        ``holds``, ``does not hold`` or ``inconclusive``.
    reason
        One sentence with the numbers that decided.
    numbers
        Name → number or :class:`~gossamer.papers.statistics.Interval`.
    """

    outcome: Outcome
    reason: str
    numbers: Mapping[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome not in get_args(Outcome):
            raise ConfigurationError(f"verdict is {self.outcome!r}; it must be one of {', '.join(get_args(Outcome))}")


@dataclass(frozen=True)
class Result:
    """One finished run of an experiment.

    Attributes
    ----------
    slug, claim, rule
        The paper, its claim, and the rule the verdict follows.
    budget
        Name of the budget.
    settings
        Everything that decides whether observations can be reused: the budget's values, the fingerprint of the
        experiment's source, and the version of gossamer.
    seeds, observations
        One observation for each seed, in this order.
    verdict
        What the rule says about them.
    machine
        Hardware and versions, as :func:`gossamer.measure.describe_machine` gives them.
    seconds
        Time of all seeds together, without what an interruption lost.
    date
        UTC day on which the run finished, such as ``2026-01-31``.
    """

    slug: str
    claim: str
    rule: str
    budget: str
    settings: dict[str, Any]
    seeds: list[int]
    observations: list[dict[str, Any]]
    verdict: Verdict
    machine: dict[str, Any]
    seconds: float
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Result:
        """Rebuild a result from :meth:`to_dict`.

        Raises
        ------
        CheckpointError
            If the format is unknown or a part is missing or of the wrong kind.
        """
        if not isinstance(stored, Mapping) or stored.get("format") != FORMAT:
            found = stored.get("format") if isinstance(stored, Mapping) else type(stored).__name__
            raise CheckpointError(f"a result of format {found!r}; this version reads format {FORMAT}: run it again")
        try:
            parts = {name: stored[name] for name in cls.__dataclass_fields__}
            verdict = stored["verdict"]
            numbers = {name: _number(value) for name, value in verdict["numbers"].items()}
            parts["verdict"] = Verdict(verdict["outcome"], verdict["reason"], numbers)
            if len(parts["seeds"]) != len(parts["observations"]):
                raise ValueError(f"{len(parts['seeds'])} seeds but {len(parts['observations'])} observations")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"a result that lacks a part or is altered ({error!r}): run it again") from None
        return cls(**parts)


def results_directory(output: str | os.PathLike[str] | None = None) -> Path:
    """Return where a run writes: `output`, else ``$GOSSAMER_RESULTS``, else ``gossamer-results``."""
    return Path(output or os.environ.get(ENVIRONMENT) or "gossamer-results")


def load_result(path: str | os.PathLike[str]) -> Result:
    """Read one stored result.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated, altered, or of an unknown format.
    """
    stored = read_json(Path(path), "run it again or delete the file")
    try:
        return Result.from_dict(stored)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)} holds {error}") from None


def stored_result(slug: str) -> Result | None:
    """Return the result that ships with the package for a paper, or None.

    Raises
    ------
    UnknownNameError
        If there is no such paper.
    CheckpointError
        If its file is broken.
    """
    path = shipped_directory() / f"{paper(slug).slug}.json"
    return load_result(path) if path.is_file() else None


def shipped_directory() -> Path:
    """Return the directory of the results that ship with the package."""
    return Path(str(resources.files("gossamer.papers"))) / "results"


def rows() -> list[dict[str, Any]]:
    """Return every paper as a JSON row: slug, title, room, status, entry_points, and verdict (or None)."""
    table = []
    for entry in papers():
        result = stored_result(entry.slug)
        table.append(
            {
                "slug": entry.slug,
                "title": entry.title,
                "room": entry.room,
                "status": entry.status,
                "entry_points": list(entry.entry_points),
                "verdict": result.verdict.outcome if result else None,
            }
        )
    return table


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file that gossamer wrote; a broken one is a :class:`CheckpointError` that ends in `remedy`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is truncated or altered ({error}); {remedy}") from None


def _number(value: Any) -> Number:
    if isinstance(value, Mapping):
        return Interval(**value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return value

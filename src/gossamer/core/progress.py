"""One look for all progress bars."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_T = TypeVar("_T")
_console = Console(stderr=True)


def track(items: Iterable[_T], description: str, total: int | None = None, enabled: bool = True) -> Iterator[_T]:
    """Yield the items with a progress bar on standard error.

    Parameters
    ----------
    items
        What to iterate over.
    description
        Shown before the bar.
    total
        Number of items where it cannot be asked for.
    enabled
        False iterates silently.
    """
    if not enabled:
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console) as bar:
        yield from bar.track(items, total=total, description=f"{description:<28}")

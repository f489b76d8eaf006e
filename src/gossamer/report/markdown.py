"""Markdown out of values: tables, cells, and mappings on one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table."""
    lines = [columns, tuple("---" for _ in columns), *(tuple(map(cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def cell(text: str) -> str:
    """Text that does not end its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def flat(values: Mapping[str, Any]) -> str:
    """Names and values, without what is empty."""
    return ", ".join(
        flat(value) if isinstance(value, Mapping) else f"{name.replace('_', ' ')} {value}"
        for name, value in values.items()
        if value not in (None, "", {}, [])
    )

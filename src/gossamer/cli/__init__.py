"""The command line: parses, calls, prints. Everything it does is a few lines of Python."""

from __future__ import annotations

import sys

from rich.console import Console

from gossamer.cli import attention, features, jobs, knowledge, models  # noqa: F401  # each adds its commands
from gossamer.cli.common import app
from gossamer.errors import GossamerError

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; a deliberate error becomes one line and exit status 2."""
    try:
        app()
    except GossamerError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {error}", markup=True, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

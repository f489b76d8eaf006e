"""Perplexity of the pruning methods on the packaged models: python -m benchmarks.pruning_quality --json FILE.

What is in FILE already is not measured again, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gossamer import calibration_batches, evaluation_tokens, load, prune, read_text
from gossamer.core.progress import track
from gossamer.measure import describe_machine, perplexity

METHODS: dict[str, dict[str, Any]] = {
    **{"magnitude": {}, "wanda": {}, "sparsegpt": {}, "dsnot": {}},
    "swap": {"candidates": 16, "swaps_per_round": 4},  # the best of all pairs takes ten times as long
}
CASES = (("50 %", {"sparsity": 0.5}), ("60 %", {"sparsity": 0.6}), ("2:4", {"pattern": "2:4"}))
SETTINGS = {
    "calibration": "16 × 512 tokens of state-of-the-union, seed 0",
    "text": "8,192 tokens of moby-dick, windows of 1,024, stride 1,024",
    "dtype": "float32",
    "parameters": {name: options or "defaults" for name, options in METHODS.items()},
}


def measure(source: str, methods: list[str], known: dict[str, dict[str, float]], save: Callable[[], None]) -> None:
    """Fill `known`, ``"model, method, case"`` → figures, and `save()` after each."""
    loaded = load(source, dtype="float32")
    batches = calibration_batches(read_text("state-of-the-union"), loaded.tokenizer, 16, 512)
    ids = evaluation_tokens(read_text("moby-dick"), loaded.tokenizer, 8_192)
    if f"{source}, dense" not in known:
        known[f"{source}, dense"] = {"perplexity": perplexity(loaded.model, ids, 1024, 1024, progress=False).value}
        save()
    cells = [(method, *case) for method in methods for case in CASES]
    for method, case, arguments in track(cells, f"{source}: pruning and reading"):
        name = f"{source}, {method}, {case}"
        if name in known:
            continue
        model = copy.deepcopy(loaded.model)
        result = prune(model, method, calibration=batches, progress=False, **METHODS[method], **arguments)
        found = perplexity(model, ids, 1024, 1024, progress=False)
        known[name] = {
            "perplexity": found.value,
            "standard error": found.standard_error,
            "sparsity": result.masks.sparsity,
        }
        save()


def show(known: dict[str, dict[str, float]]) -> None:
    """Print perplexities, one row for each model and method."""
    table = Table("model", "method", *(case for case, _ in CASES))
    for source in dict.fromkeys(name.split(", ")[0] for name in known):
        table.add_row(source, "dense", f"{known[f'{source}, dense']['perplexity']:.1f}")
        for method in METHODS:
            cells = [known.get(f"{source}, {method}, {case}") for case, _ in CASES]
            table.add_row(source, method, *(f"{cell['perplexity']:.1f}" if cell else "" for cell in cells))
    Console().print(table)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["demo", "gemma"])
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("quality.json"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    known = json.loads(arguments.json.read_text())["figures"] if arguments.json.exists() else {}

    def save() -> None:
        content = {"machine": describe_machine(), "settings": SETTINGS, "figures": known}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")

    for source in arguments.models:
        measure(source, arguments.methods, known, save)
    show(known)


if __name__ == "__main__":
    main()

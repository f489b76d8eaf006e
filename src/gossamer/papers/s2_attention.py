"""S2-Attention's claims: a shard of the context for each head costs no quality where all of it is covered together.

Small models learn real text, and to recall what was said somewhere in it, with dense attention, with a shard for each
head, with the same stripe for all heads, and with a sliding window that reads at least as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gossamer.attention.s2_attention import LocalStridePattern
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.python_source import python_source
from gossamer.papers.recall_language import CHANCE, Heads, Lesson, RecallGPT, attended_pairs, masked, teach
from gossamer.papers.results import Verdict
from gossamer.papers.statistics import Interval, mean_interval

CLOSE = 0.02  # of the dense loss that counts as none
NEAR = 0.05  # of all values that dense attention may recall more
DENSE, SHARDS, SAME, WINDOW = "dense", "a shard for each head", "the same stripe for all heads", "window"

QUICK: dict[str, Any] = {
    "bytes": 1_500_000,
    "length": 256,
    "held_out": 64,
    "pairs": 32,
    "text_batch": 1,
    "batch": 4,
    "steps": 450,
    "learning_rate": 1e-2,
    "width": 64,
    "heads": 8,
    "head_size": 32,
    "layers": 1,
    "block_size": 16,
    "local_blocks": 1,
    "vert_stride": 4,
}
FULL: dict[str, Any] = {
    **QUICK,
    "bytes": 8_000_000,
    "length": 1024,
    "held_out": 256,
    "text_batch": 4,
    "batch": 8,
    "steps": 3000,
    "learning_rate": 3e-3,
    "width": 128,
    "heads": 8,
    "head_size": 32,
    "layers": 4,
    "local_blocks": 2,
    "vert_stride": 8,
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Train a model with each pattern, and judge it."""
    text = python_source(settings["bytes"], 20, 20, 128, 2, seed=0).text
    lesson = Lesson.of(text, settings)
    found: dict[str, dict[str, Any]] = {}
    for name, links in progress(contestants(settings).items(), "training with each pattern"):
        torch.manual_seed(seed)
        shape = (settings["width"], settings["heads"], settings["head_size"])
        attentions = [Heads(*shape, masked(links)) for _ in range(settings["layers"])]
        model = RecallGPT(settings["width"], settings["length"], attentions)
        marks = teach(model, lesson, settings, seed)
        found[name] = {**asdict(marks), "keys a query": attended_pairs(links)}
    stored = _pattern(settings).kv_share(settings["length"], settings["block_size"])
    curves = {name: {"x": [0.125, 0.375, 0.625, 0.875], "y": marks["by_distance"]} for name, marks in found.items()}
    return {"marks": found, "keys and values stored": stored, "curves": curves}


def _pattern(settings: dict[str, Any], **changes: Any) -> LocalStridePattern:
    shape = {key: settings[key] for key in ("local_blocks", "vert_stride")}
    return LocalStridePattern(settings["heads"], **{**shape, **changes})


def contestants(settings: dict[str, Any]) -> dict[str, Tensor]:
    """What each pattern lets be read, bool ``(heads or 1, n, n)``; the window is no smaller than the shards."""
    length, size = settings["length"], settings["block_size"]

    def links(pattern: LocalStridePattern) -> Tensor:
        return pattern.mask(length, size).to_dense()[0]

    shards = links(_pattern(settings))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    windows = (((distance >= 0) & (distance < width))[None] for width in range(1, length + 1))
    least = attended_pairs(shards)
    return {
        DENSE: (distance >= 0)[None],
        SHARDS: shards,
        SAME: links(_pattern(settings, homogeneous=True)),
        WINDOW: next(window for window in windows if attended_pairs(window) >= least),
    }


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Differences paired by seed."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    needed = {
        "recalled by shards − by the same stripe": _gap(observations, SHARDS, SAME, _recalled),
        "recalled by shards − by the window": _gap(observations, SHARDS, WINDOW, _recalled),
        f"recalled by shards − dense + {NEAR}": _gap(observations, SHARDS, DENSE, _recalled, NEAR),
        f"1 + {CLOSE} − loss by shards / dense": mean_interval(
            [1 + CLOSE - row["marks"][SHARDS]["loss"] / row["marks"][DENSE]["loss"] for row in observations]
        ),
    }
    numbers: dict[str, Interval | float] = {**needed, "recalled by guessing": CHANCE}
    for name in observations[0]["marks"]:
        for part in ("loss", "recalled", "keys a query"):
            numbers[f"{name}: {part}"] = sum(row["marks"][name][part] for row in observations) / len(observations)
    numbers["keys and values that shards store, share"] = observations[0]["keys and values stored"]
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if wrong:
        return Verdict("does not hold", f"reversed: {'; '.join(wrong)}", numbers)
    if open_:
        return Verdict("inconclusive", f"the interval reaches across zero: {'; '.join(open_)}", numbers)
    return Verdict("holds", "shards recall what stripes and windows lose, and stay close to dense in both", numbers)


def _recalled(row: Observation, name: str) -> float:
    return row["marks"][name]["recalled"]


def _gap(
    observations: list[Observation], one: str, other: str, of: Callable[[Observation, str], float], add: float = 0.0
) -> Interval:
    return mean_interval([of(row, one) - of(row, other) + add for row in observations])


experiment = Experiment(
    slug="s2-attention",
    claim=(
        "A model trained so that each head reads its own strided shard of the context predicts text and recalls what "
        "lies far back as well as a dense one, unlike one whose heads all read the same stripe or a window, at no "
        "more keys a query."
    ),
    rule=(
        "holds if, paired over seeds at 95 %, shards recall more values than the same stripe for all heads and than a "
        "window that reads no less, at most 0.05 of all values fewer than dense attention, and their loss on text is "
        "less than 2 % above dense; does not hold if one of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="distance of what is to be recalled, share of the length",
    y_label="share recalled",
)

"""XAttention: which cheap score finds the blocks that matter, and what reading only those costs a language model.

Queries, keys and values of a pretrained model on a long document are judged layer by layer at equal numbers of blocks
against the true attention mass; then the model reads the same document through XAttention at several thresholds. How
fast it is, selection included, is a question for ``benchmarks.kernels_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.attention.last_queries import diagonal_sums, last_query_weights
from gossamer.attention.scores import Scoring, exact_mass, score_blocks
from gossamer.attention.selection import sinks_and_diagonal, top_blocks
from gossamer.attention.thresholds import observe_calls
from gossamer.attention.vertical_slash import VerticalSlash
from gossamer.attention.xattention import XAttention
from gossamer.core.block_mask import BlockMask
from gossamer.kernels.attention import block_sparse_attention
from gossamer.models.attention_sites import AttentionCall
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import Interval, paired_difference

_SCORINGS: tuple[Scoring, ...] = ("antidiagonal", "diagonal", "random", "mean", "sum")
_RIVALS = ("diagonal", "random", "mean", "sum", "last queries")
_TOLERANCE = 0.01  # nats: one percent of perplexity


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Both parts on one document."""
    contest = Contest.of(settings, seed)
    document = contest.held_out
    found: dict[str, list[dict[str, float]]] = {}

    def look(call: AttentionCall) -> None:
        if call.layer in settings["layers"]:
            for name, values in judged(call, settings).items():
                found.setdefault(name, []).append(values)

    with torch.no_grad():
        observe_calls(contest.model, [document], look, progress=False)
    scores = {
        name: {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]} for name, parts in found.items()
    }
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll(), "density": 1.0}}
    for stride, threshold in progress(settings["cases"], "perplexity through XAttention"):
        method = XAttention(threshold=threshold, stride=stride, block_size=settings["block_size"])
        with method.install(contest.model) as installed:
            nll = contest.nll()
            points[f"stride {stride}, threshold {threshold}"] = {
                "nll": nll,
                "density": installed.report().density("prefill"),
            }
    return {"scores": scores, "points": points, "curves": _curves(points)}


def judged(call: AttentionCall, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Recall of the true mass, and error of the output, of every way to choose the same share of blocks."""
    block, stride = settings["block_size"], settings["stride"]
    geometry = BlockMask.full(call.query.shape[2], call.key.shape[2], block)
    always = sinks_and_diagonal(geometry)
    keep = (geometry.allowed.sum(1) * settings["keep"]).ceil().long().clamp(min=1)
    truth, dense = exact_mass(call, block), call.dense()
    scores = {name: score_blocks(call, name, stride, block) for name in _SCORINGS}
    scores |= {"exact": truth, "last queries": line_scores(call, block)}
    found = {}
    for name, values in scores.items():
        mask = BlockMask(top_blocks(values, keep, geometry.allowed, always), *call_lengths(call), (block, block))
        found[name] = _judge(call, mask, truth, dense)
    lines = VerticalSlash(density=found["antidiagonal"]["density"], block_size=block).prefill(call)
    if lines is not None:
        found["strips of the last queries"] = _judge(call, lines, exact_mass_of(call, lines), dense)
    return found


def line_scores(call: AttentionCall, block_size: int, queries: int = 64) -> Tensor:
    """Blocks scored by the columns and diagonals of the last queries' attention that cross them."""
    weights = last_query_weights(call, queries)
    columns = block_sums(weights.sum(-2), block_size)
    diagonals = block_sums(diagonal_sums(weights), block_size)
    place = torch.arange(columns.shape[-1])
    return columns[..., None, :] + diagonals[..., (place[:, None] - place).clamp(min=0)]


def block_sums(values: Tensor, block_size: int) -> Tensor:
    """Sums over blocks of the last dimension."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % block_size))
    return padded.unflatten(-1, (-1, block_size)).sum(-1)


def call_lengths(call: AttentionCall) -> tuple[int, int]:
    """Queries and keys of a call."""
    return call.query.shape[2], call.key.shape[2]


def exact_mass_of(call: AttentionCall, mask: BlockMask) -> Tensor:
    """The true mass in the blocks of a mask of any shape."""
    links = call.query @ call.key.repeat_interleave(call.group, 1).mT * call.scale
    hidden = torch.ones(call_lengths(call), dtype=torch.bool).triu(1)
    shares = links.masked_fill_(hidden, float("-inf")).softmax(-1)
    rows, columns = mask.block_size
    pads = (0, -shares.shape[-1] % columns, 0, -shares.shape[-2] % rows)
    tiles = torch.nn.functional.pad(shares, pads).unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return tiles.sum((-1, -3))


def _judge(call: AttentionCall, mask: BlockMask, truth: Tensor, dense: Tensor) -> dict[str, float]:
    output = block_sparse_attention(call.query, call.key, call.value, mask, scale=call.scale)
    return {
        "recall": float(mask.recall(truth).mean()),
        "error": float((output - dense).norm() / dense.norm()),
        "density": mask.density,
    }


def _curves(points: dict[str, dict[str, float]]) -> dict[str, dict[str, list[float]]]:
    curves: dict[str, dict[str, list[float]]] = {}
    for label, point in sorted(points.items(), key=lambda item: -item[1]["density"]):
        if label != "dense":
            curve = curves.setdefault(label.partition(",")[0], {"x": [1.0], "y": [math.exp(points["dense"]["nll"])]})
            curve["x"].append(point["density"])
            curve["y"].append(math.exp(point["nll"]))
    return curves


def decide(observations: Sequence[Observation]) -> Verdict:
    """Mass recall against every rival, and log perplexity at a threshold of 0.9, paired by document."""
    gaps: dict[str, Interval] = {}
    for rival in (*_RIVALS, "exact"):
        ours, theirs = ([o["scores"][name]["recall"] for o in observations] for name in ("antidiagonal", rival))
        gaps[rival] = paired_difference(ours, theirs)
    label = next(name for name in observations[0]["points"] if name.endswith("threshold 0.9"))
    sparse, dense = ([o["points"][name]["nll"] for o in observations] for name in (label, "dense"))
    cost = paired_difference(sparse, dense)
    numbers: dict[str, Any] = {f"recall, antidiagonal − {rival}": gap for rival, gap in gaps.items()}
    numbers["log perplexity at 0.9 − dense"] = cost
    for part, keys in (("scores", ("recall", "error", "density")), ("points", ("nll", "density"))):
        for name in observations[0][part]:
            for key in keys:
                numbers[f"{key}, {name}"] = sum(o[part][name][key] for o in observations) / len(observations)
    rivals = [gaps[rival] for rival in _RIVALS]
    outcome: Outcome
    if all(gap.above_zero for gap in rivals) and cost.high < _TOLERANCE:
        outcome, reason = "holds", "antidiagonals recall more than every rival, and perplexity stays within 1%"
    elif any(gap.below_zero for gap in rivals):
        better = ", ".join(rival for rival in _RIVALS if gaps[rival].below_zero)
        outcome, reason = "does not hold", f"at equal blocks more of the attention is recalled by: {better}"
    elif cost.low > _TOLERANCE:
        outcome, reason = "does not hold", "a threshold of 0.9 costs more than 1% of perplexity"
    else:
        outcome, reason = "inconclusive", "a difference cannot be told from none"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="xattention",
    claim=(
        "Sums over strided antidiagonals rank blocks of attention better than other scores of the same cost, and "
        "reading the blocks that hold 90% of the estimated mass leaves a language model as good as dense attention."
    ),
    rule=(
        "holds if at 15% of the causal blocks antidiagonals recall more of the true attention mass than "
        "diagonals, random pairs, pooled means and sums, and the lines of the last 64 queries, paired over documents "
        "at 95%, and a threshold of 0.9 raises log perplexity by less than 0.01; does not hold if a rival recalls "
        "more, or the rise is surely larger"
    ),
    run=run,
    decide=decide,
    budgets={
        "quick": {
            "model": "demo",
            "calibration": "state-of-the-union",
            "held_out": "moby-dick",
            "length": 512,
            "tokens": 2048,
            "window": 2048,
            "block_size": 64,
            "stride": 8,
            "keep": 0.15,
            "layers": [0, 6, 12, 18, 24, 29],
            "cases": [[8, 0.8], [8, 0.9], [8, 0.95], [16, 0.9]],
        },
        "full": {
            "model": "demo",
            "calibration": "state-of-the-union",
            "held_out": "moby-dick",
            "length": 512,
            "tokens": 8192,
            "window": 8192,
            "block_size": 128,
            "stride": 8,
            "keep": 0.15,
            "layers": list(range(0, 30, 3)),
            "cases": [[stride, threshold] for stride in (8, 16) for threshold in (0.7, 0.8, 0.9, 0.95)],
        },
    },
    seeds=4,
    x_label="share of the causal blocks that was computed",
    y_label="perplexity",
)

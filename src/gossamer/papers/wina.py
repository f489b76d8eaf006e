"""WINA: whether weights should have a say in which inputs count, exactly, in the mean, and on a pretrained model.

The first part needs ground truth and is synthetic: matrices with orthogonal columns, for which every subset of
channels is tried, and matrices whose columns differ in norm. The second part is a language model, with and without the
rotation that makes columns orthogonal; all contenders keep the same number of channels for every token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.wina import Wina, output_error
from gossamer.core.channel_rules import ChannelRule, TopK, column_norms
from gossamer.core.randomness import generator_for
from gossamer.models.rotation import orthogonalise
from gossamer.papers.activation_contest import (
    FULL,
    QUICK,
    activation_curves,
    nll_gap,
    reported,
    sweep,
)
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest
from gossamer.papers.results import Outcome, Verdict

_SPREADS = (0.0, 0.5, 1.0)
_STEPS = (
    ("by magnitude", "by norm"),
    ("by norm", "by norm, rotated"),
    ("by magnitude, rotated", "by norm, rotated"),
)


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Both parts."""
    contest = Contest.of(settings, seed)
    windows = contest.windows(1)
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll()}}
    plan = progress(range(2), "in the model's own basis, and rotated")
    for turned in plan:
        suffix = ""
        if turned:
            orthogonalise(contest.model)
            points["rotated"] = {"nll": contest.nll()}
            suffix = ", rotated"
        # None: all layers in the model's own basis, keys and gates in the rotated one
        for label, norm_sites in (("by magnitude", ()), ("by norm", None)):
            method = Wina(norm_sites=norm_sites)
            points |= sweep(contest, method, windows, settings["sparsities"], f"{label}{suffix}")
    return {
        "points": points,
        "best subset": best_subsets(seed),
        "errors": mean_errors(seed),
        "curves": activation_curves(points),
    }


def best_subsets(seed: int, outputs: int = 16, inputs: int = 10, keep: int = 5, tokens: int = 20) -> dict[str, float]:
    """How often a score keeps the very subset of channels that any other subset of that size is worse than."""
    generator = generator_for("orthogonal columns", seed)
    basis = torch.linalg.qr(torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)).Q
    weight = basis * torch.exp(torch.randn(inputs, generator=generator, dtype=torch.float64))
    x = torch.randn(tokens, inputs, generator=generator, dtype=torch.float64)
    subsets = torch.zeros(math.comb(inputs, keep), inputs, dtype=torch.bool)
    for row, chosen in enumerate(itertools.combinations(range(inputs), keep)):
        subsets[row, list(chosen)] = True
    dropped = x.unsqueeze(1) * ~subsets
    best = subsets[(dropped @ weight.T).norm(dim=2).argmin(1)]
    rules = {"by norm": ChannelRule(TopK(keep), column_norms(weight)), "by magnitude": ChannelRule(TopK(keep))}
    return {name: float((rule.live(x) == best).all(1).double().mean()) for name, rule in rules.items()}


def mean_errors(seed: int, size: int = 128, tokens: int = 200) -> dict[str, dict[str, float]]:
    """Mean output error at half of the channels, over that of a random half, by the spread of column norms."""
    generator = generator_for("spread of column norms", seed)
    found: dict[str, dict[str, float]] = {}
    for spread in _SPREADS:
        scale = torch.exp(spread * torch.randn(size, generator=generator))
        weight = nn.functional.normalize(torch.randn(size, size, generator=generator), dim=0) * scale
        x = torch.randn(tokens, size, generator=generator)
        rules = {
            "by norm": ChannelRule(TopK(size // 2), column_norms(weight)),
            "by magnitude": ChannelRule(TopK(size // 2)),
        }
        chance = float(_random_error(weight, x, generator))
        found[str(spread)] = {n: float(output_error(weight, x, r).mean()) / chance for n, r in rules.items()}
    return found


def _random_error(weight: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    half = torch.rand(x.shape, generator=generator).argsort(1) < x.shape[1] // 2
    return ((x * half).double() @ weight.double().T).norm(dim=1).mean()


def decide(observations: Sequence[Observation]) -> Verdict:
    """Exactness where it is claimed, and log perplexity at 50% and 65%, paired by seed."""
    exact = [o["best subset"] for o in observations]
    numbers: dict[str, Any] = {
        f"best subset found {name}": sum(e[name] for e in exact) / len(exact) for name in ("by norm", "by magnitude")
    }
    for spread in map(str, _SPREADS):
        for name in ("by norm", "by magnitude"):
            mean = sum(o["errors"][spread][name] for o in observations) / len(observations)
            numbers[f"error over random, norms spread by {spread}, {name}"] = mean
    gaps = {}
    for sparsity in (0.5, 0.65):
        pairs = (
            ("by magnitude", "by norm"),
            ("by norm", "by norm, rotated"),
            ("by magnitude, rotated", "by norm, rotated"),
        )
        for worse, better in pairs:
            key = f"{worse} − {better} at {sparsity}"
            gaps[key] = nll_gap(observations, f"{worse} at {sparsity}", f"{better} at {sparsity}")
    change = [abs(o["points"]["rotated"]["nll"] - o["points"]["dense"]["nll"]) for o in observations]
    numbers |= {**gaps, "change of log perplexity by rotating": max(change), **reported(observations)}
    needed = [gaps[f"by magnitude − by norm at {s}"] for s in (0.5, 0.65)]
    needed += [gaps[f"by norm − by norm, rotated at {s}"] for s in (0.5, 0.65)]
    perfect = numbers["best subset found by norm"] == 1.0
    outcome: Outcome
    if perfect and all(interval.above_zero for interval in needed):
        outcome, reason = "holds", "norms find the best subset, and help the language model with and without rotation"
    elif not perfect or any(interval.below_zero for interval in needed):
        outcome, reason = "does not hold", "a step of the order magnitude > norm > norm with rotation is reversed"
    else:
        outcome, reason = "inconclusive", "a step of the order cannot be told from none"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="wina",
    claim=(
        "Counting the norm of the weights that an input channel meets makes activation sparsity cheaper: the best "
        "choice there is for orthogonal columns, better than magnitude on a language model, and best after the "
        "rotation."
    ),
    rule=(
        "holds if scores by norm find the best subset of channels for every token of a matrix with orthogonal columns, "
        "and log perplexity at 50% and 65% falls, paired over seeds at 95%, from magnitude to norm and from norm to "
        "norm with rotation; does not hold if a step is wholly reversed or a subset is missed"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="sparsity of the treated layers that was asked for",
    y_label="perplexity",
    logarithmic=True,
)

"""R-Sparse on a pretrained language model: exact columns and a few singular vectors under one budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.activations.evolution import Evolution
from gossamer.activations.r_sparse import Material, RSparse, Split, bias_view_error, importance_map, singular_factors
from gossamer.activations.rules import ActivationRules
from gossamer.activations.teal import Teal
from gossamer.core.channel_rules import ChannelRule, TopK, column_norms
from gossamer.core.randomness import generator_for
from gossamer.papers.activation_contest import (
    FULL,
    QUICK,
    SPARSITIES,
    activation_curves,
    judged,
    nll_gap,
    reported,
    sweep,
)
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import mean_interval

_INSIDE = (0.9, 0.7, 0.5)
_factors: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}  # of a model's weights, which no seed changes


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Perplexity over α at equal budgets, the searched division, and a layer made for the method."""
    contest = Contest.of(settings, seed)
    windows = contest.windows(settings["sequences"])
    method = RSparse()
    material = Material.of(contest.model, windows, method.sites(contest.model), False, _factors.get(settings["model"]))
    _factors[settings["model"]] = material.factors
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll()}}
    points |= sweep(contest, Teal(), windows, settings["sparsities"], "teal")
    plan = [(s, alpha) for s in settings["sparsities"] for alpha in (1.0, *_INSIDE, 0.0)]
    plan += [(s, _INSIDE[0]) for s in settings["pictured"] if s not in settings["sparsities"]]
    for sparsity, alpha in progress(plan, "divisions of the budget"):
        points[f"alpha {alpha} at {sparsity}"] = judged(contest, _rules(material, sparsity, alpha))
    searched = RSparse(sparsity=0.6, alpha="search", search=Evolution(**settings["search"], seed=seed))
    short = [window[:, : settings["search length"]] for window in windows]
    rules = searched.calibrate(contest.model, short, progress=False, material=material)
    points["searched at 0.6"] = judged(contest, rules)
    return {
        "points": points,
        "made": made_for_it(seed),
        "views": _views(material, contest, windows),
        "curves": activation_curves(points),
    }


def _rules(material: Material, sparsity: float, alpha: float) -> ActivationRules:
    names = [site.name for site in material.sites]
    return material.rules(dict.fromkeys(names, alpha), dict.fromkeys(names, sparsity), weighted=True)


@torch.no_grad()
def _views(material: Material, contest: Contest, windows: Sequence[Tensor]) -> dict[str, Any]:
    """The two diagnostics on the first block: how few constants stand in, and where importance lies."""
    found: dict[str, Any] = {}
    seen: dict[str, Tensor] = {}
    chosen = material.sites[:7]
    handles = [
        site.module.register_forward_pre_hook(
            lambda module, args, name=site.name: seen.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
        for site in chosen
    ]
    try:
        contest.model(windows[0])
    finally:
        for handle in handles:
            handle.remove()
    for site in chosen:
        weight, inputs = site.target.matrix().float(), seen[site.name].float()
        rule = ChannelRule(TopK(site.width // 2), column_norms(weight))
        errors = {str(levels): bias_view_error(weight, inputs, rule, levels) for levels in (1, 4, 16, 64)}
        mass = importance_map(weight, inputs)
        top = mass.flatten().sort(descending=True).values
        share = float(top[: len(top) // 10].sum() / top.sum())
        found[site.role] = {"constants": errors, "mass in the top tenth": share}
    return found


def made_for_it(seed: int, size: int = 64, tokens: int = 200) -> dict[str, float]:
    """Relative output errors at a tenth of the weights, on a layer of nearly low rank with a few very large inputs."""
    generator = generator_for("a layer for R-Sparse", seed)
    low = torch.randn(size, 2, generator=generator) @ torch.randn(2, size, generator=generator)
    weight = low + 0.2 * torch.randn(size, size, generator=generator)
    x = torch.randn(tokens, size, generator=generator)
    x[:, torch.randperm(size, generator=generator)[:2]] *= 20
    whole = (x @ weight.T).norm()
    left, right = singular_factors(weight)
    errors = {}
    for name, alpha in (("channels only", 1.0), ("both", 0.35), ("rank only", 0.0)):
        split = Split.of((size, size), 0.9, alpha)
        live = ChannelRule(TopK(split.channels), column_norms(weight)).live(x) if split.channels else x != x
        approximate = (x * live) @ weight.T + ((x * ~live) @ right[: split.rank].T) @ left[:, : split.rank].T
        errors[name] = float((approximate - x @ weight.T).norm() / whole)
    return errors


def decide(observations: Sequence[Observation]) -> Verdict:
    """Whether a division inside beats both ends, and the searched one beats a single α, in log perplexity."""
    numbers: dict[str, Any] = {}
    inside = {}
    for sparsity in (0.6, 0.7):
        # one α for all seeds, so that the best is not chosen by the seeds it is judged on alone
        best = min(_INSIDE, key=lambda a: sum(o["points"][f"alpha {a} at {sparsity}"]["nll"] for o in observations))
        numbers[f"best alpha inside at {sparsity}"] = best
        for end in (1.0, 0.0):
            gap = nll_gap(observations, f"alpha {end} at {sparsity}", f"alpha {best} at {sparsity}")
            inside[f"alpha {end} − alpha {best} at {sparsity}"] = gap
        numbers[f"teal − alpha {best} at {sparsity}"] = nll_gap(
            observations, f"teal at {sparsity}", f"alpha {best} at {sparsity}"
        )
    searched = nll_gap(observations, f"alpha {numbers['best alpha inside at 0.6']} at 0.6", "searched at 0.6")
    made = [o["made"] for o in observations]
    built = mean_interval([min(m["channels only"], m["rank only"]) / m["both"] for m in made])
    numbers |= {**inside, "best single alpha − searched at 0.6": searched}
    numbers["error of the better end over both, on a layer made for it"] = built
    numbers |= reported(observations)
    outcome: Outcome
    if all(gap.above_zero for gap in inside.values()) and searched.above_zero:
        outcome, reason = "holds", "a division inside beats both ends, and a search finds a better one"
    elif any(gap.below_zero for gap in inside.values()):
        outcome, reason = "does not hold", "an end of the range beats every division inside"
    else:
        outcome, reason = "inconclusive", "an interval reaches across zero, or the search finds nothing better"
    return Verdict(outcome, reason, numbers)


_SEARCH = {"population": 8, "generations": 2, "sequences": 1}
_LEVELS = {"sparsities": [0.5, 0.6, 0.7], "pictured": list(SPARSITIES)}
_QUICK = {**QUICK, **_LEVELS, "search": _SEARCH, "search length": 256}
experiment = Experiment(
    slug="r-sparse",
    claim=(
        "Under one budget of weights read, a layer does best with some exact channels and some singular vectors for "
        "the others: better than channels alone or rank alone from 60% on, and better still with budgets "
        "searched by layer."
    ),
    rule=(
        "holds if, paired over seeds at 95%, log perplexity at 60% and 70% of the best of α = 0.9, 0.7, 0.5 is below "
        "that of α = 1 and of α = 0 (scores by norm in all), and the searched division at 60% is below that α; "
        "does not hold "
        "if an end is wholly below the best inside"
    ),
    run=run,
    decide=decide,
    budgets={
        "quick": _QUICK,
        "full": {
            **FULL,
            **_LEVELS,
            "search": {"population": 32, "generations": 5, "sequences": 4},
            "search length": 512,
        },
    },
    seeds=3,
    x_label="sparsity of the treated layers that was asked for",
    y_label="perplexity",
    logarithmic=True,
)

"""CHESS on a pretrained language model: a threshold for each channel of a gate, against one for all, and hindsight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.activations.base import run_over
from gossamer.activations.chess import Chess, partner_moments
from gossamer.core.selection import dropped_count, keep_highest
from gossamer.models.activation_sites import find_gate_sites
from gossamer.papers.activation_contest import FULL, QUICK, activation_curves, nll_gap, reported, sweep
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.one_shot_comparison import Contest
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import paired_difference

_LEVELS = (0.3, 0.5, 0.7)
_CASES: dict[str, dict[str, Any]] = {
    "chess": {"attention": "none"},
    "cats": {"attention": "none", "channel_thresholds": False},
    "chess with down norms": {"attention": "none", "use_down_norm": True},
    "chess and q, o": {"attention": "selective"},
    "chess and q, k, v, o": {"attention": "all"},
}
_PICTURED = ("cats", "chess and q, o")  # also at the sparsities of the other methods without training


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """Perplexity of all modes, and the output error of every feed-forward layer at equal numbers of live channels."""
    contest = Contest.of(settings, seed)
    windows = contest.windows(settings["sequences"])
    points: dict[str, dict[str, float]] = {"dense": {"nll": contest.nll()}}
    for label, options in progress(list(_CASES.items()), "thresholds"):
        further = settings["sparsities"] if label in _PICTURED else []
        points |= sweep(contest, Chess(**options), windows, sorted({*settings["levels"], *further}), label)
    sample = contest.windows(settings["sequences"] + 1)[-1:]
    errors, correlation = gate_errors(contest.model, windows, sample)
    return {"points": points, "errors": errors, "correlation": correlation, "curves": activation_curves(points)}


@torch.no_grad()
def gate_errors(
    model: nn.Module, windows: Sequence[Tensor], sample: Sequence[Tensor]
) -> tuple[dict[str, dict[str, float]], float]:
    """Relative output errors of feed-forward layers when each token keeps equally many channels.

    Parameters
    ----------
    model
        The model.
    windows
        What the moments are taken from.
    sample
        What errors are measured on.

    Returns
    -------
    tuple
        Level → score → mean error of all layers, and the rank correlation over layers between the spread of the moments
        (their coefficient of variation) and what channel thresholds gain at 50%.
    """
    gates = find_gate_sites(model)
    moments = partner_moments(model, windows, gates, progress=False)
    found: dict[float, dict[str, list[float]]] = {
        level: {name: [] for name in ("chess", "cats", "oracle")} for level in _LEVELS
    }
    spreads = []
    for gate in gates:
        a, middle = _gate_and_middle(model, gate, sample)
        moment = moments[gate.name].float()
        spreads.append(float(moment.sqrt().std() / moment.sqrt().mean()))
        scores = {"chess": a.abs() * moment.sqrt(), "cats": a.abs(), "oracle": middle.abs()}
        down = gate.layer.down.matrix().float()
        whole = (middle @ down.T).norm()
        for level in _LEVELS:
            for name, score in scores.items():
                gone = middle * ~keep_highest(score, dropped_count(score.shape[1], level))
                found[level][name].append(float((gone @ down.T).norm() / whole))
    gains = [cats / chess for cats, chess in zip(found[0.5]["cats"], found[0.5]["chess"])]
    ranks = torch.stack([torch.tensor(v).argsort().argsort().double() for v in (spreads, gains)])
    means = {str(level): {n: sum(v) / len(v) for n, v in row.items()} for level, row in found.items()}
    return means, float(torch.corrcoef(ranks)[0, 1])


def _gate_and_middle(model: nn.Module, gate: Any, sample: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """act(W_gate x), and its product with W_up x, ``(tokens, m)``."""
    seen: dict[str, list[Tensor]] = {"gate": [], "middle": []}
    rows: Callable[[Tensor], Tensor] = lambda values: values.reshape(-1, values.shape[-1]).float()  # noqa: E731
    with _hooks(
        gate.activation.register_forward_hook(lambda module, args, output: seen["gate"].append(rows(output))),
        gate.layer.down.module.register_forward_pre_hook(lambda module, args: seen["middle"].append(rows(args[0]))),
    ):
        run_over(model, sample, "", progress=False)
    return torch.cat(seen["gate"]), torch.cat(seen["middle"])


@contextmanager
def _hooks(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decide(observations: Sequence[Observation]) -> Verdict:
    """Order of layer errors, and of log perplexity with channel thresholds or one, paired by seed."""
    numbers: dict[str, Any] = {}
    steps = []
    for level in _LEVELS:
        errors = [o["errors"][str(level)] for o in observations]
        for worse, better in (("cats", "chess"), ("chess", "oracle")):
            gap = paired_difference([e[worse] for e in errors], [e[better] for e in errors])
            numbers[f"layer error, {worse} − {better} at {level}"] = gap
            steps.append(gap)
        gap = nll_gap(observations, f"cats at {level}", f"chess at {level}")
        numbers[f"cats − chess at {level}"] = gap
        steps.append(gap)
    selective = nll_gap(observations, "chess and q, k, v, o at 0.5", "chess and q, o at 0.5")
    numbers["keys and values too − selective at 0.5"] = selective
    numbers["rank correlation of the spread of moments with the gain"] = sum(
        o["correlation"] for o in observations
    ) / len(observations)
    numbers |= reported(observations)
    outcome: Outcome
    if all(step.above_zero for step in (*steps, selective)):
        outcome, reason = "holds", "channel thresholds beat one threshold, and sparse keys and values cost more"
    elif any(step.below_zero for step in (*steps, selective)):
        outcome, reason = "does not hold", "a comparison is wholly reversed"
    else:
        outcome, reason = "inconclusive", "an interval reaches across zero"
    return Verdict(outcome, reason, numbers)


experiment = Experiment(
    slug="chess",
    claim=(
        "Thresholds of their own for the channels of a gate, from what usually comes through, lose less than one "
        "threshold (CATS) at equal sparsity, with hindsight as the bound, and sparsifying queries and outputs only "
        "loses less than sparsifying keys and values too."
    ),
    rule=(
        "holds if, paired over seeds at 95%, at 30, 50 and 70% layer errors fall from CATS to CHESS to the oracle, and "
        "log perplexity falls from CATS to CHESS, and at 50% selective attention has lower log perplexity than "
        "all of it; "
        "does not hold if any of these is wholly reversed"
    ),
    run=run,
    decide=decide,
    budgets={
        "quick": {**QUICK, "levels": list(_LEVELS)},
        "full": {**FULL, "sequences": 64, "levels": list(_LEVELS)},
    },
    seeds=3,
    x_label="sparsity of the treated layers that was asked for",
    y_label="perplexity",
    logarithmic=True,
)

"""The rule by which the experiment on essential sparsity is judged: six parts, each with an interval over the seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gossamer.core.changepoint import fit_knee
from gossamer.papers.experiment import Observation
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import Interval, mean_interval, paired_difference

STEEPER = 5.0

RULE = (
    "Over the seeds, with 95% intervals, on the accuracy of the next byte: (1) sharp drop: the 1% essential sparsity "
    "is above 0, every sweep falls below the tolerance, and the two-piece fit of the mean curve is more than "
    f"{STEEPER:g} times steeper, downwards, after its knee; (2) magnitude exceeds random in essential sparsity; "
    "(3) mean essential sparsity rises with each amount of pretraining data and the largest exceeds the smallest; "
    "(4) no N:M pattern lies above the unstructured curve at its sparsity, and their mean difference is at most 0. "
    "After fine-tuning: (5) the Jaccard index of lottery tickets and one-shot masks is higher inside the essential "
    "range than beyond (that of unrelated masks falls too as they get sparser: the index corrected for chance is "
    "reported beside it). On images: (6) after fine-tuning on other digits, essential sparsity of self-supervised "
    "pretraining exceeds that of supervised pretraining, paired over networks; magnitude against random and an easier "
    "against a harder task are reported beside it. Each does not hold if its interval (for 1 also the fit) "
    "contradicts it and is inconclusive otherwise. The claim holds if all six do, does not hold if one does not, and "
    "is inconclusive otherwise. Abrupt sparsification is reported, not judged: minutes of training are no pretraining "
    "of BERT."
)


def decide(observations: list[Observation]) -> Verdict:
    """Apply the rule."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})
    parts = {
        "sharp drop": _sharp(observations),
        "beats random": _beats_random(observations),
        "grows with data": _grows_with_data(observations),
        "N:M below": _ladder_below(observations),
        "tickets part": _tickets_part(observations),
        "self-supervised": _self_supervised(observations),
    }
    outcomes = [outcome for outcome, _ in parts.values()]
    overall: Outcome = "inconclusive"
    if "does not hold" in outcomes:
        overall = "does not hold"
    elif set(outcomes) == {"holds"}:
        overall = "holds"
    numbers: dict[str, Interval | float] = {}
    for _, found in parts.values():
        numbers |= found
    numbers |= _finetuned(observations)
    abrupt = sum(o["monitor"]["abrupt"] for o in observations)
    reason = "; ".join(f"{name}: {outcome}" for name, (outcome, _) in parts.items())
    reason += f"; abrupt sparsification in {abrupt} of {len(observations)} runs"
    return Verdict(overall, reason, numbers)


Part = tuple[Outcome, dict[str, Interval | float]]


def _judge(interval: Interval) -> Outcome:
    return "holds" if interval.above_zero else "does not hold" if interval.below_zero else "inconclusive"


def _sharp(observations: Sequence[Observation]) -> Part:
    es = mean_interval([o["es"]["magnitude"] for o in observations])
    curves = [o["curves"]["magnitude"] for o in observations]
    knee = fit_knee(curves[0]["x"], np.mean([curve["y"] for curve in curves], 0))
    steep = knee.right_slope < 0 and -knee.right_slope > STEEPER * abs(knee.left_slope)
    falls = all(o["reached"]["magnitude"] for o in observations)
    numbers: dict[str, Interval | float] = {
        "essential_sparsity": es,
        "knee": knee.position,
        "slope_before": knee.left_slope,
        "slope_after": knee.right_slope,
    }
    if not (steep and falls):
        return "does not hold", numbers
    return ("holds" if es.above_zero else "inconclusive"), numbers


def _beats_random(observations: Sequence[Observation]) -> Part:
    gain = paired_difference([o["es"]["magnitude"] for o in observations], [o["es"]["random"] for o in observations])
    return _judge(gain), {"gain_over_random": gain}


def _grows_with_data(observations: Sequence[Observation]) -> Part:
    sizes = sorted(observations[0]["es_by_data"], key=int)
    rows = [[o["es_by_data"][size] for size in sizes] for o in observations]
    gain = paired_difference([row[-1] for row in rows], [row[0] for row in rows])
    ordered = bool((np.diff(np.mean(rows, 0)) > 0).all())
    outcome = _judge(gain)
    return ("inconclusive" if outcome == "holds" and not ordered else outcome), {"gain_by_data": gain}


def _ladder_below(observations: Sequence[Observation]) -> Part:
    excess: dict[str, list[float]] = {}
    for o in observations:
        for pattern, (sparsity, quality) in o["ladder"].items():
            curve = o["curves"]["magnitude"]
            excess.setdefault(pattern, []).append(quality - float(np.interp(sparsity, curve["x"], curve["y"])))
    intervals = {f"excess_{pattern}": mean_interval(values) for pattern, values in excess.items()}
    if any(interval.above_zero for interval in intervals.values()):
        return "does not hold", dict(intervals)
    mean = float(np.mean([interval.mean for interval in intervals.values()]))
    return ("holds" if mean <= 0 else "inconclusive"), dict(intervals)


def _tickets_part(observations: Sequence[Observation]) -> Part:
    found: dict[str, Interval | float] = {}
    for index in ("jaccard", "above_chance"):
        inside, beyond = [], []
        for o in observations:
            near = [row[index] for row in o["downstream"]["tickets"] if row["inside"]]
            far = [row[index] for row in o["downstream"]["tickets"] if not row["inside"]]
            if near and far:
                inside.append(float(np.mean(near)))
                beyond.append(float(np.mean(far)))
        if len(inside) < 2:
            return "inconclusive", {}
        found[f"ticket_{index}_inside"] = mean_interval(inside)
        found[f"ticket_{index}_fall"] = paired_difference(inside, beyond)
    fall = found["ticket_jaccard_fall"]
    assert isinstance(fall, Interval)
    return _judge(fall), found


def _finetuned(observations: Sequence[Observation]) -> dict[str, Interval | float]:
    """What fine-tuning says, beside the verdict: magnitude over random, and over lottery tickets, in accuracy."""
    rows: dict[str, list[list[float]]] = {"magnitude": [], "random": [], "ticket": []}
    for o in observations:
        for name in ("magnitude", "random"):
            rows[name].append(o["downstream"]["curves"][name]["y"][1:])
        rows["ticket"].append([row["accuracy"] for row in o["downstream"]["tickets"]])
    means = {name: [float(np.mean(row)) for row in values] for name, values in rows.items()}
    return {
        "finetuned_gain_over_random": paired_difference(means["magnitude"], means["random"]),
        "finetuned_gain_over_tickets": paired_difference(means["magnitude"], means["ticket"]),
        "finetuned_essential_sparsity": mean_interval([o["downstream"]["es"]["magnitude"] for o in observations]),
    }


def _self_supervised(observations: Sequence[Observation]) -> Part:
    es = {
        name: [value for o in observations for value in o["vision"]["es"][name]]
        for name in observations[0]["vision"]["es"]
    }
    gain = paired_difference(es["self-supervised"], es["supervised"])
    return _judge(gain), {
        "vision_gain_of_self_supervision": gain,
        "vision_gain_over_random": paired_difference(es["supervised"], es["random"]),
        "vision_gain_of_an_easier_task": paired_difference(es["two digits"], es["supervised"]),
    }

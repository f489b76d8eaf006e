"""What attention over pairs costs and what it can: errors and degrees, operations and times, and a task about triples.

Queries and keys have entries of one size B and random signs, so that scores reach their bound. The polynomial's error
is held against its guarantee, the degree it takes against B, and operations against the length, as torch counts them.
Then three networks with as many parameters learn which numbers of a sequence add up to nothing with two others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.attention.kronecker_attention import (
    Method,
    column_kronecker,
    feature_count,
    plan_polynomial,
    random_feature_attention,
    tensor_attention,
)
from gossamer.core.randomness import generator_for
from gossamer.papers.experiment import Experiment, Observation, Track
from gossamer.papers.match_three import MatchThree, TripleNetwork, parameters_of, widest_within
from gossamer.papers.results import Outcome, Verdict
from gossamer.papers.statistics import Interval, mean_interval

HALF = 0.5  # how far a fitted power may lie from the predicted one
ROUNDING = 1e-12  # of double precision, which no guarantee covers
CUBIC, LINEAR = 2.8, 1.2  # exponents that count as cubic and as nearly linear
PAIRS, WIDE, DEEP = "one layer over pairs", "one wider layer over tokens", "two layers over tokens"

QUICK: dict[str, Any] = {
    "tokens": 32,
    "width": 4,
    "bounds": [0.5, 1.0, 1.5],
    "degrees": [1, 2, 4, 6, 8, 12],
    "largest": 8.0,
    "eps": 1e-2,
    "exact_lengths": [32, 64, 128],
    "polynomial_lengths": [1024, 4096, 16384],
    "match": {
        "length": 16,
        "modulus": 31,
        "values": 5,
        "width": 32,
        "heads": 4,
        "hidden": 64,
        "steps": 260,
        "batch": 32,
        "learning_rate": 4e-3,
        "judged": 500,
    },
}
FULL: dict[str, Any] = {
    **QUICK,
    "tokens": 64,
    "bounds": [0.25, 0.5, 1.0, 1.5, 2.0],
    "exact_lengths": [16, 32, 64, 128, 256],
    "polynomial_lengths": [1024, 4096, 16384, 65536],
    "match": {**QUICK["match"], "length": 32, "modulus": 37, "values": 6, "steps": 8000, "batch": 64},
}


def run(settings: dict[str, Any], seed: int, progress: Track) -> Observation:
    """One draw of everything."""
    steps = iter(progress(range(4), "errors, degrees, exponents, triples"))
    next(steps)
    errors = _errors(settings, seed)
    next(steps)
    powers = {str(order): _power(settings, order, seed) for order in (2, 3, 4)}
    next(steps)
    exponents, times = _exponents(settings, seed)
    next(steps)
    match = _match(settings["match"], seed)
    curves = {
        f"B = {bound}": {
            "x": [row["degree"] for row in errors if row["B"] == bound],
            "y": [row["error"] for row in errors if row["B"] == bound],
        }
        for bound in settings["bounds"]
    }
    return {
        "errors": errors,
        "powers": powers,
        "exponents": exponents,
        "times": times,
        "match": match,
        "curves": curves,
    }


def _signs(bound: float, order: int, tokens: int, width: int, seed: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries, keys and values of entries ±B, ``(1, 1, tokens, width)``."""
    generator = generator_for(f"signs of order {order}", seed)
    drawn = torch.randint(2, (2 * order - 1, 1, 1, tokens, width), generator=generator).double() * 2 - 1
    return bound * drawn[0], list(bound * drawn[1:order]), list(bound * drawn[order:])


def _errors(own: dict[str, Any], seed: int) -> list[dict[str, float]]:
    """Largest error of the output by B and degree, its guarantee, and rivals with as many features or pairs."""
    rows = []
    for bound in own["bounds"]:
        q, keys, values = _signs(bound, 3, own["tokens"], own["width"], seed)
        exact = tensor_attention(q, keys, values)
        for degree in own["degrees"]:
            plan = plan_polynomial(q, keys, 1 / own["width"], degree)
            if plan.error >= 1:
                continue
            features = feature_count(own["width"], degree)
            found = {
                "error": tensor_attention(q, keys, values, method="polynomial", degree=degree),
                "random features": random_feature_attention(
                    q, keys, values, features, generator=generator_for("features", seed)
                ),
                "best pairs": tensor_attention(q, keys, values, method="topk", count=features),
            }
            largest = {name: float((one - exact).abs().max()) for name, one in found.items()}
            rows.append({"B": bound, "degree": degree, "guarantee": plan.output_error(values), **largest})
    return rows


def _power(own: dict[str, Any], order: int, seed: int) -> dict[str, Any]:
    """The power of B by which the degree grows at which all weights come within a relative error of eps."""
    tokens = {2: 256, 3: own["tokens"], 4: 12}[order]
    bounds, degrees = [], []
    for step in range(1, 9):
        bound = (own["largest"] * step / 8) ** (1 / order)
        q, keys, _ = _signs(bound, order, tokens, own["width"], seed)
        plan = partial(plan_polynomial, q, keys, 1 / own["width"])
        scores = _scores(q, keys, own["width"])
        degree = next(g for g in range(60) if _weight_error(scores, plan(g).coefficients) <= own["eps"])
        bounds.append(bound)
        degrees.append(degree)
    features = [feature_count(own["width"], degree) for degree in degrees]
    return {"bounds": bounds, "degrees": degrees, "features": features, "power": _fitted_power(bounds, degrees)}


def _scores(q: Tensor, keys: list[Tensor], width: int) -> np.ndarray:
    """All scores of all tuples."""
    product = keys[0]
    for key in keys[1:]:
        product = column_kronecker(product, key)
    return (q @ product.transpose(-1, -2) / width).numpy()


def _weight_error(scores: np.ndarray, coefficients: np.ndarray) -> float:
    return float(np.abs(np.polynomial.polynomial.polyval(scores, coefficients) / np.exp(scores) - 1).max())


def _fitted_power(bounds: list[float], degrees: list[int]) -> float:
    """P of the line ``degree = a + b · B^p`` that fits best."""
    x, y = np.array(bounds), np.array(degrees, dtype=float)

    def left_over(power: float) -> float:
        design = np.stack([np.ones_like(x), x**power], 1)
        solution = np.linalg.lstsq(design, y, rcond=None)[0]
        return float(np.square(design @ solution - y).sum())

    candidates = np.arange(0.5, 6.01, 0.05)
    return float(candidates[np.argmin([left_over(power) for power in candidates])])


def _exponents(own: dict[str, Any], seed: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Slopes of operations and of seconds against the length, both on logarithmic scales, and the seconds."""
    slopes: dict[str, float] = {}
    times: dict[str, dict[str, float]] = {}
    for method, lengths in (("exact", own["exact_lengths"]), ("polynomial", own["polynomial_lengths"])):
        operations, seconds = [], []
        for length in lengths:
            call = _call(own, method, length, seed)
            with FlopCounterMode(display=False) as counter:
                call()
            operations.append(float(counter.get_total_flops()))
            seconds.append(_median(call))
        slopes[f"operations, {method}"] = _slope(lengths, operations)
        slopes[f"seconds, {method}"] = _slope(lengths, seconds)
        times[method] = {str(length): second for length, second in zip(lengths, seconds)}
    for length in own["exact_lengths"]:
        times["polynomial"][str(length)] = _median(_call(own, "polynomial", length, seed))
    return slopes, times


def _call(own: dict[str, Any], method: Method, length: int, seed: int) -> Callable[[], Tensor]:
    q, keys, values = _signs(1.0, 3, length, own["width"], seed)
    return partial(tensor_attention, q, keys, values, method=method, eps=own["eps"])


def _median(call: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[1]


def _slope(lengths: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def _match(own: dict[str, Any], seed: int) -> dict[str, dict[str, float]]:
    task = MatchThree(own["length"], own["modulus"], own["values"])
    tokens, answers = task.draw(own["judged"], generator_for("judged", seed))
    sizes = own["modulus"], own["width"], own["heads"], own["hidden"]
    torch.manual_seed(seed)
    networks = {PAIRS: TripleNetwork(*sizes, order=3, layers=1)}
    budget = parameters_of(networks[PAIRS])
    for name, layers in ((WIDE, 1), (DEEP, 2)):
        networks[name] = widest_within(budget, own["modulus"], own["heads"], own["hidden"], order=2, layers=layers)
    found = {}
    for name, network in networks.items():
        _learn(network, task, own, seed)
        with torch.no_grad():
            right = torch.cat([(network(part) > 0) for part in tokens.split(100)]) == answers
        found[name] = {"accuracy": 100 * float(right.double().mean()), "parameters": parameters_of(network)}
    share = float(answers.double().mean())
    found["always the same answer"] = {"accuracy": 100 * max(share, 1 - share), "parameters": 0}
    return found


def _learn(network: nn.Module, task: MatchThree, own: dict[str, Any], seed: int) -> None:
    generator = generator_for("sequences", seed)
    optimizer = torch.optim.AdamW(network.parameters(), own["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, own["learning_rate"], own["steps"], pct_start=0.1)
    for _ in range(own["steps"]):
        tokens, answers = task.draw(own["batch"], generator)
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(network(tokens), answers.float()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------------------------------------------- verdict


def decide(observations: list[Observation]) -> Verdict:
    """Guarantee, powers, exponents and accuracies."""
    if len(observations) < 2:
        return Verdict("inconclusive", "one seed gives no interval; run at least two", {})

    def over_seeds(value: Callable[[Observation], float]) -> Interval:
        return mean_interval([value(row) for row in observations])

    needed: dict[str, Interval] = {}
    for order in (2, 3):
        off = [abs(row["powers"][str(order)]["power"] - order) for row in observations]
        needed[f"half − distance of the fitted power of B from {order}"] = mean_interval([HALF - one for one in off])
    for rival in (WIDE, DEEP):
        needed[f"accuracy, {PAIRS} − {rival}"] = over_seeds(
            lambda row, rival=rival: row["match"][PAIRS]["accuracy"] - row["match"][rival]["accuracy"]
        )
    counted = {
        f"exponent, {kind}": over_seeds(lambda row, kind=kind: row["exponents"][kind])
        for kind in observations[0]["exponents"]
    }
    broken = sum(row["error"] > row["guarantee"] + ROUNDING for one in observations for row in one["errors"])
    numbers: dict[str, Interval | float] = {
        **needed,
        **counted,
        **_told(observations),
        "errors above guarantee": broken,
    }
    cubic = counted["exponent, operations, exact"].mean >= CUBIC
    linear = counted["exponent, operations, polynomial"].mean <= LINEAR
    outcome: Outcome
    wrong = [name for name, value in needed.items() if value.below_zero]
    open_ = [name for name, value in needed.items() if not value.above_zero]
    if broken or not cubic or not linear:
        outcome, reason = "does not hold", "an error exceeds its guarantee, or operations do not grow as predicted"
    elif wrong:
        outcome, reason = "does not hold", f"reversed: {', '.join(wrong)}"
    elif open_:
        outcome, reason = "inconclusive", f"the interval reaches across zero: {', '.join(open_)}"
    else:
        outcome = "holds"
        reason = (
            "errors keep their guarantee, degrees grow as predicted, one layer over pairs learns what two others do not"
        )
    return Verdict(outcome, reason, numbers)


def _told(observations: list[Observation]) -> dict[str, Interval | float]:
    numbers: dict[str, Interval | float] = {}
    for order in observations[0]["powers"]:
        fitted = [row["powers"][order]["power"] for row in observations]
        numbers[f"fitted power of B at order {order}"] = mean_interval(fitted)
    for bound, features in zip(*(observations[0]["powers"]["3"][part] for part in ("bounds", "features"))):
        numbers[f"features at order 3 for B = {bound:.2f}"] = features
    for name in observations[0]["match"]:
        for kind in ("accuracy", "parameters"):
            numbers[f"triples, {kind}, {name}"] = _mean([row["match"][name][kind] for row in observations])
    for place, point in enumerate(observations[0]["errors"]):
        for kind in ("error", "guarantee", "random features", "best pairs"):
            label = f"B = {point['B']}, degree {point['degree']}, {kind}"
            numbers[label] = _mean([row["errors"][place][kind] for row in observations])
    for method, seconds in observations[0]["times"].items():
        for length in seconds:
            numbers[f"seconds, {method}, {length} tokens"] = _mean([r["times"][method][length] for r in observations])
    return numbers


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


experiment = Experiment(
    slug="kronecker-attention",
    claim=(
        "Attention over pairs of tokens learns what attention over tokens does not at equal size; with entries up to "
        "B, a polynomial whose degree grows like B³ (like B² for common attention) replaces it in nearly linear "
        "instead of cubic time, within a guaranteed error."
    ),
    rule=(
        "holds if no error exceeds its guarantee, operations counted by torch grow with an exponent of at least 2.8 "
        "exactly and at most 1.2 with the polynomial, and, at 95% over seeds, the degree that is needed grows like a "
        "power of B within a half of 2 and 3 for orders 2 and 3, and one layer over pairs is more accurate on triples "
        "than one or two layers over tokens with as many parameters; does not hold if one of these is wholly "
        "reversed. Times, random features and best pairs at equal number are reported"
    ),
    run=run,
    decide=decide,
    budgets={"quick": QUICK, "full": FULL},
    seeds=3,
    x_label="degree of the polynomial",
    y_label="largest error of the output",
    logarithmic=True,
)

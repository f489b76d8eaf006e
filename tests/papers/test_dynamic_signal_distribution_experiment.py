from __future__ import annotations

import json

import pytest
import torch

from gossamer.papers import dynamic_signal_distribution as paper
from gossamer.papers.digits import Digits

EXPONENTS = {"cnn": 1.0, "lcn": 2.0, "fcn": 3.0}
FIRST = {"cnn": 1.0, "lcn": 3.0, "fcn": 5.0}


def observation(shift=0.0, exponents=EXPONENTS):
    """What a run gives where the claim is right."""
    tasks = [(4, 96, True), (8, 96, True), (16, 96, True), (8, 48, True), (8, 192, True), (8, 96, False)]
    rows = [
        {
            "kind": kind,
            "k": k,
            "d": d,
            "dynamic": dynamic,
            "n": FIRST[kind] * (k / 4) ** (exponents[kind] + shift) * d / 96,
            "bracket": [1, 2],
        }
        for k, d, dynamic in tasks
        for kind in paper.KINDS
    ]
    return {
        "rows": rows,
        "rates": {},
        "oracle": {"4": 0.0, "8": 0.001},
        "floors": {"fcn": 70.0, "lcn": 9.0, "cnn": 1.0},
        "rotations": {f"{kind}, {name}": v for kind in paper.KINDS for name, v in (("gd", 1e-9), ("adam", 0.5))},
        "searches": [{"search": "rigl", "n": 40, "error": 0.25, "locality": 0.2}],
        "digits": {f"{kind}, 100{end}": 20.0 + shift for kind in paper.KINDS for end in ("", ", permuted")},
    }


def observations(**options):
    return [observation(shift, **options) for shift in (0.0, 0.05, -0.05)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["exponent in k, lcn − cnn"].mean == pytest.approx(1)
    assert verdict.numbers["exponent of fcn in k"].mean == pytest.approx(3)
    assert verdict.numbers["exponent of cnn in d"].mean == pytest.approx(1)
    assert verdict.numbers["n of lcn at k = 4, d = 96"] == pytest.approx(3)


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


def test_it_does_not_hold_where_an_exponent_is_reversed():
    verdict = paper.decide(observations(exponents={**EXPONENTS, "fcn": 1.5}))
    assert verdict.outcome == "does not hold"
    assert "exponent in k, fcn − lcn" in verdict.reason


def test_it_does_not_hold_where_an_order_is_reversed():
    found = observations()
    for one in found:
        for row in one["rows"]:
            if (row["kind"], row["d"]) == ("cnn", 48):
                row["n"] = 1000.0
    verdict = paper.decide(found)
    assert verdict.outcome == "does not hold"
    assert "cnn before lcn at k = 8, d = 48" in verdict.reason


def test_it_does_not_hold_where_gradient_descent_sees_rotations():
    found = observations()
    found[1]["rotations"]["fcn, gd"] = 0.1
    assert paper.decide(found).outcome == "does not hold"


def test_a_censored_task_keeps_its_place_in_the_order_and_bends_no_slope():
    found = observations()
    for one in found:
        for row in one["rows"]:
            if (row["kind"], row["k"]) == ("cnn", 4):
                row["n"], row["bracket"] = None, [None, 1]
    verdict = paper.decide(found)
    assert verdict.outcome == "holds"
    assert verdict.numbers["exponent of cnn in k"].mean == pytest.approx(1)
    assert "n of cnn at k = 4, d = 96" not in verdict.numbers


def test_exponents_that_cannot_be_told_apart_leave_it_open():
    found = [observation(0.0, exponents={**EXPONENTS, "lcn": 1.0 + gap}) for gap in (0.3, -0.2, 0.0)]
    verdict = paper.decide(found)
    assert verdict.outcome == "inconclusive"
    assert "lcn − cnn" in verdict.reason


@pytest.mark.parametrize("kind", paper.KINDS)
def test_networks_for_digits_are_equally_wide(kind):
    network = paper.digit_network(kind, 3)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert network[-1].in_features == 108


def test_a_small_run_gives_what_the_verdict_needs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data = Digits(torch.rand(600, 1, 28, 28, generator=generator), torch.arange(600) % 2)
    monkeypatch.setattr(paper, "digits", lambda: data)
    monkeypatch.setattr(paper.Digits, "split", lambda self, n, seed: (self, self))
    settings = json.loads(json.dumps(paper.QUICK))
    settings |= {"patches": [2, 4], "size": 8, "sizes": [16], "middle": 4, "grid": [1, 64], "repetitions": 2}
    settings |= {"test": 60, "steps": 40, "rates": [0.3], "searches": 1, "target": 0.25}
    settings["pilot"] = {"cnn": 4, "lcn": 4, "fcn": 4}
    settings["digits"] = {"samples": [20], "channels": 1, "steps": 3, "batch": 8, "rates": [0.1]}
    found = paper.run(settings, 0, lambda items, description: items)
    json.dumps(found, allow_nan=False)
    assert len(found["rows"]) == 3 * 4
    assert {row["search"] for row in found["searches"]} >= set(paper.SEARCHES)
    assert paper.decide([found, found]).numbers["rotations, least under Adam"] > 0.01

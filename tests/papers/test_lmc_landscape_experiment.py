from __future__ import annotations

import copy
import json

import pytest

from gossamer.papers import image_soups
from gossamer.papers import lmc_landscape as paper
from gossamer.papers.digits import Digits


def observation(shift=0.0):
    """What a run gives where the picture is right."""
    forks = []
    for place, loss in ((0, 1.0 + shift), (10, 0.5), (100, 0.01)):
        forks.append(
            {"network": "perceptron", "pair": 0, "fork": place, "loss": loss, "error": 20 * loss, "middle": loss,
             "ridge step": place + 5, "barrier step": place + 9,
             **{f"predicted from {kind}": 3 * loss for kind in paper.PREDICTIONS}}
        )  # fmt: skip
    layers = [{"middle": value, "endpoints": value**3, "midpoint": -value, "start": 1.0} for value in (-2, 0.1, 3, 5)]
    soups = [
        {"condition": "near", "barrier": 0.1, "gain": 0.2},
        {"condition": "far", "barrier": 30.0, "gain": -20.0},
    ]
    identity = {"smooth": 0.001, "relu": 0.01, "relu, second order": 1.5}
    alignment = {"32": {"before": 1.0, "after": 0.4 + shift}, "256": {"before": 1.0, "after": 0.1}}
    return {"forks": forks, "layers": layers, "identity": identity, "alignment": alignment, "soups": soups}


def observations():
    return [copy.deepcopy(observation(shift)) for shift in (0.0, 0.01, -0.01)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["barrier of the first fork − of the latest"].mean == pytest.approx(0.99)
    assert verdict.numbers["rank correlation of layers, from the ends"].mean == 1
    assert verdict.numbers["rank correlation of layers, from half-way"].mean == pytest.approx(-1)
    assert verdict.numbers["k*, seed 0"] == 100
    assert verdict.numbers["share of the barrier left after alignment, width 256"].mean == pytest.approx(0.1)
    assert verdict.numbers["soups that succeed exactly where there is no barrier"] == 1


def break_identity(row):
    row["identity"]["smooth"] = 0.03


def break_connection(row):
    row["forks"][-1]["error"] = 5.0


def break_order(row):
    row["forks"][0]["loss"], row["forks"][-1]["loss"] = row["forks"][-1]["loss"] - 1e-3, row["forks"][0]["loss"]


def break_layers(row):
    for layer in row["layers"]:
        layer["endpoints"] *= -1


def break_ridges(row):
    for fork in row["forks"]:
        fork["ridge step"] = None


def break_soups(row):
    row["soups"][1]["gain"] = 1.0


def only_one_kind(row):
    row["soups"] = row["soups"][:1]


@pytest.mark.parametrize(
    ("breaking", "named"),
    [
        (break_identity, "identity, smooth"),
        (break_connection, "latest fork still has"),
        (break_order, "barrier of the first fork"),
        (break_layers, "rank correlation of layers"),
        (break_ridges, "ridges seen"),
        (break_soups, "soups do not succeed"),
        (only_one_kind, "soups do not succeed"),
    ],
)
def test_every_part_can_refute_the_claim(breaking, named):
    rows = observations()
    for row in rows:
        breaking(row)
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason


def test_a_gap_that_could_be_chance_leaves_it_open():
    rows = observations()
    for row, loss in zip(rows, (0.0, 3.0, 0.5)):
        row["forks"][0]["loss"] = loss
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "barrier of the first fork" in verdict.reason


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


@pytest.mark.slow
def test_a_small_run_measures_everything(drawn_digits, monkeypatch):
    repeated = Digits(drawn_digits.images.repeat(6, 1, 1, 1), drawn_digits.labels.repeat(6))
    monkeypatch.setattr(image_soups, "digits", lambda: repeated)
    settings = json.loads(json.dumps(paper.QUICK))
    settings.update(training_images=20, validation_images=4, looked_at=40, points=3, nodes=4, looks=2, widths=[4])
    settings["networks"] = {"perceptron": {"steps": 4, "rate": 0.1, "batch": 32, "forks": [0, 0.5]}}
    settings["identity"] = {"steps": 3, "rate": 0.1}
    settings["sparse"].update(steps=4, models=2, rewinds=[0.0])
    rows = [json.loads(json.dumps(paper.run(settings, seed, lambda items, _: items))) for seed in (0, 1)]
    assert [row["fork"] for row in rows[0]["forks"]] == [0, 2]
    assert [len(rows[0][name]) for name in ("layers", "identity", "alignment", "soups")] == [6, 3, 1, 4]
    assert set(rows[0]["forks"][0]["records"][-1]) >= {"ridge", "distance", "angle", "curvature", "bend"}
    assert "rank correlation of barrier and gain" in paper.decide(rows).numbers

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.papers import image_soups
from gossamer.papers import sparse_model_soups as paper
from gossamer.papers.digits import Digits
from gossamer.papers.image_soups import Retraining, SoupTask, normalised_convolutions
from gossamer.pruning.soup_branches import Branch

ACCURACY = {
    "soup of 1": 0.80,
    "soup of 5": 0.85,
    "longer": 0.82,
    "candidate 0": 0.82,
    "candidate 1": 0.84,
    "ensemble": 0.86,
    "without recalibration": 0.5,
    "gmp as a soup of 1": 0.7,
    "gmp as a soup of 5": 0.72,
}


def observation(shift=0.0):
    """What a run gives where the claim is right, at two places."""
    clean = {f"{name}, perceptron, {s}": value + shift for name, value in ACCURACY.items() for s in (0.9, 0.98)}
    other = {"zeros kept, perceptron, 0.9": 1.0, "zeros kept, perceptron, 0.98": 1.0, "barrier, perceptron, 0.9": 0.1}
    clean["dense, perceptron, 0"] = 0.9
    return {"clean": clean, "corrupted": {name: value - 0.2 for name, value in clean.items()}, "other": other}


def observations():
    rows = [observation(shift) for shift in (0.0, 0.01, -0.01)]
    for number, row in enumerate(rows):
        for kind in ("clean", "corrupted"):
            for place in ("perceptron, 0.9", "perceptron, 0.98"):
                row[kind][f"soup of 5, {place}"] += 0.001 * number
    return copy.deepcopy(rows)


def change(rows, start, by, kinds=("clean", "corrupted")):
    for row in rows:
        for kind in kinds:
            for label in row[kind]:
                if label.startswith(start):
                    row[kind][label] += by
    return rows


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["clean, soup − mean candidate"].mean == pytest.approx(2.1)
    assert verdict.numbers["clean, soup − best candidate"].mean == pytest.approx(1.1)
    assert verdict.numbers["clean, soup − one model"].mean == pytest.approx(5.1)
    assert verdict.numbers["clean, soup − ensemble"].mean == pytest.approx(-0.9)
    assert verdict.numbers["clean, gmp as a soup of 5 − of 1"].mean == pytest.approx(2)


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("start", "named"), [("candidate", "mean candidate"), ("soup of 1,", "one model"), ("longer", "longer")]
)
def test_a_reversed_order_refutes_the_claim_and_is_named(start, named):
    verdict = paper.decide(change(observations(), start, 0.2))
    assert verdict.outcome == "does not hold"
    assert f"soup − {named}" in verdict.reason


def test_corrupted_images_decide_too():
    verdict = paper.decide(change(observations(), "candidate", 0.2, ("corrupted",)))
    assert verdict.outcome == "does not hold"
    assert "corrupted, soup − mean candidate" in verdict.reason


def test_a_soup_that_lost_zeros_refutes_the_claim():
    rows = observations()
    rows[1]["other"]["zeros kept, perceptron, 0.98"] = 0.0
    assert paper.decide(rows).outcome == "does not hold"


def test_a_gap_that_could_be_chance_leaves_it_open():
    rows = observations()
    for row, value in zip(rows, (0.7, 0.95, 0.8)):
        row["clean"]["soup of 1, perceptron, 0.9"] = value
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "clean, soup − one model" in verdict.reason


@pytest.fixture
def drawn(drawn_digits, monkeypatch):
    repeated = Digits(drawn_digits.images.repeat(2, 1, 1, 1), drawn_digits.labels.repeat(2))
    monkeypatch.setattr(image_soups, "digits", lambda: repeated)
    return repeated


def test_training_validation_and_held_out_images_are_apart(drawn):
    task = SoupTask.drawn(10, 4, 16, 0)
    assert [len(part) for part in (task.training, task.validation, task.held_out)] == [100, 40, 100]
    assert task.training.images.shape[1:] == (1, 14, 14)


def test_weights_averaged_along_a_run_keep_its_zeros():
    data = Digits(torch.randn(32, 1, 14, 14), torch.arange(32) % 10)
    model = normalised_convolutions()
    masks = MaskSet({"0.weight": torch.rand(8, 1, 3, 3) > 0.5})
    from gossamer.core.masking import static_masks

    kinds = []
    for averaged in (False, True):
        one = copy.deepcopy(model)
        with static_masks(one, masks):
            Retraining(data, 16, averaged=averaged)(one, masks, Branch(1, 0, 3, 0.0, (0.1,) * 6))
        assert not masks.violations(one)
        kinds.append(one)
    assert not torch.equal(kinds[0][0].weight, kinds[1][0].weight)


@pytest.mark.slow
def test_a_small_run_measures_everything(drawn):
    settings = json.loads(json.dumps(paper.QUICK))
    settings.update(
        training_images=8, validation_images=3, batch=16, pretraining_steps=4, steps=2, phases=2, models=[1, 2],
        networks={"perceptron": [0.98], "convolutional": [0.9]},
    )  # fmt: skip
    rows = [json.loads(json.dumps(paper.run(settings, seed, lambda items, _: items))) for seed in (0, 1)]
    clean = rows[0]["clean"]
    for name in ("soup of 2", "longer", "best of several", "soup at the end", "different masks", "ensemble", "greedy"):
        assert 0 <= clean[f"{name}, perceptron, 0.98"] <= 1
    for name in ("gmp", "dpf", "bimp"):
        assert f"{name} as a soup of 2, perceptron, 0.98" in clean
    assert rows[0]["other"]["density of different masks, perceptron, 0.98"] == pytest.approx(1 - 0.98**2, abs=0.004)
    assert paper.decide(rows).numbers["share of soups with exactly their candidates' zeros"] == 1
    assert clean != rows[1]["clean"]


def test_both_networks_take_the_small_images():
    for make in image_soups.NETWORKS.values():
        assert isinstance(make(), nn.Sequential)
        assert make()(torch.zeros(2, 1, 14, 14)).shape == (2, 10)

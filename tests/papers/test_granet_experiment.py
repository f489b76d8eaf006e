from __future__ import annotations

import copy

import pytest
import torch

from gossamer.papers import granet as paper
from gossamer.papers.digits import Digits

ACCURACIES = {
    "GraNet": 96.0,
    "GraNet, dense start": 95.5,
    "GraNet, random growth": 94.0,
    "gradual magnitude": 95.0,
    "RigL": 93.0,
    "SET": 91.0,
    "static": 89.0,
}


def observation(shift=0.0):
    """What a run gives where the claim is right."""
    accuracies = {"digits, dense": 97.0, "clothes, dense": 85.0}
    for name, value in ACCURACIES.items():
        accuracies |= {f"digits, {name} at {s}": value - 10 * s + shift for s in (0.9, 0.95, 0.98)}
        accuracies[f"clothes, {name} at 0.95"] = value - 15 - shift
    rows = [
        {
            "moment": moment,
            "amount": amount,
            "regeneration": regeneration,
            "plasticity": 5 - amount + {0.0: 0, 0.5: -0.3, "all": 0.5}[regeneration] * (1 + shift),
            "against unpruned": -amount - moment * (1 + shift),
        }
        for moment in (0.1, 0.75)
        for amount in (0.9, 0.98)
        for regeneration in (0.0, "all", 0.5)
    ]
    return {"accuracies": accuracies, "plasticity": rows}


def observations():
    return [observation(shift) for shift in (0.0, 0.1, -0.1)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["GraNet − static"].mean == pytest.approx(7)
    assert verdict.numbers["GraNet − gradual magnitude"].mean == pytest.approx(1)
    assert verdict.numbers["plasticity, with − without regeneration"].mean == pytest.approx(0.5)
    assert verdict.numbers["plasticity, exchange at equal sparsity − none"].mean == pytest.approx(-0.3)
    assert verdict.numbers["recovery, early − late"].mean == pytest.approx(0.65)
    assert verdict.numbers["digits, GraNet at 0.98 − static"].mean == pytest.approx(7)
    assert verdict.numbers["accuracy, clothes, SET at 0.95"] == pytest.approx(76)


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


@pytest.mark.parametrize("rival", ["gradual magnitude", "RigL", "SET", "GraNet, random growth", "GraNet, dense start"])
def test_a_rival_that_is_better_at_high_sparsity_refutes_the_claim(rival):
    rows = observations()
    for row in rows:
        for task, sparsity in (("digits", 0.95), ("digits", 0.98), ("clothes", 0.95)):
            row["accuracies"][f"{task}, {rival} at {sparsity}"] += 20
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert f"GraNet − {rival}" in verdict.reason
    for row in rows:  # what happens at lower sparsity does not count
        row["accuracies"] = observation()["accuracies"] | {f"digits, {rival} at 0.9": 99.0}
    assert paper.decide(rows).outcome == "holds"


def test_regeneration_that_does_not_help_is_not_enough():
    rows = observations()
    for row, gain in zip(rows, (1, -1, 0.1)):
        for each in row["plasticity"]:
            each["plasticity"] = gain if each["regeneration"] else 0.0
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "with − without regeneration" in verdict.reason
    for row in rows:
        for each in row["plasticity"]:
            each["against unpruned"] = each["moment"]
    assert "recovery" in paper.decide(rows).reason
    assert paper.decide(rows).outcome == "does not hold"


def test_all_methods_end_at_the_same_sparsity_with_the_last_layer_counted(drawn_digits, monkeypatch):
    monkeypatch.setattr(paper, "digits", lambda: drawn_digits)
    monkeypatch.setattr(paper, "fashion", lambda: Digits((drawn_digits.images * 255).byte(), drawn_digits.labels))
    monkeypatch.setitem(paper.NETWORKS, "digits", lambda own: paper.fully_connected(784, 24, 16, 10))
    seen = {}
    train = paper.train_images

    def watch(model, data, recipe, seed, method=None, **rest):
        masks = train(model, data, recipe, seed, method, **rest)
        if masks is not None:
            seen[len(seen)] = (len(masks), masks.kept, masks.total, masks.violations(model))

    monkeypatch.setattr(paper, "train_images", watch)
    settings = copy.deepcopy(paper.QUICK)
    settings["digits"] |= {"images": 8, "judged": 2, "steps": 12, "batch": 8, "sparsities": [0.9]}
    settings["clothes"] |= {"images": 8, "judged": 2, "steps": 6, "batch": 8, "channels": [4, 8, 8]}
    settings["plasticity"] |= {"moments": [0.25, 0.75], "amounts": [0.9]}
    found = paper.run(settings, 0, lambda items, description: items)
    layers = [4] * 7 + [3] * 7
    order = sorted((row[0] for row in seen.values()), reverse=True)
    assert order == layers
    for count, kept, total, violations in seen.values():
        sparsity = 0.9 if count == 3 else 0.95
        assert abs(kept - (1 - sparsity) * total) <= count
        assert not violations
    assert len(found["accuracies"]) == 2 * 8
    assert [(r["moment"], r["regeneration"]) for r in found["plasticity"]] == [
        (moment, regeneration) for moment in (0.25, 0.75) for regeneration in (0.0, "all", 0.5)
    ]
    assert set(found["curves"]) == set(ACCURACIES)


def test_the_dense_training_goes_on_as_if_it_had_not_been_interrupted(drawn_digits):
    settings = copy.deepcopy(paper.QUICK)
    settings["digits"] |= {"steps": 12, "batch": 8}
    settings["plasticity"] |= {"moments": [0.5], "amounts": [0.0], "horizon": 0.5}
    training, held_out = drawn_digits.split(8, 0)
    rows = paper._plasticity(settings, training, held_out, 0, lambda items, description: items)
    assert rows[0]["against unpruned"] == 0
    torch.manual_seed(0)
    model = paper.NETWORKS["digits"]({})
    before = []
    recipe = paper.Recipe(12, 8, settings["learning_rate"])
    paper.train_images(
        model,
        training,
        recipe,
        0,
        each=lambda step, _: before.append(paper.accuracy(model, held_out)) if step == 6 else None,
    )
    gain = 100 * (paper.accuracy(model, held_out) - before[0])
    assert rows[0]["plasticity"] == pytest.approx(gain)


def test_crops_of_photographs_count_in_the_full_budget(monkeypatch, drawn_digits, drawn_textures):
    monkeypatch.setattr(paper, "digits", lambda: drawn_digits)
    monkeypatch.setattr(paper, "fashion", lambda: Digits((drawn_digits.images * 255).byte(), drawn_digits.labels))
    monkeypatch.setattr(paper, "textures", lambda: drawn_textures)
    settings = copy.deepcopy(paper.FULL)
    for task in ("digits", "clothes", "textures"):
        settings[task] |= {"sparsities": [0.95], "images": 8, "steps": 4, "batch": 8}
    settings["clothes"] |= {"judged": 2, "channels": [4, 8, 8]}
    settings["textures"] |= {"judged": 4, "width": 4}
    settings["plasticity"] |= {"moments": [0.25, 0.5], "amounts": [0.5]}
    found = paper.run(settings, 0, lambda items, description: items)
    names = {label.partition(", ")[2] for label in found["accuracies"] if label.startswith("textures")}
    assert names == {"dense", *(f"{name} at 0.95" for name in ACCURACIES)}
    assert "textures, GraNet at 0.95 − static" in paper.decide([found, found]).numbers

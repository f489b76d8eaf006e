from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.papers import magnitude as paper

POINTS = {
    "dense": 3.8,
    "random at 0.5": 11.0,
    "magnitude at 0.3": 4.2,
    "magnitude at 0.5": 6.3,
    "magnitude at 0.7": 9.0,
    "magnitude largest=True at 0.5": 12.0,
    "wanda at 0.5": 4.5,
}


def observation(shift=0.0, **changes):
    """What a run gives where the claim is right."""
    points = {label: {"nll": value + shift} for label, value in POINTS.items()}
    points["magnitude at 0.5"]["nll"] += shift / 2
    tuned = {"magnitude": 0.92, "random": 0.88, **dict.fromkeys(paper.DATA_DRIVEN, 0.915)}
    digits = {n: [{"before": 0.8, "after": v + shift / 50}, {"before": 0.8, "after": v}] for n, v in tuned.items()}
    digits["dense"] = [{"before": 0.93}, {"before": 0.92}]
    return copy.deepcopy({"points": points, "digits": digits} | changes)


def observations():
    return [observation(shift) for shift in (0.0, 0.1, -0.1)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["accuracy, magnitude after tuning"] == pytest.approx(0.92)
    assert "magnitude − wanda at 0.5" in verdict.numbers


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("label", "value", "named"),
    [
        ("random at 0.5", 5.0, "random − magnitude at 0.5"),
        ("wanda at 0.5", 8.0, "magnitude − wanda at 0.5"),
        ("magnitude largest=True at 0.5", 5.0, "largest − magnitude at 0.5"),
        ("magnitude at 0.7", 5.0, "magnitude at 0.7 − magnitude at 0.5"),
        ("dense", 5.0, "magnitude at 0.3 − dense"),
    ],
)
def test_a_reversed_order_fails_and_is_named(label, value, named):
    rows = observations()
    for row in rows:
        row["points"][label]["nll"] = value
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason


def test_a_score_that_gains_on_digits_fails_and_one_that_may_is_inconclusive():
    rows = observations()
    for row in rows:
        row["digits"]["wanda"] = [{"before": 0.9, "after": one["after"] + 0.01} for one in row["digits"]["magnitude"]]
    assert "digits, wanda" in paper.decide(rows).reason
    assert paper.decide(rows).outcome == "does not hold"
    for row, gain in zip(rows, (0.02, -0.02, 0.0)):
        row["digits"]["wanda"] = [{"before": 0.9, "after": one["after"] + gain} for one in row["digits"]["magnitude"]]
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "digits, wanda" in verdict.reason


def test_budgets_name_cases_of_registered_methods_and_differ_only_in_size():
    assert {label for label, *_ in paper.QUICK["cases"]} <= {label for label, *_ in paper.FULL["cases"]}
    labels = [label for label, *_ in paper.FULL["cases"]]
    assert len(set(labels)) == len(labels)
    assert {"sparsegpt at 2:4", "random at 0.7", "wanda at 0.4"} <= set(labels)


def test_networks_are_pruned_to_the_sparsity_and_tuned_by_every_score(drawn_digits, monkeypatch):
    seen = {}
    prune = paper._prune

    def watch(network, name, *rest):
        masks = prune(network, name, *rest)
        seen[name] = [masks.sparsity, not masks.violations(network)]
        return masks

    monkeypatch.setattr(paper, "_prune", watch)
    settings = {**paper.QUICK, "networks": 1, "training_images": 8, "calibration_images": 64, "training_steps": 40}
    found = paper._digits({**settings, "tuning_steps": 10, "batch": 8}, 0, lambda items, description: items)
    assert set(found) == {"dense", "random", "magnitude", *paper.DATA_DRIVEN}
    assert all(tight for _, tight in seen.values())
    assert {name: value for name, (value, _) in seen.items()} == {name: pytest.approx(0.9, abs=0.005) for name in seen}
    assert found["dense"][0]["before"] > 0.8


def test_gradients_are_those_of_single_images():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    images, labels = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 1, 0, 1])
    found = paper._gradients(network, images, labels)
    single = []
    for image, label in zip(images, labels):
        network.zero_grad()
        nn.functional.cross_entropy(network(image.unsqueeze(0)), label.unsqueeze(0)).backward()
        single.append(network[1].weight.grad.clone())
    torch.testing.assert_close(found["taylor"]["1.weight"], torch.stack(single).abs().mean(0))
    torch.testing.assert_close(found["fisher"]["1.weight"], torch.stack(single).square().mean(0))

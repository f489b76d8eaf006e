"""Experiments on N:M training: each part of a rule decides, and a tiny run trains what it says."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.papers import bdwp, progressive_gradient_flow, sr_ste
from gossamer.papers.nm_runs import PatchTransformer, small_convolutional


def shifted(build):
    return [build(shift) for shift in (0.0, 0.1, -0.1)]


def silent(items, description):
    return items


# ---------------------------------------------------------------------------------------------------- SR-STE


def sr_ste_observation(shift=0.0):
    """What a run gives where the claim is right."""
    accuracy = {"SR-STE": 96.0, "straight-through": 95.0, "pushed": 80.0, "pruned after training": 95.8}
    flips = {"SR-STE": 0.1, "straight-through": 0.5, "pushed": 3.0, "pruned after training": 0.0}
    images = {"dense": {"accuracy": 96.2 + shift, "loss": 0.1}}
    masks = {}
    for pattern in ("2:4", "1:16"):
        for name, value in accuracy.items():
            images[f"{name} at {pattern}"] = {"accuracy": value + shift, "loss": 0.2}
            masks[f"{name} at {pattern}"] = {"late flips": flips[name] * (1 + shift), "since first": 0.3}
    text = {"dense": 2.0}
    for pattern in ("2:4", "1:16"):
        for name, value in (("straight-through", 2.05), ("SR-STE", 2.005 + shift / 100), ("pushed", 2.2)):
            text[f"{name} at {pattern}"] = value
    grid = [
        {"decay": decay, "accuracy": 90 + decay + shift, "late flips": 2 - decay, "since first": 0.1}
        for decay in (-1.0, 0.0, 1.0)
    ]
    return {"digits": images, "bytes": text, "masks": masks, "grid": grid}


def test_the_claim_of_sr_ste_holds_where_every_part_does():
    verdict = sr_ste.decide(shifted(sr_ste_observation))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["digits, SR-STE − straight-through"].mean == pytest.approx(1)
    assert verdict.numbers["digits, half the flips − flips"].mean == pytest.approx(0.15)
    assert verdict.numbers["bytes, straight-through − SR-STE, % of loss"].mean == pytest.approx(2.25)
    assert verdict.numbers["digits, rank correlation of accuracy and flips over strengths"].mean == pytest.approx(-1)


@pytest.mark.parametrize(
    ("part", "label", "value", "named"),
    [
        ("digits", "straight-through at 1:16", {"accuracy": 99.0, "loss": 0.1}, "SR-STE − straight-through"),
        ("digits", "pushed at 2:4", {"accuracy": 130.0, "loss": 0.1}, "SR-STE − pushed"),
        ("digits", "dense", {"accuracy": 98.0, "loss": 0.1}, "SR-STE 2:4 − dense"),
        ("bytes", "straight-through at 2:4", 1.8, "straight-through − SR-STE"),
        ("bytes", "SR-STE at 2:4", 2.04, "dense + noise − SR-STE 2:4"),
        ("masks", "SR-STE at 2:4", {"late flips": 2.0, "since first": 0.1}, "half the flips"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_sr_ste_and_is_named(part, label, value, named):
    rows = shifted(sr_ste_observation)
    for row in rows:
        row[part][label] = value
    verdict = sr_ste.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason
    assert sr_ste.decide(rows[:1]).outcome == "inconclusive"


def test_sr_ste_trains_every_contestant_from_the_same_start(drawn_digits, monkeypatch):
    monkeypatch.setattr(sr_ste, "digits", lambda: drawn_digits)
    settings = copy.deepcopy(sr_ste.QUICK)
    settings["digits"] |= {"images": 8, "steps": 12, "batch": 8, "patterns": ["2:4"], "grid_pattern": "2:4"}
    settings["bytes"] |= {"size": 60_000, "held_out": 4, "steps": 4, "batch": 2, "length": 16, "patterns": ["1:16"]}
    found = sr_ste.run(settings, 0, silent)
    names = ("straight-through", "SR-STE", "pushed", "pruned after training")
    assert set(found["digits"]) == {"dense", *(f"{name} at 2:4" for name in names)}
    assert set(found["bytes"]) == {"dense", *(f"{name} at 1:16" for name in names[:3])}
    grid = {point["decay"]: point for point in found["grid"]}
    assert grid[0.05]["accuracy"] == found["digits"]["SR-STE at 2:4"]["accuracy"]
    assert grid[0.0]["late flips"] == found["masks"]["straight-through at 2:4"]["late flips"]
    assert found["masks"]["pruned after training at 2:4"]["late flips"] == 0
    assert set(found["curves"]) == set(names)


# ---------------------------------------------------------------------------------- progressive gradient flow

RECIPES = {
    "straight-through": 0.0,
    "SR-STE": 0.5,
    "fading": 3.0,
    "fading, straight-through": 1.0,
    "fading along a line": 2.0,
    "by steps": 2.0,
    "shrinking groups": 1.0,
    "pruned half-way": 1.0,
}


def flow_observation(shift=0.0):
    images, text = {"dense": {"accuracy": 97.0, "loss": 0.1}}, {"dense": 2.0}
    watched, operations = {}, {}
    for pattern, scale in (("2:4", 0.1), ("1:16", 1.0), ("1:32", 2.0)):
        for name, gain in RECIPES.items():
            label = f"{name} at {pattern}"
            images[label] = {"accuracy": 90 + gain * scale * (1 + shift) + shift, "loss": 0.2}
            text[label] = 2.2 - gain * scale / 100
            watched[label] = {} if name == "pruned half-way" else {"chosen": 2.0, "removed": 1.0, "jump": 0.1}
            operations[label] = 0.5
    return {"digits": images, "bytes": text, "watched": watched, "operations": operations}


def test_the_claim_of_gradient_flow_holds_where_every_part_does():
    verdict = progressive_gradient_flow.decide(shifted(flow_observation))
    assert verdict.outcome == "holds", verdict.reason
    # (2.5 on digits and 1.25 on bytes) times 1.5
    assert verdict.numbers["slow − straight-through at 1:16 and 1:32, %"].mean == pytest.approx(2.8125)
    assert verdict.numbers["squared gradients late, removed / chosen, SR-STE at 1:16"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rival", "pattern", "accuracy", "named"),
    [
        ("straight-through", "1:32", 110.0, "slow − straight-through"),
        ("SR-STE", "1:16", 110.0, "slow − SR-STE"),
        ("SR-STE", "2:4", 70.0, "closeness of slow and SR-STE at 2:4"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_gradient_flow_and_is_named(rival, pattern, accuracy, named):
    rows = shifted(flow_observation)
    for row in rows:
        row["digits"][f"{rival} at {pattern}"]["accuracy"] = accuracy
    verdict = progressive_gradient_flow.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason


def test_gradient_flow_trains_every_recipe_to_its_pattern(drawn_digits, monkeypatch):
    monkeypatch.setattr(progressive_gradient_flow, "digits", lambda: drawn_digits)
    ended = []
    train = progressive_gradient_flow.train_watched

    def watch(model, data, recipe, seed, method, look):
        run = train(model, data, recipe, seed, method, look)
        if method is not None:
            masks = run.masks
            ended.append((type(method).__name__, set(run.targets), masks.violations(model)))
            for name in masks:
                method.pattern.verify(masks[name])
        return run

    monkeypatch.setattr(progressive_gradient_flow, "train_watched", watch)
    settings = copy.deepcopy(progressive_gradient_flow.QUICK)
    small = {"steps": 20, "layers": 1, "width": 32, "heads": 2}
    settings["digits"] |= {**small, "images": 8, "batch": 8, "patterns": ["1:16"]}
    settings["bytes"] |= {**small, "size": 60_000, "held_out": 4, "batch": 2, "length": 16, "patterns": ["1:32"]}
    found = progressive_gradient_flow.run(settings, 0, silent)
    feed_forward = {f"blocks.0.{name}.weight" for name in ("up", "down")}
    assert [(targets, violations) for _, targets, violations in ended] == [(feed_forward, {})] * 8
    assert set(found["digits"]) == {"dense", *(f"{name} at 1:16" for name in RECIPES)}
    assert set(found["curves"]) == set(RECIPES)
    assert found["operations"]["straight-through at 1:16"] == pytest.approx(1 / 16)
    assert found["operations"]["pruned half-way at 1:16"] == pytest.approx(17 / 32)
    assert found["operations"]["fading at 1:16"] == pytest.approx(0.9 + 0.1 / 16)
    # what is removed gets no gradient any more where it fades by the chain rule, and does where it does not
    removed = {name: value["removed"] / value["chosen"] for name, value in found["watched"].items() if value}
    assert removed["fading at 1:16"] < removed["straight-through at 1:16"]
    assert "jump" in found["watched"]["fading at 1:16"]
    assert "jump" not in found["watched"]["by steps at 1:16"]


def test_looking_at_a_run_does_not_change_it(drawn_digits):
    paper = progressive_gradient_flow
    settings = copy.deepcopy(paper.QUICK)
    training, held_out = drawn_digits.split(8, 0)
    weights = []
    for looked in (False, True):
        torch.manual_seed(0)
        model = PatchTransformer(1, 16, 2)
        method = paper.recipes(settings, "1:8", 20, 16)["fading"]
        look = paper._Look(lambda model=model: paper.quality(model, held_out)[1], 20, method)
        each = {"each": look} if looked else {}
        paper.train_watched(model, training, paper.AdamRecipe(20, 8), 0, method, **each)
        weights.append([value.detach().clone() for value in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


# ---------------------------------------------------------------------------------------------------- BDWP


def bdwp_observation(shift=0.0):
    values = {"bidirectional": 95.0, "forward": 95.2, "transposable": 93.0, "gradients": 92.0}
    images, text = {"dense": {"accuracy": 95.5 + shift, "loss": 0.1}}, {"dense": 2.0}
    for pattern in ("2:4", "2:8"):
        for name, value in values.items():
            images[f"{name} at {pattern}"] = {"accuracy": value, "loss": 0.1}
    for name, value in (("bidirectional", 2.01), ("forward", 2.0), ("transposable", 2.1), ("gradients", 2.1)):
        text[f"{name} at 2:8"] = value + shift / 100
    cosines = {"2:4": {"dense": 0.95, "forward": 0.9}, "2:8": {"dense": 0.85 + shift / 10, "forward": 0.8}}
    return {"digits": images, "bytes": text, "cosines": cosines, "operations": {"bidirectional at 2:8": 0.5}}


def test_the_claim_of_bdwp_holds_where_every_part_does():
    verdict = bdwp.decide(shifted(bdwp_observation))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["digits, bidirectional − dense + 1 at 2:8, %"].mean == pytest.approx(0.5)
    assert verdict.numbers["bidirectional − transposable, %"].mean == pytest.approx((2 + 2 + 4.5) / 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda row: row["digits"].update(dense={"accuracy": 99.0, "loss": 0.1}), "digits, bidirectional − dense"),
        (lambda row: row["bytes"].update({"forward at 2:8": 1.9}), "bytes, bidirectional − forward"),
        (lambda row: row["cosines"]["2:8"].update(dense=0.5), "cosine"),
        (lambda row: row["digits"]["gradients at 2:4"].update(accuracy=120.0), "bidirectional − gradients"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_bdwp_and_is_named(change, named):
    rows = shifted(bdwp_observation)
    for row in rows:
        change(row)
    verdict = bdwp.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason


def test_bdwp_trains_every_variant_and_measures_what_flows_back(drawn_digits, monkeypatch):
    monkeypatch.setattr(bdwp, "digits", lambda: drawn_digits)
    settings = copy.deepcopy(bdwp.QUICK)
    settings["digits"] |= {"images": 8, "steps": 6, "batch": 8, "patterns": ["2:8"]}
    settings["bytes"] |= {"size": 60_000, "held_out": 4, "steps": 3, "batch": 2, "length": 16}
    found = bdwp.run(settings, 0, silent)
    names = ("bidirectional", "forward", "transposable", "gradients")
    assert set(found["digits"]) == set(found["bytes"]) == {"dense", *(f"{name} at 2:8" for name in names)}
    assert 0 < found["cosines"]["2:8"]["dense"] < 1
    assert found["operations"]["bidirectional at 2:8"] < found["operations"]["forward at 2:8"] < 1
    assert found["curves"]["bidirectional"]["x"] == [0.5]


def test_the_networks_have_widths_for_all_patterns():
    widths = [layer.in_channels for layer in small_convolutional() if isinstance(layer, torch.nn.Conv2d)]
    assert widths == [1, 16, 32]
    assert PatchTransformer(2, 64, 4)(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert PatchTransformer(1, 16, 2, patch=4)(torch.rand(2, 1, 28, 28)).shape == (2, 10)

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.papers import g2gnet as paper
from gossamer.papers.digits import Digits
from gossamer.training.g2gnet import G2G, widen

SMALL = {"images": 8, "validation": 4, "held_out": 4, "hidden": [32, 32], "steps": 12, "batch": 16, "exchanges": 3}
SMALL |= {"speed": {"width": 64, "batch": 8, "rounds": 1}}


@pytest.fixture
def clothes(monkeypatch):
    """Twenty noisy images of each of ten drawings in the place of photographs; nothing is downloaded."""
    generator = torch.Generator().manual_seed(0)
    drawings = (torch.rand(10, 1, 28, 28, generator=generator) > 0.7).float() * 255
    labels = torch.arange(200) % 10
    images = (drawings[labels] + 30 * torch.rand(200, 1, 28, 28, generator=generator)).clamp(0, 255).byte()
    monkeypatch.setattr(paper, "fashion", lambda: Digits(images, labels))


def observation(seed, **changes):
    """What a run gives where the claim is right."""
    small = 0.001 * seed
    values = dict.fromkeys(paper.cases(paper.QUICK, 0), 0.8)
    values |= {"index #0": 0.83 + small, "index #1": 0.84 + small, "dense #1": 0.81, "narrow": 0.8}
    values |= changes
    accuracy = {f"pixels: {name}": {"validation": value, "held_out": value} for name, value in values.items()}
    wiring = {"pixels: index, hebbian and hebbian": {"inter_fraction": 0.5, "modularity": 0.3}}
    return {"accuracy": accuracy, "wiring": wiring, "speed": {"masked": 2.0, "dense": 1.5}}


def observations(**changes):
    return [copy.deepcopy(observation(seed, **changes)) for seed in range(3)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    gap = verdict.numbers["pixels: groups − dense, both regularised"]
    assert gap.mean == pytest.approx(0.031)  # the second of the index, the second of the dense ones
    assert verdict.numbers["times faster than masked, training pass of a layer"] == 2


def test_one_seed_decides_nothing():
    assert paper.decide(observations()[:1]).outcome == "inconclusive"


@pytest.mark.parametrize(("name", "named"), [("dense #2", "dense"), ("uniform", "uniform"), ("narrow", "narrow")])
def test_a_better_rival_is_named(name, named):
    verdict = paper.decide(observations(**{name: 0.9}))
    assert verdict.outcome == "does not hold"
    assert f"groups − {named}" in verdict.reason


def test_regularisation_is_chosen_on_other_images():
    rows = observations(**{"dense #2": 0.9})
    for row in rows:
        row["accuracy"]["pixels: dense #2"]["validation"] = 0.1
    assert paper.decide(rows).outcome == "holds"


def test_spread_makes_it_inconclusive():
    rows = observations()
    for row, value in zip(rows, (0.7, 0.9, 0.8)):
        row["accuracy"]["pixels: uniform"]["held_out"] = value
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "uniform" in verdict.reason


def test_all_static_wirings_but_those_meant_to_differ_have_as_many_edges(clothes):
    settings = {**paper.QUICK, **SMALL, "hidden": [64, 64]}
    data = paper._data(settings, "pixels", 0)
    expected = (1 - paper.SPARSITY) * (784 * 64 + 64 * 64)
    seen = 0
    for name, case in paper.cases(settings, 0).items():
        moves = getattr(case.method, "every", None) is not None
        if case.method and not moves and "p′" not in name and "blocks" not in name:
            network, _ = paper._train(settings, data, case, 0)
            hidden = [layer for layer in network if isinstance(layer, nn.Linear)][:-1]
            assert abs(sum(int((layer.weight != 0).sum()) for layer in hidden) - expected) <= 2, name
            seen += 1
    assert seen == 9
    narrow = [
        layer for layer in paper.perceptron(784, [64, 64], sparsity=paper.SPARSITY) if isinstance(layer, nn.Linear)
    ]
    assert sum(layer.weight.numel() for layer in narrow[:-1]) == pytest.approx(expected, rel=0.05)


def test_a_small_run_gives_what_the_rule_reads(clothes):
    settings = {**paper.QUICK, **SMALL, "features": ["pixels", "random convolution"]}
    found = paper.run(settings, 0, lambda items, description: items)
    assert set(found["speed"]) == {"masked", "dense"}
    assert set(found["curves"]) == {"pixels", "random convolution"}
    assert all(set(measures) == {"inter_fraction", "modularity"} for measures in found["wiring"].values())
    assert len(found["wiring"]) == 2 * len(paper.QUICK["rewiring"])
    verdict = paper.decide([found, found])
    assert "random convolution: neighbours grouped − random groups, shuffled pixels" in verdict.numbers


@pytest.mark.parametrize(("features", "units"), [("texture pixels", 256), ("texture random convolution", 512)])
def test_crops_of_photographs_serve_as_features(monkeypatch, drawn_textures, features, units):
    monkeypatch.setattr(paper, "textures", lambda: drawn_textures)
    settings = {**paper.FULL, **SMALL, "crops": {"images": 6, "validation": 3, "held_out": 4}}
    data = paper._data(settings, features, 0)
    assert {name: tuple(rows.shape) for name, (rows, _) in data.items()} == {
        "training": (60, units),
        "validation": (30, units),
        "held_out": (40, units),
    }
    network, _ = paper._train(settings, data, paper.cases(settings, 0)["index #0"], 0)
    assert 0 <= paper._accuracy(network, *data["held_out"], False) <= 1
    assert features in paper.FULL["features"]


def test_a_shuffle_of_pixels_is_fixed_and_loses_none():
    assert torch.equal(paper.pixel_shuffle(784), paper.pixel_shuffle(784))
    assert sorted(paper.pixel_shuffle(784).tolist()) == list(range(784))


def test_sparse_networks_start_with_the_signal_of_dense_ones():
    torch.manual_seed(0)
    x = torch.randn(500, 400)
    dense = paper.perceptron(400, [400])
    sparse = copy.deepcopy(dense)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    widen(G2G().attach(sparse, optimizer))
    with torch.no_grad():
        ratio = float((sparse[0](x) - sparse[0].bias).std() / (dense[0](x) - dense[0].bias).std())
    assert ratio == pytest.approx(1, abs=0.05)


def test_full_measures_all_that_quick_does():
    assert paper.FULL.keys() - paper.QUICK.keys() == {"crops"}
    assert paper.cases(paper.QUICK, 0).keys() <= paper.cases(paper.FULL, 0).keys()

from __future__ import annotations

import io
import json
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.errors import CheckpointError
from gossamer.kernels.native import available
from gossamer.papers import fashion as fashion_module
from gossamer.papers import (
    fast_sparse_convnets,
    mobile_networks,
    network_speed,
    npm_packages,
    run_experiment,
    sparsebytenn,
)
from gossamer.papers.digits import Digits
from gossamer.papers.fashion import FashionTask
from gossamer.papers.mobile_networks import MOBILENET_V2, SMALL, cache_aware, inverted_network, mobilenet, mobilenet_v2
from gossamer.papers.network_speed import EAGER, UNPRUNED, times_faster
from gossamer.pruning.fast_sparse_convnets import FastSparseConvnets
from gossamer.runtime.convolution import fold_normalisation


def show(items, description):
    return iter(items)


def clothes(per_class=12):
    """Images that can be told apart: a bright row whose place is the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat_interleave(per_class)
    images = torch.randint(0, 60, (len(labels), 1, 28, 28), generator=generator, dtype=torch.uint8)
    for image, label in zip(images, labels):
        image[0, 2 * int(label) + 3] = 250
    return Digits(images, labels)


@pytest.fixture
def tiny(monkeypatch):
    """Small images, small networks and no download."""
    monkeypatch.setattr(fashion_module, "fashion", clothes)
    small = ((16, 1), (32, 2))
    for module in (fast_sparse_convnets, sparsebytenn):
        monkeypatch.setattr(module, "SMALL", small)

    def few_channels(plan=small, width=1.0, colours=3, classes=1000):
        return mobilenet(small, width, colours, classes)

    monkeypatch.setattr(fast_sparse_convnets, "mobilenet", few_channels)
    monkeypatch.setattr(sparsebytenn, "mobilenet", few_channels)
    monkeypatch.setattr(mobile_networks, "GATED", ((16, 2), (16, 1)))
    networks = {"mobilenet": (few_channels, FastSparseConvnets(sparsity=0.9, late_layers=1))}
    monkeypatch.setattr(fast_sparse_convnets, "_NETWORKS", networks)


COMMON = {"images": 8, "held_out": 2, "batch": 8, "rounds": 1}
CONVNETS = {
    **fast_sparse_convnets.FULL,
    **COMMON,
    "steps": 20,
    "stretches": [1, 2],
    "dense_widths": {"mobilenet": [0.5, 1.0], "inverted": [0.5]},
    "sparse_widths": {"mobilenet": [1.0], "inverted": [1.0]},
    "networks": ["mobilenet"],
    "speeds": [0.9],
}
GROUPS = {**sparsebytenn.QUICK, **COMMON, "training_steps": 4, "tuning_steps": 4, "pruning_steps": 2, "width": 1.0}


def test_sparse_and_dense_networks_are_trained_counted_and_timed(tiny):
    observed = fast_sparse_convnets.run(json.loads(json.dumps(CONVNETS)), 0, show)
    json.dumps(observed, allow_nan=False)
    points = observed["points"]
    assert len(points) == 2 * (3 + 2 * 4)
    at = {(point["kind"], point["width"], point["block"]): point["multiplications"] for point in points}
    assert at["mobilenet", 1.0, 1] < at["mobilenet", 1.0, 0]
    names = {"0.9, blocks of 1", "0.9, blocks of 4", "as published", EAGER, UNPRUNED}
    assert set(observed["speed"]) == {f"mobilenet, {name}" for name in names}
    assert set(observed["curves"]) >= {"mobilenet, dense", "mobilenet, sparse, blocks of 4"}
    assert "inverted, sparse, blocks of 1, then 4, 2 × as long" in observed["curves"]


def test_all_ways_of_pruning_are_trained_and_compared(tiny):
    observed = sparsebytenn.run(json.loads(json.dumps(GROUPS)), 0, show)
    json.dumps(observed, allow_nan=False)
    ways = {"filters", "groups", "groups, rearranged", "groups, rearranged, taught", "unstructured", "dense"}
    others = {f"{name} at {share}" for name in sparsebytenn.COMPARED for share in (0.3, 0.8)}
    assert set(observed["accuracy"]) == ways | others | {"groups of 4, rearranged"}
    verdict = sparsebytenn.decide([observed, observed])
    assert "accuracy at 0.3, dense − rearranged groups" in verdict.numbers
    for kept in observed["kept"].values():
        assert max(kept["none"], kept["random"]) <= kept["ours"] <= kept["unstructured"] <= 1
    assert set(observed["speed"]) >= {"0.3", "0.5", "0.7", "0.3, anywhere", UNPRUNED}


def test_rivals_cost_at_least_as_many_multiplications_as_the_sparse_network():
    for budget in (fast_sparse_convnets.QUICK, fast_sparse_convnets.FULL):
        for kind, widths in budget["sparse_widths"].items():
            pruned = fast_sparse_convnets._network(kind, max(widths))
            method = fast_sparse_convnets._pruner(budget["sparsity"][kind], budget["steps"], 1)
            method.masks(pruned).apply_(pruned)
            cost = fast_sparse_convnets.multiplications(pruned)
            rivals = [
                fast_sparse_convnets.multiplications(fast_sparse_convnets._network(kind, width))
                for width in budget["dense_widths"][kind]
            ]
            assert any(cost <= rival < 1.35 * cost for rival in rivals), (kind, cost, rivals)


def test_zeros_are_not_counted_as_multiplications():
    network = mobilenet(((16, 1),), 1.0, 1, 10)
    before = fast_sparse_convnets.multiplications(network)
    with torch.no_grad():
        network[6].weight[:8] = 0  # 1 × 1, 32 → 16, on 14² positions
    assert before - fast_sparse_convnets.multiplications(network) == 8 * 32 * 14 * 14


def point(kind, width, block, cost, accuracy, stretch=1):
    own = {"kind": kind, "width": width, "block": block, "stretch": stretch}
    return {**own, "multiplications": cost, "accuracy": accuracy}


def convnet_observations(spread=0.001, speed=1.6, gain=0.02, inverted=0.02):
    found = []
    for seed in (-1, 0, 1):
        points = []
        for kind, more in (("mobilenet", gain), ("inverted", inverted)):
            for width, block, cost, accuracy in ((0.3, 0, 50, 0.5), (0.5, 0, 100, 0.8), (0.9, 0, 300, 0.9)):
                points.append(point(kind, width, block, cost, accuracy))
            accuracy = 0.8 + more + spread * seed
            points.append(point(kind, 1, 1, 90, accuracy))
            points.append(point(kind, 1, 4, 90, 0.1))
            points.append(point(kind, 1, 1, 91, 0.99, stretch=2))
        times = {"mobilenet, 0.9, blocks of 1": speed + spread * seed, "mobilenet, 0.8, blocks of 1": 1.1}
        found.append({"points": points, "speed": times})
    return found


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"gain": -0.02}, "does not hold"),
        ({"inverted": -0.02}, "does not hold"),
        ({"speed": 1.25}, "does not hold"),
        ({"speed": 1.3}, "inconclusive"),
        ({"gain": 0.0}, "inconclusive"),
        ({"spread": 0.2}, "inconclusive"),
    ],
)
def test_the_rule_on_sparse_networks_decides_as_stated(changes, outcome):
    assert fast_sparse_convnets.decide(convnet_observations(**changes)).outcome == outcome


def test_the_rival_is_the_smallest_dense_network_of_at_least_the_same_cost():
    gain = fast_sparse_convnets._gain(convnet_observations(spread=0.0), "mobilenet")
    assert gain.low == pytest.approx(0.02)
    observed = convnet_observations(spread=0.0)
    for one in observed:
        one["points"] = [point for point in one["points"] if point["multiplications"] != 300]
        one["points"] += [{**one["points"][0], "multiplications": 89, "accuracy": 0.99}]
    assert fast_sparse_convnets._gain(observed, "mobilenet").low == pytest.approx(0.02)


def group_observations(spread=0.0005, **changes):
    accuracy = {"dense": 0.9, "filters": 0.8, "groups": 0.87, "groups, rearranged": 0.88, "unstructured": 0.881}
    accuracy |= {name: value for name, value in changes.items() if name in accuracy}
    accuracy["groups, rearranged"] = changes.get("ours", 0.88)
    gain, speed = changes.get("kept", 0.02), changes.get("speed", 1.2)
    found = []
    for seed in (-1, 0, 1):
        accuracies = {name: value + spread * seed * number for number, (name, value) in enumerate(accuracy.items())}
        kept = {"none": 0.5, "random": 0.51, "ours": 0.51 + gain + spread * seed, "unstructured": 0.9}
        times = {"0.3": speed + 10 * spread * seed, "0.5": 1.5, UNPRUNED: 1.1}
        found.append({"accuracy": accuracies, "kept": {"16 at 0.5": kept}, "speed": times})
    return found


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"filters": 0.9}, "does not hold"),
        ({"ours": 0.85}, "does not hold"),  # three points below unstructured
        ({"kept": -0.02}, "does not hold"),
        ({"speed": 0.8}, "does not hold"),
        ({"speed": 1.0}, "inconclusive"),
        ({"filters": 0.88}, "inconclusive"),
        ({"ours": 0.876}, "inconclusive"),
        ({"spread": 0.05}, "inconclusive"),
        ({"groups": 0.1}, "holds"),  # reported, not decisive
    ],
)
def test_the_rule_on_groups_decides_as_stated(changes, outcome):
    assert sparsebytenn.decide(group_observations(**changes)).outcome == outcome


@pytest.mark.parametrize("module", [fast_sparse_convnets, sparsebytenn])
def test_one_seed_decides_nothing(module):
    assert module.decide([{}]).outcome == "inconclusive"


SHORT = {"blocks": [1], "steps": 4, "recipes": False}


@pytest.mark.parametrize(
    ("module", "settings"), [(fast_sparse_convnets, {**CONVNETS, **SHORT}), (sparsebytenn, GROUPS)]
)
def test_the_engine_runs_the_experiments_end_to_end(module, settings, tmp_path, monkeypatch, tiny):
    monkeypatch.setitem(module.experiment.budgets, "tiny", settings)
    result = run_experiment(module.experiment, "tiny", seeds=2, output=tmp_path, progress=False)
    assert result.verdict.outcome in ("holds", "does not hold", "inconclusive")
    assert (tmp_path / f"{module.experiment.slug}.json").exists()


def test_a_network_learns_and_pruning_ends_at_the_sparsity(tiny):
    task = FashionTask.of(9, 2, 32, 1e-2, 0)
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.ReLU()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 6 * 6, 10)),
    )
    masks = task.train(network, 60, FastSparseConvnets(sparsity=0.5, begin=5, end=30, every=5))
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    assert not masks.violations(network)
    assert task.accuracy(network) > 0.8


@pytest.mark.skipif(not available(), reason="the compiled kernels are missing")
def test_times_are_against_the_fastest_form_of_torch(monkeypatch):
    class Clock:
        def __init__(self, median):
            self.median = median

    seconds = {EAGER: 4.0, "torch, channels last": 3.0, "torch, frozen": 2.0, UNPRUNED: 1.0, "pruned": 0.5}
    monkeypatch.setattr(
        network_speed, "interleave", lambda runs, repeats: {name: Clock(seconds[name]) for name in runs}
    )
    monkeypatch.setattr(network_speed, "ratio", lambda one, other: Clock(one.median / other.median))
    network = mobilenet(((16, 1),), 1.0, 3, 10).eval()
    assert times_faster(network, {"pruned": network}, torch.randn(1, 3, 32, 32), 1) == {
        EAGER: 0.5,
        UNPRUNED: 2.0,
        "pruned": 4.0,
    }


def test_every_form_of_the_dense_network_computes_the_same():
    torch.manual_seed(0)
    network, x = mobilenet(((16, 1), (32, 2)), 1.0, 3, 10).eval(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        wanted = network(x)
        for run in network_speed._torch_forms(network, x).values():
            torch.testing.assert_close(run(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: mobilenet(SMALL, 0.5, 3, 10),
        lambda: mobilenet_v2(width=0.25, classes=10, last=64),
        lambda: mobilenet_v2(cache_aware(width=0.25, cache=4 << 10), width=0.25, classes=10, last=64),
        inverted_network,
    ],
)
def test_networks_can_be_traced_and_folded(build):
    torch.manual_seed(0)
    network = build().eval()
    x = torch.randn(2, next(network.parameters()).shape[1], 32, 32)
    folded = fold_normalisation(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "cache"), [(1.0, 32 << 10), (1.4, 32 << 10), (2.0, 32 << 10), (1.0, 16 << 10)])
def test_a_cache_aware_plan_fits_the_cache_and_is_deeper_at_about_the_same_cost(width, cache):
    def cost(plan):
        network, total = mobilenet_v2(plan, width, classes=10), 0
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.groups == 1 and module.kernel_size == (1, 1):
                total += module.weight.numel()
                assert plan is MOBILENET_V2 or module.in_channels * 16 * 4 <= cache or module.in_channels == last
        return total

    last = 8 * round(320 * width / 8)  # what the last convolution reads is not inside a block
    plan = cache_aware(width=width, cache=cache)
    assert 0.6 < cost(plan) / cost(MOBILENET_V2) < 1.2  # a stage of a single block gets no other
    assert all(new[1] == old[1] and new[3] == old[3] for new, old in zip(plan, MOBILENET_V2))
    deeper = sum(stage[0] for stage in plan) > sum(stage[0] for stage in MOBILENET_V2)
    assert deeper
    assert cache_aware(width=0.25) == MOBILENET_V2


def test_mobilenets_have_the_sizes_of_their_papers():
    def millions(network):
        return sum(parameter.numel() for parameter in network.parameters()) / 1e6

    assert millions(mobilenet()) == pytest.approx(4.23, abs=0.01)
    assert millions(mobilenet_v2()) == pytest.approx(3.50, abs=0.01)
    sizes = [millions(mobilenet(width=width)) for width in (0.25, 0.5, 0.75, 1.0, 1.4)]
    assert all(one < other for one, other in pairwise(sizes))


def packed(folder, rows=3):
    path = folder / "clothes.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for label in range(10):
            data = json.dumps({"data": [[label] * 784] * rows + [[]]}).encode()
            member = tarfile.TarInfo(f"package/src/clothes/{label}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_images_are_read_class_after_class_without_empty_rows(tmp_path):
    read = fashion_module._read(packed(tmp_path))
    assert read.shape == (30, 784)
    assert np.array_equal(read[:, 0], np.repeat(np.arange(10), 3))


def test_the_images_are_stored_once_and_a_damaged_store_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    monkeypatch.setattr(npm_packages, "npm_archive", lambda *wanted: packed(wanted[-1]))
    fashion_module.fashion.cache_clear()
    assert fashion_module.fashion().images.shape == (30, 1, 28, 28)
    monkeypatch.setattr(npm_packages, "npm_archive", lambda *wanted: pytest.fail("downloaded again"))
    fashion_module.fashion.cache_clear()
    assert len(fashion_module.fashion()) == 30
    next(tmp_path.glob("**/images.npy")).write_bytes(b"nothing")
    fashion_module.fashion.cache_clear()
    with pytest.raises(CheckpointError, match="delete it"):
        fashion_module.fashion()
    fashion_module.fashion.cache_clear()

"""The model against its closed forms, and against products counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gossamer.core.patterns import NM
from gossamer.errors import ConfigurationError, TargetError
from gossamer.training.bdwp_accelerator import (
    TECHNIQUES,
    Accelerator,
    Product,
    products_of,
    simulate_training,
    stored_bytes,
)

IDEAL = Accelerator(fill=0, adder_latency=1, bandwidth=math.inf, updated_weights=math.inf, sorted_weights=math.inf)
#: a block of ViT-B/16 for 16 images, and the convolutions of ResNet-18 for 16 images at 224²
VIT = [
    *(Product(name, 16 * 197, 768, 768) for name in ("q", "k", "v", "o")),
    Product("up", 16 * 197, 768, 3072),
    Product("down", 16 * 197, 3072, 768),
]
RESNET = [
    Product("stem", 16 * 112 * 112, 147, 64, first=True),
    *(Product(f"1.{i}", 16 * 56 * 56, 576, 64) for i in range(4)),
    Product("2.0", 16 * 28 * 28, 576, 128),
    *(Product(f"2.{i}", 16 * 28 * 28, 1152, 128) for i in range(1, 4)),
    Product("3.0", 16 * 14 * 14, 1152, 256),
    *(Product(f"3.{i}", 16 * 14 * 14, 2304, 256) for i in range(1, 4)),
    Product("4.0", 16 * 7 * 7, 2304, 512),
    *(Product(f"4.{i}", 16 * 7 * 7, 4608, 512) for i in range(1, 4)),
]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 8), (1, 8), (1, 16)])
def test_without_any_overhead_the_cycles_are_the_closed_form(n, m):
    layer = [Product("layer", 256, 512, 1024)]
    for techniques in ((), TECHNIQUES):
        dense = simulate_training(layer, None, IDEAL, techniques)
        sparse = simulate_training(layer, NM(n, m), IDEAL, techniques)
        share = (2 * n / m + 1) / 3
        assert sparse.multiplications == dense.multiplications * share
        computing = [sum(s.cycles for s in found.stages if s.stage != "update") for found in (dense, sparse)]
        assert computing[0] == 3 * 256 * 512 * 1024 / (32 * 32)
        assert computing[1] == pytest.approx(computing[0] * share, rel=1e-12)


def test_a_layer_counted_by_hand():
    sizes = {"rows": 4, "columns": 4, "fill": 3, "adder_latency": 2}
    machine = Accelerator(**sizes, bandwidth=1e9, sorted_weights=4, updated_weights=1)
    layer = [Product("layer", 8, 16, 4)]
    plain = {s.stage: s.cycles for s in simulate_training(layer, NM(2, 4), machine, ()).stages}
    # forward: 2 tiles of 8 terms that wait 2 cycles each, filled in 3, after sorting 16 groups
    assert plain["forward"] == 2 * (8 * 2 + 3) + 16
    assert plain["backward"] == 2 * 4 * (2 * 2 + 3) + 16
    assert plain["weights"] == 4 * (8 * 2 + 3)
    assert plain["update"] == 64
    tuned = {s.stage: s for s in simulate_training(layer, NM(2, 4), machine, TECHNIQUES).stages}
    assert tuned["forward"].cycles == min(2 * (8 + 3), 2 * (8 + 3))
    assert tuned["backward"].cycles == min(8 * (2 + 3), 1 * 4 * (8 + 3))
    assert tuned["update"].cycles == max(64, 2 * 16)
    assert tuned["forward"].multiplications == 8 * 8 * 4
    assert tuned["forward"].utilisation == 8 * 8 * 4 / (16 * 22)


def test_bytes_are_those_of_the_stored_form():
    machine = Accelerator()
    assert stored_bytes(64, NM(2, 8), machine) == 16 * (2 + 3 / 8)
    layer = [Product("layer", 8, 16, 4)]
    dense, sparse = ({s.stage: s.bytes for s in simulate_training(layer, p, machine).stages} for p in (None, NM(2, 4)))
    assert dense["forward"] - sparse["forward"] == 2 * 64 - 32 * (2 + 2 / 8)
    assert sparse["update"] - dense["update"] == 2 * 32 * (2 + 2 / 8)


@pytest.mark.parametrize("network", [VIT, RESNET], ids=["ViT", "ResNet-18"])
def test_each_technique_adds_something(network):
    dense = simulate_training(network, None, techniques=("interleave", "schedule")).cycles
    found = [simulate_training(network, NM(2, 8), techniques=TECHNIQUES[:many]).cycles for many in range(4)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[2]
    assert 1.5 < dense / found[3] < 2  # the closed form says at most 2


def test_slow_memory_bounds_a_stage():
    machine = Accelerator(bandwidth=1.0)
    stage = simulate_training([Product("layer", 8, 16, 4)], None, machine).stages[0]
    assert stage.cycles == stage.bytes == 2 * (8 * 16 + 8 * 4 + 16 * 4)


def test_groups_that_do_not_fit_run_dense():
    layer = [Product("layer", 64, 12, 64)]
    found = {s.stage: s.sparse for s in simulate_training(layer, NM(2, 8), techniques=()).stages}
    assert found == {"forward": False, "backward": True, "weights": False, "update": False}


def test_the_layers_of_a_model_become_products():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 10),
    )
    assert products_of(model, torch.randn(2, 3, 6, 6)) == [
        Product("0", 2 * 36, 27, 8, first=True),
        Product("1", 2 * 16, 9, 8, channels=0),
        Product("3", 2, 128, 10),
    ]
    stages = simulate_training(products_of(model, torch.randn(2, 3, 6, 6)), NM(2, 4)).rows()
    assert not any(row["sparse"] for row in stages if row["layer"] == "1")
    assert [row["stage"] for row in stages if row["layer"] == "0"] == ["forward", "weights", "update"]


def test_a_model_without_products_is_refused():
    with pytest.raises(TargetError, match="no linear layer"):
        products_of(nn.ReLU(), torch.randn(2))


@pytest.mark.parametrize("field", ["rows", "bandwidth", "adder_latency", "sorted_weights"])
def test_impossible_machines_are_refused(field):
    with pytest.raises(ConfigurationError, match=f"{field} is 0"):
        Accelerator(**{field: 0})


def test_unknown_techniques_are_refused():
    with pytest.raises(ConfigurationError, match="technique 'magic'"):
        simulate_training(VIT, NM(2, 8), techniques=("magic",))

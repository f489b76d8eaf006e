"""The experiment of beyond-l1 on drawn pictures, and how its verdict is reached."""

from __future__ import annotations

import json

import pytest
import torch

from gossamer.papers import beyond_l1
from gossamer.papers.beyond_l1 import QUICK, decide, run, support_f1, units
from gossamer.papers.natural_images import NaturalImages

TINY = {
    **QUICK,
    "side": 6,
    "training": 300,
    "held_out": 120,
    "epochs": 1,
    "batch_size": 100,
    "coding_iter": 10,
    "test_iter": 20,
    "target_l0": 3,
    "curve": [2, 3],
    "sizes": {"l1": [12, 24], "l0": [12], "l1/2": [12], "cel0": [12]},
    "shapes": {"units": 12, "l0": [2, 3]},
    "planted": {"atoms": 24, "size": 16, "active": 2, "noise": 0.02, "signals": 60, "basins": 3, "starts": 4},
}


def pictures(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return NaturalImages(tuple(torch.randn(40, 50, generator=generator) for _ in range(2)), ("a", "b"))


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(beyond_l1, "natural_images", pictures)
    monkeypatch.setattr(beyond_l1, "scrambled_images", pictures)


def test_a_run_observes_everything(drawn):
    seen = run(TINY, 0, lambda items, description: iter(items))
    assert json.loads(json.dumps(seen)) == seen
    assert set(seen["curves"]) == {*beyond_l1.NAMES.values(), "soft, refitted", "orthogonal pursuit"}
    assert set(seen["shapes"]) == {
        *("hard (ℓ0) at 3", "half (ℓ1/2) at 3", "soft (ℓ1) at 2", "soft (ℓ1) at 3", "CEL0 at 2", "CEL0 at 3"),
        "scrambled phases",
    }
    assert seen["pictures"]["pictures"] == 2
    assert 0 <= seen["planted"]["CEL0, F1"] <= 1
    assert 1 <= seen["planted"]["CEL0, minima"] <= 4


def observation(soft=0.4, oriented=0.5, f1=0.9, minima=3.0, variety=9.0, needed=60.0):
    curve = {name: {"x": [2, 8], "y": [0.5, 0.2]} for name in beyond_l1.NAMES.values()}
    curve["soft (ℓ1)"]["y"] = [0.5 + soft, soft]
    shape = {"oriented": oriented, "variety": 4.0}
    shapes = {f"{name} at 8": dict(shape) for name in beyond_l1.NAMES.values()}
    shapes |= {"CEL0 at 3": {**shape, "variety": variety}, "CEL0 at 24": dict(shape)}
    shapes["scrambled phases"] = {"oriented": 0.05, "variety": 1.0}
    return {
        "curves": curve,
        "units": {"soft (ℓ1)": 576.0, "CEL0": needed},
        "planted": {"CEL0, F1": f1, "soft (ℓ1), F1": 0.7, "hard (ℓ0), minima": 12.0, "CEL0, minima": minima},
        "shapes": shapes,
        "sizes": {"l1": {"144": 0.4}},
        "pictures": {"smallest": 1.2},
        "starts": {"CEL0 from zero, error": 0.2},
    }


def varied(**changes):
    return [observation(**{"soft": 0.4 + 0.01 * seed, **changes}) for seed in range(3)]


def test_all_parts_are_needed_to_hold():
    assert decide(varied()).outcome == "holds"
    for change in (
        {"soft": 0.1},
        {"oriented": 0.01},
        {"f1": 0.5},
        {"minima": 20.0},
        {"variety": 2.0},
        {"needed": 400.0},
    ):
        assert decide(varied(**change)).outcome == "does not hold", change
    assert decide(varied()[:1]).outcome == "inconclusive"


def test_units_are_read_off():
    found = units({"l1": {"144": 0.4, "576": 0.2}, "cel0": {"36": 0.4, "144": 0.1}, "l0": {"36": 0.5}})
    assert found["target error"] == 0.2
    assert found["CEL0"] == pytest.approx(72)
    assert found["hard (ℓ0)"] == 576  # not reached


def test_f1_by_hand():
    codes, truth = torch.tensor([[1.0, 0, 2, 0]]), torch.tensor([[1.0, 3, 0, 0]])
    assert support_f1(codes, truth) == pytest.approx(0.5)

from __future__ import annotations

import json

import pytest
import torch

from gossamer.papers import sparse_ift as module
from gossamer.papers.digits import Digits
from gossamer.papers.sparse_ift import FULL, decide


def show(items, description):
    return iter(items)


def drawn(count, dtype=torch.float32):
    """Noisy images of ten drawings."""
    generator = torch.Generator().manual_seed(0)
    drawings = (torch.rand(10, 1, 28, 28, generator=generator) > 0.7).float()
    labels = torch.arange(count) % 10
    images = (drawings[labels] + 0.2 * torch.rand(count, 1, 28, 28, generator=generator)).clamp(0, 1)
    return Digits((255 * images).to(dtype) if dtype == torch.uint8 else images, labels)


TINY = {
    **FULL,
    "batch": 16,
    "every": 3,
    "digits": {**FULL["digits"], "training": 8, "width": 12, "steps": 12},
    "clothes": {**FULL["clothes"], "training": 8, "held_out": 2, "width": 6, "steps": 8},
    "textures": {
        **FULL["textures"],
        "training": 8,
        "held_out": 2,
        "width": 6,
        "steps": 4,
        "forms": {"wide+rigl": [0.75]},
    },
    "control": {**FULL["control"], "training": 8, "width": 40, "steps": 8},
    "language": {
        **FULL["language"],
        "bytes": 20_000,
        "held_out": 4_000,
        "layers": 1,
        "width": 16,
        "inner": 16,
        "length": 16,
        "batch": 4,
        "steps": 8,
        "forms": {"wide+rigl": [0.75]},
    },
}


def test_every_form_is_trained_at_the_operations_of_the_dense_network(monkeypatch, drawn_textures):
    monkeypatch.setattr(module, "textures", lambda: drawn_textures)
    monkeypatch.setattr(module, "digits", lambda: drawn(120))
    monkeypatch.setattr(module, "fashion", lambda: drawn(120, torch.uint8))
    observed = module.run(json.loads(json.dumps(TINY)), 0, show)
    json.dumps(observed, allow_nan=False)
    operations = observed["operations"]
    forms = [f"{form}, {s}" for form in FULL["digits"]["forms"] for s in (0.5, 0.75, 0.9)]
    expected = {f"{task}, {form}" for task in ("digits", "clothes") for form in ["dense", "twice", *forms]}
    expected |= {f"textures, {form}" for form in ("dense", "twice", "wide+rigl, 0.75")}
    assert set(operations) == expected | {"control, dense", "control, wide+rigl, 0.75"}
    for label, ratio in operations.items():
        if "twice" in label:
            assert 2 <= ratio < 2.6
        elif "small" in label:
            assert ratio < 0.75
        else:
            assert ratio == pytest.approx(1, abs=0.002)
    assert observed["training operations"]["digits, wide+static, 0.9"] == operations["digits, wide+static, 0.9"]
    assert observed["training operations"]["digits, wide+rigl, 0.9"] > 1.1  # a dense gradient every three steps
    assert observed["log2 masks"]["digits, wide+rigl, 0.9"] > observed["log2 masks"]["digits, wide+rigl, 0.5"]
    assert set(observed["loss"]) == {"dense", "twice", "wide+rigl, 0.75"}
    assert observed["curves"]["digits, wide+rigl"]["x"] == [0.5, 0.75, 0.9]


def observation(seed, wide, static, small, loss, control):
    noise = 0.001 * seed
    accuracy = {"control, dense": 0.97, "control, wide+rigl, 0.75": 0.97 + control}
    operations = {}
    for task in ("digits", "clothes"):
        accuracy[f"{task}, dense"], accuracy[f"{task}, twice"] = 0.9, 0.92
        operations[f"{task}, twice"] = 2.1
        for sparsity in ("0.75", "0.9"):
            shift = 0.01 if sparsity == "0.9" else -0.01  # the mean over sparsities counts
            for form, value in (("wide+rigl", wide), ("wide+static", static), ("small+rigl", small)):
                accuracy[f"{task}, {form}, {sparsity}"] = value + shift + (noise if form == "wide+rigl" else 0)
                operations[f"{task}, {form}, {sparsity}"] = 1.001 if form != "small+rigl" else 0.3
    return {
        "accuracy": accuracy,
        "operations": operations,
        "training operations": operations,
        "loss": {"dense": 2.0, "wide+rigl, 0.75": loss - noise, "twice": 1.9},
    }


def test_the_rule_is_applied_as_stated():
    def verdict(*values):
        return decide([observation(seed, *values) for seed in range(3)])

    assert verdict(0.92, 0.91, 0.8, 1.95, 0.0).outcome == "holds"
    assert verdict(0.89, 0.88, 0.8, 1.95, -0.05).outcome == "does not hold"
    assert "wide+rigl − dense" in verdict(0.89, 0.88, 0.8, 1.95, -0.05).reason
    assert verdict(0.92, 0.93, 0.8, 1.95, 0.0).outcome == "does not hold"
    assert verdict(0.92, 0.91, 0.8, 2.05, 0.0).outcome == "does not hold"
    assert verdict(0.92, 0.91, 0.8, 1.95, 0.05).outcome == "does not hold"
    assert verdict(0.9, 0.88, 0.8, 1.95, -0.05).outcome == "inconclusive"
    assert decide([observation(0, 0.92, 0.91, 0.8, 1.95, 0.0)]).outcome == "inconclusive"
    crops = [observation(seed, 0.92, 0.91, 0.8, 1.95, 0.0) for seed in range(3)]
    for row in crops:
        row["accuracy"] |= {name.replace("clothes", "textures"): value for name, value in row["accuracy"].items()}
    assert decide(crops).numbers["accuracy, textures, wide+rigl − wide+static"].mean == pytest.approx(0.011)
    dearer = [observation(seed, 0.92, 0.91, 0.8, 1.95, 0.0) for seed in range(3)]
    dearer[0]["operations"]["digits, wide+rigl, 0.75"] = 1.05
    assert "operations differ" in decide(dearer).reason

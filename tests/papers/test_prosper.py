"""The experiment on probabilistic coders: what is planted, what counts as found, and what is made of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from gossamer.papers import prosper
from gossamer.papers.natural_images import normalised


def observation(found=10, rival=3, gain=0.1):
    """One in which everything is as claimed."""
    good = {"found": found, "bars": 10, "least": 0.99, "prior error": 0.02, "noise error": 0.02}
    others = {"FastICA": rival, "NMF": rival + 1, "DictionaryLearning": rival}
    bars = {name: copy.deepcopy(good) for name in prosper.CODERS}
    bars["MCA"]["rivals"], bars["MMCA"]["rivals"] = others, {**others, "MCA": rival}
    images = {kind: {"Gaussian": -1.4, "DSC": -1.3, "GSC": -1.4 + gain} for kind in ("photographs", "scrambled phases")}
    return {"bars": bars, "images": images}


def several(**changes):
    return [observation(rival=3 + seed % 2, gain=0.1 + 0.01 * seed) | changes for seed in range(4)]


def test_bars_are_found_one_to_one_whatever_their_sign_and_length():
    truth = prosper.bars(3).numpy()
    order = np.array([3, 1, 0, 5, 4, 2])
    assert prosper.bars_found(-2.5 * truth[order], truth)["found"] == 6
    doubled = truth.copy()
    doubled[0] = truth[1]
    assert prosper.bars_found(doubled, truth)["found"] == 5


def test_the_verdict_follows_the_rule():
    assert prosper.decide(several()).outcome == "holds"
    assert prosper.decide(several()[:1]).outcome == "inconclusive"
    missed = several()
    missed[0]["bars"]["TSC"]["found"] = 9
    assert prosper.decide(missed).outcome == "does not hold"
    magnitude = several()
    magnitude[0]["bars"]["MMCA"]["found"] = 9
    assert prosper.decide(magnitude).outcome == "holds"
    off = several()
    off[1]["bars"]["GSC"]["noise error"] = 0.2
    assert "GSC" in prosper.decide(off).reason
    assert prosper.decide(several(images={})).outcome == "inconclusive"
    close = [observation(rival=10 if seed % 2 else 9) for seed in range(4)]
    assert prosper.decide(close).outcome == "inconclusive"


def test_patches_are_judged_in_nats_a_dimension(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pictures = normalised((torch.randn(60, 80, generator=generator),), ("noise",))
    settings = {
        **prosper.QUICK["images"],
        "side": 4,
        "kept": 8,
        "training": 400,
        "held_out": 200,
        "components": 6,
        "steps": 3,
    }
    found, fields = prosper.patches(settings, pictures, seed=0)
    assert found["Gaussian"] == pytest.approx(-1.42, abs=0.1)  # white noise: −½ log 2πe
    assert found["GSC"] < found["Gaussian"] + 0.05
    assert np.shape(fields["GSC, photographs"]) == (6, 16)


def test_a_small_run_gives_what_the_verdict_needs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pictures = normalised((torch.randn(60, 80, generator=generator),), ("noise",))
    monkeypatch.setattr(prosper, "natural_images", lambda: pictures)
    monkeypatch.setattr(prosper, "scrambled_images", lambda seed: pictures)
    small = {
        **prosper.QUICK,
        "size": 3,
        "points": dict.fromkeys(prosper.CODERS, 60),
        "steps": dict.fromkeys(prosper.CODERS, 2),
        "candidates": {name: [3, 2] for name in prosper.CODERS},
    }
    small["images"] = {
        **small["images"],
        "side": 4,
        "kept": 6,
        "training": 80,
        "held_out": 60,
        "components": 6,
        "steps": 2,
    }
    rows = [prosper.run(small, seed, lambda items, _: iter(items)) for seed in range(2)]
    assert set(rows[0]["fields"]) == {*prosper.CODERS, "DSC, photographs", "GSC, photographs"}
    assert prosper.decide(rows).outcome in ("holds", "does not hold", "inconclusive")

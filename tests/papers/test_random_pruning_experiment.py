from __future__ import annotations

import copy
import math

import pytest

from gossamer.papers import random_pruning as paper
from gossamer.papers.digits import Digits

WIDTHS = (32, 64, 128, 256)


def observation(shift=0.0):
    """What a run gives where the claim is right."""
    digits = {"small for 256": 90.0}
    for index, width in enumerate(WIDTHS):
        digits |= {f"dense {width}": 95.0 + shift, f"random {width}": 89.0 + index + shift / 2}
    rules = {"uniform": 80, "ER": 81, "ERK": 83, "ERK+": 83, "SNIP ratios": 84, "SNIP": 84.2, "gradual magnitude": 85}
    clothes = {"dense": 86.0} | {f"{name} at 0.9": value + shift for name, value in rules.items()}
    views = {"calibration_error": 0.1, "nll": 0.3, "auroc": 0.9, "attacked_accuracy": 0.4}
    robust = {"dense": views, "random": {name: value + 0.01 for name, value in views.items()}}
    return {"digits": digits, "clothes": clothes, "robustness": robust}


def observations():
    return [observation(shift) for shift in (0.0, 0.1, -0.1)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["rank correlation of width and gap"] == pytest.approx(-1)
    assert verdict.numbers["gap at width 32"].mean == pytest.approx(6)
    assert verdict.numbers["random − small dense at width 256"].mean == pytest.approx(2)
    assert verdict.numbers["clothes, ERK − uniform at 0.9"].mean == pytest.approx(3)
    assert verdict.numbers["calibration error, random − dense"].mean == pytest.approx(0.01)


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


def test_a_gap_that_grows_with_width_refutes_the_claim():
    rows = observations()
    for row in rows:
        for index, width in enumerate(WIDTHS):
            row["digits"][f"random {width}"] = 92.0 - index
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert "rank correlation" in verdict.reason


@pytest.mark.parametrize(
    ("task", "label", "value", "named"),
    [("digits", "small for 256", 97.0, "small dense"), ("clothes", "uniform at 0.9", 99.0, "ERK − uniform at 0.9")],
)
def test_a_reversed_comparison_refutes_the_claim(task, label, value, named):
    rows = observations()
    for row in rows:
        row[task][label] = value
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason


def test_a_gap_that_closes_unevenly_leaves_it_open():
    rows = observations()
    for row in rows:
        row["digits"]["random 256"] = row["digits"]["random 32"] + 0.5
        row["digits"]["small for 256"] = 80.0
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "unevenly" in verdict.reason


def test_rank_correlation_as_by_hand():
    assert paper.rank_correlation([1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert paper.rank_correlation([1, 2, 3], [5.0, 5.0, 5.0]) == 0
    tied = paper.rank_correlation([1, 2, 3, 4], [1.0, 2.0, 2.0, 3.0])  # ranks 0, 1.5, 1.5, 3
    assert tied == pytest.approx(4.5 / math.sqrt(5 * 4.5))


def test_small_networks_have_as_many_weights_as_the_random_ones():
    for width in (64, 256, 1024):
        small = paper._width_of(width, 0.9)
        sparse = 0.1 * (784 * width + width**2 + 10 * width)
        assert 784 * small + small**2 + 10 * small >= sparse > 784 * (small - 1) + (small - 1) ** 2 + 10 * (small - 1)


def test_everything_is_trained_at_its_sparsity(drawn_digits, monkeypatch):
    monkeypatch.setattr(paper, "digits", lambda: drawn_digits)
    monkeypatch.setattr(paper, "fashion", lambda: Digits((drawn_digits.images * 255).byte(), drawn_digits.labels))
    seen = []
    train = paper.train_images

    def watch(model, data, recipe, seed, method=None, **rest):
        masks = train(model, data, recipe, seed, method, **rest)
        if masks is not None:
            seen.append(round(masks.sparsity, 3))
            assert not masks.violations(model)

    monkeypatch.setattr(paper, "train_images", watch)
    settings = copy.deepcopy(paper.QUICK)
    settings["digits"] |= {
        "widths": [8, 16],
        "sparsities": [0.5],
        "sweep_width": 16,
        "small_for": [16],
        "robust_width": 16,
        "images": 8,
        "steps": 3,
        "batch": 8,
    }
    settings["clothes"] |= {"images": 8, "judged": 2, "steps": 8, "batch": 8, "channels": [8, 16, 16]}
    found = paper.run(settings, 0, lambda items, description: items)
    assert sorted(seen) == pytest.approx([0.5] + [0.9] * 9, abs=2e-3)
    assert set(found["digits"]) == {"dense 8", "random 8", "dense 16", "random 16", "random 16 at 0.5", "small for 16"}
    assert set(found["clothes"]) == {
        "dense",
        *(f"{name} at 0.9" for name in ("uniform", "ER", "ERK", "ERK+", "SNIP ratios", "SNIP", "gradual magnitude")),
    }
    assert set(found["robustness"]) == {"dense", "random"}
    assert found["curves"]["random"]["x"] == [3, 4]
    assert "textures" not in found


def test_residual_networks_learn_crops_at_every_size(monkeypatch, drawn_textures):
    monkeypatch.setattr(paper, "textures", lambda: drawn_textures)
    settings = copy.deepcopy(paper.FULL)
    settings["textures"] |= {"blocks": [1, 2], "depth_width": 4, "widths": [2, 4], "sparsities": [0.5]}
    settings["textures"] |= {"images": 8, "judged": 4, "steps": 3, "batch": 8}
    accuracies, views = paper._textures(settings, 0, lambda items, description: items)
    sizes = {"depth 8", "depth 14", "width 2", "width 4"}
    assert set(accuracies) == {f"{kind} {size}" for kind in ("dense", "random") for size in sizes} | {
        "random at 0.5 width 4"
    }
    assert set(views) == {"dense", "random"}
    assert views["dense"] != views["random"]
    assert paper.FULL.keys() - paper.QUICK.keys() == {"textures"}


def test_a_verdict_tells_whether_wide_and_random_beats_dense():
    rows = observations()
    for row in rows:
        row["textures"] = {"random at 0.5 width 4": 72.0}
        for index, size in enumerate(("depth 8", "depth 14", "width 2", "width 4")):
            row["textures"] |= {f"dense {size}": 70.0, f"random {size}": 66.0 + 2 * (index % 2)}
        row["robustness on textures"] = row["robustness"]
    numbers = paper.decide(rows).numbers
    assert numbers["textures, rank correlation of depth and gap"] == pytest.approx(-1)
    assert numbers["textures, gap at depth 8"].mean == pytest.approx(4)
    assert numbers["textures, gap at width 4"].mean == pytest.approx(2)
    assert numbers["textures, wide beats dense: random − dense at width 4"].mean == pytest.approx(-2)
    assert numbers["textures, wide beats dense: random at 0.5 − dense at width 4"].mean == pytest.approx(2)
    assert numbers["textures, auroc, random − dense"].mean == pytest.approx(0.01)

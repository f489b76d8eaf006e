from __future__ import annotations

import copy

import pytest

from gossamer.measure import footprint
from gossamer.papers import gmp as paper

LOSSES = {
    "large, dense": 4.0,
    "large at 0.75": 4.1,
    "large at 0.9": 4.3,
    "large at 0.95": 4.6,
    "at once at 0.9": 4.5,
    "random at 0.9": 6.0,
    "small for 0.75": 4.6,
    "small for 0.9": 5.0,
    "small for 0.95": 5.6,
}


def observation(shift=0.0):
    """What a run gives where the claim is right: two perceptrons and one LSTM."""
    points = {}
    for label, loss in LOSSES.items():
        points[f"perceptron, {label}"] = [{"bytes": 100, "loss": loss + shift}, {"bytes": 100, "loss": loss - shift}]
        points[f"LSTM, {label}"] = [{"bytes": 50, "loss": loss / 2 + shift}]
    points["perceptron, straight at 0.9"] = [{"bytes": 100, "loss": 4.2}, {"bytes": 100, "loss": 4.4}]
    return {"points": copy.deepcopy(points)}


def observations():
    return [observation(shift) for shift in (0.0, 0.1, -0.1)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["perceptron, small − large at 0.95"].mean == pytest.approx(1.0)
    assert verdict.numbers["LSTM, small − large at 0.75"].mean == pytest.approx(0.25)
    assert verdict.numbers["LSTM, at once − large at 0.9"].mean == pytest.approx(0.1)
    assert "perceptron, straight − large at 0.9" in verdict.numbers
    assert "LSTM, straight − large at 0.9" not in verdict.numbers


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


@pytest.mark.parametrize("family", ["perceptron", "LSTM"])
@pytest.mark.parametrize(
    ("label", "named"),
    [
        ("small for 0.75", "small − large at 0.75"),
        ("random at 0.9", "random − large at 0.9"),
        ("at once at 0.9", "at once − large at 0.9"),
    ],
)
def test_a_reversed_order_refutes_the_claim_and_is_named(family, label, named):
    rows = observations()
    for row in rows:
        for point in row["points"][f"{family}, {label}"]:
            point["loss"] -= 4
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert f"{family}, {named}" in verdict.reason


def test_a_gap_that_could_be_chance_leaves_it_open():
    rows = observations()
    for row, loss in zip(rows, (1.0, 3.0, 2.4)):
        row["points"]["LSTM, small for 0.9"][0]["loss"] = loss
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "LSTM, small − large at 0.9" in verdict.reason


def test_small_networks_are_the_smallest_with_as_many_bytes():
    for size in (1, 20_000, 143_000):
        width = paper._width_of(paper.ByteLstm, size)
        assert footprint(paper.ByteLstm(width), "dense") >= size
        assert width == 1 or footprint(paper.ByteLstm(width - 1), "dense") < size


def test_ramps_of_the_controls_end_where_they_should():
    cubic, once, late = (paper.pruner(0.9, 800, **options) for options in ({}, {"at_once": True}, {"late": True}))
    assert (cubic.begin, cubic.end) == (100, 500)
    assert (once.begin, once.end) == (500, 500)
    assert late.end == 800
    assert cubic.heads
    assert cubic.embeddings


def test_both_families_are_trained_and_pruned_to_equal_bytes(drawn_digits, monkeypatch):
    monkeypatch.setattr(paper, "digits", lambda: drawn_digits)
    settings = copy.deepcopy(paper.QUICK)
    settings["perceptron"] |= {"width": 32, "training_images": 8, "networks": 1, "steps": 16, "batch": 8}
    settings["lstm"] |= {"width": 16, "bytes": 20_000, "steps": 16, "batch": 4, "length": 9, "judged": 8}
    found = paper.run(settings, 0, lambda items, description: items)["points"]
    assert len(found) == 11 + 8
    for family in ("perceptron", "LSTM"):
        for sparsity in (0.75, 0.9, 0.95):
            large = found[f"{family}, large at {sparsity}"][0]["bytes"]
            small = found[f"{family}, small for {sparsity}"][0]["bytes"]
            assert large <= small
            assert large < found[f"{family}, large, dense"][0]["bytes"]
    assert found["LSTM, large, dense"][0]["bytes"] == footprint(paper.ByteLstm(16), "dense")
    kept, weights, biases = 52 + 64 + 205, 256 * 4 + 64 * 20 + 256 * 16, 64 + 64 + 256
    assert found["LSTM, large at 0.95"][0]["bytes"] == 4 * kept + weights // 8 + 4 * biases


def test_residual_networks_stand_beside_in_the_full_budget(monkeypatch, drawn_textures):
    monkeypatch.setattr(paper, "textures", lambda: drawn_textures)
    settings = copy.deepcopy(paper.FULL)
    settings["residual"] |= {"width": 8, "images": 8, "judged": 4, "steps": 16, "batch": 8}
    found = dict(paper._residuals(settings, 0, lambda items, description: items))
    assert found.keys() == LOSSES.keys()
    for sparsity in (0.75, 0.9, 0.95):
        assert found[f"large at {sparsity}"]["bytes"] <= found[f"small for {sparsity}"]["bytes"]
    rows = observations()
    for row, noise in zip(rows, (0.0, 0.1, -0.1)):
        row["points"] |= {
            f"residual, {label}": [{"bytes": 10, "loss": noise + (9.0 if label == "large at 0.9" else 2.0)}]
            for label in LOSSES
        }
    verdict = paper.decide(rows)
    assert verdict.outcome == "holds"  # it is told, and does not count
    assert verdict.numbers["residual, small − large at 0.9"].mean == pytest.approx(-7)

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.errors import CalibrationError
from gossamer.papers import essential_sparsity as paper
from gossamer.papers import run_experiment
from gossamer.papers.python_source import python_source

TINY = {
    **paper.QUICK,
    "layers": 1,
    "width": 32,
    "length": 16,
    "batch": 4,
    "pretraining_bytes": [2000, 4000],
    "pretraining_steps": 40,
    "sparsities": [0.3, 0.6, 0.9],
    "classes": 2,
    "training_snippets": 32,
    "held_out_snippets": 32,
    "held_out_sequences": 16,
    "finetuning_steps": 2,
    "finetuning_batch": 4,
    "finetuned_sparsities": [0.5, 0.9],
    "vision": {
        **paper.QUICK["vision"],
        "networks": 2,
        "pretraining_steps": 3,
        "training_images": 4,
        "finetuning_steps": 2,
        "sparsities": [0.5, 0.9],
    },
}


def observation(shift=0.0, tickets=(0.9, 0.5)):
    """What a run would give if the paper were right, by the numbers."""
    x = [0.0, 0.2, 0.4, 0.6, 0.8]
    good, poor = [0.5, 0.5, 0.499, 0.35, 0.2], [0.5, 0.3, 0.25, 0.2, 0.2]
    return {
        "curves": {"magnitude": {"x": x, "y": good}, "random": {"x": x, "y": poor}},
        "es": {"magnitude": 0.42 + shift, "random": 0.01 + shift / 2},
        "reached": {"magnitude": True, "random": True},
        "es_by_data": {"1000": 0.2 + shift, "3000": 0.3 + shift, "10000": 0.42 + 2 * shift},
        "ladder": {"2:4": [0.5, 0.40 + shift], "1:4": [0.75, 0.2 + shift]},
        "monitor": {"abrupt": False},
        "downstream": {
            "curves": {
                "magnitude": {"x": [0, 0.5], "y": [0.6, 0.6]},
                "random": {"x": [0, 0.5], "y": [0.6, 0.5 + shift]},
            },
            "es": {"magnitude": 0.5 + shift},
            "tickets": [
                {"inside": True, "jaccard": tickets[0] + shift, "above_chance": 0.5, "accuracy": 0.6},
                {"inside": False, "jaccard": tickets[1], "above_chance": 0.5 + shift, "accuracy": 0.5},
            ],
        },
        "vision": {
            "es": {
                "self-supervised": [0.6 + shift, 0.7],
                "supervised": [0.5, 0.58 + shift],
                "two digits": [0.9, 0.9 + shift],
                "random": [0.1, 0.2 + shift],
            }
        },
    }


def observations(**changes):
    rows = [observation(0.0), observation(0.01), observation(-0.01)]
    for row in rows:
        row.update(copy.deepcopy(changes))
    return rows


def test_the_rule_says_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["knee"] == pytest.approx(0.4, abs=0.05)


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("sharp drop", {"reached": {"magnitude": False, "random": True}}),
        ("sharp drop", {"curves": {"magnitude": {"x": [0, 0.2, 0.4, 0.6, 0.8], "y": [0.5, 0.4, 0.3, 0.2, 0.1]}}}),
        ("N:M below", {"ladder": {"2:4": [0.5, 0.49], "1:4": [0.75, 0.2]}}),
    ],
)
def test_a_part_that_fails_fails_the_claim(part, changes):
    verdict = paper.decide(observations(**changes))
    assert verdict.outcome == "does not hold"
    assert f"{part}: does not hold" in verdict.reason


def test_similarity_that_rises_beyond_fails_and_missing_sides_are_inconclusive():
    rising = [observation(shift, tickets=(0.4, 0.6)) for shift in (0.0, 0.01, -0.01)]
    assert "tickets part: does not hold" in paper.decide(rising).reason
    for row in rising:
        row["downstream"]["tickets"] = row["downstream"]["tickets"][:1]
        row["downstream"]["tickets"][0]["inside"] = False
    assert "tickets part: inconclusive" in paper.decide(rising).reason


def test_the_vision_half_is_judged_by_network():
    rows = observations()
    numbers = paper.decide(rows).numbers
    assert numbers["vision_gain_of_self_supervision"].mean == pytest.approx(0.11)
    assert numbers["vision_gain_over_random"].above_zero
    assert numbers["vision_gain_of_an_easier_task"].above_zero
    for row in rows:
        es = row["vision"]["es"]
        es["supervised"], es["self-supervised"] = es["self-supervised"], es["supervised"]
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert "self-supervised: does not hold" in verdict.reason


def test_data_that_help_only_in_the_end_are_inconclusive():
    rows = observations()
    for row in rows:
        row["es_by_data"]["3000"] = 0.1
    assert "grows with data: inconclusive" in paper.decide(rows).reason


def test_a_tiny_run_goes_through_the_engine(tmp_path, drawn_digits):
    from dataclasses import replace

    experiment = replace(paper.experiment, budgets={"tiny": TINY})
    result = run_experiment(experiment, "tiny", seeds=2, output=tmp_path, progress=False)
    assert len(result.observations) == 2
    observed = result.observations[0]
    assert set(observed["curves"]) >= {"magnitude", "random", "random, ERK", "per layer", "Wanda", "magnitude, 2,000 B"}
    assert len(observed["monitor"]["below"]) == 20
    assert set(observed["ladder"]) == {"1:2", "2:4", "4:8", "1:4"}
    assert [row["sparsity"] for row in observed["downstream"]["tickets"]] == [0.5, 0.9]
    vision = observed["vision"]
    assert [len(values) for values in vision["es"].values()] == [2] * 4
    assert vision["curves"]["supervised"]["x"] == [0, 0.5, 0.9]
    assert result.observations[1]["vision"] != vision
    assert (tmp_path / "essential-sparsity.png").exists()


def test_snippets_are_balanced_and_repeatable():
    a, b = (python_source(50_000, 40, 40, 32, 4, seed=3) for _ in range(2))
    assert torch.equal(a.text, b.text)
    assert torch.equal(a.held_out.tokens, b.held_out.tokens)
    assert a.held_out.tokens.shape == (40, 32)
    assert a.held_out.labels.bincount().tolist() == [10, 10, 10, 10]
    assert not torch.equal(a.text, python_source(50_000, 40, 40, 32, 4, seed=4).text)
    assert torch.equal(a.text[:1000], python_source(1000, 40, 40, 32, 4, seed=3).text)


def test_held_out_snippets_are_not_in_the_text():
    source = python_source(3_000_000, 8, 200, 64, 4, seed=0)
    text = bytes(source.text.tolist())
    found = sum(bytes(snippet.tolist()) in text for snippet in source.held_out.tokens)
    assert found < 10, "only boilerplate may occur twice"


def test_more_source_than_there_is_gets_a_clear_error():
    with pytest.raises(CalibrationError, match="standard library"):
        python_source(10**10, 40, 40, 32, 4, seed=0)

"""Experiments on learned links and on attention over pairs: each part of a rule decides, and a tiny run ends well."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch

from gossamer.papers import kronecker_attention, sparsifiner
from gossamer.papers.cluttered_images import ClutteredImages
from gossamer.papers.kronecker_attention import DEEP, PAIRS, WIDE
from gossamer.papers.match_three import MatchThree, TripleNetwork, parameters_of, widest_within
from gossamer.papers.sparsifiner import BLIND, CHANCE, DENSE, NEAR, ORACLE, OURS, PROJECTED, TOKENS


def shifted(build):
    return [build(shift) for shift in (0.0, 0.01, -0.01)]


def silent(items, description):
    return items


# ------------------------------------------------------------------------------------------------ Sparsifiner


def links_observation(shift=0.0):
    """What a run gives where the claim is right."""
    recalls = {OURS: 0.6, BLIND: 0.3, CHANCE: 0.25, NEAR: 0.4, PROJECTED: 0.35, ORACLE: 0.8, TOKENS: 1.0, DENSE: 1.0}
    found = {
        name: {"recall": recall + shift, "accuracy": 85.0 + shift, "attention": 0.6, "multihead": 0.8, "total": 0.9}
        for name, recall in recalls.items()
    }
    return {"found": found, "before": 80.0, "times": {"64 of 3137": 0.5}}


def varied(rows, name, kind, value):
    for place, row in enumerate(rows):
        row["found"][name][kind] = value + 0.001 * place
    return rows


def test_the_claim_of_sparsifiner_holds_where_every_part_does():
    verdict = sparsifiner.decide(shifted(links_observation))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["recall, Sparsifiner − local"].mean == pytest.approx(0.2)
    assert verdict.numbers["accuracy, Sparsifiner − dense + a point"].mean == pytest.approx(1.0)
    assert verdict.numbers["time of links over dense, 64 of 3137"] == 0.5


@pytest.mark.parametrize(
    ("name", "kind", "value", "named"),
    [
        (CHANCE, "recall", 0.9, "recall, Sparsifiner − random"),
        (NEAR, "recall", 0.9, "recall, Sparsifiner − local"),
        (BLIND, "recall", 0.9, "recall, Sparsifiner − without reconstruction"),
        (DENSE, "accuracy", 95.0, "accuracy, Sparsifiner − dense"),
        (OURS, "attention", 1.2, "more operations"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_sparsifiner_and_is_named(name, kind, value, named):
    rows = varied(shifted(links_observation), name, kind, value)
    verdict = sparsifiner.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named.split(", ")[-1] in verdict.reason
    assert sparsifiner.decide(rows[:1]).outcome == "inconclusive"


def test_sparsifiner_runs_every_way_to_choose(drawn_digits, monkeypatch):
    monkeypatch.setattr(sparsifiner, "digits", lambda: drawn_digits)
    monkeypatch.setattr(sparsifiner, "SPEED_TOKENS", (20,))
    settings = sparsifiner.QUICK | {"images": 8, "held_out": 40, "width": 16, "layers": 2, "heads": 2, "batch": 8}
    settings |= {"steps": 5, "reconstruct": 3, "distill": 3}
    observed = sparsifiner.run(settings, 0, silent)
    found = observed["found"]
    assert set(found) == {OURS, BLIND, CHANCE, NEAR, PROJECTED, ORACLE, TOKENS, DENSE}
    assert found[ORACLE]["recall"] == max(row["recall"] for name, row in found.items() if name not in (TOKENS, DENSE))
    assert found[DENSE]["total"] == found[DENSE]["recall"] == 1
    assert found[TOKENS]["total"] <= found[OURS]["total"] < 1
    assert found[CHANCE]["attention"] < found[OURS]["attention"]


def test_an_object_keeps_its_place_on_top_of_the_clutter(drawn_digits):
    task = ClutteredImages(drawn_digits, canvas=28, pieces=3, size=7)
    images, labels = task.draw(6, torch.Generator().manual_seed(0))
    assert images.shape == (6, 1, 28, 28)
    assert labels.shape == (6,)
    plain = (drawn_digits.images - 0.3) / 0.4
    for image, label in zip(images, labels):
        below = [bool((image >= one - 1e-6).all()) for one in plain[drawn_digits.labels == label]]
        assert any(below)
    assert torch.equal(images, task.draw(6, torch.Generator().manual_seed(0))[0])


# ----------------------------------------------------------------------------------------- attention over pairs


def pairs_observation(shift=0.0):
    """What a run gives where the claim is right."""
    match = {PAIRS: 90.0, WIDE: 75.0, DEEP: 70.0}
    kinds = {"operations, exact": 3.0, "operations, polynomial": 1.0, "seconds, exact": 2.5}
    return {
        "errors": [
            {"B": 1.0, "degree": 4, "error": 0.1, "guarantee": 0.2, "random features": 1.0, "best pairs": 0.5},
        ],
        "powers": {
            "2": {"power": 2.1 + shift},
            "3": {"power": 3.2 + shift, "bounds": [1.0], "features": [70]},
            "4": {"power": 4.3},
        },
        "exponents": {kind: value + shift / 10 for kind, value in kinds.items()},
        "times": {"exact": {"64": 0.1}, "polynomial": {"64": 0.01}},
        "match": {name: {"accuracy": value + shift, "parameters": 100} for name, value in match.items()},
    }


def test_the_claim_of_attention_over_pairs_holds_where_every_part_does():
    verdict = kronecker_attention.decide(shifted(pairs_observation))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["fitted power of B at order 3"].mean == pytest.approx(3.2)
    assert verdict.numbers["errors above guarantee"] == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda row: row["errors"][0].update(error=0.3), "guarantee"),
        (lambda row: row["exponents"].update({"operations, polynomial": 1.9}), "do not grow"),
        (lambda row: row["exponents"].update({"operations, exact": 2.0}), "do not grow"),
        (lambda row: row["powers"]["3"].update(power=2.0), "power of B from 3"),
        (lambda row: row["powers"]["2"].update(power=3.0), "power of B from 2"),
        (lambda row: row["match"][WIDE].update(accuracy=99.0), WIDE),
        (lambda row: row["match"][DEEP].update(accuracy=99.0), DEEP),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_pairs_and_is_named(change, named):
    rows = shifted(pairs_observation)
    for row in rows:
        change(row)
    verdict = kronecker_attention.decide(rows)
    assert verdict.outcome == "does not hold"
    assert named in verdict.reason
    assert kronecker_attention.decide(rows[:1]).outcome == "inconclusive"


def test_attention_over_pairs_runs_through():
    settings = copy.deepcopy(kronecker_attention.QUICK)
    settings |= {"tokens": 12, "bounds": [1.0], "degrees": [1, 4], "largest": 2.0}
    settings |= {"exact_lengths": [8, 16], "polynomial_lengths": [32, 64]}
    settings["match"] |= {"steps": 3, "judged": 20, "length": 6, "width": 8, "heads": 2}
    observed = kronecker_attention.run(settings, 0, silent)
    assert all(row["error"] <= row["guarantee"] for row in observed["errors"])
    assert observed["exponents"]["operations, exact"] == pytest.approx(3)
    assert observed["exponents"]["operations, polynomial"] == pytest.approx(1)
    parameters = [observed["match"][name]["parameters"] for name in (PAIRS, WIDE, DEEP)]
    assert max(parameters) == parameters[0]


@pytest.mark.parametrize("power", [2.0, 3.0, 4.5])
def test_the_power_of_a_line_in_it_is_found(power):
    bounds = np.linspace(0.5, 2, 8)
    assert kronecker_attention._fitted_power(list(bounds), list(1 + 2 * bounds**power)) == pytest.approx(power)


def test_answers_are_those_of_trying_all_pairs():
    task = MatchThree(length=7, modulus=11, values=4)
    tokens, answers = task.draw(20, torch.Generator().manual_seed(0))
    for sequence, said in zip(tokens.tolist(), answers.tolist()):
        assert len(set(sequence)) <= 4
        wanted = [any((x + y + z) % 11 == 0 for y, z in itertools.product(sequence, repeat=2)) for x in sequence]
        assert said == wanted
    assert 0.2 < answers.double().mean() < 0.8


def test_the_widest_network_within_a_budget_is_just_within():
    found = widest_within(5000, modulus=11, heads=4, hidden=16, order=2, layers=2)
    width = found.embedding.embedding_dim
    assert parameters_of(found) <= 5000 < parameters_of(TripleNetwork(11, width + 4, 4, 16, 2, 2))
    assert found(torch.randint(11, (2, 5))).shape == (2, 5)

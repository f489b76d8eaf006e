from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from gossamer.papers import sparse_rnn as paper
from gossamer.papers.pronunciation import Pronouncer, coded
from gossamer.papers.reber import encode, reber_dataset
from gossamer.papers.reber_networks import CELLS, GrammarTask, Recogniser, dense_body, equal_hidden
from gossamer.training.graph_prediction import predict_result
from gossamer.training.graph_rnn import GraphRNN
from gossamer.training.graph_study import random_graph
from gossamer.training.static import Static

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def linear_regression(monkeypatch):
    """One regression for all of them, which takes milliseconds."""

    def predict(rows, features, result, regressor="", permutations=0, **_):
        return predict_result(rows, features, result, "bayesian ridge", permutations=permutations)

    monkeypatch.setattr(paper, "predict_result", predict)


def points(cell_loss=0.0, chance=0.9):
    return [
        {"amount": 0.6, "which": "both", "score": "magnitude", "accuracies": [0.93, 0.98 - cell_loss]},
        {"amount": 0.6, "which": "both", "score": "random", "accuracies": [0.55, chance]},
        {"amount": 1.0, "which": "both", "score": "magnitude", "accuracies": [0.5, 0.51]},
    ]


def observation(seed=0, foretold=True):
    """What a run gives where the claim is right."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(15):
        nodes, edges = generator.normal(size=2)
        accuracy = 0.8 + (0.05 * nodes if foretold else 0) + 0.005 * generator.normal()
        rows.append({"nodes": nodes, "edges": edges, "gru": accuracy, "gru, dense": 0.9, "kind": "watts-strogatz"})
    small = 0.001 * seed
    pruning = [{"cell": cell, "number": seed, "dense": 0.98, "points": points(small), "peers": {}} for cell in CELLS]
    real_points = [
        {"amount": 0.0, "score": "magnitude", "accuracies": [0.9, 0.89]},
        {"amount": 0.6, "score": "magnitude", "accuracies": [0.8, 0.888 + small]},
        {"amount": 0.6, "score": "random", "accuracies": [0.1, 0.3]},
    ]
    prediction = {"permutations": 39, "trees": 10}
    real = {"dense": 0.89, "points": real_points, "epoch": True}
    return {"pruning": pruning, "real": real, "graphs": rows, "prediction": prediction}


def observations(**changes):
    return [copy.deepcopy(observation(seed, **changes)) for seed in range(3)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["p of R², gru"] == pytest.approx(1 / 40)
    assert verdict.numbers["accuracy, gru, magnitude at 60% of both, pruned"] == pytest.approx(0.93)


def test_one_seed_decides_nothing():
    assert paper.decide(observations()[:1]).outcome == "inconclusive"


def test_a_cell_that_loses_too_much_fails_and_is_named():
    rows = observations()
    for row in rows:
        row["pruning"][2]["points"] = points(0.05)
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert "lost at 60 % after an epoch, gru" in verdict.reason


def test_chance_that_does_as_well_fails():
    rows = observations()
    for row in rows:
        row["pruning"][3]["points"] = points(chance=0.99)
    verdict = paper.decide(rows)
    assert verdict.outcome == "does not hold"
    assert "by chance at 60 %, both retrained, lstm" in verdict.reason


def test_what_still_works_without_weights_fails():
    rows = observations()
    for row in rows:
        row["pruning"][1]["points"][2]["accuracies"] = [0.9, 0.9]
    assert "no recurrent weight, relu" in paper.decide(rows).reason


def test_relu_may_lose_more():
    rows = observations()
    for row in rows:
        row["pruning"][1]["points"] = points(0.2)
    assert paper.decide(rows).outcome == "holds"


def test_the_real_network_must_recover_only_after_a_whole_epoch():
    rows = observations()
    for row in rows:
        row["real"]["points"][1]["accuracies"][1] -= 0.1
    assert "letters to phonemes" in paper.decide(rows).reason
    for row in rows:
        row["real"]["epoch"] = False
    verdict = paper.decide(rows)
    assert verdict.outcome == "holds"
    assert verdict.numbers["lost at 60 % after retraining, letters to phonemes"] > 0.09


def test_graphs_that_foretell_nothing_fail():
    verdict = paper.decide(observations(foretold=False))
    assert verdict.outcome == "does not hold"
    assert "foretell" in verdict.reason


def test_spread_makes_it_inconclusive():
    rows = observations()
    for row, lost in zip(rows, (0.02, -0.02, 0.02)):
        row["pruning"][0]["points"] = points(lost)
    verdict = paper.decide(rows)
    assert verdict.outcome == "inconclusive"
    assert "tanh" in verdict.reason


def test_a_small_run_gives_what_the_rule_reads(monkeypatch):
    entries = [("ab", ("AE1", "B")), ("ba", ("B", "AA1")), ("b", ("B",)), ("a", ("AH0",))]
    monkeypatch.setattr(paper, "words", lambda number, seed: coded((entries * number)[:number]))
    monkeypatch.setattr(paper, "pronouncer", lambda: Pronouncer(8).eval())
    small = {
        "strings": 64,
        "held_out": 40,
        "epochs": 1,
        "networks": 1,
        "hidden": 6,
        "embedding": 5,
        "graphs": 3,
        "graph_strings": 64,
    }
    small |= {
        "embedding": 5,
        "words": 8,
        "held_out_words": 4,
        "graph_epochs": 1,
        "nodes": [10, 12],
        "lengths": [10, 20],
    }
    found = paper.run({**paper.QUICK, **small}, 0, lambda items, description: items)
    assert {network["cell"] for network in found["pruning"]} == set(paper.TOUGH)
    assert {name for network in found["pruning"] for name in network["peers"]} == {"static", "set"}
    assert len(found["graphs"]) == 3
    assert {"tanh", "gru", "tanh, dense", "gru, dense", "layers"} <= found["graphs"][0].keys()
    assert {point["score"] for point in found["real"]["points"]} == {"magnitude", "random", "per gate"}
    labels = paper._peer_numbers([found])
    assert "accuracy, tanh, set from the start" in labels


def test_full_measures_all_that_quick_does():
    assert set(paper.QUICK["amounts"]) <= set(paper.FULL["amounts"])
    assert set(paper.QUICK["word_amounts"]) <= set(paper.FULL["word_amounts"])
    assert paper.QUICK.keys() == paper.FULL.keys()


@pytest.mark.parametrize("cell", CELLS)
def test_a_dense_cell_gets_as_many_parameters_as_the_graph(cell):
    body = GraphRNN(random_graph("watts-strogatz", 24, 0), cell)
    width = equal_hidden(cell, body.input_size, body.active_parameters)
    counts = [sum(p.numel() for p in dense_body(cell, body.input_size, w).parameters()) for w in (width, width + 1)]
    assert abs(counts[0] - body.active_parameters) <= abs(counts[1] - body.active_parameters)
    assert abs(counts[0] - body.active_parameters) < 0.1 * body.active_parameters


@pytest.mark.parametrize("layers", [1, 2])
def test_padding_does_not_change_the_answer(layers):
    torch.manual_seed(0)
    network = Recogniser(dense_body("lstm", 4, 5, layers))
    both, alone = encode(["BTXSE", "BTSSSXXVVE"]), encode(["BTXSE"])
    torch.testing.assert_close(network(both.tokens, both.lengths)[:1], network(alone.tokens, alone.lengths))


def test_a_network_learns_the_grammar_and_a_method_keeps_its_zeros():
    task = GrammarTask(*reber_dataset(500, near_misses=0.0, lengths=(10, 20)).split(400), 32, 1e-2)
    torch.manual_seed(0)
    network = Recogniser(dense_body("gru", 10, 12))
    before = task.accuracy(network)
    task.train(network, 4, Static(sparsity=0.5, include=("body",)))
    assert task.accuracy(network) > max(0.8, before)
    weights = [value for name, value in network.named_parameters() if "body.weight" in name]
    total = sum(value.numel() for value in weights)
    assert sum(int((value == 0).sum()) for value in weights) == total // 2
    assert (network.head.weight != 0).all()

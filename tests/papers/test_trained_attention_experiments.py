"""Experiments on attention that is trained sparse: what is to be recalled, each part of a rule, and tiny runs."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.papers import routing_transformer, s2_attention
from gossamer.papers.recall_language import Heads, Lesson, RecallGPT, attended_pairs, draw_recall, judge, masked

TINY = {"bytes": 60_000, "length": 64, "held_out": 4, "pairs": 6, "text_batch": 1, "batch": 2, "steps": 3, "width": 16}


def silent(items, description):
    return items


def text(size=20_000):
    return torch.randint(32, 127, (size,), generator=torch.Generator().manual_seed(0))


def test_what_is_asked_for_was_said_where_it_is_said_to_lie():
    recall = draw_recall(text(), 5, 100, 8, torch.Generator().manual_seed(1))
    for row in range(5):
        tokens = recall.tokens[row].tolist()
        assert sorted(set(recall.places[row].tolist())) == list(range(84, 100, 2))
        for place, distance, value in zip(recall.places[row], recall.distances[row], recall.values()[row]):
            name = tokens[place]
            assert tokens.index(name) == place - distance < 84
            assert tokens[place - distance + 1] == value == tokens[place + 1]
        assert len({name for name in tokens if 128 <= name < 192}) == 8


class _Finder(torch.nn.Module):
    """Says after every byte what followed it the first time."""

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 256)
        for row, sequence in enumerate(tokens.tolist()):
            for place, byte in enumerate(sequence):
                logits[row, place, sequence[sequence.index(byte) + 1 if byte >= 128 else 0]] = 9.0
        return logits, torch.zeros(())


def test_marks_are_full_for_a_model_that_finds_and_low_for_one_that_does_not():
    lesson = Lesson.of(text(), {"length": 80, "held_out": 6, "pairs": 8})
    assert judge(_Finder(), lesson).recalled == 1
    torch.manual_seed(0)
    blind = RecallGPT(16, 80, [Heads(16, 2, 8, masked(torch.eye(80, dtype=torch.bool)[None]))])
    assert judge(blind, lesson).recalled < 0.2


def test_a_model_sees_no_byte_behind():
    torch.manual_seed(0)
    links = torch.ones(1, 30, 30, dtype=torch.bool).tril()
    model = RecallGPT(16, 30, [Heads(16, 2, 8, masked(links))])
    tokens = text(30)[None]
    other = tokens.clone()
    other[:, 20:] += 1
    torch.testing.assert_close(model(tokens)[0][:, :20], model(other)[0][:, :20])


# ------------------------------------------------------------------------------------------------- S2-Attention


def s2_observation(shift=0.0):
    recalled = {"dense": 0.9, "a shard for each head": 0.9, "the same stripe for all heads": 0.3, "window": 0.2}
    marks = {name: {"loss": 2.0, "recalled": value + shift, "keys a query": 9.0} for name, value in recalled.items()}
    marks["dense"]["recalled"] = 0.9
    return {"marks": marks, "keys and values stored": 0.3}


def shifted(build, size):
    return [build(part * size) for part in (0, 1, -1)]


def test_the_claim_of_s2_holds_where_every_part_does():
    verdict = s2_attention.decide(shifted(s2_observation, 0.005))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["recalled by shards − by the window"].mean == pytest.approx(0.7)
    assert s2_attention.decide([s2_observation()]).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("name", "part", "value", "said"),
    [
        ("the same stripe for all heads", "recalled", 1.5, "the same stripe"),
        ("window", "recalled", 1.5, "the window"),
        ("dense", "recalled", 1.5, "dense"),
        ("a shard for each head", "loss", 2.1, "loss by shards"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_s2_and_is_named(name, part, value, said):
    rows = shifted(s2_observation, 0.005)
    for row in rows:
        row["marks"][name][part] = value
    verdict = s2_attention.decide(rows)
    assert verdict.outcome == "does not hold"
    assert said in verdict.reason


def test_rivals_of_the_shards_read_no_less_and_the_shards_together_everything():
    links = s2_attention.contestants({**s2_attention.QUICK})
    pairs = {name: attended_pairs(part) for name, part in links.items()}
    assert 0 <= pairs["window"] - pairs["a shard for each head"] < 1
    assert pairs["the same stripe for all heads"] >= pairs["a shard for each head"]
    assert bool(links["a shard for each head"].any(0).tril().eq(links["dense"][0]).all())


def test_s2_trains_every_contestant():
    settings = copy.deepcopy(s2_attention.QUICK) | TINY
    row = s2_attention.run(settings, 0, silent)
    assert set(row["marks"]) == set(s2_observation()["marks"])
    assert all(0 <= marks["recalled"] <= 1 < marks["loss"] for marks in row["marks"].values())


# ------------------------------------------------------------------------------------------------------ routing


def routing_observation(shift=0.0):
    recalled = {"routing": 0.8 + shift, "strictly causal routing": 0.7, "random centroids": 0.3, "hashing": 0.4}
    recalled |= {"strided": 0.1, "local": 0.05, "dense": 0.95}
    marks = {name: {"loss": 2.0 + shift, "recalled": value} for name, value in recalled.items()}
    marks["local"]["loss"] = 2.0
    return {"marks": marks, "routing": {"share": 0.5}, "keys a query": dict.fromkeys(recalled, 8.0)}


def test_the_claim_of_routing_holds_where_every_part_does():
    verdict = routing_transformer.decide(shifted(routing_observation, 0.01))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["recalled by routing − by random centroids"].mean == pytest.approx(0.5)
    assert routing_transformer.decide([routing_observation()]).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("name", "part", "value", "said"),
    [
        ("random centroids", "recalled", 1.5, "random centroids"),
        ("strided", "recalled", 1.5, "strided"),
        ("local", "recalled", 1.5, "local"),
        ("local", "loss", 1.5, "loss of local"),
    ],
)
def test_a_reversed_part_refutes_the_claim_of_routing_and_is_named(name, part, value, said):
    rows = shifted(routing_observation, 0.01)
    for row in rows:
        row["marks"][name][part] = value
    verdict = routing_transformer.decide(rows)
    assert verdict.outcome == "does not hold"
    assert said in verdict.reason


def test_heads_of_all_kinds_read_equally_many_keys():
    settings = routing_transformer.QUICK
    keys = routing_transformer.keys_a_query(settings)
    for kind in ("strictly causal routing", "hashing", "strided", "local"):
        assert keys[kind] == pytest.approx(keys["routing"], rel=0.1)


def test_only_learned_centroids_move():
    settings = routing_transformer.QUICK | TINY | {"decay": 0.5}
    kinds = {"routing": True, "strictly causal routing": True, "random centroids": False, "hashing": False}
    for kind, moves in kinds.items():
        layer = routing_transformer.make_attention(kind, settings, 0)
        before = layer.kmeans.means.clone()
        for _ in range(2):
            layer(torch.randn(1, 64, 16))
        assert torch.equal(before, layer.kmeans.means) is not moves


def test_routing_trains_every_contestant():
    settings = copy.deepcopy(routing_transformer.QUICK) | TINY | {"clusters": 4, "local_window": 8}
    row = routing_transformer.run(settings, 0, silent)
    assert set(row["marks"]) == set(routing_observation()["marks"])
    assert 0 <= row["routing"]["share of attention in clusters"] <= 1

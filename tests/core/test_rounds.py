from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.rounds import drop_in_turn, drop_lowest, prune_in_rounds
from gossamer.core.scores import lamp
from gossamer.errors import ConfigurationError, SparsityError

ALIVE = {"a": torch.tensor([[True, True], [False, True]]), "b": torch.tensor([[True, True, True]])}
SCORES = {"a": torch.tensor([[-5.0, 3.0], [-9.0, 0.0]]), "b": torch.tensor([[1.0, 2.0, -1.0]])}


def bits(masks):
    return {name: mask.int().tolist() for name, mask in masks.items()}


def test_the_lowest_of_what_is_alive_go_whatever_the_sign():
    assert bits(drop_lowest(ALIVE, SCORES, 3)) == {"a": [[0, 1], [0, 0]], "b": [[1, 1, 0]]}
    assert bits(drop_lowest(ALIVE, SCORES, 0)) == bits(ALIVE)


def test_infinity_protects_and_too_few_candidates_are_all_that_goes():
    scores = SCORES | {"b": torch.full((1, 3), torch.inf)}
    assert bits(drop_lowest(ALIVE, scores, 5)) == {"a": [[0, 0], [0, 0]], "b": [[1, 1, 1]]}


@pytest.mark.parametrize("count", [-1, 7])
def test_more_than_there_are_cannot_go(count):
    with pytest.raises(SparsityError, match="of 6 remaining"):
        drop_lowest(ALIVE, SCORES, count)


def test_criteria_take_turns():
    opposite = {name: -values for name, values in SCORES.items()}
    masks, removed = drop_in_turn(ALIVE, (SCORES, 1), (opposite, 2))
    assert bits(masks) == {"a": [[0, 0], [0, 1]], "b": [[1, 0, 1]]}
    assert removed == (1, 2)


def test_the_first_criterion_removes_what_a_later_one_cannot_find():
    nothing = {name: torch.full_like(values, torch.inf) for name, values in SCORES.items()}
    masks, removed = drop_in_turn(ALIVE, (SCORES, 1), (nothing, 2))
    assert bits(masks) == bits(drop_lowest(ALIVE, SCORES, 3))
    assert removed == (3, 0)


def test_many_random_scores_against_a_sort():
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.randn(60, 50, generator=generator).mul(4).round() for name in "xyz"}
    alive = {name: torch.rand(60, 50, generator=generator) < 0.6 for name in "xyz"}
    flat = torch.cat([scores[n].masked_fill(~alive[n], -torch.inf).flatten() for n in "xyz"])
    dead = int(sum((~mask).sum() for mask in alive.values()))
    expected = torch.ones(9000, dtype=torch.bool)
    expected[flat.argsort(stable=True)[: dead + 1234]] = False
    found = drop_lowest(alive, scores, 1234)
    assert torch.equal(torch.cat([found[n].flatten() for n in "xyz"]), expected)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def train(model, masks):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (model(torch.randn(16, 6)) - 1).square().mean().backward()
        optimiser.step()


def halve(seen):
    def choose(ended):
        seen.append(ended)
        scores = ended.scores(lambda target: target.matrix().abs())
        return drop_lowest(ended.alive, scores, ended.remaining // 2)

    return choose


def test_movement_counts_from_where_the_round_began():
    model, moved = network(), []

    def choose(ended):
        target = ended.targets[0]
        moved.append((ended.movement(target), ended.movement(target, since="initial"), target.matrix().clone()))
        return drop_lowest(ended.alive, ended.scores(lambda target: target.matrix().abs()), 10)

    original = model[0].weight.detach().clone()
    masks = prune_in_rounds(model, train, choose, 2, restart=False)
    since_start, since_initial, weight = moved[1]
    assert torch.equal(since_initial, (weight - original).abs())
    began = moved[0][2] * masks[0]["0.weight"]
    assert torch.equal(since_start, (weight - began).abs())
    assert not torch.equal(since_start, since_initial)


def test_restarting_returns_to_the_first_weights_and_retraining_trains_once_more():
    seen, runs = [], []

    def watched(model, masks):
        runs.append((masks.sparsity, model[0].weight.detach().clone()))
        train(model, masks)

    model = network()
    prune_in_rounds(model, watched, halve(seen), 2, retrain=True)
    assert [run[0] for run in runs] == [0.0, 0.5, 0.5, 0.75]
    assert torch.equal(runs[2][1] != 0, runs[1][1] != 0)
    assert torch.equal(runs[1][1], runs[2][1])
    kept = runs[1][1] != 0
    assert torch.equal(runs[1][1][kept], model[0].weight.detach()[kept])


def test_rounds_without_end_or_beginning_are_refused():
    with pytest.raises(ConfigurationError, match="at least 1"):
        prune_in_rounds(network(), train, halve([]), 0)


def test_lamp_divides_each_square_by_those_that_are_not_smaller():
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    expected = torch.tensor([[9 / 9, 1 / 14], [4 / 13, 0.0]])
    torch.testing.assert_close(lamp(weight), expected)
    assert lamp(torch.zeros(2, 2)).tolist() == [[0, 0], [0, 0]]


def test_the_numbers_of_a_round_are_not_those_that_made_the_weights():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 2))

    def choose(ended):
        drawn = {t.name: torch.rand(t.shape, generator=ended.generator) for t in ended.targets}
        return drop_lowest(ended.alive, drawn, 1000)

    masks = prune_in_rounds(model, lambda model, masks: None, choose, 1, seed=7)
    kept = model[0].weight.detach()[masks[0]["0.weight"]]
    assert 0.4 < float((kept < 0).double().mean()) < 0.6

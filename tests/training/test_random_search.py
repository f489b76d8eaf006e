from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gossamer.core.masks import MaskSet
from gossamer.core.nodes import node_groups, shrink
from gossamer.core.patterns import Unstructured
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError, SparsityError
from gossamer.training.random_search import RandomSearch
from gossamer.training.searchers import LearningCurve, NodeImportance, compare_searchers, important_nodes


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 3))


def data(seed=0, count=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def candidates(method, model):
    """Each candidate by itself, as the draws of one and the same generator."""
    generator = method.generator()
    for _ in range(method.n_trials):
        nodes = {}
        for name, group in node_groups(model).items():
            kept = torch.randperm(group.size, generator=generator)[: round((1 - method.sparsity) * group.size)]
            nodes[name] = torch.zeros(group.size, dtype=torch.bool).index_fill_(0, kept, True)
        yield shrink(model, nodes).double()


def gradient_norm(model, inputs, targets):
    cross_entropy(model(inputs), targets).backward()
    return math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))


def test_side_by_side_scores_are_those_of_each_candidate_alone():
    model, (inputs, targets) = network(), data()
    for score, alone in {
        "init_loss": lambda m: cross_entropy(m(inputs.double()), targets).item(),
        "accuracy": lambda m: float((m(inputs.double()).argmax(1) == targets).double().mean()),
        "gradient_norm": lambda m: gradient_norm(m, inputs.double(), targets),
    }.items():
        method = RandomSearch(n_trials=7, sparsity=0.6, score=score, at_once=3)
        found = method.search(model, (inputs, targets))
        expected = [alone(candidate) for candidate in candidates(method, model)]
        assert found.scores.tolist() == pytest.approx(expected, rel=1e-5)
        best = min(expected) if score == "init_loss" else max(expected)
        assert expected[found.best_index] == best


def test_warm_up_is_gradient_descent_on_the_batches_in_turn():
    model, batches = network(), [data(0), data(1, 24)]
    method = RandomSearch(n_trials=4, sparsity=0.5, warm_up=3, learning_rate=0.2)
    found = method.search(model, batches)
    expected = []
    for candidate in candidates(method, model):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.2)
        for step in range(3):
            optimizer.zero_grad()
            inputs, targets = batches[step % 2]
            cross_entropy(candidate(inputs.double()), targets).backward()
            optimizer.step()
        losses = [cross_entropy(candidate(x.double()), y).item() for x, y in batches]
        expected.append((40 * losses[0] + 24 * losses[1]) / 64)
    assert found.scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert found.forward_passes == 4 * (2 + 3 * 3)


@pytest.mark.parametrize("space", ["node", "edge"])
def test_the_first_draw_does_not_depend_on_how_many_follow(space):
    model = network()
    many = RandomSearch(n_trials=9, space=space, sparsity=0.5, seed=3).search(model, data())
    few = RandomSearch(n_trials=4, space=space, sparsity=0.5, seed=3).search(model, data())
    one = RandomSearch(n_trials=1, space=space, sparsity=0.5, seed=3).search(model)
    assert torch.equal(many.scores[:4], few.scores)
    assert one.best_index == 0
    assert one.forward_passes == 0
    assert one.skipped == 0
    chosen = RandomSearch(n_trials=1, space=space, sparsity=0.5, seed=3).search(model, data())
    assert chosen.masks == one.masks
    assert chosen.scores[0] == many.scores[0]
    other = RandomSearch(n_trials=1, space=space, sparsity=0.5, seed=3, stream=1).search(model)
    assert other.masks != one.masks


def test_every_layer_keeps_its_rounded_share_of_nodes_and_its_initial_weights():
    model = network()
    found = RandomSearch(n_trials=5, sparsity=0.77).search(model, data())
    assert {name: int(kept.sum()) for name, kept in found.nodes.items()} == {"0.weight": 5, "2.weight": 2}
    small = shrink(model, found.nodes)
    rows = found.nodes["0.weight"]
    assert torch.equal(small[0].weight, model[0].weight[rows])
    # 5·6 + 2·5 + 3·2 of 120 + 200 + 30 weights
    assert found.weight_sparsity == pytest.approx(1 - 46 / 350)


def test_edges_keep_an_exact_number_in_each_layer_whatever_made_the_weights():
    model = network(seed=5)
    found = RandomSearch(n_trials=6, sparsity=0.5, space="edge", seed=5).search(model, data())
    assert found.nodes == {}
    assert set(found.masks.layer_sparsity().values()) == {0.5}
    kept = model[0].weight.detach()[found.masks["0.weight"]]
    assert 0.3 < float((kept > 0).double().mean()) < 0.7
    best = copy.deepcopy(model)
    found.masks.apply_(best)
    inputs, targets = data()
    assert cross_entropy(best(inputs), targets).item() == pytest.approx(float(found.scores.min()), rel=1e-5)


def test_edge_candidates_do_not_regrow_while_they_warm_up():
    model = network()
    found = RandomSearch(n_trials=3, sparsity=0.8, space="edge", warm_up=2, learning_rate=0.5).search(model, data())
    expected = []
    generator = RandomSearch(sparsity=0.8, space="edge").generator()
    for _ in range(3):
        candidate = copy.deepcopy(model)
        names = ("0.weight", "2.weight", "4.weight")
        draws = [torch.rand(candidate.get_parameter(n).shape, generator=generator) for n in names]
        masks = MaskSet({n: Unstructured("layer").select(d, 0.8) for n, d in zip(names, draws)})
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.5)
        masks.apply_(candidate)
        for _ in range(2):
            optimizer.zero_grad()
            inputs, targets = data()
            cross_entropy(candidate(inputs), targets).backward()
            optimizer.step()
            masks.apply_(candidate)
        expected.append(cross_entropy(candidate(inputs), targets).item())
    assert found.scores.tolist() == pytest.approx(expected, rel=1e-4)


def test_normalisation_uses_the_batch_and_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 3)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, targets = torch.rand(16, 1, 6, 6) + 5, torch.randint(3, (16,))
    state = torch.get_rng_state()
    found = RandomSearch(n_trials=3, sparsity=0.5).search(model, (images, targets))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    winner = shrink(model, found.nodes).eval()
    winner[1].train()
    assert cross_entropy(winner(images), targets).item() == pytest.approx(float(found.scores.min()), rel=1e-5)


def test_a_score_that_is_nan_is_skipped_and_counted():
    model = network()
    method = RandomSearch(n_trials=12, sparsity=0.5, at_once=5)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with_it = sum(bool(torch.isnan(c[0].weight).any()) for c in candidates(method, model))
    assert 0 < with_it < 12
    found = method.search(model, data())
    assert found.skipped == with_it == int(found.scores.isnan().sum())
    assert not found.nodes["0.weight"][0]
    with torch.no_grad():
        model[4].bias[0] = float("nan")
    with pytest.raises(NonFiniteError, match="all 12 scores are NaN"):
        method.search(model, data())


def test_attached_it_trains_the_network_that_was_found():
    model, batch = network(), data()
    method = RandomSearch(n_trials=8, sparsity=0.5, data=batch)
    found = method.search(model, batch)
    small = shrink(model, found.nodes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    run = method.attach(model, optimizer)
    for _ in range(5):
        for network_, opt in ((model, optimizer), (small, second)):
            opt.zero_grad()
            cross_entropy(network_(batch[0]), batch[1]).backward()
            opt.step()
    torch.testing.assert_close(model(batch[0]), small(batch[0]))
    masks = run.finalize()
    assert all(torch.equal(masks[name], found.masks[name]) for name in masks)


@pytest.mark.parametrize(
    "options",
    [{"n_trials": 0}, {"space": "layer"}, {"score": "ntk"}, {"warm_up": -1}, {"at_once": 0}, {"sparsity": 1.0}],
)
def test_bad_settings_are_refused(options):
    with pytest.raises(ConfigurationError):
        RandomSearch(**options)


def test_a_layer_without_nodes_and_a_search_without_data_are_refused():
    with pytest.raises(SparsityError, match=r"none of the 20 nodes of 0\.weight"):
        RandomSearch(sparsity=0.98).search(network(), data())
    with pytest.raises(CalibrationError, match="no data"):
        RandomSearch().search(network())


# ------------------------------------------------------------------------------------------------- comparing searchers


def learn(model, seed):
    """Recognise the sign of a sum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    steps, metrics = [], []
    judged = torch.randn(200, 6, generator=torch.Generator().manual_seed(99))
    for step in range(30):
        inputs = torch.randn(32, 6)
        optimizer.zero_grad()
        cross_entropy(model(inputs), (inputs.sum(1) > 0).long()).backward()
        optimizer.step()
        if step % 10 == 9:
            steps.append(step + 1)
            metrics.append(float((model(judged).argmax(1) == (judged.sum(1) > 0)).double().mean()))
    return LearningCurve(steps, metrics)


def test_a_comparison_has_a_row_for_every_trial_and_repeats():
    searchers = {
        "best": RandomSearch(n_trials=5),
        "chance": RandomSearch(n_trials=1),
        "informed": NodeImportance(train=learn),
    }

    def compare():
        return compare_searchers(searchers, network, data, [0.5, 0.8], [0, 1], learn)

    rows, again = compare(), compare()
    assert [{**row, "initial_score": None} for row in rows] == [{**row, "initial_score": None} for row in again]
    assert [row["searcher"] for row in rows[:2]] == ["dense", "dense"]
    assert len(rows) == 2 + 2 * 2 * 3
    by = {(row["searcher"], row["sparsity"], row["seed"]): row for row in rows}
    assert by["best", 0.5, 0]["forward_passes"] == 5
    assert by["chance", 0.5, 0]["forward_passes"] == 1
    assert by["informed", 0.5, 0]["forward_passes"] == 3 * 30
    assert by["best", 0.8, 1]["initial_score"] <= by["chance", 0.8, 1]["initial_score"]
    assert by["best", 0.5, 0]["weight_sparsity"] > 0.5
    parent = network(0)
    torch.manual_seed(0)
    assert by["dense", 0.0, 0]["metric"] == learn(parent, 0).final > 0.8


def test_all_trainings_see_the_same_data_in_the_same_order():
    seen = []

    def watch(model, seed):
        seen.append(torch.randn(3).tolist())
        return LearningCurve([1], [0.5])

    compare_searchers({"a": RandomSearch(n_trials=3), "b": RandomSearch(n_trials=1)}, network, data, [0.5], [7], watch)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


def test_masks_from_any_searcher_are_trained_as_masks():
    @dataclass
    class First:
        sparsity: float = 0.5
        seed: int = 0

        def search(self, model, data):
            keep = torch.ones(20, 6, dtype=torch.bool)
            keep[: round(20 * self.sparsity)] = False
            return MaskSet({"0.weight": keep})

    kept = []

    def watch(model, seed):
        kept.append(int(torch.count_nonzero(model[0].weight)))
        return learn(model, seed)

    rows = compare_searchers({"first": First()}, network, data, [0.5], [0], watch)
    assert kept == [120, 60]
    assert rows[1]["weight_sparsity"] == 0.5


def test_important_nodes_have_the_largest_product_of_norms():
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, -9.0, 2.0, 50.0]]))  # products 5, 9, 4, 0
    assert important_nodes(model, 0.5)["0.weight"].tolist() == [True, True, False, False]


def test_steps_to_a_target_and_the_area_of_a_curve():
    curve = LearningCurve([10, 20, 40], [0.2, 0.6, 0.8])
    assert curve.steps_to(0.6) == 20
    assert curve.steps_to(0.81) is None
    assert curve.final == 0.8
    assert curve.area == pytest.approx((10 * 0.2 + 10 * 0.4 + 20 * 0.7) / 40)


def test_a_comparison_without_seeds_or_with_a_second_dense_is_refused():
    with pytest.raises(ConfigurationError):
        compare_searchers({"dense": RandomSearch()}, network, data, [0.5], [0], learn)
    with pytest.raises(ConfigurationError):
        compare_searchers({}, network, data, [0.5], [], learn)


def test_attached_in_edge_space_it_trains_under_the_winning_masks():
    model, batch = network(), data()
    method = RandomSearch(n_trials=4, sparsity=0.5, space="edge", data=batch)
    found = method.search(model, batch)
    run = method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert run.finalize() == found.masks

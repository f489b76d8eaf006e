from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError
from gossamer.training.g2g_measures import group_measures, path_count, wiring_measures
from gossamer.training.g2gnet import G2G, draw_wiring, g2g_mask, inter_probability, mask_of_groups, unit_groups
from gossamer.training.hebbian import HebbianScore


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def step(model, optimizer, seed):
    x = torch.randn(32, 24, generator=generator(seed))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long()).backward()
    optimizer.step()


def test_groups_are_balanced_blocks_or_strides():
    assert unit_groups(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert unit_groups(6, 3, "mixer", layer=0).tolist() == [0, 0, 1, 1, 2, 2]
    assert unit_groups(6, 3, "mixer", layer=1).tolist() == [0, 1, 2, 0, 1, 2]
    drawn = unit_groups(100, 8, "random", generator=generator())
    assert sorted(drawn.tolist()) == unit_groups(100, 8).tolist() != drawn.tolist()
    for units in range(8, 30):
        sizes = unit_groups(units, 8).bincount(minlength=8)
        assert int(sizes.max() - sizes.min()) <= 1


def test_all_edges_within_groups_exist_and_none_between_without_a_probability():
    mask = g2g_mask(4, 6, groups=2, p_inter=0.0)
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2
    assert g2g_mask(4, 6, groups=2, p_inter=1.0).all()


@pytest.mark.parametrize("grouping", ["index", "random", "mixer"])
def test_density_follows_the_formula_within_three_deviations(grouping):
    groups, p, size = 8, 0.15, 256
    mask = g2g_mask(size, size, groups, p, grouping, generator=generator(1))
    pairs = size * size * (1 - 1 / groups)
    expected = size * size * (1 / groups + (1 - 1 / groups) * p)
    assert abs(int(mask.sum()) - expected) < 3 * (pairs * p * (1 - p)) ** 0.5


def test_the_number_of_edges_can_be_exact():
    mask = g2g_mask(40, 24, 4, 0.2, "random", exact=True, generator=generator())
    assert int(mask.sum()) == 40 * 24 // 4 + round(0.2 * 40 * 24 * 3 / 4)
    ends = [unit_groups(units, 4, "random", generator=generator(seed)) for seed, units in enumerate((40, 24))]
    within = ends[0].unsqueeze(1) == ends[1]
    assert mask_of_groups(*ends, 0.1, exact=True, generator=generator())[within].all()


def test_a_mixer_lets_two_layers_connect_every_group_with_every_other():
    mixed = [g2g_mask(64, 64, 8, 0.0, "mixer", layer=layer).float() for layer in (0, 1)]
    assert (mixed[1] @ mixed[0] > 0).all()
    alone = [g2g_mask(64, 64, 8, 0.0, "index", layer=layer).float() for layer in (0, 1)]
    assert float((alone[1] @ alone[0] > 0).float().mean()) == 1 / 8


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: unit_groups(4, 5), ConfigurationError, "groups is 5 for 4 units"),
        (lambda: unit_groups(4, 0), ConfigurationError, "groups is 0"),
        (lambda: unit_groups(4, 2, "indices"), UnknownNameError, "index"),
        (lambda: g2g_mask(8, 8, 2, 1.5), ConfigurationError, "p_inter is 1.5"),
        (lambda: inter_probability(0.9, 8), SparsityError, "8 groups reach at most 0.875"),
        (lambda: G2G(sparsity=0.9), SparsityError, "more groups"),
        (lambda: G2G(p_inter=-0.1), ConfigurationError, "p_inter is -0.1"),
        (lambda: G2G(groups=0), ConfigurationError, "groups is 0"),
        (lambda: G2G(grouping="rows"), UnknownNameError, "rows"),
        (lambda: G2G(prune="hebb"), UnknownNameError, "hebbian"),
        (lambda: G2G(growth="set"), UnknownNameError, "rule to grow by"),
        (lambda: G2G(every=0), ConfigurationError, "every"),
        (lambda: G2G(every=5, begin=9, end=9), ConfigurationError, "begin, end"),
        (lambda: G2G(exchange=1.5), ConfigurationError, "exchange is 1.5"),
        (lambda: HebbianScore("squared"), UnknownNameError, "squared"),
    ],
)
def test_bad_arguments_are_named_in_one_line(call, error, named):
    with pytest.raises(error) as caught:
        call()
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_probability_and_sparsity_are_two_ways_to_say_the_same():
    assert inter_probability(0.74375, 8) == pytest.approx(0.15)
    assert G2G(p_inter=0.15).sparsity == pytest.approx(0.74375)
    assert G2G(groups=4, p_inter=0.0).sparsity == 0.75


@pytest.mark.parametrize("grouping", ["index", "random", "mixer"])
def test_the_method_wires_every_layer_with_exactly_its_sparsity_and_keeps_it(grouping):
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    run = G2G(groups=4, sparsity=0.6, grouping=grouping).attach(model, optimizer)
    masks = run.masks
    assert set(masks) == {"0.weight", "2.weight"}
    for name, mask in masks.items():
        assert int((~mask).sum()) == round(0.6 * mask.numel())
        ends = (run.extra[f"groups of {name}, out"], run.extra[f"groups of {name}, in"])
        assert mask[ends[0].unsqueeze(1) == ends[1]].all()
    for seed in range(3):
        step(model, optimizer, seed)
    assert run.finalize() == masks
    assert not masks.violations(model)
    if grouping == "random":  # a group goes on in the next layer
        assert torch.equal(run.extra["groups of 0.weight, out"], run.extra["groups of 2.weight, in"])


def test_a_layer_with_fewer_units_than_groups_is_named():
    model = perceptron()
    with pytest.raises(ConfigurationError, match=r"4\.weight.*groups is 8"):
        G2G(groups=8, sparsity=0.5, heads=True).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(SparsityError, match=r"edges between groups"):
        draw_wiring(G2G().targets(model), 0.8, 2)


@pytest.mark.parametrize("prune", ["set", "random", "hebbian"])
@pytest.mark.parametrize("growth", ["hebbian", "random", "gradient"])
def test_exchanges_move_edges_and_keep_their_number(prune, growth):
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    method = G2G(groups=4, sparsity=0.6, every=2, end=7, exchange=0.2, prune=prune, growth=growth)
    run = method.attach(model, optimizer)
    counts = {name: run.active(name) for name in run.targets}
    seen = [run.masks]
    for seed in range(8):
        step(model, optimizer, seed)
        assert {name: run.active(name) for name in run.targets} == counts
        seen.append(run.masks)
    moved = [one.distance(other) > 0 for one, other in pairwise(seen)]
    assert moved == [False, True, False, True, False, True, False, False]
    assert (method.phase(0), method.phase(7)) == ("explore", "frozen")
    run.finalize()
    assert not any(key.startswith("activity") for key in run.extra)
    assert not model[0]._forward_hooks


def test_correlations_are_those_of_numpy():
    model = perceptron().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = G2G(groups=4, sparsity=0.5).attach(model, optimizer)
    score = HebbianScore("signed")
    score.attach(run)
    inputs = [torch.randn(50, 24, dtype=torch.float64, generator=generator(seed)) + 5 for seed in range(3)]
    for x in inputs:
        model(x)
    before = torch.cat(inputs)
    with torch.no_grad():
        behind = torch.relu(model[0](before))  # this pass is heard as well
    everything = np.concatenate([np.concatenate([before, before]), np.concatenate([behind, behind])], 1)
    alive = behind.std(0) > 0
    with np.errstate(invalid="ignore"):  # of units that are silent
        expected = np.corrcoef(everything.T)[24:, :24]
    found = score(run, "0.weight")
    np.testing.assert_allclose(found[alive].numpy(), expected[alive.numpy()], atol=1e-9)
    score.variant = "absolute"
    torch.testing.assert_close(score(run, "0.weight")[alive], found[alive].abs())


def test_a_unit_that_is_silent_never_gets_an_edge():
    model = perceptron()
    with torch.no_grad():
        model[0].bias[3] = -100.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = G2G(groups=4, sparsity=0.6, every=1, growth="hebbian", exchange=0.3).attach(model, optimizer)
    before = run.mask("0.weight")
    for seed in range(4):
        x = torch.randn(32, 24, generator=generator(seed))
        x[:, 7] = 2.5
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    came = run.mask("0.weight") & ~before
    assert came.any()
    assert not came[3].any()
    assert not came[:, 7].any()


def test_the_residual_variant_listens_to_the_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = G2G(groups=2, sparsity=0.4).attach(model, optimizer)
    score = HebbianScore("residual")
    score.attach(run)
    x = torch.randn(40, 6, dtype=torch.float64)
    hidden = model[0](x)
    hidden.retain_grad()
    model[1](hidden).square().sum().backward()
    expected = np.corrcoef(np.concatenate([x.numpy(), hidden.grad.numpy()], 1).T)[6:, :6]
    np.testing.assert_allclose(score(run, "0.weight").numpy(), np.abs(expected), atol=1e-9)


def test_only_passes_in_training_shortly_before_an_exchange_are_heard():
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    run = G2G(groups=4, sparsity=0.6, every=5, batches=2).attach(model, optimizer)
    model.eval()
    model(torch.randn(3, 24))
    model.train()
    heard = []
    for seed in range(5):
        step(model, optimizer, seed)
        heard.append(run.extra.get("activity of 0.weight, count", 0))
    assert heard == [0, 0, 0, 32, 0]


def test_a_score_that_has_heard_nothing_says_so():
    model = perceptron()
    run = G2G(groups=4, sparsity=0.6).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    score = HebbianScore()
    with pytest.raises(ConfigurationError, match="another run"):
        score(run, "0.weight")
    score.attach(run)
    with pytest.raises(ConfigurationError, match=r"no forward pass of 0\.weight"):
        score(run, "0.weight")


def test_all_gates_of_a_recurrent_unit_belong_to_its_group():
    model = nn.LSTM(8, 12)
    run = G2G(groups=4, sparsity=0.6).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for name, mask in run.masks.items():
        groups = run.extra[f"groups of {name}, out"]
        assert groups.tolist() == unit_groups(12, 4).repeat(4).tolist()
        assert mask[groups.unsqueeze(1) == run.extra[f"groups of {name}, in"]].all()
        assert int((~mask).sum()) == round(0.6 * mask.numel())


def test_only_linear_layers_are_heard():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="Conv2d"):
        G2G(groups=2, sparsity=0.4, every=2).attach(model, optimizer)
    run = G2G(groups=2, sparsity=0.4).attach(model, optimizer)
    assert run.mask("0.weight")[0, 0].all()
    assert group_measures(run)["0.weight"]["inter_fraction"] < 0.5


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not():
    def begin():
        model = perceptron()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer

    method = G2G(groups=4, sparsity=0.6, every=4, batches=3, prune="hebbian", growth="hebbian", exchange=0.2)
    model, optimizer = begin()
    run = method.attach(model, optimizer)
    for seed in range(6):
        step(model, optimizer, seed)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    state = run.state_dict()
    other, other_optimizer = begin()
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    other_run = method.attach(other, other_optimizer, state)
    for seed in range(6, 14):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
    assert run.masks == other_run.masks
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters()))


def test_measures_of_wirings_worked_out_by_hand():
    groups = torch.tensor([0, 0, 1, 1])
    blocks = groups.unsqueeze(1) == groups
    found = wiring_measures(blocks, groups, groups)
    assert (found["inter_fraction"], found["modularity"], found["assortativity"]) == (0, 0.5, 1)
    assert (found["in_degree_mean"], found["in_degree_deviation"], found["out_degree_largest"]) == (2, 0, 2)
    full = wiring_measures(torch.ones(4, 4, dtype=torch.bool), groups, groups)
    assert full["inter_fraction"] == full["modularity"] + 0.5 == 0.5
    assert full["assortativity"] == 0
    opposite = wiring_measures(~blocks, groups, groups)
    assert (opposite["inter_fraction"], opposite["modularity"], opposite["assortativity"]) == (1, -0.5, -1)
    with pytest.raises(ConfigurationError, match="0 edges"):
        wiring_measures(torch.zeros(4, 4, dtype=torch.bool), groups, groups)


def test_paths_are_counted_from_inputs_to_outputs():
    first = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    second = torch.tensor([[1, 1], [0, 1]]).bool()
    assert path_count([first, second]) == 6
    assert path_count([first]) == 4
    with pytest.raises(ConfigurationError, match="layer 1 reads 3 units"):
        path_count([first, first])
    with pytest.raises(ConfigurationError, match="no mask"):
        path_count([])

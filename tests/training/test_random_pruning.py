from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.core.selection import dropped_count
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, NonFiniteError, SparsityError, UnknownNameError
from gossamer.training.random_pruning import RandomPruning
from gossamer.training.saliency import count_paths, saliency

pytestmark = pytest.mark.filterwarnings("ignore:.*(stays dense|have no input left)")


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def batch(shape=(20,)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, *shape, generator=generator), torch.randint(10, (12,), generator=generator)


def attach(method, model=None):
    model = network() if model is None else model
    return method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3))


RULES = [
    "uniform",
    "uniform-plus",
    "erdos-renyi",
    "erdos-renyi-kernel",
    "erdos-renyi-kernel-plus",
    "snip",
    "grasp",
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sparsity", [0.5, 0.63])
def test_every_rule_meets_the_budget_to_the_weight(rule, sparsity):
    run = attach(RandomPruning(sparsity=sparsity, allocation=rule, batch=batch()))
    assert sum(run.active(name) for name in run.targets) == run.total - dropped_count(run.total, sparsity)
    assert {"0.weight", "2.weight", "4.weight"} == set(run.targets)


@pytest.mark.parametrize("rule", RULES)
def test_a_bernoulli_draw_has_the_same_densities_on_average(rule):
    exact = attach(RandomPruning(sparsity=0.6, allocation=rule, batch=batch()))
    rows = [
        attach(RandomPruning(sparsity=0.6, allocation=rule, batch=batch(), draw="bernoulli", seed=s)) for s in range(30)
    ]
    for name, target in exact.targets.items():
        size, density = target.shape.numel(), exact.active(name) / target.shape.numel()
        mean = sum(run.active(name) for run in rows) / len(rows) / size
        assert abs(mean - density) <= 4 * (density * (1 - density) / size / len(rows)) ** 0.5 + 1 / size
    assert density in (0, 1) or len({run.active(name) for run in rows}) > 1


def test_the_mask_never_changes_and_holds_while_training():
    model = network()
    run = attach(RandomPruning(sparsity=0.8), model)
    before = run.masks
    x, y = batch()
    for _ in range(5):
        run.optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        run.optimizer.step()
        assert not run.masks.violations(model)
    assert run.finalize() == before


def test_a_seed_repeats_the_draw():
    masks = [attach(RandomPruning(sparsity=0.8, seed=seed)).masks for seed in (3, 3, 4)]
    assert masks[0] == masks[1] != masks[2]


def test_layers_are_kept_dense_by_role_and_the_others_make_up_for_it():
    run = attach(RandomPruning(sparsity=0.5, allocation="uniform", keep=("first", "last")))
    assert run.active("0.weight") == 20 * 64
    assert run.active("4.weight") == 320
    assert sum(run.active(name) for name in run.targets) == run.total - dropped_count(run.total, 0.5)
    with pytest.raises(SparsityError, match=r"0\.weight"):
        attach(RandomPruning(sparsity=0.9, allocation="uniform", keep=("first",)))


def test_given_sparsities_are_taken_and_missing_ones_named():
    run = attach(RandomPruning(allocation={"0.weight": 0.5, "2.weight": 0.9, "4.weight": 0.25}))
    assert run.masks.layer_sparsity() == pytest.approx({"0.weight": 0.5, "2.weight": 0.9, "4.weight": 0.25}, abs=1e-3)
    with pytest.raises(UnknownNameError, match=r"2\.weight"):
        attach(RandomPruning(allocation={"0.weight": 0.5, "4.weight": 0.25}))


def test_snip_ratios_are_those_of_the_highest_scores_but_other_places():
    model, data = network(), batch()
    x, y = data
    plain = network()
    nn.functional.cross_entropy(plain(x), y).backward()
    scores = {n: (p * p.grad).abs().detach() for n, p in plain.named_parameters() if n.endswith("weight")}
    threshold = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    kept = len(threshold) - dropped_count(len(threshold), 0.7)
    expected = {name: score >= threshold[kept - 1] for name, score in scores.items()}
    run = attach(RandomPruning(sparsity=0.7, allocation="snip", batch=data), model)
    for name, mask in expected.items():
        assert run.active(name) == int(mask.sum())
        assert not torch.equal(run.mask(name), mask)
    exact = attach(RandomPruning(sparsity=0.7, allocation="snip", batch=data, redraw=False))
    assert all(torch.equal(exact.mask(name), mask) for name, mask in expected.items())


def test_snip_and_grasp_agree_with_derivatives_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    shapes = [p.shape for p in model.parameters()]

    def loss(flat, divisor):
        first, second = flat[:12].view(shapes[0]), flat[12:].view(shapes[1])
        return nn.functional.cross_entropy(torch.tanh(x @ first.T) @ second.T / divisor, y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.autograd.functional.jacobian(lambda w: loss(w, 1.0), flat)
    snip = saliency(model, find_targets(model, heads=True), x, y)
    torch.testing.assert_close(torch.cat([s.flatten() for s in snip.values()]), (flat * gradient).abs().float())
    gradient = torch.autograd.functional.jacobian(lambda w: loss(w, 200.0), flat)
    product = torch.autograd.functional.hessian(lambda w: loss(w, 200.0), flat) @ gradient
    grasp = saliency(model, find_targets(model, heads=True), x, y, kind="grasp")
    torch.testing.assert_close(torch.cat([s.flatten() for s in grasp.values()]), (flat * product).float())


def test_scoring_leaves_weights_statistics_gradients_and_chance_alone():
    model = nn.Sequential(*convolutional(), nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    for kind in ("snip", "grasp"):
        saliency(model, find_targets(model, heads=True), *batch((3, 8, 8)), kind=kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_damaged_batches_and_idle_weights_are_named():
    x, y = batch()
    x[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        attach(RandomPruning(sparsity=0.5, allocation="snip", batch=(x, y)))

    class Idle(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    model = Idle(nn.Linear(20, 10), nn.Linear(20, 10))
    with pytest.raises(ConfigurationError, match=r"1\.weight takes no part"):
        attach(RandomPruning(sparsity=0.5, allocation="snip", batch=batch()), model)


def test_every_unit_keeps_some_inputs_where_that_is_asked_for():
    dead = attach(RandomPruning(sparsity=0.94, allocation="uniform"))
    assert any("have no input left" in note for note in dead.notes)
    run = attach(RandomPruning(sparsity=0.94, allocation="uniform", min_per_unit=1))
    for name in run.targets:
        assert run.active(name) == dead.active(name)
        assert run.mask(name).flatten(1).sum(1).min() >= 1
    assert not any("have no input left" in note for note in run.notes)
    with pytest.raises(SparsityError, match="min_per_unit = 3 is out of reach"):
        attach(RandomPruning(sparsity=0.94, allocation="uniform", min_per_unit=3))


def test_an_empty_layer_and_a_network_without_a_path_are_refused():
    with pytest.raises(SparsityError, match=r"0\.weight is left without a single weight"):
        attach(RandomPruning(sparsity=0.9999, allocation="uniform"))
    thin = {"0.weight": 1 - 2 / 1280, "2.weight": 1 - 2 / 2048, "4.weight": 1 - 2 / 320}
    with pytest.raises(SparsityError, match="no path of weights"):
        attach(RandomPruning(sparsity=0.9, allocation=thin, example=torch.randn(1, 20)))
    attach(RandomPruning(sparsity=0.9, example=torch.randn(1, 20)))


def test_paths_are_counted_as_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 3.0], [0.0, 0.0]]))
        model[3].weight.copy_(torch.tensor([[0.5, -1.0, 4.0], [0.0, 0.0, 7.0]]))
        model[1].running_mean.fill_(9)
    before = copy.deepcopy(model.state_dict())
    found = count_paths(model, torch.randn(1, 2))
    torch.testing.assert_close(found, torch.tensor([[3.0, 0.0]], dtype=torch.float64), rtol=1e-4, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_sparse_fan_in_keeps_the_variance_of_a_layer():
    plain, scaled = network(), network()
    attach(RandomPruning(sparsity=0.75, allocation="uniform"), plain)
    attach(RandomPruning(sparsity=0.75, allocation="uniform", init="sparse fan-in"), scaled)
    torch.testing.assert_close(scaled[0].weight, plain[0].weight * 2)
    x = torch.randn(2000, 20, generator=torch.Generator().manual_seed(9))
    dense = x @ network()[0].weight.detach().T
    assert float((x @ scaled[0].weight.detach().T).var() / dense.var()) == pytest.approx(1, abs=0.15)


def test_dense_layers_are_told():
    run = attach(RandomPruning(sparsity=0.5, allocation="uniform-plus"), convolutional())
    assert any("0.weight stays dense: uniform-plus" in note for note in run.notes)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"sparsity": 1.0}, SparsityError, r"\[0, 1\)"),
        ({"allocation": "erk"}, ConfigurationError, "erdos-renyi-kernel-plus, snip"),
        ({"allocation": "snip"}, ConfigurationError, "need a batch"),
        ({"redraw": False}, ConfigurationError, "highest scores of snip"),
        ({"draw": "poisson"}, ConfigurationError, "exact or bernoulli"),
        ({"init": "zeros"}, ConfigurationError, "sparse fan-in"),
        ({"min_per_unit": -1}, ConfigurationError, "min_per_unit"),
        ({"last_density": 0}, ConfigurationError, "last_density"),
    ],
)
def test_impossible_settings_are_refused(options, error, named):
    with pytest.raises(error, match=named):
        RandomPruning(**options)


def test_sizes_of_layers_are_what_the_paper_gives_them():
    # by hand: ERK densities in proportion to (out + in + 3 + 3) / (9 out in), and 26/160 for the last
    run = attach(RandomPruning(sparsity=0.8), convolutional())
    raw = {"0.weight": 17 / 216, "3.weight": 30 / 1152, "7.weight": 26 / 160}
    size = {"0.weight": 216, "3.weight": 1152, "7.weight": 160}
    scale = 0.2 * 1528 / sum(raw[n] * size[n] for n in raw)
    assert max(raw.values()) * scale < 1
    for name in raw:
        assert run.active(name) == pytest.approx(raw[name] * scale * size[name], abs=1)
    assert math.isclose(sum(run.active(n) for n in raw), 1528 - dropped_count(1528, 0.8))

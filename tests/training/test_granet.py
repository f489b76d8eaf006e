from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.core.allocation import allocate
from gossamer.core.selection import dropped_count
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.granet import GraNet
from gossamer.training.plasticity import Plasticity, pruning_plasticity

pytestmark = pytest.mark.filterwarnings("ignore:.*stays dense")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def steps_of(model, optimizer, steps, seed=1, after=lambda: None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(16, 20, generator=generator), torch.randint(10, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        after()


def train(method, steps, after=lambda run: None):
    model = network()
    optimizer = optimizer_of(model)
    run = method.attach(model, optimizer)
    steps_of(model, optimizer, steps, after=lambda: after(run))
    return run


def counts(run):
    return {name: run.active(name) for name in run.targets}


@pytest.mark.parametrize("growth", ["gradient", "random", "momentum"])
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_sparsity_follows_the_ramp_to_the_weight_and_ends_exactly(start, growth):
    method = GraNet(sparsity=0.93, initial_sparsity=start, begin=3, end=50, ramp_end=37, every=5, growth=growth)
    seen = {}
    run = train(method, 55, lambda run: seen.setdefault(run.step, sum(counts(run).values())))
    assert seen[1] == run.total - dropped_count(run.total, start)
    for step in (8, 13, 18, 23, 28, 33, 37):
        ramp = 0.93 + (start - 0.93) * (1 - (step - 3) / 34) ** 3 if step < 37 else 0.93
        assert seen[step] == run.total - dropped_count(run.total, ramp), step
    assert set(list(seen.values())[37:]) == {run.total - dropped_count(run.total, 0.93)}


def test_regeneration_keeps_the_number_of_each_layer_and_most_of_its_weights(monkeypatch):
    method = GraNet(sparsity=0.9, end=40, every=4)
    seen = []
    from gossamer.core.sparse_training import SparseTraining

    exchange = SparseTraining.exchange

    def watch(run, share, *rest):
        before = {name: run.mask(name) for name in run.targets}
        exchange(run, share, *rest)
        for name, mask in before.items():
            after = run.mask(name)
            assert share[name] == math.ceil(method.share_at(run.step) * int(mask.sum()))
            assert int(after.sum()) == int(mask.sum())
            assert int((after & mask).sum()) >= int(mask.sum()) - share[name]
            assert not run.weight(name)[after & ~mask].any()
            seen.append(int((after & ~mask).sum()))

    monkeypatch.setattr(SparseTraining, "exchange", watch)
    train(method, 45)
    assert len(seen) == 3 * len([step for step in range(1, 46) if method.exchanges(step)])
    assert sum(seen) > 100


def test_one_update_is_the_algorithm_written_out_by_hand():
    model = network()
    optimizer = optimizer_of(model)
    run = GraNet(sparsity=0.9, end=32, ramp_end=16, every=4, initial_sparsity=0.5).attach(model, optimizer)
    masks = {name: run.mask(name) for name in run.targets}
    steps_of(model, optimizer, 3)
    plain = network()
    plain.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(16, 20, generator=generator), torch.randint(10, (16,), generator=generator)
    nn.functional.cross_entropy(plain(x), y).backward()
    gradients = {name: value.grad.clone() for name, value in plain.named_parameters()}
    weights = {}

    def reference():
        share = 0.9 - 0.4 * (1 - 4 / 16) ** 3
        everything = torch.cat([torch.where(masks[n], w.abs(), -1).flatten() for n, w in weights.items()])
        left = len(everything) - dropped_count(len(everything), share)
        threshold = everything.sort(descending=True).values[left - 1]
        rho = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * 4 / 32)) / 2
        expected = {}
        for name, weight in weights.items():
            kept = masks[name] & (weight.abs() >= threshold)
            number = math.ceil(rho * int(kept.sum()))
            smallest = torch.where(kept, weight.abs(), torch.inf).flatten().argsort()[:number]
            kept.view(-1)[smallest] = False
            grown = torch.where(kept, -1, gradients[name].abs()).flatten().argsort(descending=True)[:number]
            kept.view(-1)[grown] = True
            expected[name] = kept
        return expected

    change = type(run.method).change

    def spy(self, training):
        weights.update({name: training.weight(name).clone() for name in training.targets})
        change(self, training)

    type(run.method).change = spy
    try:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    finally:
        type(run.method).change = change
    expected = reference()
    assert run.step == 4
    for name in masks:
        assert torch.equal(run.mask(name), expected[name]), name


def test_without_exchange_it_is_gradual_magnitude_pruning():
    ours = train(
        GraNet(sparsity=0.9, initial_sparsity=0, end=40, ramp_end=22, every=5, exchange=0, last_exchange=0), 30
    )
    theirs = train(GradualMagnitudePruning(sparsity=0.9, end=22, every=5, scope="model", heads=True), 30)
    assert ours.masks == theirs.masks
    assert ours.sparsity == pytest.approx(0.9, abs=1e-3)


def test_without_a_ramp_the_number_of_weights_never_changes_and_weights_move():
    start, seen = [], []

    def watch(run):
        start.append(run.masks)
        seen.append(counts(run))

    train(GraNet(sparsity=0.8, initial_sparsity=0.8, end=40, every=4), 45, watch)
    assert all(each == seen[0] for each in seen)
    assert start[0].distance(start[-1]) > 50
    assert start[39] == start[-1]  # from `end` on nothing moves


def test_the_sparse_start_has_the_numbers_of_its_allocation():
    run = train(GraNet(sparsity=0.9, initial_sparsity=0.6, end=1000, every=1000), 1)
    shapes = {name: tuple(target.shape) for name, target in run.targets.items()}
    expected = allocate("erdos-renyi-kernel", shapes, 0.6)
    for name, shape in shapes.items():
        assert run.active(name) == pytest.approx((1 - expected[name]) * math.prod(shape), abs=1)


def test_a_dense_start_masks_nothing_before_the_first_update():
    run = train(GraNet(sparsity=0.9, initial_sparsity=0, begin=5, end=1000, every=10), 14)
    assert run.sparsity == 0
    assert run.phase == "ramp"


def test_layers_of_one_sparsity_spare_the_classifier_and_keep_the_total():
    run = train(GraNet(sparsity=0.9, scope="layer", end=30, every=3), 35)
    shares = {name: count / run.targets[name].shape.numel() for name, count in counts(run).items()}
    assert shares["4.weight"] == 0.2
    assert shares["0.weight"] == pytest.approx(shares["2.weight"], abs=2e-3)
    assert sum(counts(run).values()) == run.total - dropped_count(run.total, 0.9)
    gentle = train(GraNet(sparsity=0.7, initial_sparsity=0, scope="layer", end=30, every=3), 35)
    assert gentle.masks.layer_sparsity() == pytest.approx(dict.fromkeys(counts(run), 0.7), abs=2e-3)


def test_momentum_grows_where_the_mean_gradient_is_large():
    model = network()
    optimizer = optimizer_of(model)
    run = GraNet(sparsity=0.8, initial_sparsity=0.8, end=40, every=4, growth="momentum", momentum=0.7).attach(
        model, optimizer
    )
    plain, masks = network(), {}
    mean = {}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 5):
        x, y = torch.randn(16, 20, generator=generator), torch.randint(10, (16,), generator=generator)
        plain.load_state_dict(model.state_dict())
        plain.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        for name, parameter in plain.named_parameters():
            if name in run.targets:
                mean[name] = 0.7 * mean.get(name, 0) + parameter.grad
                masks[name] = run.mask(name)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert step < 4 or run.masks.distance(run.masks) == 0
    for name, before in masks.items():
        after = run.mask(name)
        grown, never = after & ~before, ~after
        assert grown.any()
        assert mean[name].abs()[grown].min() >= mean[name].abs()[never & ~before].max()


def test_a_growth_of_ones_own_is_asked_for_every_layer():
    asked = []

    def corner(topology, name):
        asked.append(name)
        shape = topology.targets[name].shape
        return torch.arange(shape.numel(), dtype=torch.float32).view(shape)

    run = train(GraNet(sparsity=0.8, initial_sparsity=0.8, end=10, every=4, growth=corner, exchange=0.3), 5)
    assert asked == ["0.weight", "2.weight", "4.weight"]
    assert run.mask("2.weight").view(-1)[-20:].all()


def test_longer_training_stretches_every_time():
    plain, long = (GraNet(begin=100, ramp_end=1000, end=1600, multiplier=m) for m in (1.0, 2.5))
    assert plain.steps == (100, 1000, 1600)
    assert long.steps == (250, 2500, 4000)
    assert GraNet(end=160).steps == (0, 110, 160)
    assert long.sparsity_at(1375) == pytest.approx(plain.sparsity_at(550))
    assert long.share_at(2125) == pytest.approx(plain.share_at(850)) == pytest.approx(0.2525)


def test_the_exchanged_share_decays_as_asked():
    shares = {decay: GraNet(end=100, decay=decay) for decay in ("cosine", "linear", "constant")}
    assert [shares["constant"].share_at(step) for step in (0, 50, 100)] == [0.5, 0.5, 0.5]
    assert shares["linear"].share_at(25) == pytest.approx(0.5 - 0.495 / 4)
    assert shares["cosine"].share_at(100) == 0.005


def test_gradients_of_zeros_are_only_asked_for_when_they_are_needed():
    def asked(**options):
        return [step for step in range(1, 25) if GraNet(end=20, ramp_end=14, every=4, **options).wants_gradient(step)]

    assert asked() == [4, 8, 12, 14, 16]
    assert asked(growth="random") == []
    assert asked(growth="momentum") == list(range(1, 20))


@pytest.mark.parametrize("growth", ["gradient", "momentum", "random"])
def test_a_resumed_run_equals_one_that_never_stopped(growth):
    def method():
        return GraNet(sparsity=0.9, end=40, every=4, growth=growth)

    model = network()
    optimizer = optimizer_of(model)
    run = method().attach(model, optimizer)
    steps_of(model, optimizer, 18)
    state = [run.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}, optimizer.state_dict()]
    other = network()
    other_optimizer = optimizer_of(other)
    resumed = method().attach(other, other_optimizer)
    state = copy.deepcopy(state)
    steps_of(model, optimizer, 22, seed=2)
    resumed.load_state_dict(state[0])
    other.load_state_dict(state[1])
    other_optimizer.load_state_dict(state[2])
    steps_of(other, other_optimizer, 22, seed=2)
    assert run.masks == resumed.masks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_training_that_stops_early_is_finished():
    assert train(GraNet(sparsity=0.9, end=1000, every=10), 15).finalize().sparsity == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"sparsity": 1.0}, SparsityError, r"\[0, 1\)"),
        ({"initial_sparsity": -0.1}, SparsityError, "initial_sparsity"),
        ({"initial_sparsity": 0.95}, ConfigurationError, "initial_sparsity is 0.95"),
        ({"every": 0}, ConfigurationError, "every"),
        ({"begin": 5, "end": 5}, ConfigurationError, "begin, end and every"),
        ({"end": 100, "ramp_end": 101}, ConfigurationError, "ramp_end is 101"),
        ({"multiplier": 0}, ConfigurationError, "multiplier"),
        ({"exchange": 1.5}, ConfigurationError, "exchange"),
        ({"growth": "hebbian"}, ConfigurationError, "gradient, random, momentum"),
        ({"decay": "step"}, ConfigurationError, "cosine, linear, constant"),
        ({"scope": "row"}, ConfigurationError, "scope"),
        ({"momentum": 1.0}, ConfigurationError, "momentum"),
    ],
)
def test_impossible_settings_are_refused(options, error, named):
    with pytest.raises(error, match=named):
        GraNet(**{"sparsity": 0.9} | options)


def test_a_frozen_weight_is_named():
    model = network()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"2\.weight"):
        GraNet(sparsity=0.9, end=10).attach(model, optimizer_of(model))


# ---------------------------------------------------------------------------------------------- plasticity


def checkpoint():
    model = network()
    optimizer = optimizer_of(model)
    steps_of(model, optimizer, 10)
    return model, optimizer


def distance(to):
    """A training function whose metric is the negative distance of the first layer from where it was."""

    def go_on(model, optimizer, steps):
        steps_of(model, optimizer, steps, seed=5)
        return -float((model[0].weight.detach() - to).norm())

    return go_on


def test_plasticity_compares_with_the_checkpoint_and_with_the_unpruned_continuation():
    model, optimizer = checkpoint()
    weight = model[0].weight.detach().clone()
    rows = pruning_plasticity(distance(weight), (model, optimizer), (0.5, 0.9), horizon=6)
    assert [row.amount for row in rows] == [0.5, 0.9]
    assert len({row.unpruned for row in rows}) == 1
    steps_of(model, optimizer, 6, seed=5)
    assert rows[0].unpruned == -float((model[0].weight.detach() - weight).norm())
    assert rows[0].before == 0
    assert rows[0].pruned < 0
    assert rows[1].pruned < rows[0].pruned
    assert Plasticity(0.5, 0.0, 1.0, 0.2, 0.9, 1.1, 0.5).plasticity == pytest.approx(-0.1)
    assert Plasticity(0.5, 0.0, 1.0, 0.2, 0.9, 1.1, 0.5).against_unpruned == pytest.approx(-0.2)


def test_the_checkpoint_stays_as_it_was():
    model, optimizer = checkpoint()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruning_plasticity(distance(model[0].weight.detach().clone()), (model, optimizer), (0.5,), horizon=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    GraNet(sparsity=0.5, end=10).attach(model, optimizer)  # nobody follows it any more


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_regeneration_keeps_the_sparsity_or_brings_it_back(scope):
    model, optimizer = checkpoint()
    rows = pruning_plasticity(
        distance(model[0].weight.detach().clone()),
        (model, optimizer),
        (0.5, 0.9),
        horizon=3,
        scope=scope,
        regeneration=(0.0, 0.4, "all"),
    )
    assert [(row.amount, row.regeneration) for row in rows] == [(a, r) for a in (0.5, 0.9) for r in (0.0, 0.4, "all")]
    for row in rows:
        expected = 0.0 if row.regeneration == "all" else row.amount
        assert row.sparsity == pytest.approx(expected, abs=2e-3)
    assert rows[0].after != rows[1].after


def test_a_sparse_checkpoint_loses_a_share_of_what_it_has():
    model, optimizer = checkpoint()
    for layer in (0, 2, 4):
        with torch.no_grad():
            model[layer].weight.view(-1)[::2] = 0
    metric = distance(model[0].weight.detach().clone())
    rows = pruning_plasticity(metric, (model, optimizer), (0.5,), horizon=2, regeneration=(0.0, "all"))
    assert [row.sparsity for row in rows] == [pytest.approx(0.75, abs=1e-3), pytest.approx(0.5, abs=1e-3)]


def test_chance_prunes_other_weights_than_magnitude_and_a_seed_repeats_it():
    start = checkpoint()
    metric = distance(start[0][0].weight.detach().clone())

    def after(**options):
        return pruning_plasticity(metric, start, (0.5,), horizon=2, **options)[0].after

    assert after(criterion="random") == after(criterion="random")
    assert len({after(), after(criterion="random"), after(criterion="random", seed=1)}) == 3
    assert after() == after(criterion=lambda run, name: run.weight(name).abs())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"amounts": (1.0,)}, SparsityError),
        ({"horizon": 0}, ConfigurationError),
        ({"criterion": "hessian"}, ConfigurationError),
        ({"scope": "row"}, ConfigurationError),
        ({"regeneration": (1.0,)}, ConfigurationError),
        ({"regeneration": ("some",)}, ConfigurationError),
    ],
)
def test_impossible_studies_are_refused_before_anything_is_trained(options, error):
    def train(*_):
        raise AssertionError("nothing should be trained")

    with pytest.raises(error):
        pruning_plasticity(train, checkpoint(), **options)

"""A method follows a training run: what it changes is exact, nothing drifts, and the loop stays the user's."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM, Unstructured
from gossamer.core.sparse_training import SparseTraining
from gossamer.core.sparsifier import Sparsifier, check_steps, random_masks
from gossamer.core.targets import find_targets
from gossamer.errors import (
    CheckpointError,
    ConfigurationError,
    NonFiniteError,
    SparsityError,
    TargetError,
    UnknownNameError,
)
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.static import Static

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}
METHODS = {
    "static": lambda: Static(sparsity=0.8),
    "set": lambda: SET(sparsity=0.8, every=3, end=40),
    "rigl": lambda: RigL(sparsity=0.8, every=3, end=40),
    "gmp": lambda: GradualMagnitudePruning(sparsity=0.8, begin=2, end=20, every=3),
    "gmp-model": lambda: GradualMagnitudePruning(sparsity=0.8, begin=2, end=20, every=3, scope="model"),
}


class Everywhere(torch.optim.Optimizer):
    """Moves every weight, whatever its gradient, as optimisers that mix gradients do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 12, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def one_step(net, optimizer, batch, parts=1, clip=None):
    optimizer.zero_grad()
    for inputs, labels in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
        (nn.functional.cross_entropy(net(inputs), labels) / parts).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


def zeros_of(net, run):
    return {name: int((target.matrix()[~run.mask(name)] != 0).sum()) for name, target in run.targets.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["rigl", "gmp"])
def test_masks_hold_after_every_step_of_every_optimizer(optimizer, method, net, batch):
    chosen = OPTIMIZERS[optimizer](net.parameters())
    run = METHODS[method]().attach(net, chosen)
    for _ in range(25):
        one_step(net, chosen, batch, parts=2, clip=0.5)
        assert set(zeros_of(net, run).values()) == {0}
        # what is not there has no gradient, so that the norm that is clipped is that of the sparse model
        for name, target in run.targets.items():
            assert not target.parameter.grad[~run.mask(name)].any()
    assert run.finalize().violations(net) == {}


def test_memory_that_is_loaded_from_a_dense_run_does_not_move_masked_weights(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        one_step(net, optimizer, batch)
    dense = copy.deepcopy(optimizer.state_dict())
    run = Static(sparsity=0.7).attach(net, optimizer)
    one_step(net, optimizer, batch)
    optimizer.load_state_dict(dense)
    for _ in range(3):
        one_step(net, optimizer, batch)
        assert set(zeros_of(net, run).values()) == {0}
        for name, target in run.targets.items():
            assert not optimizer.state[target.parameter]["momentum_buffer"][~run.mask(name)].any()


def test_masks_hold_under_an_optimizer_that_moves_everything(net, batch):
    optimizer = Everywhere(net.parameters())
    run = Static(sparsity=0.7).attach(net, optimizer)
    for _ in range(3):
        one_step(net, optimizer, batch)
    assert set(zeros_of(net, run).values()) == {0}


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_weights_is_exact(method, net, batch):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    run = METHODS[method]().attach(net, optimizer)
    for _ in range(45):
        one_step(net, optimizer, batch)
    masks = run.finalize()
    expected = 960 - sum(int(0.8 * n) for n in (360, 600)) if method == "gmp" else 960 - int(0.8 * 960)
    assert masks.kept == expected
    assert {step for step, _ in run.history} <= set(range(46))
    assert run.history[-1][1] == expected


def test_weights_that_stay_train_as_if_the_others_did_not_exist(net, batch):
    # an equal model whose weights are multiplied by the mask in its forward pass
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    run = Static(sparsity=0.6).attach(net, optimizer)
    masks = run.masks
    twin = copy.deepcopy(net).double()
    second = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.1)
    net.double()
    for _ in range(10):
        one_step(net, optimizer, (batch[0].double(), batch[1]))
        weights = {name: value * masks[name] if name in masks else value for name, value in twin.named_parameters()}
        outputs = torch.func.functional_call(twin, weights, batch[0].double())
        second.zero_grad()
        nn.functional.cross_entropy(outputs, batch[1]).backward()
        second.step()
    for name, value in net.named_parameters():
        other = dict(twin.named_parameters())[name].detach()
        torch.testing.assert_close(value.detach(), other * masks[name] if name in masks else other)


class Watch(Sparsifier):
    """Static, but it looks at the gradient of its zeros."""

    def start(self, training):
        training.assign(random_masks(training.targets.values(), 0.7, "uniform", training.generator)[0])

    def wants_gradient(self, step):
        return step % 2 == 0

    def change(self, training):
        training.extra["seen"] = {}
        if self.wants_gradient(training.step):
            training.extra["seen"] = {name: training.gradient(name).clone() for name in training.targets}


def dense_gradients(net, batch):
    probe = copy.deepcopy(net)
    nn.functional.cross_entropy(probe(batch[0]), batch[1]).backward()
    return {name: value.grad for name, value in probe.named_parameters()}


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("to_none", [True, False])
def test_the_gradient_of_zeros_is_the_dense_one_however_the_step_is_made(parts, clip, to_none, net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = Watch().attach(net, optimizer)
    for step in range(1, 5):
        expected = dense_gradients(net, batch)
        optimizer.zero_grad(set_to_none=to_none)
        for inputs, labels in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
            (nn.functional.cross_entropy(net(inputs), labels) / parts).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        assert bool(run.extra["seen"]) == (step % 2 == 0)
        for name, found in run.extra["seen"].items():
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-7)


def test_asking_for_a_gradient_that_was_not_announced_is_refused(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = Static(sparsity=0.5).attach(net, optimizer)
    one_step(net, optimizer, batch)
    with pytest.raises(ConfigurationError, match=r"no gradient of the zeros of 0\.weight at step 1"):
        run.gradient("0.weight")


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_that_the_gradient_scaler_skips_leaves_no_trace(to_none, net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run = Watch().attach(net, optimizer)
    one_step(net, optimizer, batch)
    expected = dense_gradients(net, batch)
    for broken in (True, False):
        optimizer.zero_grad(set_to_none=to_none)
        loss = nn.functional.cross_entropy(net(batch[0]), batch[1]) * (float("inf") if broken else 1.0)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert run.step == (1 if broken else 2)
    for name, found in run.extra["seen"].items():
        torch.testing.assert_close(found / scale, expected[name], rtol=1e-4, atol=1e-6)
    assert set(zeros_of(net, run).values()) == {0}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("stop", "order"), [(1, "mor"), (7, "rmo"), (12, "omr")])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method, stop, order, net, batch):
    def begin(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        return optimizer, METHODS[method]().attach(model, optimizer)

    whole = copy.deepcopy(net)
    optimizer, run = begin(whole)
    for _ in range(25):
        one_step(whole, optimizer, batch)

    first = copy.deepcopy(net)
    optimizer, part = begin(first)
    for _ in range(stop):
        one_step(first, optimizer, batch)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict(), "run": part.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)

    second = copy.deepcopy(net)
    optimizer, part = begin(second)
    loads = {"m": (second, "model"), "o": (optimizer, "optimizer"), "r": (part, "run")}
    for letter in order:
        loads[letter][0].load_state_dict(state[loads[letter][1]])
    for _ in range(25 - stop):
        one_step(second, optimizer, batch)
    assert part.history == run.history
    assert part.finalize() == run.finalize()
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_goes_and_comes_back_starts_anew(net, batch):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    run = Static(sparsity=0.5).attach(net, optimizer)
    for _ in range(3):
        one_step(net, optimizer, batch)
    old = run.mask("0.weight")
    new = ~old
    new[0] = old[0]
    weight = net[0].weight
    before = {key: value.clone() for key, value in optimizer.state[weight].items()}
    stayed = old & new
    run.assign({"0.weight": new})
    after = optimizer.state[weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][stayed], before[key][stayed])
        assert not after[key][~new].any()
    assert not after["exp_avg"][new & ~old].any()
    mean = before["exp_avg_sq"][stayed].mean()
    torch.testing.assert_close(after["exp_avg_sq"][new & ~old], mean.expand(int((new & ~old).sum())))
    assert not weight[new & ~old].any()
    one_step(net, optimizer, batch)
    # a first step of Adam without a warm second moment would be the learning rate over √(1 − β₂) ≈ 0.3
    assert float(weight[new & ~old].detach().abs().max()) < 0.05


@settings(max_examples=40, deadline=None)
@given(
    first=st.floats(0, 0.95),
    second=st.floats(0, 0.95),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    joint=st.booleans(),
)
def test_prune_and_exchange_are_exact_and_agree_with_sorting(first, second, share, seed, joint):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 5), nn.Linear(5, 2))
    for parameter in net.parameters():
        parameter.data = (parameter.data * 8).round() / 8  # many ties
    run = Sparsifier().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    weights = {name: target.matrix().clone() for name, target in run.targets.items()}
    scope = "model" if joint else "layer"
    run.prune(first, scope)
    zeros = run.total - run.history[-1][1]
    sizes = [77, 55]
    assert zeros == (int_floor(first, sum(sizes)) if joint else sum(int_floor(first, n) for n in sizes))
    if not joint:
        for name, weight in weights.items():
            order = weight.abs().flatten().argsort(stable=True)
            expected = torch.ones(weight.numel(), dtype=torch.bool)
            expected[order[: int_floor(first, weight.numel())]] = False
            assert torch.equal(run.mask(name).flatten(), expected)
    run.prune(second, scope)  # never brings anything back
    assert run.total - run.history[-1][1] >= zeros
    alive = {name: run.active(name) for name in weights}
    run.exchange(share, "random")
    assert {name: run.active(name) for name in weights} == alive
    assert set(zeros_of(net, run).values()) == {0}


def int_floor(share, size):
    from gossamer.core.selection import dropped_count

    return dropped_count(size, share)


def test_exchange_drops_the_smallest_and_grows_the_largest_scores():
    net = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 2))
    net[0].weight.data = torch.tensor([[1.0, -0.1, 3.0, 4.0], [0.2, 5.0, 6.0, -7.0]])
    run = Sparsifier().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    mask = torch.tensor([[True, True, False, True], [True, True, False, True]])
    run.assign({"0.weight": mask})
    wanted = torch.tensor([[0.0, 1.0, 9.0, 0.0], [8.0, 0.0, 7.0, 0.0]])
    run.exchange({"0.weight": 2}, lambda training, name: wanted)
    # −0.1 and 0.2 go; 9 comes, and 0.2, which has just gone, comes back for its 8
    assert run.mask("0.weight").tolist() == [[True, False, True, True], [True, True, False, True]]
    expected = torch.tensor([[1.0, 0.0, 0.0, 4.0], [0.2, 5.0, 0.0, -7.0]])
    assert torch.equal(net[0].weight.detach(), expected)


def test_a_pattern_and_sparsities_by_layer_are_followed(net):
    run = Sparsifier().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    run.prune({"0.weight": 0.5, "2.weight": 0.25})
    assert [run.active(name) for name in run.targets] == [180, 450]
    run.prune(0.5, NM(2, 4, dim=0) if net[0].weight.shape[0] % 4 == 0 else Unstructured("row"))
    assert all(run.active(name) <= 0.5 * run.targets[name].shape.numel() for name in run.targets)


def test_other_kinds_of_layers_are_followed(batch):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned, self.rnn = Conv1D(16, 12), nn.LSTM(16, 8, batch_first=True)
            self.conv, self.head = nn.Conv1d(8, 6, 3, padding=1), nn.Linear(6, 3)

        def forward(self, x):
            states = self.rnn(self.turned(x).unsqueeze(1).expand(-1, 5, -1))[0]
            return self.head(self.conv(states.transpose(1, 2)).mean(2))

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = RigL(sparsity=0.75, every=2, end=20).attach(model, optimizer)
    assert list(run.targets) == ["turned.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "conv.weight"]
    assert run.mask("turned.weight").shape == (16, 12)
    assert model.turned.weight.shape == (12, 16)
    active = run.history[-1][1]
    for _ in range(10):
        one_step(model, optimizer, batch)
    assert {n for _, n in run.history} == {active}
    assert run.finalize().violations(model) == {}


def test_averages_get_the_same_zeros(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    run = SET(sparsity=0.8, every=2, end=20).attach(net, optimizer)
    for _ in range(10):
        one_step(net, optimizer, batch)
        average.update_parameters(net)
    masks = run.masks
    assert masks.violations(average.module)  # an average remembers what has gone
    run.finalize(average.module)
    assert masks.violations(average.module) == {}


def test_finalize_leaves_a_plain_model(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = Static(sparsity=0.5).attach(net, optimizer)
    one_step(net, optimizer, batch)
    masks = run.finalize()
    with pytest.raises(ConfigurationError, match="finalized already"):
        run.finalize()
    assert not any(parameter._backward_hooks for parameter in net.parameters())
    optimizer.zero_grad()
    one_step(net, optimizer, batch)
    assert masks.violations(net)  # nothing holds the zeros any more
    assert run.step == 1
    Static(sparsity=0.5).attach(net, optimizer)


def test_gradual_pruning_reaches_its_sparsity_even_if_training_ends_early(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = GradualMagnitudePruning(sparsity=0.9, begin=0, end=1000, every=10).attach(net, optimizer)
    for _ in range(12):
        one_step(net, optimizer, batch)
    assert run.phase == "ramp"
    assert run.finalize().layer_sparsity() == pytest.approx({"0.weight": 0.9, "2.weight": 0.9})


def test_bfloat16_autocast_changes_nothing_about_the_zeros(net, batch):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    run = RigL(sparsity=0.8, every=2, end=20).attach(net, optimizer)
    for _ in range(9):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
    assert set(zeros_of(net, run).values()) == {0}
    assert run.history[-1][1] == run.total - int_floor(0.8, run.total)


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_second_method_on_the_same_weights_is_refused(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = Static(sparsity=0.5).attach(net, optimizer)
    with pytest.raises(ConfigurationError, match=r"0\.weight is already followed by Static; finalize\(\) that first"):
        SET(sparsity=0.5).attach(net, optimizer)
    run.finalize()
    SET(sparsity=0.5).attach(net, optimizer)


def test_a_frozen_weight_and_one_without_optimizer_are_refused(net):
    net[2].weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"2\.weight has requires_grad=False"):
        Static().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    net[2].weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"2\.weight is not in the optimizer"):
        Static().attach(net, torch.optim.SGD(net[0].parameters(), lr=0.1))
    Static(exclude=("2",)).attach(net, torch.optim.SGD(net[0].parameters(), lr=0.1))


def test_another_optimizer_is_found_out(net, batch):
    run = Static(sparsity=0.5).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    other = Everywhere(net.parameters())
    one_step(net, other, batch)
    with pytest.raises(ConfigurationError, match=r"weights of [02]\.weight that are masked have been moved"):
        one_step(net, other, batch)
    assert run.step == 0


def test_a_model_without_anything_to_prune_is_refused(net):
    with pytest.raises(TargetError, match="no layer to prune"):
        Static(exclude=("*",)).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.parametrize(("begin", "end", "every"), [(10, 10, 1), (10, 5, 1), (0, 10, 0), (-1, 10, 1)])
def test_steps_that_make_no_schedule_are_refused(begin, end, every):
    with pytest.raises(ConfigurationError, match="0 <= begin < end and every >= 1"):
        check_steps(begin, end, every)
    with pytest.raises(ConfigurationError):
        RigL(begin=begin, end=end, every=every)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan"), "half"])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(SparsityError):
        Static(sparsity=sparsity)


def test_a_layer_that_an_allocation_leaves_dense_is_named(net):
    wide = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"2\.weight stays dense: erdos-renyi-kernel"):
        run = Static(sparsity=0.9).attach(wide, optimizer)
    assert run.masks.layer_sparsity()["2.weight"] == 0
    assert run.total - run.history[-1][1] == int_floor(0.9, run.total)


def test_an_allocation_that_empties_a_layer_is_refused():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 50), nn.Linear(50, 50), nn.Linear(50, 2))
    with pytest.raises(SparsityError, match=r"leaves 0\.weight without a single weight"):
        random_masks(find_targets(net), 0.9999, "uniform")


def test_states_of_others_are_refused_and_change_nothing(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = Static(sparsity=0.5).attach(net, optimizer)
    masks, state = run.masks, run.state_dict()
    with pytest.raises(CheckpointError, match="the state is of SET"):
        run.load_state_dict({**state, "method": "SET"})
    with pytest.raises(CheckpointError, match="lacks 'masks'"):
        run.load_state_dict({key: value for key, value in state.items() if key != "masks"})
    other = nn.Sequential(nn.Linear(12, 31), nn.Linear(31, 3))
    foreign = Static(sparsity=0.5).attach(other, torch.optim.SGD(other.parameters(), lr=0.1)).state_dict()
    with pytest.raises(CheckpointError, match="of another model"):
        run.load_state_dict(foreign)
    assert run.masks == masks


@pytest.mark.parametrize("part", [{"generator": torch.zeros(3, dtype=torch.uint8)}, {"step": "ten"}, {"history": [1]}])
def test_a_damaged_state_is_refused_and_changes_nothing(net, part):
    twin = copy.deepcopy(net)
    run = Static(sparsity=0.5).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    masks, generator = run.masks, run.generator.get_state()
    other = Static(sparsity=0.5, seed=1).attach(twin, torch.optim.SGD(twin.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match="damaged"):
        run.load_state_dict({**other.state_dict(), **part})
    assert run.masks == masks
    assert torch.equal(run.generator.get_state(), generator)
    assert run.step == 0


def test_scores_that_are_no_numbers_are_named(net):
    run = RigL(sparsity=0.5, end=10).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    name = next(iter(run.targets))
    with pytest.raises(NonFiniteError, match=f"growth scores of {re.escape(name)}"):
        run.exchange(0.5, lambda topology, target: torch.full(topology.targets[target].shape, torch.nan))


def test_damaged_weights_and_wrong_masks_are_named(net):
    run = Sparsifier().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(UnknownNameError, match=r"unknown sparse weight '1\.weight'"):
        run.assign({"1.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ConfigurationError, match=r"the mask of 0\.weight is torch.float32"):
        run.assign({"0.weight": torch.ones(30, 12)})
    with pytest.raises(ConfigurationError, match="growth is 'hope'"):
        run.exchange(0.1, "hope")
    net[0].weight.data[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"0\.weight: 1 of 360 weights"):
        run.prune(0.5)


def test_an_error_at_the_start_lets_go_of_the_model(net):
    class Broken(Sparsifier):
        def start(self, training):
            raise ConfigurationError("no")

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match="no"):
        Broken().attach(net, optimizer)
    assert isinstance(Static().attach(net, optimizer), SparseTraining)


def test_a_given_mask_is_kept_as_it_is(net, batch):
    masks = MaskSet({"0.weight": torch.rand(net[0].weight.shape) < 0.3})
    run = Static(masks=masks).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert run.masks["0.weight"].equal(masks["0.weight"])
    assert all(run.masks[name].all() for name in run.masks if name != "0.weight")
    run.finalize()


@pytest.mark.parametrize(
    ("name", "shape", "message"), [("9.weight", (2, 2), "unknown sparse weight"), ("0.weight", (2, 2), "must be")]
)
def test_given_masks_that_do_not_fit_are_refused(net, name, shape, message):
    masks = MaskSet({name: torch.ones(shape, dtype=torch.bool)})
    with pytest.raises((UnknownNameError, ConfigurationError), match=message):
        Static(masks=masks).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert not net[0].weight._post_accumulate_grad_hooks

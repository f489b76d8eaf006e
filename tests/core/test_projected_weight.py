"""A dense weight trains while the model computes with a part of it: exact groups, an unchanged loop, a plain end."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from gossamer.core.nm_sparsifier import NMSparsifier, as_nm
from gossamer.core.patterns import NM
from gossamer.errors import (
    CheckpointError,
    ConfigurationError,
    NonFiniteError,
    PatternError,
    SparsityError,
    TargetError,
)
from gossamer.training.progressive_gradient_flow import MaskDecay, StructureDecay
from gossamer.training.sr_ste import SRSTE, STE

METHODS = {
    "ste": lambda: STE(pattern="2:4"),
    "sr-ste": lambda: SRSTE(pattern="1:4", decay=0.05),
    "fade": lambda: MaskDecay(pattern="1:8", total=20, final_value=0.1),
    "fade-ste": lambda: MaskDecay(pattern="1:8", total=20, decay="linear", rate=0.1, flow="ste"),
    "structure": lambda: StructureDecay(pattern="1:8", total=20),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 12, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def one_step(net, optimizer, batch, parts=1, clip=None):
    optimizer.zero_grad()
    for inputs, labels in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
        (functional.cross_entropy(net(inputs), labels) / parts).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    optimizer.step()


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01)


def brute_mask(weight, n, m):
    """The largest by a stable sort, group by group along the inputs."""
    moved = weight.abs().movedim(1, -1).contiguous()
    groups = moved.view(-1, m)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    for row in range(len(groups)):
        kept[row, groups[row].argsort(stable=True)[m - n :]] = True
    return kept.view(moved.shape).movedim(-1, 1)


class Master(nn.Module):
    """The same network in the reference's way: dense parameters, projected anew in every forward pass."""

    def __init__(self, net, n, m):
        super().__init__()
        self.net, self.n, self.m = copy.deepcopy(net), n, m

    def forward(self, x):
        for layer in self.net:
            if isinstance(layer, nn.Linear) and layer.in_features == 16:
                mask = brute_mask(layer.weight.detach(), self.n, self.m)
                through = layer.weight + (layer.weight * mask - layer.weight).detach()
                x = functional.linear(x, through, layer.bias)
            else:
                x = layer(x)
        return x


def only_second(method):
    return method(pattern="2:4", exclude=("0", "4"))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(
    "optimizer",
    [
        adamw,
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    ],
)
def test_training_is_that_of_dense_weights_projected_in_every_forward_pass(optimizer, clip, parts, net, batch):
    net.double()
    batch = (batch[0].double(), batch[1])
    master = Master(net, 2, 4)
    one, other = optimizer(net), optimizer(master)
    run = only_second(STE).attach(net, one)
    for _ in range(12):
        one_step(net, one, batch, parts, clip)
        one_step(master, other, batch, parts, clip)
        expected = brute_mask(master.net[2].weight.detach(), 2, 4)
        assert torch.equal(run.mask("2.weight"), expected)
        torch.testing.assert_close(run.dense("2.weight"), master.net[2].weight.detach())
        torch.testing.assert_close(net[2].weight.detach(), master.net[2].weight.detach() * expected)
    for ours, theirs in zip(net[4].parameters(), master.net[4].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 4),
    factor=st.integers(1, 4),
    groups=st.integers(1, 5),
    rows=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_exactly_n_of_every_m_are_chosen_and_equal_ones_by_their_place(n, factor, groups, rows, seed):
    m = n * factor
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(m * groups, rows), nn.Linear(rows, 2))
    net[0].weight.data = (torch.randn(rows, m * groups, generator=generator) * 2).round() / 2  # ties and zeros
    dense = net[0].weight.detach().clone()
    run = STE(pattern=NM(n, m), keep=()).attach(net, adamw(net))
    mask = run.mask("0.weight")
    assert torch.equal(mask, brute_mask(dense, n, m))
    NM(n, m).verify(mask)
    assert torch.equal(run.dense("0.weight"), dense)
    assert torch.equal(net[0].weight.detach(), dense * mask)


def test_groups_longer_than_what_is_handled_at_once_are_chosen_alike(monkeypatch):
    monkeypatch.setattr("gossamer.core.projected_weight._AT_ONCE", 100)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(36, 50), nn.Linear(50, 2))
    dense = net[0].weight.detach().clone()
    run = STE(pattern="1:3", keep=()).attach(net, adamw(net))
    assert torch.equal(run.mask("0.weight"), brute_mask(dense, 1, 3))
    assert torch.equal(run.dense("0.weight"), dense)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_groups_of_a_convolution_run_along_its_input_channels(memory_format):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 2)).to(memory_format=memory_format)
    dense = net[0].weight.detach().clone()
    run = STE(pattern="2:4", keep=()).attach(net, adamw(net))
    weight = net[0].weight.detach()
    assert torch.equal(run.mask("0.weight"), brute_mask(dense, 2, 4))
    assert ((weight != 0).permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 2).all()
    assert torch.equal(run.dense("0.weight"), dense)


def test_layers_that_keep_their_weights_in_other_ways_are_followed():
    from transformers.pytorch_utils import Conv1D

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Parameter(torch.randn(3, 5, 8))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.turned, self.rnn = Conv1D(8, 12), nn.LSTM(8, 4, batch_first=True)
            self.experts, self.head = Experts(), nn.Linear(4, 3)

        def forward(self, x):
            mixed = self.rnn(self.turned(x).unsqueeze(1))[0][:, 0]
            routed = torch.einsum("boi,bi->bo", self.experts.down[[0, 2]], torch.cat([mixed, mixed], 1))
            return self.head(mixed) + routed.sum(1, keepdim=True)

    torch.manual_seed(0)
    model = Model()
    run = STE(pattern="1:4", keep=(), exclude=("head",)).attach(model, adamw(model))
    assert set(run.targets) == {
        "turned.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        *(f"experts.down[{i}]" for i in range(3)),
    }
    for _ in range(3):
        one_step(model, run.optimizer, (torch.randn(2, 12), torch.tensor([0, 2])))
    for name, target in run.targets.items():
        NM(1, 4).verify(run.mask(name))
        assert torch.equal(target.matrix() != 0, run.mask(name))
    masks = run.finalize()
    assert masks.violations(model) == {}
    assert masks.sparsity == 0.75


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("stop", "order"), [(1, "mor"), (9, "rmo"), (19, "omr")])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(method, stop, order, net, batch):
    whole = copy.deepcopy(net)
    run = METHODS[method]().attach(whole, adamw(whole))
    for _ in range(24):
        one_step(whole, run.optimizer, batch)

    first = copy.deepcopy(net)
    part = METHODS[method]().attach(first, adamw(first))
    for _ in range(stop):
        one_step(first, part.optimizer, batch)
    file = io.BytesIO()
    state = {"model": first.state_dict(), "optimizer": part.optimizer.state_dict(), "run": part.state_dict()}
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file)
    one_step(first, part.optimizer, batch)  # a state is a copy: going on does not change it

    second = copy.deepcopy(net)
    part = METHODS[method]().attach(second, adamw(second))
    loads = {"m": (second, "model"), "o": (part.optimizer, "optimizer"), "r": (part, "run")}
    for letter in order:
        loads[letter][0].load_state_dict(state[loads[letter][1]])
    for _ in range(24 - stop):
        one_step(second, part.optimizer, batch)
    assert part.history == run.history
    for name in run.targets:
        assert torch.equal(part.dense(name), run.dense(name))
    assert part.finalize() == run.finalize()
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_masks_are_chosen_once_a_step_whatever_the_number_of_backward_passes(net, batch, monkeypatch):
    from gossamer.core.projected_weight import ProjectedWeight

    chosen = []
    choose = ProjectedWeight.choose
    monkeypatch.setattr(
        ProjectedWeight, "choose", lambda self, *args: (chosen.append(self.name), choose(self, *args))[1]
    )
    run = STE().attach(net, adamw(net))
    assert chosen == ["2.weight"]
    for steps in range(2, 5):
        one_step(net, run.optimizer, batch, parts=8)
        net(batch[0])
        assert len(chosen) == steps


def test_a_step_that_the_gradient_scaler_skips_changes_nothing(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run = SRSTE(decay=0.1).attach(net, optimizer)
    before, masks = run.dense("2.weight"), run.masks
    for broken in (True, False):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(batch[0]), batch[1]) * (float("inf") if broken else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert run.step == (0 if broken else 1)
        assert torch.equal(run.dense("2.weight"), before) == broken
        assert broken == (run.masks == masks and torch.equal(net[2].weight.detach(), before * masks["2.weight"]))


@pytest.mark.parametrize("fused", [False, True])
def test_the_pull_of_sr_ste_does_not_depend_on_the_scale_of_mixed_precision(fused, net, batch):
    weights = []
    for scale in (None, 64.0):
        model = copy.deepcopy(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        run = SRSTE(decay=0.5).attach(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(functional.cross_entropy(model(batch[0]), batch[1])).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(run.dense("2.weight"))
    torch.testing.assert_close(weights[0], weights[1])


def test_bfloat16_autocast_and_bfloat16_weights_keep_the_pattern(net, batch):
    for model, inputs in ((copy.deepcopy(net), batch[0]), (copy.deepcopy(net).bfloat16(), batch[0].bfloat16())):
        run = SRSTE(decay=0.1).attach(model, adamw(model))
        for _ in range(5):
            run.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = functional.cross_entropy(model(inputs).float(), batch[1])
            loss.backward()
            dense = run.dense("2.weight")
            run.optimizer.step()
            assert not torch.equal(run.dense("2.weight"), dense)
            NM(2, 4).verify(run.mask("2.weight"))
        assert run.finalize().violations(model) == {}


def test_a_copy_of_the_model_computes_the_same_and_is_plain(net, batch):
    run = STE().attach(net, adamw(net))
    one_step(net, run.optimizer, batch)
    twin = copy.deepcopy(net)
    assert torch.equal(net(batch[0]), twin(batch[0]))
    assert set(twin.state_dict()) == set(net.state_dict())
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert torch.equal(run.dense("2.weight") * run.mask("2.weight"), net[2].weight.detach())


def test_an_average_of_dense_weights_gets_the_pattern_at_the_end(net, batch):
    run = STE().attach(net, torch.optim.SGD(net.parameters(), lr=0.5))
    average = torch.optim.swa_utils.AveragedModel(net)
    expected = torch.zeros(24, 16)
    for _ in range(5):
        one_step(net, run.optimizer, batch)
        projected = net[2].weight.detach().clone()
        with run.dense_weights():
            assert torch.equal(net[2].weight.detach(), run.dense("2.weight"))
            average.update_parameters(net)
        assert torch.equal(net[2].weight.detach(), projected)
        expected += run.dense("2.weight") / 5
    torch.testing.assert_close(average.module[2].weight.detach(), expected)
    masks = run.finalize(average.module)
    torch.testing.assert_close(average.module[2].weight.detach(), expected * masks["2.weight"])
    NM(2, 4).verify(average.module[2].weight.detach() != 0)


def test_a_faded_weight_counts_as_there_and_gets_its_share_of_the_gradient(net, batch):
    for flow, share in (("chain", 0.25), ("ste", 1.0)):
        model = copy.deepcopy(net)
        method = MaskDecay(pattern="1:8", total=10, dense_fraction=0, decay="linear", rate=0.25, flow=flow)
        run = method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(3):
            assert run.sparsity == 0
            one_step(model, run.optimizer, batch)
        assert method.fade_at(3) == 0.25
        dense, kept = run.dense("2.weight"), brute_mask(run.dense("2.weight"), 1, 8)
        expected = torch.where(kept, dense, dense * 0.25)
        assert torch.equal(model[2].weight.detach(), expected)
        twin = copy.deepcopy(model)
        functional.cross_entropy(twin(batch[0]), batch[1]).backward()
        model.zero_grad()
        functional.cross_entropy(model(batch[0]), batch[1]).backward()
        plain = twin[2].weight.grad
        torch.testing.assert_close(model[2].weight.grad, torch.where(kept, plain, plain * share))
        run.optimizer.step()
        assert run.sparsity == 0.875


def test_history_notes_only_steps_that_change_the_number_of_weights(net, batch):
    run = StructureDecay(pattern="1:8", total=20).attach(net, adamw(net))
    for _ in range(20):
        one_step(net, run.optimizer, batch)
    assert run.history == [(0, 384), (1, 336), (6, 192), (10, 96), (14, 48)]
    assert run.sparsity == 0.875


def test_finalize_leaves_a_plain_model_whose_weights_may_be_trained_again(net, batch):
    run = STE().attach(net, adamw(net))
    one_step(net, run.optimizer, batch)
    masks = run.finalize()
    assert masks.violations(net) == {}
    NM(2, 4).verify(net[2].weight.detach() != 0)
    one_step(net, run.optimizer, batch)
    assert masks.violations(net)
    STE().attach(net, run.optimizer).finalize()


def test_layers_have_patterns_of_their_own_and_those_that_do_not_fit_are_refused_or_noted(batch):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(i, o) for i, o in ((12, 16), (16, 18), (18, 16), (16, 3), (3, 3))))

    with pytest.raises(PatternError, match=r"2\.weight has shape \(16, 18\).*multiple of 4"):
        STE().attach(build(), adamw(build()))
    net = build()
    with pytest.warns(UserWarning, match=r"2\.weight stays dense: 2:4 does not divide \(16, 18\)"):
        run = STE(own={"3": "1:8"}, indivisible="dense").attach(net, adamw(net))
    assert list(run.targets) == ["1.weight", "3.weight"]
    assert run.masks.layer_sparsity() == {"1.weight": 0.5, "3.weight": 0.875}
    with pytest.raises(TargetError, match="5:7"):
        STE(pattern="5:7", indivisible="dense").attach(build(), adamw(build()))


def test_what_is_impossible_is_refused(net, batch):
    with pytest.raises(SparsityError, match="contradicts the pattern 2:4"):
        STE(sparsity=0.6)
    assert STE(sparsity=0.5).sparsity == 0.5
    with pytest.raises(PatternError, match="N:M training needs"):
        STE(pattern="16x1")
    with pytest.raises(PatternError, match="N:M training needs"):
        NMSparsifier(own={"*": "rows"})
    with pytest.raises(ConfigurationError, match="indivisible is 'pad'"):
        STE(indivisible="pad")
    assert as_nm("1:16@0") == NM(1, 16, 0)
    run = STE().attach(net, adamw(net))
    with pytest.raises(ConfigurationError, match="STE cannot follow a step with a closure"):
        run.optimizer.step(lambda: functional.cross_entropy(net(batch[0]), batch[1]))


def test_weights_that_are_written_to_between_steps_are_refused(net, batch):
    run = STE().attach(net, adamw(net))
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    with pytest.raises(ConfigurationError, match=r"2\.weight that are kept aside have been written to"):
        one_step(net, run.optimizer, batch)


def test_a_weight_that_is_not_a_number_is_named(net, batch):
    run = STE().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        one_step(net, run.optimizer, (batch[0] * float("nan"), batch[1]))


def test_a_state_without_dense_weights_or_of_another_shape_is_refused(net):
    run = STE().attach(net, adamw(net))
    state = run.state_dict()
    with pytest.raises(CheckpointError, match="dense weights"):
        run.load_state_dict({**state, "dense": {}})
    wrong = {**state["dense"]["2.weight"], "aside": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=r"2\.weight has another shape"):
        run.load_state_dict({**state, "dense": {"2.weight": wrong}})
    with pytest.raises(CheckpointError, match="damaged"):
        run.load_state_dict({**state, "dense": {"2.weight": {}}})

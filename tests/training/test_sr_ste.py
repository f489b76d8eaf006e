from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.core.mask_divergence import MaskTrace, sparse_architecture_divergence
from gossamer.core.masks import MaskSet
from gossamer.core.patterns import NM
from gossamer.errors import ConfigurationError, TargetError
from gossamer.methods import methods
from gossamer.training.sr_ste import ASP, SRSTE, STE, refined_straight_through


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 12, generator=generator).double(), torch.randint(0, 3, (32,), generator=generator)


def one_step(net, optimizer, batch):
    optimizer.zero_grad()
    functional.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("decay", [0.3, -0.3, 0.0])
def test_a_step_is_the_one_of_the_paper(decay, net, batch):
    # W ← W − γ (∂L/∂W̃ + λ (1 − m) ⊙ W)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = SRSTE(decay=decay).attach(net, optimizer)
    for _ in range(4):
        dense, mask = run.dense("2.weight"), run.mask("2.weight")
        twin = copy.deepcopy(net)
        functional.cross_entropy(twin(batch[0]), batch[1]).backward()
        one_step(net, optimizer, batch)
        expected = dense - 0.1 * (twin[2].weight.grad + decay * dense * ~mask)
        torch.testing.assert_close(run.dense("2.weight"), expected)


def test_the_pull_is_added_after_clipping(net, batch):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = SRSTE(decay=10.0).attach(net, optimizer)
    dense, mask = run.dense("2.weight"), run.mask("2.weight")
    functional.cross_entropy(net(batch[0]), batch[1]).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-9)
    optimizer.step()
    torch.testing.assert_close(run.dense("2.weight"), dense - dense * ~mask, atol=1e-8, rtol=0)


def test_decoupled_removed_weights_shrink_by_a_factor_whatever_adam_does(net, batch):
    plain, pulled = copy.deepcopy(net), net
    one, other = (torch.optim.Adam(model.parameters(), lr=0.01) for model in (plain, pulled))
    first, second = STE().attach(plain, one), SRSTE(decay=20.0, mode="decoupled").attach(pulled, other)
    dense, mask = first.dense("2.weight"), first.mask("2.weight")
    one_step(plain, one, batch)
    one_step(pulled, other, batch)
    torch.testing.assert_close(second.dense("2.weight"), first.dense("2.weight") - 0.2 * dense * ~mask)


def test_pulled_masks_come_to_rest_and_pushed_ones_do_not(batch):
    flips = {}
    for decay in (-2.0, 0.0, 2.0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        run, trace = SRSTE(pattern="2:8", decay=decay).attach(net, optimizer), MaskTrace()
        for step in range(60):
            one_step(net, optimizer, batch)
            if step >= 20:
                trace.look(step, run.masks)
        flips[decay] = trace.total_flips
    assert flips[2.0] < 0.5 * flips[0.0]
    assert flips[0.0] < flips[-2.0]


def test_a_parameter_without_gradient_is_not_pulled(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = SRSTE(decay=1.0, mode="decoupled").attach(net, optimizer)
    dense = run.dense("2.weight")
    optimizer.step()
    assert torch.equal(run.dense("2.weight"), dense)


def test_asp_prunes_a_trained_network_once_and_keeps_the_mask(net, batch):
    dense = copy.deepcopy(net)
    trained, optimizer = (torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (dense, net))
    run = ASP(pattern="1:4", begin=3).attach(net, optimizer)
    seen = []
    for step in range(8):
        one_step(net, optimizer, batch)
        if step < 3:
            one_step(dense, trained, batch)
        seen.append(run.masks)
    assert [masks.sparsity for masks in seen] == [0, 0] + [0.75] * 6
    assert torch.equal(seen[2]["2.weight"], NM(1, 4).select(dense[2].weight.detach().abs()))
    assert all(masks == seen[2] for masks in seen[2:])
    assert run.finalize() == seen[2]
    early = ASP(pattern="1:4", begin=30).attach(net, optimizer)
    assert early.finalize().sparsity == 0.75


def test_within_a_forward_pass_of_ones_own_it_has_the_same_gradient():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]], requires_grad=True)
    masked = refined_straight_through(weight, "2:4", decay=0.1)
    assert masked.tolist() == [[3.0, 0.0, 2.0, 0.0]]
    (gradient,) = torch.autograd.grad(masked.sum(), weight)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.9, 1.0, 1.05]]))
    mask = torch.tensor([[True, True, False, False]])
    assert refined_straight_through(weight, "2:4", mask=mask).tolist() == [[3.0, -1.0, 0.0, 0.0]]
    (again,) = torch.autograd.grad((refined_straight_through(weight, "2:4", 0.1) ** 2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        again.sum().backward()


def test_divergence_counts_weights_that_changed_sides():
    first = MaskSet({"a": torch.tensor([[True, True, False, False]]), "b": torch.ones(2, 2, dtype=torch.bool)})
    second = MaskSet({"a": torch.tensor([[True, False, True, False]]), "b": torch.ones(2, 2, dtype=torch.bool)})
    assert sparse_architecture_divergence(first, second) == 2 / 8
    assert sparse_architecture_divergence(first, second, normalize=False) == 2
    assert sparse_architecture_divergence(second, second) == 0
    with pytest.raises(TargetError, match="different parameters"):
        sparse_architecture_divergence(first, MaskSet({"a": torch.tensor([True])}))
    trace = MaskTrace()
    trace.look(3, first)
    trace.look(5, second)
    assert (trace.steps, trace.since_first, trace.flips) == ([3, 5], [0, 0.25], [0, 0.25])
    with pytest.raises(ConfigurationError, match="step 5 does not follow step 5"):
        trace.look(5, first)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"decay": float("nan")}, "decay is nan"), ({"mode": "both"}, "mode is 'both'; use 'in-gradient' or 'decoupled'")],
)
def test_impossible_settings_are_refused(options, named):
    with pytest.raises(ConfigurationError, match=named):
        SRSTE(**options)
    with pytest.raises(ConfigurationError, match="begin is -1"):
        ASP(begin=-1)


def test_the_defaults_are_those_of_the_paper():
    assert (SRSTE().decay, SRSTE().mode, str(SRSTE().pattern)) == (2e-4, "in-gradient", "2:4")
    assert {"ste", "sr-ste", "asp"} <= set(methods())

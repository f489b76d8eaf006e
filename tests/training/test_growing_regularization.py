from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from gossamer.core.rounds import Round
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.training.ap import ActivateWhilePruning
from gossamer.training.growing_regularization import GrowingRegularization


def ended(model, alive=None, seed=0):
    targets = find_targets(model, heads=True)
    start = {target.name: target.matrix().clone() for target in targets}
    alive = alive or {target.name: torch.ones(target.shape, dtype=torch.bool) for target in targets}
    return Round(0, model, targets, alive, start, start, torch.Generator().manual_seed(seed))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))


def loss(model):
    return (model(torch.randn(8, 20)) - 1).square().mean()


def test_of_equal_weights_those_stay_largest_that_the_loss_curves_most_along():
    """``½ Σ h (w − 1)²`` with growing curvature h: the minimum under the penalty is ``h / (h + λ)``."""
    layer = nn.Linear(6, 1, bias=False).double()
    nn.init.ones_(layer.weight)
    curvature = torch.tensor([3.0, 0.1, 1.0, 0.3, 10.0, 0.03], dtype=torch.float64)

    def bowl(model):
        return (curvature * (model.weight[0] - 1).square()).sum() / 2

    host = GrowingRegularization(
        bowl, penalty_step=0.05, penalty_every=50, penalty_limit=1.0, learning_rate=0.1, momentum=0.0, weight_decay=0.0
    )
    found = host(ended(layer))["weight"][0]
    assert found.argsort().tolist() == curvature.argsort().tolist()
    torch.testing.assert_close(found, (curvature / (curvature + 1)).float(), rtol=0.1, atol=0.01)
    assert layer.weight.tolist() == [[1.0] * 6]


def test_the_penalty_grows_as_written():
    """Without a loss, SGD multiplies by ``1 − η λ`` with λ one step larger every other step."""
    layer = nn.Linear(5, 3).double()
    before = layer.weight.detach().clone()
    host = GrowingRegularization(
        lambda model: 0 * model.weight.sum(),
        penalty_step=0.1,
        penalty_every=2,
        penalty_limit=0.3,
        learning_rate=0.5,
        momentum=0.0,
        weight_decay=0.0,
    )
    assert host.steps == 6
    factor = 1.0
    for penalty in (0.0, 0.1, 0.1, 0.2, 0.2, 0.3):
        factor *= 1 - 0.5 * penalty
    torch.testing.assert_close(host(ended(layer))["weight"].double(), before.abs() * factor, rtol=1e-6, atol=0)


def test_model_generator_and_removed_weights_are_left_alone():
    model = network()
    alive = {target.name: torch.rand(target.shape) > 0.5 for target in find_targets(model, heads=True)}
    with torch.no_grad():
        for target in find_targets(model, heads=True):
            target.matrix().masked_fill_(~alive[target.name], 0)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    model.eval()
    host = GrowingRegularization(loss, penalty_step=1e-3, learning_rate=0.05)
    found = host(ended(model, alive))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, score in found.items():
        assert not score[~alive[name]].any()
        assert (score[alive[name]] > 0).any()
    again = host(ended(model, alive))
    assert all(torch.equal(found[name], again[name]) for name in found)
    other = host(ended(model, alive, seed=1))
    assert not torch.equal(other["0.weight"], found["0.weight"])  # other batches


def test_it_is_a_host_of_activation():
    host = GrowingRegularization(loss, penalty_step=2e-3, learning_rate=0.01)
    tickets = ActivateWhilePruning(sparsity=0.36, host=host, heads=True).tickets(network(), lambda model, masks: None)
    total = 20 * 30 + 30 * 2
    assert [ticket.masks.kept for ticket in tickets] == [total - 132, total - 237]
    for one, other in itertools.pairwise(tickets):
        for name, mask in other.masks.items():
            assert not (mask & ~one.masks[name]).any()


def test_it_runs_within_a_training():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    host = GrowingRegularization(loss, penalty_step=2e-3, learning_rate=0.01)
    run = ActivateWhilePruning(sparsity=0.5, host=host, end=6, heads=True).attach(model, optimizer)
    for _ in range(8):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert run.finalize().sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    "wrong", [{"penalty_step": 0.0}, {"penalty_step": 1.0}, {"penalty_every": 0}, {"learning_rate": 0.0}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        GrowingRegularization(loss, **wrong)


def test_a_diverging_copy_is_named():
    host = GrowingRegularization(loss, penalty_step=1e-3, learning_rate=1e6)
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        host(ended(network()))

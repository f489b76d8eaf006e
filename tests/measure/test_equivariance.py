from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.measure.equivariance import check_equivariance, random_rotation
from gossamer.training.dynamic_signal_distribution import PatchNet, PatchTraining, make_dsd

K, D = 3, 4
OWN = {"fcn": "orthogonal", "lcn": "block", "cnn": "shared-block"}


def learner(kind, **options):
    def train(x, y, initial):
        model = PatchNet(K, D, kind).double()
        with torch.no_grad():
            model.weight.copy_(initial)
        return PatchTraining(steps=60, **options).fit(model, x, y)

    return train


def deviation(kind, group, **options):
    x, y, _ = make_dsd(40, K, D, 0.3, seed=1)
    test, _, _ = make_dsd(30, K, D, 0.3, seed=2)
    shape = PatchNet(K, D, kind).weight.shape
    initial = 1e-2 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        return check_grad(kind, group, x.double(), y.double(), test.double(), initial, options)


def check_grad(kind, group, x, y, test, initial, options):
    with torch.enable_grad():
        train = learner(kind, **options)
        return check_equivariance(lambda *a: _detached(train(*a)), x, y, test, initial, group)


def _detached(model):
    return lambda x: model(x).detach()


@pytest.mark.parametrize("kind", list(OWN))
def test_gradient_descent_does_not_notice_the_rotations_of_its_network(kind):
    assert deviation(kind, OWN[kind]) < 1e-5


@pytest.mark.parametrize("kind", list(OWN))
def test_adam_does(kind):
    assert deviation(kind, OWN[kind], optimizer="adam", learning_rate=0.01) > 1e-2


def test_so_does_an_l1_penalty():
    assert deviation("fcn", "orthogonal", l1=0.01) > 1e-2


@pytest.mark.parametrize(("kind", "group"), [("fcn", "block"), ("fcn", "shared-block"), ("lcn", "shared-block")])
def test_the_smaller_groups_are_parts_of_the_larger(kind, group):
    assert deviation(kind, group) < 1e-5


@pytest.mark.parametrize("group", list(OWN.values()))
def test_rotations_are_orthogonal_and_have_the_blocks_of_their_group(group):
    rotation = random_rotation(K, D, group, torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(K * D, dtype=torch.float64))
    if group != "orthogonal":
        assert not rotation[:D, D:].any()
        assert torch.equal(rotation[:D, :D], rotation[D : 2 * D, D : 2 * D]) == (group == "shared-block")


def test_bad_input_is_refused():
    with pytest.raises(UnknownNameError, match="shared-block"):
        random_rotation(2, 2, "shared_block")
    with pytest.raises(ConfigurationError, match="positive"):
        random_rotation(0, 2)

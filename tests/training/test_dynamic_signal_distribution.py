from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError, UnknownNameError
from gossamer.training.dynamic_signal_bounds import dsd_bounds, orbit_coordinates, orbit_member
from gossamer.training.dynamic_signal_distribution import (
    PatchNet,
    PatchTraining,
    error_rate,
    logistic_loss,
    make_dsd,
    noise_is_bearable,
    oracle_labels,
    random_directions,
    soft_threshold,
)

KINDS = ("fcn", "lcn", "cnn")


def test_the_signal_stands_in_the_patch_of_its_position_with_the_sign_of_the_label():
    signal = random_directions((), 5, torch.Generator().manual_seed(0))
    x, y, position = make_dsd(500, 4, 5, 1e-3, signal)
    assert x.shape == (500, 4, 5)
    assert set(y.tolist()) == {-1.0, 1.0}
    assert set(position.tolist()) == {0, 1, 2, 3}
    expected = torch.zeros(500, 4, 5)
    expected[torch.arange(500), position] = y.unsqueeze(1) * signal
    torch.testing.assert_close(x, expected, rtol=0, atol=6e-3)


def test_without_movement_the_signal_stays_in_the_first_patch():
    _, _, position = make_dsd(50, 4, 5, 0.1, dynamic=False)
    assert not position.any()


def test_the_noise_has_its_size_and_a_seed_repeats():
    x, y, position = make_dsd(4000, 3, 4, 0.3, seed=7)
    others = x[torch.arange(4000), (position + 1) % 3]
    assert others.std() == pytest.approx(0.3, rel=0.03)
    again = make_dsd(4000, 3, 4, 0.3, seed=7)
    assert all(torch.equal(a, b) for a, b in zip((x, y, position), again))


def test_many_sets_are_drawn_side_by_side_each_with_its_signal():
    signals = random_directions((3,), 6, torch.Generator().manual_seed(0))
    x, y, position = make_dsd(40, 2, 6, 1e-4, signals)
    assert x.shape == (3, 40, 2, 6)
    for copy in range(3):
        held = x[copy, torch.arange(40), position[copy]] * y[copy].unsqueeze(1)
        torch.testing.assert_close(held, signals[copy].expand(40, 6), rtol=0, atol=1e-3)


def test_the_oracle_is_right_where_the_noise_can_be_borne():
    signal = random_directions((), 8)
    for k, sigma, most in ((8, 0.2, 0.01), (8, 1.0, 1.0)):
        x, y, _ = make_dsd(2000, k, 8, sigma, signal)
        error = float((oracle_labels(x, signal) != y).double().mean())
        assert (error < most) if noise_is_bearable(k, sigma) else (error > 0.2)


def test_the_threshold_is_odd_and_zero_in_between():
    found = soft_threshold(torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0]), 0.25)
    torch.testing.assert_close(found, torch.tensor([-0.75, 0.0, 0.0, 0.0, 0.75]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_fully_connected_network_with_another_matrix(kind):
    net = PatchNet(3, 4, kind, copies=(2,)).reset_parameters(1.0, torch.Generator().manual_seed(0))
    assert net.weight.numel() == 2 * {"fcn": 3 * 12, "lcn": 12, "cnn": 4}[kind]
    dense = PatchNet(3, 4, "fcn", copies=(2,))
    with torch.no_grad():
        dense.weight.copy_(net.dense_weight())
    x = torch.randn(2, 7, 3, 4)
    torch.testing.assert_close(net(x), dense(x))
    blocks = torch.eye(3, dtype=torch.bool).repeat_interleave(4, 1)
    if kind != "fcn":
        assert not net.dense_weight()[:, ~blocks].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_descent_follows_the_gradient_by_hand(kind):
    x, y, _ = make_dsd(20, 3, 4, 0.3)
    net = PatchNet(3, 4, kind).reset_parameters(0.5, torch.Generator().manual_seed(1)).double()
    x, y = x.double(), y.double()
    expected = net.weight.detach().clone()
    for b in (0.0, 0.25):
        trial = expected.clone().requires_grad_()
        clone = PatchNet(3, 4, kind, b).double()
        clone.weight = torch.nn.Parameter(trial)
        (gradient,) = torch.autograd.grad(torch.log1p(torch.exp(-y * clone(x))).mean(), clone.weight)
        expected = expected - 0.1 * (1 if kind == "cnn" else 3) * gradient
    PatchTraining(steps=2, warm=0.5, learning_rate=0.1).fit(net, x, y)
    torch.testing.assert_close(net.weight.detach(), expected)
    assert net.threshold == 0.25


def test_copies_do_not_mix():
    x, y, _ = make_dsd(30, 3, 4, 0.3, random_directions((2,), 4))
    stack = PatchNet(3, 4, "lcn", copies=(2,)).reset_parameters(1e-2, torch.Generator().manual_seed(0))
    alone = PatchNet(3, 4, "lcn")
    with torch.no_grad():
        alone.weight.copy_(stack.weight[1])
    training = PatchTraining(steps=40)
    training.fit(stack, x, y)
    training.fit(alone, x[1], y[1])
    torch.testing.assert_close(stack.weight[1], alone.weight)


def test_with_a_threshold_from_the_start_nothing_is_learnt():
    x, y, _ = make_dsd(30, 3, 4, 0.3)
    net = PatchNet(3, 4, "lcn")
    PatchTraining(steps=10, warm=0.0).fit(net, x, y)
    assert not net.weight.any()
    PatchTraining(steps=10).fit(net, x, y)
    assert net.weight.any()


def test_connections_in_their_place_save_samples():
    generator = torch.Generator().manual_seed(0)
    signals = random_directions((6,), 16, generator)
    x, y, _ = make_dsd(60, 8, 16, 0.2, signals, seed=generator)
    test, labels, _ = make_dsd(1000, 8, 16, 0.2, signals, seed=generator)
    errors = {}
    for kind in KINDS:
        net = PatchNet(8, 16, kind, copies=(6,)).reset_parameters(generator=generator)
        errors[kind] = float(error_rate(PatchTraining().fit(net, x, y)(test), labels).mean())
    assert errors["cnn"] < errors["lcn"] < errors["fcn"] < 0.4


def test_an_l1_penalty_leaves_exact_zeros():
    x, y, _ = make_dsd(60, 4, 8, 0.2)
    net = PatchNet(4, 8, "fcn").reset_parameters(generator=torch.Generator().manual_seed(0))
    PatchTraining(steps=100, l1=0.02).fit(net, x, y)
    zeros = int((net.weight == 0).sum())
    assert 0 < zeros < net.weight.numel()


def test_an_undecided_score_is_half_an_error():
    assert float(error_rate(torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 1.0, 1.0]))) == 0.375
    assert float(logistic_loss(torch.zeros(4), torch.ones(4))) == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_members_of_an_orbit_are_orthonormal(kind):
    member = orbit_member(3, 5, kind, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(member @ member.t(), torch.eye(3, dtype=torch.float64))
    blocks = torch.eye(3, dtype=torch.bool).repeat_interleave(5, 1)
    assert bool(member[~blocks].abs().max() > 1e-6) == (kind == "fcn")


def test_the_floors_have_the_order_of_the_theory():
    bounds = dsd_bounds(8, 32, 0.5, samples=1024)
    assert {kind: bound.coordinates for kind, bound in bounds.items()} == {"fcn": 8 * 8 * 31, "lcn": 8 * 31, "cnn": 31}
    assert bounds["fcn"].n > 4 * bounds["lcn"].n > 16 * bounds["cnn"].n > 0
    for bound in bounds.values():
        # what a sample can say at most: the squared distance of two patches' signals, position known
        assert -4 * bound.kl_error < bound.kl <= 4 / (2 * 0.25) + 4 * bound.kl_error


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="positive"):
        make_dsd(0, 2, 3, 0.1)
    with pytest.raises(ConfigurationError, match="length 1"):
        make_dsd(5, 2, 3, 0.1, torch.ones(3))
    with pytest.raises(UnknownNameError, match="fcn"):
        PatchNet(2, 3, "mlp")
    with pytest.raises(ConfigurationError, match="threshold"):
        PatchNet(2, 3, threshold=-1.0)
    with pytest.raises(UnknownNameError, match="'gd'"):
        PatchTraining(optimizer="sgd")
    with pytest.raises(ConfigurationError, match="warm"):
        PatchTraining(warm=2.0)
    with pytest.raises(UnknownNameError, match="patch network"):
        orbit_coordinates(2, 3, "mlp")
    with pytest.raises(ConfigurationError, match="d >= 2"):
        orbit_member(2, 1, "cnn", 1.0)

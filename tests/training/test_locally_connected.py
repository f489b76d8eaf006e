from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.errors import ConfigurationError
from gossamer.training.dynamic_signal_distribution import PatchNet
from gossamer.training.locally_connected import LocallyConnected1d, LocallyConnected2d, weight_map

CASES_1D = [(8, 3, 1, 0), (9, 4, 2, 1), (12, 4, 4, 0), (7, 7, 1, 3)]
CASES_2D = [((6, 5), (3, 2), (1, 1), (0, 0)), ((7, 7), (3, 3), (2, 2), (1, 1)), ((6, 8), (2, 4), (2, 4), (0, 2))]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CASES_1D)
def test_tied_to_the_filters_of_a_convolution_it_is_one(size, kernel, stride, padding):
    torch.manual_seed(0)
    convolution = nn.Conv1d(3, 5, kernel, stride, padding)
    layer = LocallyConnected1d(3, 5, size, kernel, stride, padding)
    layer.tie_(convolution.weight, convolution.bias)
    x = torch.randn(4, 3, size)
    torch.testing.assert_close(layer(x), convolution(x))


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CASES_2D)
def test_so_it_is_in_two_dimensions(size, kernel, stride, padding):
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, kernel, stride, padding)
    layer = LocallyConnected2d(2, 3, size, kernel, stride, padding)
    layer.tie_(convolution.weight, convolution.bias)
    x = torch.randn(4, 2, *size)
    torch.testing.assert_close(layer(x), convolution(x))


def test_every_place_has_a_filter_of_its_own():
    torch.manual_seed(0)
    layer = LocallyConnected2d(1, 2, 4, 2, 2, bias=False)
    x = torch.randn(3, 1, 4, 4)
    found = layer(x)
    for row in range(2):
        for column in range(2):
            window = x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            torch.testing.assert_close(found[:, :, row, column], window @ layer.weight[2 * row + column].t())


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CASES_2D)
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_masked_linear_layer(size, kernel, stride, padding, bias):
    torch.manual_seed(0)
    layer = LocallyConnected2d(2, 3, size, kernel, stride, padding, bias)
    dense = layer.to_linear()
    x = torch.randn(4, 2, *size)
    torch.testing.assert_close(dense(x.flatten(1)), layer(x).flatten(1))
    mask = weight_map(2, 3, size, kernel, stride, padding) >= 0
    assert not MaskSet({"weight": mask}).violations(dense)


@pytest.mark.parametrize(("size", "kernel", "stride", "padding"), CASES_2D)
def test_a_convolution_is_the_same_mask_with_ties(size, kernel, stride, padding):
    torch.manual_seed(0)
    convolution = nn.Conv2d(2, 3, kernel, stride, padding, bias=False)
    places = weight_map(2, 3, size, kernel, stride, padding, tied=True)
    dense = torch.where(places >= 0, convolution.weight.detach().flatten()[places.clamp_min(0)], 0.0)
    x = torch.randn(4, 2, *size)
    torch.testing.assert_close(x.flatten(1) @ dense.t(), convolution(x).flatten(1))
    assert torch.equal(places >= 0, weight_map(2, 3, size, kernel, stride, padding) >= 0)


def test_the_networks_of_the_task_are_these_layers():
    torch.manual_seed(0)
    k, d = 4, 6
    x = torch.randn(5, k, d)
    row = x.flatten(1).unsqueeze(1)
    local = PatchNet(k, d, "lcn").reset_parameters(1.0)
    layer = LocallyConnected1d(1, 1, k * d, d, d, bias=False)
    with torch.no_grad():
        layer.weight.copy_(local.weight.unsqueeze(1))
    torch.testing.assert_close(layer(row).squeeze(1), local.units(x))
    shared = PatchNet(k, d, "cnn").reset_parameters(1.0)
    places = weight_map(1, 1, (k * d,), (d,), (d,), (0,), tied=True)
    dense = torch.where(places >= 0, shared.weight.detach().flatten()[places.clamp_min(0)], 0.0)
    assert torch.equal(dense, shared.dense_weight())


def test_gradients_reach_every_weight():
    torch.manual_seed(0)
    layer = LocallyConnected1d(2, 3, 6, 3, padding=1).double()
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().sum(2).gt(0).all()


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="does not fit"):
        LocallyConnected1d(1, 1, 3, 5)
    with pytest.raises(ConfigurationError, match="positive"):
        LocallyConnected2d(1, 1, 4, 2, stride=0)
    with pytest.raises(ConfigurationError, match="channels"):
        LocallyConnected1d(0, 1, 4, 2)
    with pytest.raises(ConfigurationError, match=r"\(batch, 1, 4\)"):
        LocallyConnected1d(1, 1, 4, 2)(torch.zeros(2, 1, 5))

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.training.g2g_layers import G2GLinear, G2GNet
from gossamer.training.g2g_measures import path_count
from gossamer.training.g2gnet import G2G


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


SHAPES = [(16, 24, 4), (15, 22, 4), (8, 8, 8), (9, 5, 1)]


@pytest.mark.parametrize("grouping", ["index", "random", "mixer"])
@pytest.mark.parametrize(("outputs", "inputs", "groups"), SHAPES)
@pytest.mark.parametrize("p_inter", [0.0, 0.3])
def test_the_layer_is_a_linear_layer_under_its_mask(grouping, outputs, inputs, groups, p_inter):
    layer = G2GLinear(inputs, outputs, groups, p_inter, grouping, generator(), layer=1).double()
    linear = layer.to_linear()
    assert torch.equal(linear.weight != 0, layer.mask())
    x = torch.randn(2, 7, inputs, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    output, expected = layer(x), linear(twin)
    torch.testing.assert_close(output, expected)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)
    if layer.between is not None:
        torch.testing.assert_close(layer.between.values.grad, linear.weight.grad[layer.between.mask()])
    # the gradient of the blocks, put where their weights stand
    with torch.no_grad():
        layer.blocks.copy_(layer.blocks.grad)
        if layer.between is not None:
            layer.between.values.copy_(layer.between.values.grad)
    torch.testing.assert_close(layer.to_linear().weight, linear.weight.grad * layer.mask())


def test_training_moves_what_exists_and_nothing_else():
    layer = G2GLinear(15, 22, 4, 0.2, "random", generator())
    mask, before = layer.mask(), layer.to_linear().weight.clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 15, generator=generator(seed))).square().sum().backward()
        optimizer.step()
    after = layer.to_linear().weight
    assert torch.equal(after != 0, mask)
    assert (after[mask] != before[mask]).all()
    assert not layer.blocks[~layer._real()].any()


def test_a_linear_layer_under_a_mask_becomes_one_in_groups_and_back():
    torch.manual_seed(0)
    linear = nn.Linear(22, 15).eval()
    model = nn.Sequential(linear, nn.Linear(15, 2))
    run = G2G(groups=4, sparsity=0.5, grouping="random").attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    groups = [run.extra[f"groups of 0.weight, {end}"] for end in ("out", "in")]
    layer = G2GLinear.from_linear(linear, run.mask("0.weight"), *groups)
    x = torch.randn(5, 22)
    torch.testing.assert_close(layer(x), linear(x))
    torch.testing.assert_close(layer.to_linear().weight, linear.weight)
    assert not layer.training


def test_wiring_comes_back_from_a_checkpoint():
    one, other = (G2GLinear(20, 12, 4, 0.3, "random", generator(seed)) for seed in (0, 1))
    assert not torch.equal(one.mask(), other.mask())
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 20)
    torch.testing.assert_close(other(x), one(x))
    assert torch.equal(one.mask(), other.mask())


def test_a_whole_mask_is_stored_by_its_edges():
    layer = G2GLinear(64, 64, 8, 0.1, generator=generator())
    stored = layer.blocks.numel() + layer.between.values.numel()
    assert stored == int(layer.mask().sum())
    assert G2GLinear(64, 64, 8, 0.0).between is None
    assert G2GLinear(64, 64, 8, 0.0, bias=False).bias is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"groups": 9}, "groups is 9 for 8 units"),
        ({"p_inter": 2.0}, "p_inter is 2.0"),
        ({"groups": 2, "in_groups": torch.zeros(8, dtype=torch.int64)}, "name each of 2 groups"),
        ({"groups": 2, "mask": torch.zeros(8, 8, dtype=torch.bool)}, "hold every edge within a group"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        G2GLinear(8, 8, **arguments)


def test_an_input_of_another_width_is_named():
    with pytest.raises(ConfigurationError, match=r"x is \(3, 7\).*8"):
        G2GLinear(8, 8, 2)(torch.zeros(3, 7))


@pytest.mark.parametrize("grouping", ["index", "random", "mixer"])
@pytest.mark.parametrize("output", ["dense", "grouped"])
def test_a_network_is_wired_throughout(grouping, output):
    net = G2GNet([1 * 4 * 8, 16, 16, 8], 4, 0.1, grouping, output, batch_norm=True, dropout=0.1, generator=generator())
    assert net(torch.randn(5, 1, 4, 8)).shape == (5, 8)
    masks = net.masks()
    assert [tuple(mask.shape) for mask in masks] == [(16, 32), (16, 16), (8, 16)]
    assert bool(masks[-1].all()) == (output == "dense")
    assert path_count(masks) > 0
    layers = [layer for layer in net.layers if isinstance(layer, G2GLinear)]
    if grouping == "random":
        assert torch.equal(layers[0].out_groups, layers[1].in_groups)
    if grouping == "mixer":
        assert layers[1].in_groups.tolist() == [0, 1, 2, 3] * 4


@pytest.mark.parametrize(
    ("sizes", "options", "named"),
    [
        ([8], {}, "sizes"),
        ([8, 0], {}, "sizes"),
        ([8, 8], {"output": "free"}, "'free'"),
        ([8, 8], {"dropout": 1.0}, "1.0"),
    ],
)
def test_bad_networks_are_named(sizes, options, named):
    with pytest.raises(ConfigurationError, match=named):
        G2GNet(sizes, 2, **options)


def test_a_network_learns():
    torch.manual_seed(0)
    net = G2GNet([16, 32, 2], 4, 0.15, generator=generator())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    x = torch.randn(200, 16, generator=generator(3))
    y = (x[:, 0] * x[:, 12] > 0).long()
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    assert float((net(x).argmax(1) == y).float().mean()) > 0.95

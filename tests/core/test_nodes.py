from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gossamer.core.nodes import gather_nodes, node_groups, node_masks, shrink
from gossamer.errors import SparsityError, TargetError, UnknownNameError


def perceptron():
    torch.manual_seed(0)
    hidden = [nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 8), nn.Sigmoid()]
    return nn.Sequential(*hidden, nn.Linear(8, 3))


def convolutional():
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.PReLU(6)]
    return nn.Sequential(*first, nn.Conv2d(6, 4, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(x + self.outer(torch.relu(self.inner(x))))


CASES = {
    "perceptron": (perceptron, (6,)),
    "convolutional": (convolutional, (1, 8, 8)),
    "residual": (Residual, (4,)),
}


def some(model, generator):
    nodes = {name: torch.rand(group.size, generator=generator) < 0.5 for name, group in node_groups(model).items()}
    for kept in nodes.values():
        kept[0] = True
    return nodes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_the_smaller_network_computes_what_the_masked_one_does(case, training):
    build, shape = CASES[case]
    model = build().double().train(training)
    nodes = some(model, torch.Generator().manual_seed(1))
    masked, small = copy.deepcopy(model), shrink(model, nodes)
    node_masks(model, nodes).apply_(masked)
    inputs = torch.randn(7, *shape, dtype=torch.float64)
    torch.testing.assert_close(small(inputs), masked(inputs))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_training_the_smaller_network_is_training_the_masked_one(case):
    build, shape = CASES[case]
    model = build().double().train()
    nodes = some(model, torch.Generator().manual_seed(2))
    masked, small = copy.deepcopy(model), shrink(model, nodes)
    node_masks(model, nodes).apply_(masked)
    inputs = torch.randn(7, *shape, dtype=torch.float64)
    for network in (masked, small):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(inputs).square().mean().backward()
            optimizer.step()
            if network is masked:
                node_masks(model, nodes).apply_(masked)
    torch.testing.assert_close(small(inputs), masked(inputs))


def test_layers_know_their_new_sizes():
    model = convolutional()
    nodes = {"0.weight": torch.tensor([1, 0, 1, 0, 0, 1]).bool(), "5.weight": torch.tensor([0, 1, 1, 0]).bool()}
    small = shrink(model, nodes)
    assert (small[0].in_channels, small[0].out_channels) == (1, 3)
    assert small[1].num_features == 3
    assert len(small[1].running_mean) == 3
    assert (small[3].groups, small[3].in_channels, small[3].out_channels) == (3, 3, 3)
    assert small[4].num_parameters == 3
    assert (small[5].in_channels, small[5].out_channels) == (3, 2)
    assert small[8].in_features == 2 * 4
    assert (model[0].out_channels, model[8].in_features) == (6, 16)


def test_masks_take_the_row_the_bias_and_the_columns_of_a_node():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    masks = node_masks(model, {"0.weight": torch.tensor([True, False, True])})
    assert masks["0.weight"].int().tolist() == [[1, 1], [0, 0], [1, 1]]
    assert masks["0.bias"].int().tolist() == [1, 0, 1]
    assert masks["2.weight"].int().tolist() == [[1, 0, 1], [1, 0, 1]]
    assert set(masks) == {"0.weight", "0.bias", "2.weight"}


def test_nodes_that_a_residual_connection_adds_go_together():
    groups = node_groups(Residual())
    assert {name: group.size for name, group in groups.items()} == {"stem.weight": 8, "inner.weight": 6}
    kept = torch.arange(8) < 5
    small = shrink(Residual(), {"stem.weight": kept})
    assert small.stem.out_features == small.outer.out_features == small.inner.in_features == small.head.in_features == 5


@pytest.mark.parametrize("case", CASES)
def test_gathered_parameters_are_those_of_the_smaller_networks(case):
    model = CASES[case][0]()
    generator = torch.Generator().manual_seed(3)
    rows = {
        name: torch.stack([torch.randperm(group.size, generator=generator)[:3].sort().values for _ in range(4)])
        for name, group in node_groups(model).items()
    }
    stacked = gather_nodes(model, rows)
    for index in range(4):
        nodes = {
            n: torch.zeros(g.size).bool().index_fill_(0, rows[n][index], True) for n, g in node_groups(model).items()
        }
        small = shrink(model, nodes)
        for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
            assert torch.equal(stacked[name][index], tensor), name


def test_bad_nodes_are_refused():
    model = perceptron()
    with pytest.raises(SparsityError, match=r"none of the 10 nodes of 0\.weight"):
        shrink(model, {"0.weight": torch.zeros(10, dtype=torch.bool)})
    with pytest.raises(SparsityError, match=r"bool \(10,\)"):
        shrink(model, {"0.weight": torch.ones(9, dtype=torch.bool)})
    with pytest.raises(UnknownNameError, match=r"0\.weight"):
        shrink(model, {"0.weigth": torch.ones(10, dtype=torch.bool)})
    with pytest.raises(TargetError, match="hidden"):
        node_groups(nn.Linear(3, 2))

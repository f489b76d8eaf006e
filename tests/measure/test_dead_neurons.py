from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from gossamer.errors import CalibrationError, ConfigurationError, TargetError
from gossamer.measure.dead_neurons import dead_neuron_rate


def hand_built():
    """Units 0 and 1 see +x and -x, unit 2 is always silent, unit 3 never."""
    network = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0], [-1.0], [0.0], [0.0]]))
        network[0].bias.copy_(torch.tensor([0.0, 0.0, -1.0, 1.0]))
    return network


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(3, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)

    def forward(self, x):
        x = self.act(self.first(x))
        if x.sum() > -1:  # a branch that torch.fx could not follow
            x = functional.relu(self.second(x))
        return torch.relu(self.second(x)).relu_()


def test_the_dynamic_rate_of_a_hand_built_net():
    inputs = torch.tensor([[1.0], [2.0], [-3.0]])
    # zeros: unit 0 once, unit 1 twice, unit 2 three times, of twelve outputs
    rate = dead_neuron_rate(hand_built(), inputs)
    assert rate.total == pytest.approx(6 / 12)
    assert rate.layers == {"1": pytest.approx(0.5)}
    assert rate.outputs == {"1": 12}


def test_the_static_rate_counts_units_that_are_always_silent():
    network = hand_built()
    assert dead_neuron_rate(network, torch.tensor([[1.0], [-1.0]]), "static").total == pytest.approx(1 / 4)
    assert dead_neuron_rate(network, torch.tensor([[1.0], [2.0]]), "static").total == pytest.approx(2 / 4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_batches_give_what_all_inputs_at_once_give(kind):
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU()), torch.randn(30, 5)
    parts = [(inputs[:7], "a label"), (inputs[7:8],), inputs[8:]]
    whole, split = dead_neuron_rate(network, inputs, kind), dead_neuron_rate(network, parts, kind)
    assert whole == split


def test_both_rates_equal_those_of_stored_activations():
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten())
    with torch.no_grad():
        network[2].weight[1].neg_().abs_().neg_()
    images = torch.rand(6, 1, 8, 8)
    first = network[:2](images)
    second = network[2:4](first)
    zeros, size = (first == 0).sum() + (second == 0).sum(), first.numel() + second.numel()
    assert dead_neuron_rate(network, images).total == pytest.approx(float(zeros / size))
    always = (first == 0).all(0).sum() + (second == 0).all(0).sum()
    units = first[0].numel() + second[0].numel()
    assert dead_neuron_rate(network, images, "static").total == pytest.approx(float(always / units))


def test_functional_and_in_place_calls_are_each_counted_once_by_name():
    rate = dead_neuron_rate(Functional(), torch.randn(9, 3))
    assert list(rate.layers) == ["act", "relu", "relu_2", "relu_3"]
    assert set(rate.outputs.values()) == {9 * 6}


def test_smooth_activations_need_a_threshold():
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(4, 50), nn.GELU()), torch.randn(20, 4)
    with pytest.raises(TargetError, match="threshold"):
        dead_neuron_rate(network, inputs)
    expected = (network(inputs).abs() <= 0.05).double().mean()
    assert dead_neuron_rate(network, inputs, threshold=0.05).total == pytest.approx(float(expected))


def test_chosen_modules_are_counted_instead():
    network = hand_built()
    rate = dead_neuron_rate(network, torch.tensor([[0.5], [-4.0]]), threshold=0.6, modules=["0"])
    assert rate.layers == {"0": pytest.approx(2 / 8)}  # 0.5 and −0.5
    with pytest.raises(TargetError, match="nowhere"):
        dead_neuron_rate(network, torch.ones(1, 1), modules=["nowhere*"])


def test_the_units_of_a_sequence_are_its_features():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    rate = dead_neuron_rate(network, [torch.randn(2, 5, 2), torch.randn(1, 9, 2)], "static")
    assert rate.outputs == {"1": 3}


def test_the_model_is_measured_in_evaluation_mode_and_stays_as_it_was():
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.9), nn.ReLU()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    inputs = torch.randn(50, 4)
    assert dead_neuron_rate(network, inputs) == dead_neuron_rate(network, inputs)
    assert network.training
    assert network[3].training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_hooks_go_even_if_the_model_fails():
    network = hand_built()
    with pytest.raises(RuntimeError):
        dead_neuron_rate(network, torch.ones(2, 7))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_bad_input_is_refused():
    with pytest.raises(CalibrationError, match="no data"):
        dead_neuron_rate(hand_built(), [])
    with pytest.raises(ConfigurationError, match="dynamic, static"):
        dead_neuron_rate(hand_built(), torch.ones(1, 1), "dead")
    with pytest.raises(ConfigurationError, match="threshold"):
        dead_neuron_rate(hand_built(), torch.ones(1, 1), threshold=-1.0)
    convolution = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())
    with pytest.raises(CalibrationError, match="one size"):
        dead_neuron_rate(convolution, [torch.ones(1, 1, 5, 5), torch.ones(1, 1, 6, 6)], "static")

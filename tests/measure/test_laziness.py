from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import ConfigurationError, NonFiniteError, TargetError
from gossamer.measure.laziness import (
    LazinessProbe,
    empirical_ntk,
    kernel_alignment,
    representation_kernel,
    sign_similarity,
)
from gossamer.training.ctrnn import CTRNN
from gossamer.training.two_layer_linear import linear_ntk


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def by_hand(model, inputs, names):
    """One backward pass for each sample and output."""
    rows = []
    parameters = dict(model.named_parameters())
    for sample in inputs:
        for output in model(sample.unsqueeze(0)).flatten():
            gradients = torch.autograd.grad(output, [parameters[name] for name in names], retain_graph=True)
            rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    stacked = torch.stack(rows)
    return stacked @ stacked.t()


@pytest.mark.parametrize("chunk", [1, 2, 5, 32])
@pytest.mark.parametrize("names", [["0.weight"], ["0.weight", "0.bias", "2.weight", "2.bias"]])
def test_the_tangent_kernel_is_that_of_single_backward_passes(chunk, names):
    model, inputs = network(), torch.randn(5, 4, dtype=torch.float64)
    expected = by_hand(model, inputs, names)
    torch.testing.assert_close(empirical_ntk(model, names, inputs, chunk=chunk), expected)
    summed = expected.view(5, 3, 5, 3).sum((1, 3))
    torch.testing.assert_close(empirical_ntk(model, names, inputs, "sum", chunk=chunk), summed)


def test_without_names_all_that_trains_counts():
    model, inputs = network(), torch.randn(3, 4, dtype=torch.float64)
    model[0].bias.requires_grad_(False)
    expected = by_hand(model, inputs, ["0.weight", "2.weight", "2.bias"])
    torch.testing.assert_close(empirical_ntk(model, None, inputs), expected)


def test_the_kernel_of_two_linear_layers_is_the_closed_form():
    w1, w2, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3), (5,), (7, 3)))
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(w1)
        model[1].weight.copy_(w2.unsqueeze(0))
    torch.testing.assert_close(empirical_ntk(model, None, x), linear_ntk(w1, w2, x))


def test_a_recurrent_kernel_runs_over_samples_steps_and_outputs():
    torch.manual_seed(0)
    model = CTRNN(2, 5, 3).double()
    sequence = torch.randn(4, 6, 2, dtype=torch.float64)
    found = empirical_ntk(model, ["recurrent"], sequence, select=lambda result: result[0], batch_dim=1, chunk=4)
    rows = []
    outputs = model(sequence)[0]
    for sample in range(6):
        for output in outputs[:, sample].flatten():
            rows.append(torch.autograd.grad(output, model.recurrent, retain_graph=True)[0].flatten())
    stacked = torch.stack(rows)
    torch.testing.assert_close(found, stacked @ stacked.t())


def test_alignment_ignores_a_factor_and_notices_a_rotation():
    activity = torch.randn(6, 3, dtype=torch.float64)
    kernel = representation_kernel(activity)
    assert kernel_alignment(kernel, 5 * kernel) == pytest.approx(1)
    rotated = activity @ torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert kernel_alignment(kernel, representation_kernel(rotated)) == pytest.approx(1)
    assert kernel_alignment(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))) == 0


def test_a_common_mean_inflates_the_alignment_unless_it_is_taken_out():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(40, 10, generator=generator) + 20 for _ in range(2))
    kernels = representation_kernel(first), representation_kernel(second)
    assert kernel_alignment(*kernels) > 0.999
    assert kernel_alignment(*kernels, center=True) < 0.5
    shifted = representation_kernel(first + 3)
    assert kernel_alignment(kernels[0], shifted, center=True) == pytest.approx(1, abs=1e-6)


def test_rectified_units_that_stay_off_count_as_the_same():
    before, after = torch.tensor([[0.0, 1.0, 2.0, 0.0]]), torch.tensor([[0.0, 3.0, 0.0, 1.0]])
    assert sign_similarity(before, after) == 0.5
    with pytest.raises(ConfigurationError, match="equal"):
        sign_similarity(before, after[:, :2])


def test_the_probe_sees_nothing_before_and_the_change_after():
    model = network()
    inputs = torch.randn(8, 4, dtype=torch.float64)
    probe = LazinessProbe(model, inputs, ["0.weight"], activity=lambda m, x: torch.relu(m[0](x)))
    with pytest.raises(ConfigurationError, match="start"):
        probe.stop()
    probe.start()
    untouched = probe.stop()
    assert untouched["weight_change"] == untouched["plasticity_cost"] == 0
    for name in ("kernel_alignment", "centred_kernel_alignment", "representation_alignment", "sign_similarity"):
        assert untouched[name] == pytest.approx(1)
    size = model[0].weight.norm().item()
    with torch.no_grad():
        model[0].weight += 0.5
        model[2].weight += 7  # not among the parameters that are probed, but the kernel depends on it
    changed = probe.stop()
    assert changed["weight_change"] == pytest.approx(0.5 * 24**0.5)
    assert changed["relative_change"] == pytest.approx(0.5 * 24**0.5 / size)
    assert changed["plasticity_cost"] == pytest.approx(12)
    assert changed["kernel_alignment"] < 0.999
    assert changed["representation_alignment"] < 0.999


def test_bad_input_is_refused():
    model, inputs = network(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(TargetError, match="'recurrent'"):
        empirical_ntk(model, ["recurrent"], inputs)
    with pytest.raises(ConfigurationError, match="chunks of 0"):
        empirical_ntk(model, None, inputs, chunk=0)
    with pytest.raises(ConfigurationError, match="square"):
        kernel_alignment(torch.eye(3), torch.eye(4))
    with pytest.raises(NonFiniteError, match="zero"):
        kernel_alignment(torch.eye(3), torch.zeros(3, 3))
    with pytest.raises(NonFiniteError, match="constant"):
        kernel_alignment(torch.eye(3), torch.ones(3, 3), center=True)

"""Densities of activations, counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.taps import Tap
from gossamer.errors import CalibrationError, ConfigurationError, TargetError
from gossamer.measure.activation_density import (
    activation_density,
    chunk_sparsity,
    frequency_curve,
    histogram,
    share_of_work,
)


class Through(nn.Module):
    """Passes activations through a module that can be tapped."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x, attention_mask=None):
        return self.inner(x)


def measure(x, mask=None, **options):
    model = Through()
    batch = {"x": x} if mask is None else {"x": x, "attention_mask": mask}
    return activation_density(model, [batch], [Tap("inner", model.inner, "output")], **options)


SEQUENCE = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [1e-4, 0.0, 0.0]]])


def test_counts_worked_by_hand():
    found = measure(SEQUENCE, chunk=2)
    assert found.density == pytest.approx(3 / 12)
    assert found.sparsity == pytest.approx(9 / 12)
    layer = found.layers["inner"]
    assert layer.frequency.tolist() == [0.5, 0, 0.25]
    assert layer.token_densities == pytest.approx((0, 1 / 3, 1 / 3))
    assert found.chunk_sparsity == pytest.approx(1 - (2 / 3 + 1 / 3) / 2)
    assert found.dead == pytest.approx(1 / 3)
    assert found.tokens == 4
    assert "float32" in str(found)


def test_histograms_worked_by_hand():
    found = measure(SEQUENCE)
    # three tokens use one neuron of three, which lies in the seventh part of twenty; one uses none
    expected = [0.0] * 20
    expected[0], expected[6] = 1 / 4, 3 / 4
    assert found.layers["inner"].token_histogram.tolist() == pytest.approx(expected)
    assert found.histogram.tolist() == pytest.approx(expected)
    # the neurons are active at two tokens of four, at none, and at one
    assert found.neuron_histogram.nonzero().flatten().tolist() == [0, 5, 10]
    assert found.neuron_histogram.sum() == pytest.approx(1)


def test_counts_on_a_border_land_above_it():
    # 0.35 in single precision lies below the border; 7 of 20 does not
    for count in range(21):
        place = histogram(torch.tensor([count]), 20).argmax()
        assert int(place) == min(count, 19)
    with pytest.raises(CalibrationError, match="no counts"):
        histogram(torch.empty(0), 3)
    with pytest.raises(ConfigurationError, match=r"0 to 4.*\[0, 3\]"):
        histogram(torch.tensor([0, 4]), 3)


def test_padding_and_layers_weigh_in_histograms_as_they_should():
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, -1.0]])
    taps = [Tap("all", model[0], "output"), Tap("positive", model[1], "output")]
    found = activation_density(model, x, taps)
    assert found.layers["all"].token_histogram[19] == 1
    assert found.histogram[[5, 10, 19]].tolist() == [0.25, 0.25, 0.5]
    masked = measure(SEQUENCE, torch.tensor([[1, 1, 0, 0]]))
    assert masked.histogram[6] == 1


def test_what_is_within_the_tolerance_is_zero():
    assert measure(SEQUENCE, tolerance=1e-3).density == pytest.approx(2 / 12)
    assert measure(SEQUENCE, tolerance=1e-4).density == pytest.approx(2 / 12)


def test_padding_does_not_count_in_tokens_or_chunks():
    found = measure(SEQUENCE, torch.tensor([[1, 1, 1, 0]]), chunk=2)
    assert found.tokens == 3
    assert found.density == pytest.approx(2 / 9)
    assert found.chunk_sparsity == pytest.approx(1 / 3)  # the second chunk holds padding


def test_batches_add_up():
    torch.manual_seed(0)
    x = torch.randn(6, 9, 5).relu()
    model = Through()
    taps = [Tap("inner", model.inner, "output")]
    whole = activation_density(model, x, taps)
    parts = activation_density(model, x.split(2), taps)
    assert parts.density == pytest.approx(whole.density)
    assert parts.chunk_sparsity == pytest.approx(whole.chunk_sparsity)
    live = x[:, :8] != 0
    assert whole.chunk_sparsity == pytest.approx(1 - float(live.any(1).double().mean()))


def test_vectors_have_no_chunks_and_groups_are_told_apart():
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 4), nn.ReLU())
    taps = [Tap("0", model[0], "output", "a"), Tap("2", model[2], "output", "b")]
    found = activation_density(model, torch.randn(7, 3), taps)
    assert found.chunk_sparsity is None
    assert found.density == pytest.approx((found.groups["a"] + found.groups["b"]) / 2)


def test_gelu_has_zeros_only_where_digits_end_and_the_dtype_is_told():
    x = torch.tensor([[-4.0, -20.0, 1.0]])
    assert measure(nn.functional.gelu(x)).density == pytest.approx(2 / 3)
    found = measure(nn.functional.gelu(x.double()).to(torch.bfloat16))
    assert found.dtype == "bfloat16"


def test_modes_are_put_back():
    model = Through().train()
    activation_density(model, torch.randn(2, 3), [Tap("inner", model.inner, "output")])
    assert model.training
    assert not model.inner._forward_hooks


def test_curves_of_neurons():
    frequency = torch.tensor([0.1, 0.6, 0.3])
    assert frequency_curve(frequency).tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert share_of_work(frequency, 0.5) == pytest.approx(1 / 3)
    assert share_of_work(frequency, 0.9) == pytest.approx(2 / 3)
    assert share_of_work(torch.ones(4), 1.0) == 1
    live = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 1], [1, 1]]).bool()
    assert chunk_sparsity(live, 2) == pytest.approx(0.5)


def test_bad_input_is_named():
    with pytest.raises(ConfigurationError, match="tolerance is -1"):
        measure(SEQUENCE, tolerance=-1)
    with pytest.raises(CalibrationError, match="no real token"):
        measure(SEQUENCE, torch.zeros(1, 4))
    with pytest.raises(CalibrationError, match="no real token"):
        activation_density(model := Through(), [], [Tap("inner", model.inner)])
    with pytest.raises(TargetError, match="no place"):
        activation_density(Through(), SEQUENCE, [])
    with pytest.raises(CalibrationError, match="no chunk of 8"):
        chunk_sparsity(torch.ones(3, 2).bool())
    with pytest.raises(ConfigurationError, match="share is 2"):
        share_of_work(torch.ones(3), 2)

"""Lazy neurons: top-k transformers, the study of emergence, the sign of the gradient, and what follows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.activations.lazy_neuron import (
    TopKTransformer,
    activation_taps,
    emergence_study,
    expected_gradient,
    feed_forward_flops,
    noisy_labels,
    topk_transformer,
)
from gossamer.errors import CalibrationError, ConfigurationError, TargetError
from gossamer.measure.activation_density import activation_density
from gossamer.methods import method
from gossamer.models.activation_functions import TopKActivation
from gossamer.models.feedforward_taps import feed_forward_taps

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=1, **SIZES)).eval()


TOKENS = torch.arange(24).view(3, 8)


def test_no_token_has_more_than_k_active_neurons_and_the_model_trains(model):
    before = copy.deepcopy(model.state_dict())
    swap = topk_transformer(model, 5)
    density = activation_density(model, TOKENS, feed_forward_taps(model))
    assert max(layer.token_densities[2] for layer in density.layers.values()) <= 5 / 24
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert float(model.model.layers[0].mlp.down_proj.weight.grad.abs().sum()) > 0
    swap.undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_top_k_as_wide_as_the_layer_is_the_model_with_relu(model):
    relu = copy.deepcopy(model)
    for layer in relu.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    TopKTransformer(k=24).install(model)
    assert torch.equal(model(input_ids=TOKENS).logits, relu(input_ids=TOKENS).logits)


def test_top_k_can_keep_the_activation_of_the_model(model):
    TopKTransformer(ratio=0.25, activation="keep").install(model)
    found = model.model.layers[0].mlp.act_fn
    assert isinstance(found, TopKActivation)
    assert found.kept(24) == 6
    assert method("lazy-neuron").factory is TopKTransformer


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": 2.5}, {"k": 3, "ratio": 0.5}, {"k": None}, {"activation": "gelu"}])
def test_a_top_k_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ConfigurationError):
        TopKTransformer(**bad)


def test_taps_are_found_anywhere_and_of_nested_ones_the_outermost():
    model = nn.Sequential(nn.Linear(2, 3), TopKActivation(2), nn.Linear(3, 3), nn.ReLU())
    assert [tap.name for tap in activation_taps(model)] == ["1", "3"]
    with pytest.raises(TargetError, match="ReLU"):
        activation_taps(nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------- emergence


def study(steps=20, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3))
    x, y = torch.randn(60, 5), torch.arange(60) % 3
    batches = [(x[i : i + 20], y[i : i + 20]) for i in torch.randint(0, 40, (steps,))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return emergence_study(
        model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), optimizer, [x], **options
    )


def test_the_study_looks_from_the_start_to_the_end():
    found = study(looks=4)
    assert found.steps == [0, 5, 10, 15, 20]
    assert len(found.density) == 5
    assert 0.35 < found.density[0] < 0.65
    assert found.layers == {"1": found.density}
    assert found.held_out.density == found.density[-1]
    assert found.fell == pytest.approx(found.density[0] - found.density[-1])
    assert found.trained.tokens == 60


def test_the_study_repeats_to_the_bit():
    assert study().density == study().density


def test_a_study_without_batches_or_looks_is_refused():
    with pytest.raises(ConfigurationError, match="looks is 0"):
        study(looks=0)
    with pytest.raises(CalibrationError, match="0 batches"):
        study(steps=0)
    with pytest.raises(ConfigurationError, match="steps None"):
        emergence_study(nn.ReLU(), iter([]), lambda m, b: m(b), None, [])


# -------------------------------------------------------------------------------------------- the expected gradient


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error"])
def test_active_neurons_have_a_positive_expected_gradient(loss):
    hidden = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).relu()
    found = expected_gradient(hidden, 10, loss=loss, networks=1000)
    assert found.mean > 0
    assert found.p_value < 1e-6


def test_the_expected_gradient_of_the_squared_error_is_the_one_by_hand():
    """E Σ_j V_ji (Σ_l V_jl p_l − y_j) = p_i · classes · variance."""
    hidden = torch.tensor([[1.0, 2.0, 0.0, 3.0]])
    found = expected_gradient(hidden, 5, loss="squared error", networks=20_000, scale=1.0)
    assert abs(found.mean - 2.0 * 5 / 4) < 4 * found.error


def test_an_output_layer_without_influence_has_no_sign():
    """With labels alone, the part of the gradient that does not depend on V p, the mean is zero."""
    hidden = torch.full((4, 16), 1e-9)
    found = expected_gradient(hidden, 5, networks=2000)
    assert abs(found.mean) < 4 * found.error


def test_bad_hidden_states_are_named():
    with pytest.raises(ConfigurationError, match="negative"):
        expected_gradient(torch.tensor([[-1.0]]), 3)
    with pytest.raises(CalibrationError, match="no neuron"):
        expected_gradient(torch.zeros(2, 3), 3)
    with pytest.raises(ConfigurationError, match="hinge"):
        expected_gradient(torch.ones(2, 3), 3, loss="hinge")


# -------------------------------------------------------------------------------------------------- consequences


def test_an_exact_share_of_the_labels_is_drawn_anew():
    labels = torch.full((1000,), 7)
    noisy = noisy_labels(labels, 0.4, 10, seed=1)
    assert int((noisy != 7).sum()) == pytest.approx(360, abs=25)  # a tenth of those drawn is right by chance
    assert torch.equal(noisy, noisy_labels(labels, 0.4, 10, seed=1))
    assert torch.equal(noisy_labels(labels, 0, 10), labels)
    with pytest.raises(ConfigurationError, match=r"share is 1\.5"):
        noisy_labels(labels, 1.5, 10)


def test_operations_worked_by_hand():
    plain = feed_forward_flops(10, 40, 0.1)
    assert (plain.dense, plain.second, plain.both) == (1600, pytest.approx(880), pytest.approx(160))
    gated = feed_forward_flops(10, 40, 0.1, gated=True)
    assert (gated.dense, gated.second, gated.both) == (2400, pytest.approx(960), pytest.approx(240))
    with pytest.raises(ConfigurationError, match="density is 2"):
        feed_forward_flops(10, 40, 2)

"""Lazy neurons: top-k transformers, the study of emergence, the sign of the gradient, and what follows."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

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


# --------------------------------------------------------------------------------- architectures other than language


def vision_transformer():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **SIZES))


class Mlp(nn.Module):
    """The feed-forward layer of timm's blocks."""

    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.0)
        self.norm, self.fc2 = nn.Identity(), nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(self.norm(self.drop1(self.act(self.fc1(x)))))


class MixerBlock(nn.Module):
    """As timm has it: one layer across the tokens of each channel, one across the channels of each token."""

    def __init__(self, tokens, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp_tokens, self.mlp_channels = Mlp(tokens, 12), Mlp(width, 32)

    def forward(self, x):
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks = nn.Linear(16, 8), nn.Sequential(MixerBlock(4, 8), MixerBlock(4, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values, labels=None):
        patches = nn.functional.unfold(pixel_values, 4, stride=4).transpose(1, 2)
        return self.head(self.blocks(self.stem(patches)).mean(1))


@pytest.mark.parametrize(("build", "count"), [(vision_transformer, 2), (Mixer, 4)])
def test_top_k_reaches_every_feed_forward_layer_of_vision_transformers_and_mixers(build, count):
    model, images = build(), torch.randn(4, 1, 8, 8)
    before = copy.deepcopy(model.state_dict())
    dense = model.eval()(images)
    swap = topk_transformer(model, 3)
    assert len(swap.names) == count
    taps = activation_taps(model, (TopKActivation,))
    assert len(taps) == count
    widths = {"mlp_tokens": 12, "mlp_channels": 32}
    for name, layer in activation_density(model, images, taps).layers.items():
        width = next((size for part, size in widths.items() if part in name), 24)
        assert layer.density > 0
        assert layer.token_densities[2] <= 3 / width + 1e-9
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.01)
    losses = []
    for _ in range(15):
        output = model(images)
        loss = nn.functional.cross_entropy(getattr(output, "logits", output), torch.arange(4) % 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    swap.undo()
    model.load_state_dict(before)
    again = model.eval()(images)
    assert torch.equal(getattr(again, "logits", again), getattr(dense, "logits", dense))


def test_top_k_keeps_the_largest_of_every_token_in_a_mixer():
    """By hand: what the layer across tokens hands on are the k largest of ReLU for each channel."""
    model, images = Mixer().eval(), torch.randn(2, 1, 8, 8)
    seen = {}
    layer = model.blocks[0].mlp_tokens
    layer.fc1.register_forward_hook(lambda module, args, output: seen.update(before=output.detach()))
    layer.fc2.register_forward_pre_hook(lambda module, args: seen.update(after=args[0].detach()))
    topk_transformer(model, 2)
    model(images)
    for row, kept in zip(seen["before"].flatten(0, 1), seen["after"].flatten(0, 1)):
        largest = set(row.topk(2).indices.tolist())
        expected = [max(float(x), 0) if i in largest else 0 for i, x in enumerate(row)]
        assert kept.tolist() == pytest.approx(expected)


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

"""Activation functions that give zeros, found and exchanged by structure."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_model
from torch import nn

from gossamer.activations.lazy_neuron import TopKTransformer
from gossamer.core.taps import Listening
from gossamer.errors import CheckpointError, ConfigurationError, TargetError, UnknownNameError
from gossamer.models import load
from gossamer.models.activation_functions import (
    FATReLU,
    ShiftedReLU,
    Swap,
    TopKActivation,
    relufy,
    restore_activations,
    swap_activations,
)
from gossamer.models.feedforward_taps import feed_forward_activations, feed_forward_taps
from gossamer.storage import save
from gossamer.storage.index import read_index

ROWS = torch.tensor([[-1.0, 0.5, 2.0, 0.1, 3.0]])


def ids(model):
    return {"input_ids": torch.arange(12).view(2, 6) % 20}


def test_functions_worked_by_hand():
    assert FATReLU(0.5)(ROWS).tolist() == [[0.0, 0.5, 2.0, 0.0, 3.0]]
    assert FATReLU(0)(ROWS).tolist() == ROWS.relu().tolist()
    assert ShiftedReLU(1.0)(ROWS).tolist() == [[0.0, 0.0, 1.0, 0.0, 2.0]]
    assert TopKActivation(2)(ROWS).tolist() == [[0.0, 0.0, 2.0, 0.0, 3.0]]
    assert TopKActivation(ratio=0.5)(ROWS).tolist() == [[0.0, 0.5, 2.0, 0.0, 3.0]]


def test_negatives_are_never_kept_and_ties_never_add_to_k():
    assert TopKActivation(3, activation=nn.Identity())(torch.tensor([[-1.0, -2.0, 1.0]])).tolist() == [[0, 0, 1]]
    assert int((TopKActivation(2)(torch.ones(4, 5)) != 0).sum(1).max()) == 2


def test_top_k_at_or_above_the_width_is_plain_relu():
    x = torch.randn(3, 5)
    assert torch.equal(TopKActivation(5)(x), x.relu())
    assert torch.equal(TopKActivation(99)(x), x.relu())


def test_gradients_flow_through_what_is_kept_only():
    x = ROWS.clone().requires_grad_()
    TopKActivation(2)(x).sum().backward()
    assert x.grad.tolist() == [[0, 0, 1, 0, 1]]
    y = ROWS.clone().requires_grad_()
    FATReLU(0.5)(y).sum().backward()
    assert y.grad.tolist() == [[0, 1, 1, 0, 1]]


@pytest.mark.parametrize(
    "arguments", [{}, {"k": 2, "ratio": 0.1}, {"k": 0}, {"k": 1.5}, {"k": True}, {"ratio": 0.0}, {"ratio": 1.5}]
)
def test_a_top_k_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ConfigurationError):
        TopKActivation(**arguments)


def test_a_negative_threshold_is_refused():
    with pytest.raises(ConfigurationError, match="threshold is -1"):
        FATReLU(-1)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "bert", "whisper"])
def test_the_activations_of_any_family_are_found_exchanged_and_put_back(kind):
    model = tiny_model(kind)
    before = {place.name: type(place.module) for place in feed_forward_activations(model)}
    assert len(before) == 2
    swap = relufy(model)
    assert {type(place.module) for place in feed_forward_activations(model)} == {nn.ReLU}
    assert sorted(swap.names) == sorted(before)
    swap.undo()
    assert {place.name: type(place.module) for place in feed_forward_activations(model)} == before


def test_only_the_feed_forward_layers_are_touched():
    model = tiny_model("bert")  # the head of a masked language model has a GELU of its own
    head = model.cls.predictions.transform.transform_act_fn
    relufy(model)
    assert model.cls.predictions.transform.transform_act_fn is head


def test_what_is_read_is_what_goes_into_the_last_matrix():
    model, seen = tiny_model(), {}
    taps = feed_forward_taps(model)
    with Listening(model, taps, lambda tap, values, mask: seen.update({tap.name: values})):
        model(**ids(model))
    mlp = model.model.layers[0].mlp
    assert list(seen) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert seen["model.layers.0.mlp.down_proj"].shape == (2, 6, mlp.down_proj.in_features)
    assert {tap.group for tap in taps} == {"model.layers"}


def test_encoder_and_decoder_are_groups_of_their_own():
    assert [tap.group for tap in feed_forward_taps(tiny_model("whisper"))] == [
        "model.encoder.layers",
        "model.decoder.layers",
    ]


@pytest.mark.parametrize("kind", ["relu", "fatrelu", "shifted-relu"])
def test_layers_are_still_found_after_their_activation_was_exchanged(kind):
    model = tiny_model()
    relufy(model, kind, threshold=5.0, shift=5.0)
    assert len(feed_forward_taps(model)) == 2
    assert len(feed_forward_taps(model, "activation")) == 2


def test_top_k_around_an_activation_is_found_as_one():
    model = tiny_model()
    swap = Swap.wrapping(model, lambda before: TopKActivation(3, activation=before))
    assert len(feed_forward_taps(model)) == 2
    assert {type(place.module) for place in feed_forward_activations(model)} == {TopKActivation}
    swap.undo()
    assert TopKActivation not in {type(module) for module in model.modules()}


def test_layers_are_found_under_peft():
    peft = pytest.importorskip("peft")
    plain = tiny_model("bert")
    names = [tap.name for tap in feed_forward_taps(plain)]
    settings = peft.LoraConfig(target_modules=["query", "value", "dense"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(plain), settings)
    state = {name: id(module) for name, module in model.named_modules()}
    taps = feed_forward_taps(model)
    assert [tap.name.removeprefix("base_model.model.") for tap in taps] == names
    assert all(hasattr(tap.module, "lora_A") for tap in taps)  # the wrapper is what is called
    assert state == {name: id(module) for name, module in model.named_modules()}
    assert len(feed_forward_taps(model, "activation")) == 2


def test_the_configuration_says_relu_so_that_a_saved_model_loads_as_it_is(tmp_path):
    model = tiny_model()
    swap = relufy(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(**ids(model)).logits, model(**ids(model)).logits, atol=1e-6)
    swap.undo()
    assert model.config.hidden_act == "silu"


@pytest.mark.parametrize("kind", ["fatrelu", "shifted-relu", "top-k", "top-k around"])
def test_what_configurations_cannot_say_is_kept_by_our_own_checkpoints(kind, tmp_path):
    model = tiny_model()
    if kind == "top-k around":
        swap = Swap.wrapping(model, lambda before: TopKActivation(ratio=0.1, activation=before))
        assert model.config.hidden_act == "silu"
    else:
        with pytest.warns(UserWarning, match="the nearest; save with gossamer"):
            swap = (
                TopKTransformer(k=5).install(model)
                if kind == "top-k"
                else relufy(model, kind, threshold=0.3, shift=0.2)
            )
        assert model.config.hidden_act == "relu"
    expected = model(**ids(model)).logits
    save(model, tmp_path / "checkpoint", settings={"made": "by hand"})
    loaded = load(str(tmp_path / "checkpoint")).model
    assert torch.equal(loaded(**ids(model)).logits, expected)
    assert repr(loaded) == repr(model)
    assert read_index(tmp_path / "checkpoint").settings["made"] == "by hand"
    swap.undo()
    assert model.config.hidden_act == "silu"
    assert not torch.allclose(model(**ids(model)).logits, expected)


def test_activations_of_a_checkpoint_that_fit_nowhere_are_refused():
    with pytest.raises(CheckpointError, match=r"mlp\.act: its activation cannot be put back"):
        restore_activations(tiny_model(), {"mlp.act": {"kind": "fatrelu", "threshold": 0.1}})
    model = tiny_model()
    place = feed_forward_activations(model)[0].name
    with pytest.raises(CheckpointError, match="no known activation"):
        restore_activations(model, {place: {"kind": "wave"}})


def test_an_activation_that_is_no_module_is_refused_with_a_way_out():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.down(torch.relu(self.up(x)))

    with pytest.raises(TargetError, match="no module"):
        relufy(Functional())
    assert len(feed_forward_taps(Functional())) == 1


def test_bad_names_are_named():
    model = tiny_model()
    with pytest.raises(TargetError, match="SiLU"):
        swap_activations(model, nn.GELU, nn.ReLU)
    with pytest.raises(UnknownNameError, match="silu"):
        swap_activations(model, "sily", nn.ReLU)
    with pytest.raises(UnknownNameError, match="relu"):
        relufy(model, "relux")
    with pytest.raises(UnknownNameError, match="middle"):
        feed_forward_taps(model, "centre")
    assert len(swap_activations(model, "silu", nn.ReLU).names) == 2

"""Feed-forward layers are found by what they compute, and their channels come out without a trace."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from gossamer.errors import ModelError, NonFiniteError, TargetError
from gossamer.models.activation_sites import find_input_sites
from gossamer.models.feedforward_search import choose_feed_forwards, find_feed_forwards
from gossamer.models.feedforward_taps import feed_forward_taps

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "bos_token_id": 1}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def build(kind: str, head: str = "AutoModelForCausalLM", **settings) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, head).from_config(transformers.AutoConfig.for_model(kind, **settings))


# kind, settings → number of layers, matrices of the first one, width
CASES = {
    "llama": (
        {**SMALL, "intermediate_size": 88, "num_key_value_heads": 2},
        2,
        ["gate_proj", "up_proj", "down_proj"],
        88,
    ),
    "mistral": (
        # as wide in the middle as outside, like its attention: shapes alone cannot tell them apart
        {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2},
        2,
        ["gate_proj", "up_proj", "down_proj"],
        32,
    ),
    "gpt2": ({**GPT, "eos_token_id": 2}, 2, ["c_fc", "c_proj"], 128),
    "opt": ({**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}, 2, ["fc1", "fc2"], 48),
    "bloom": (
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        2,
        ["dense_h_to_4h", "dense_4h_to_h"],
        128,
    ),
    "phi3": ({**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}, 2, ["gate_up_proj", "down_proj"], 48),
}


@pytest.mark.parametrize("kind", CASES)
def test_decoders_of_any_naming_give_their_feed_forward_layers(kind):
    settings, count, names, width = CASES[kind]
    found = find_feed_forwards(build(kind, **settings))
    assert len(found) == count
    assert [target.module_name.rpartition(".")[2] for target in found[0].targets] == names
    assert {layer.width for layer in found} == {width}
    assert len({layer.block for layer in found}) == count


def test_matrices_scattered_over_submodules_are_found_in_an_encoder():
    found = find_feed_forwards(build("bert", "AutoModelForMaskedLM", intermediate_size=48, **SMALL))
    assert [layer.name for layer in found] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert [t.module_name.removeprefix("bert.encoder.layer.0.") for t in found[0].targets] == [
        "intermediate.dense",
        "output.dense",
    ]


def test_encoder_decoder_gives_the_layers_of_both_stacks():
    found = find_feed_forwards(build("bart", "AutoModelForSeq2SeqLM", **BART))
    assert [layer.block for layer in found] == ["model.encoder.layers.0", "model.decoder.layers.0"]


def test_fused_gate_and_up_are_taken_apart():
    layer = find_feed_forwards(build("phi3", **CASES["phi3"][0]))[0]
    gate, up = layer.widening()
    assert gate.shape == up.shape == (48, 32)
    keep = torch.arange(48) % 3 > 0
    mask = layer.masks(keep)[layer.inputs[0].parameter_name]
    assert torch.equal(mask[:48], mask[48:])
    assert torch.equal(mask[:48, 0], keep)


class Normalised(nn.Module):
    """A feed-forward layer with a normalised middle: its channels depend on each other."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


class Mixing(nn.Module):
    """Channels are independent, tokens are not."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).cumsum(1))


class Leaking(nn.Module):
    """The widened state is also used elsewhere, so its channels cannot go."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        wide = self.up(x)
        return self.down(wide.relu()) + wide.view(*x.shape, 2).sum(-1)


class Scaled(nn.Module):
    """A parameter of its own for each channel would have to shrink too."""

    def __init__(self):
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(8, 16), nn.Parameter(torch.ones(16)), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu() * self.activation)


@pytest.mark.parametrize("kind", [Normalised, Mixing, Leaking, Scaled])
def test_what_only_looks_like_a_feed_forward_layer_is_refused(kind):
    torch.manual_seed(0)
    with pytest.raises(TargetError, match="no feed-forward layer"):
        find_feed_forwards(kind())


def test_the_search_leaves_model_mode_hooks_and_generator_as_they_were():
    model = build("llama", **CASES["llama"][0]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(parameter) for parameter in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        find_feed_forwards(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert identities == [id(parameter) for parameter in model.parameters()]
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.model.layers[0].mlp.up_proj.out_features == 88
    assert torch.equal(state, torch.get_rng_state())


def test_the_search_works_in_inference_mode_and_refuses_a_model_that_was_made_in_it():
    model = build("llama", **CASES["llama"][0])
    with torch.inference_mode():
        assert [f.name for f in find_feed_forwards(model)] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        made_inside = build("llama", **CASES["llama"][0])
    with pytest.raises(ModelError, match=r"load the model outside"):
        find_feed_forwards(made_inside)


def test_adapters_are_no_feed_forward_layers():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build("llama", **CASES["llama"][0]), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert [each.name for each in find_feed_forwards(wrapped.get_decoder())] == ["layers.0.mlp", "layers.1.mlp"]
    inside = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    with pytest.raises(TargetError, match=r"free of adapters.*merge_and_unload\(\)"):
        find_feed_forwards(peft.get_peft_model(build("llama", **CASES["llama"][0]), inside))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named_where_it_hides_the_layers(value):
    model = build("llama", **CASES["llama"][0])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = value
    for search in (find_feed_forwards, feed_forward_taps, find_input_sites):
        with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.weight: 1 of"):
            search(model)


def test_globs_choose_and_a_glob_without_a_match_names_what_there_is():
    model = build("llama", **CASES["llama"][0])
    found = find_feed_forwards(model)
    assert [f.name for f in choose_feed_forwards(model, found, ["*.1.*"])] == ["model.layers.1.mlp"]
    with pytest.raises(TargetError, match=r"model\.layers\.0\.mlp"):
        choose_feed_forwards(model, found, ["*.7.*"])


def test_layers_tied_across_modules_are_refused():
    model = build("llama", **CASES["llama"][0])
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    found = find_feed_forwards(model)
    with pytest.raises(ModelError, match="tied"):
        choose_feed_forwards(model, found)


@pytest.mark.parametrize("kind", CASES)
def test_taking_channels_out_does_the_same_as_silencing_them(kind):
    settings = CASES[kind][0]
    small, silent = build(kind, **settings).eval(), build(kind, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    for a, b in zip(find_feed_forwards(small), find_feed_forwards(silent)):
        for layer in (a, b):  # biases too, which start at zero
            for target in layer.inputs:
                if getattr(target.module, "bias", None) is not None:
                    nn.init.constant_(target.module.bias, 0.3)
        keep = torch.rand(a.width, generator=generator) < 0.6
        a.shrink_(keep)
        b.zero_(keep)
        assert a.width == int(keep.sum())
    tokens = torch.randint(3, 64, (2, 9), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, silent(tokens).logits, atol=1e-6, rtol=0)


def test_shrinking_keeps_dtype_device_and_need_of_a_gradient_and_renames_sizes():
    model = build("llama", **CASES["llama"][0]).to(torch.bfloat16).requires_grad_(False)
    layer = find_feed_forwards(model)[0]
    layer.shrink_(torch.arange(88) < 40)
    mlp = model.model.layers[0].mlp
    assert (mlp.up_proj.out_features, mlp.gate_proj.out_features, mlp.down_proj.in_features) == (40, 40, 40)
    assert mlp.intermediate_size == 40
    assert mlp.up_proj.weight.dtype == torch.bfloat16
    assert not mlp.down_proj.weight.requires_grad
    assert mlp.down_proj.weight.is_contiguous()

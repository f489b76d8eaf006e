from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import gossamer
from gossamer.errors import ModelError, NonFiniteError, SparsityError, TargetError, UnknownNameError
from gossamer.models.heads import find_attention_heads

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


def make(kind):
    torch.manual_seed(0)
    match kind:
        case "llama":
            config = transformers.LlamaConfig(**SMALL, intermediate_size=40, num_key_value_heads=2)
            return transformers.LlamaForCausalLM(config).eval()
        case "gpt2":
            config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40)
            return transformers.GPT2LMHeadModel(config).eval()
        case "bert":
            return transformers.BertModel(transformers.BertConfig(**SMALL, intermediate_size=40)).eval()
        case "opt":
            config = transformers.OPTConfig(**SMALL, ffn_dim=40, word_embed_proj_dim=32)
            return transformers.OPTForCausalLM(config).eval()
        case "neox":
            config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=40)
            return transformers.GPTNeoXForCausalLM(config).eval()
        case "t5":
            config = transformers.T5Config(d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4, vocab_size=40)
            return transformers.T5EncoderModel(config).eval()
        case "vit":
            config = transformers.ViTConfig(
                **{k: v for k, v in SMALL.items() if k != "vocab_size"},
                image_size=16,
                patch_size=8,
                intermediate_size=40,
            )
            return transformers.ViTModel(config).eval()
        case "torch":
            layer = nn.TransformerEncoderLayer(32, 4, 40, batch_first=True)
            return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    raise AssertionError(kind)


KINDS = ["llama", "gpt2", "bert", "opt", "neox", "t5", "vit", "torch"]


def prune(model, **options):
    return gossamer.prune(model, "magnitude-heads", progress=False, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_found_in_every_kind_of_model(kind):
    found = find_attention_heads(make(kind))
    assert [layer.count for layer in found] == [4] * (1 if kind == "t5" else 2)
    assert all(layer.slices().shape == (4, 32, 8) for layer in found)
    fused = kind in ("gpt2", "neox", "torch")
    assert all((layer.query is None) == fused for layer in found)
    assert {layer.groups for layer in found} == {2 if kind == "llama" else 4}


@pytest.mark.parametrize("kind", KINDS)
def test_a_silenced_head_is_as_if_its_output_were_zero(kind):
    """The model must answer as the dense one does when the slices of the heads that go are cut from its output."""
    model = make(kind)
    cut = copy.deepcopy(model)
    for layer in find_attention_heads(cut):
        shortest = layer.slices().flatten(1).norm(dim=1).argsort()[:2]
        layer.slices()[shortest] = 0
    result = prune(model, sparsity=0.5)
    assert not result.masks.violations(model)
    torch.manual_seed(1)
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    elif kind == "torch":
        inputs = {"src": torch.randn(2, 5, 32)}
    else:
        inputs = {"input_ids": torch.randint(0, 40, (2, 7))}
    with torch.no_grad():
        one, other = model(**inputs), cut(**inputs)
    one, other = (value if isinstance(value, torch.Tensor) else value[0] for value in (one, other))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_shared_keys_stay_for_as_long_as_one_of_their_heads_does():
    model = make("llama")
    with torch.no_grad():  # heads 0 and 1 share the first keys, 2 and 3 the second
        for layer, scale in zip(find_attention_heads(model), ([1, 2, 3, 4], [1, 3, 2, 4])):
            for head, factor in zip(layer.slices(), scale):
                head.fill_(factor)
    masks = prune(model, sparsity=0.5).masks
    first, second = ("model.layers.0.self_attn.", "model.layers.1.self_attn.")
    assert masks[f"{first}q_proj.weight"].view(4, -1).all(1).tolist() == [False, False, True, True]
    assert masks[f"{first}v_proj.weight"].view(2, -1).all(1).tolist() == [False, True]
    assert masks[f"{second}q_proj.weight"].view(4, -1).all(1).tolist() == [False, True, False, True]
    assert masks[f"{second}k_proj.weight"].all()
    assert masks[f"{second}o_proj.weight"].view(32, 4, 8).all(2).all(0).tolist() == [False, True, False, True]


def test_heads_of_the_whole_model_compete_whatever_the_scale_of_their_layer():
    model = make("bert")
    first, second = find_attention_heads(model)
    with torch.no_grad():
        for layer, scale in ((first, [1e-3, 1e-3, 1e-3, 1e-3]), (second, [10, 0.1, 0.1, 0.1])):
            for head, factor in zip(layer.slices(), scale):
                head.fill_(factor)
    masks = prune(model, sparsity=3 / 8, scope="model").masks
    kept = [masks[layer.output.name].view(32, 4, 8)[0, :, 0].tolist() for layer in (first, second)]
    assert kept == [[True] * 4, [True, False, False, False]]


def test_reports_name_every_matrix_and_the_count_is_rounded_down():
    model = make("llama")
    result = prune(model, sparsity=0.4, exclude=["*.layers.0.*"])
    assert [report.name.split(".")[-2] for report in result.layers] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert [report.sparsity for report in result.layers] == [0.25, 0.0, 0.0, 0.25]
    assert "layers.0" not in str(list(result.masks))
    assert result.settings["method"] == "magnitude-heads"


def test_bad_input_is_named():
    with pytest.raises(TargetError, match="no attention layer in Sequential"):
        prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with pytest.raises(TargetError, match=r"names such as 'model\.layers\.0\.self_attn'"):
        prune(make("llama"), include=["nothing"])
    with pytest.raises(SparsityError, match=r"\[0, 1\)"):
        prune(make("llama"), sparsity=1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'layer'"):
        prune(make("llama"), scope="layers")
    broken = make("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    before = broken.model.layers[0].self_attn.o_proj.weight.clone()
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.v_proj"):
        prune(broken)
    assert torch.equal(broken.model.layers[0].self_attn.o_proj.weight, before)


def test_an_attention_layer_that_does_not_say_its_heads_is_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    with pytest.raises(ModelError, match="unknown number of heads"):
        prune(nn.Sequential(Attention()))

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, WORDS, tiny_model
from torch import nn
from transformers import BertModel

import gossamer.storage as storage
from gossamer.errors import CheckpointError, ConfigurationError, ModelError, OutputError, UnknownNameError
from gossamer.models import evaluation_tokens, load, read_text, save_dense
from gossamer.models.architecture import blank_model
from gossamer.models.gguf import clear_quantised_mark
from gossamer.models.load import _device_map

IDS = torch.tensor([[3, 4, 5, 6]])


def inputs_of(kind):
    if kind == "whisper":
        return {"input_features": torch.linspace(-1, 1, 8 * 3000).reshape(1, 8, 3000), "decoder_input_ids": IDS}
    return {"input_ids": IDS}


@torch.no_grad()
def logits(model, kind="llama"):
    return model(**inputs_of(kind)).logits


@pytest.mark.parametrize("kind", CLASSES)
def test_directory_gives_the_class_it_was_saved_from(saved, kind):
    directory, model = saved(kind)
    loaded = load(directory)
    assert type(loaded.model) is CLASSES[kind]
    assert not loaded.model.training
    assert loaded.parameters == model.num_parameters()
    assert loaded.licence is None
    assert loaded.tokenizer("a b")["input_ids"] == [3, 4]
    assert torch.equal(logits(loaded.model, kind), logits(model, kind))


def test_tokenizer_is_optional(saved):
    assert load(saved(with_tokenizer=False)[0]).tokenizer is None


@pytest.mark.parametrize("kind", ["gemma3", "whisper"])
def test_tied_weights_stay_tied(saved, kind):
    model = load(saved(kind)[0]).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_model_without_named_class_falls_back_to_the_bare_encoder(saved):
    directory, model = saved("bert")
    BertModel(model.config).save_pretrained(directory)
    edit_config(directory, architectures=None)
    assert type(load(directory).model) is BertModel


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(None, torch.bfloat16), ("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)],
)
def test_dtype_is_as_stored_or_as_asked(saved, dtype, expected):
    directory, model = saved()
    model.to(torch.bfloat16).save_pretrained(directory)
    assert {p.dtype for p in load(directory, dtype=dtype).model.parameters()} == {expected}


@pytest.mark.parametrize(
    "arguments", [{"dtype": "int8"}, {"dtype": torch.int8}, {"offload": "cloud"}, {"device": "quantum"}]
)
def test_unusable_settings_are_refused_before_anything_is_read(arguments):
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        load("does-not-matter", **arguments)


# -- what can be wrong with a source -----------------------------------------------------------------------------


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unknown_name_suggests_the_nearest_demo_model():
    with pytest.raises(UnknownNameError, match="did you mean 'gemma'"):
        load("gemmma")


@pytest.mark.parametrize("source", ["./none", "/no/such/model", "none.gguf", "a/b.gguf", "a/b/c"])
def test_path_that_does_not_exist_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"{source} does not exist"):
        load(source)


def test_hub_id_without_network_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match="someone/something is not a directory here, and HF_HUB_OFFLINE is set"
    ) as caught:
        load("someone/something")
    assert "\n" not in str(caught.value)


def test_directory_without_config_or_weights_is_refused(saved, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(tmp_path)
    directory, _ = saved()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load(directory)


def test_file_that_is_not_gguf_is_refused(saved, tmp_path):
    with pytest.raises(ModelError, match="give its directory"):
        load(saved()[0] / "model.safetensors")
    (tmp_path / "fake.gguf").write_bytes(b"nothing of the sort")
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load(tmp_path / "fake.gguf")


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_safetensors_are_named(saved, kept):
    file = saved()[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        load(file.parent)


def test_missing_shard_is_named(saved):
    directory, _ = saved(max_shard_size="4KB")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        load(directory)


def test_weight_that_is_missing_or_has_another_shape_is_named(saved):
    directory, _ = saved()
    state = load_file(directory / "model.safetensors")
    norm = state.pop("model.norm.weight")
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weight 'model\.norm\.weight'"):
        load(directory)
    save_file(state | {"model.norm.weight": norm[:3].clone()}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' of shape \(3,\), .* asks for \(16,\)"):
        load(directory)


@pytest.mark.parametrize("changes", [{"model_type": "perceptron-9"}, {"model_type": None}])
def test_unsupported_architecture_is_named(saved, changes):
    directory, _ = saved()
    edit_config(directory, **changes)
    with pytest.raises(ModelError, match="architecture"):
        load(directory)


def test_broken_config_and_tokenizer_are_named(saved):
    directory, _ = saved()
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(directory)


# -- offloading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES)
def test_disk_offload_computes_the_same_and_copies_nothing(saved, kind, tmp_path, monkeypatch):
    directory, model = saved(kind)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = load(directory, offload="disk").model
    assert all(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded, kind), logits(model, kind))
    assert not [path for path in tmp_path.glob("gossamer-*/*") if path.suffix != ".json"]


def test_cpu_offload_on_the_cpu_is_an_ordinary_model(saved):
    directory, model = saved()
    assert torch.equal(logits(load(directory, offload="cpu").model), logits(model))


@pytest.mark.parametrize("kind", CLASSES)
def test_blocks_go_elsewhere_and_the_rest_to_the_fast_device(kind):
    model = tiny_model(kind)
    places = _device_map(model.config, type(model), torch.device("cuda", 0), "disk")
    elsewhere = {name for name, place in places.items() if place == "disk"}
    assert len(elsewhere) == 2
    for name, _ in model.named_parameters():
        owners = [place for place in places if name == place or name.startswith(f"{place}.")]
        assert any(place in elsewhere for place in owners) == ("layers." in name or "layer." in name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("offload", [None, "cpu", "disk"])
def test_offloaded_model_computes_on_the_gpu(saved, offload):
    directory, model = saved()
    loaded = load(directory, device="cuda", offload=offload).model
    with torch.no_grad():
        found = loaded(IDS.cuda()).logits
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), logits(model), rtol=1e-4, atol=1e-4)


# -- packed directories and shrunk layers ------------------------------------------------------------------------


def shrink(model, sizes):
    """Keep the first channels of each feed-forward layer, as structured pruning does."""
    for layer, size in zip(model.model.layers, sizes):
        for name in ("gate_proj", "up_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight, linear.out_features = nn.Parameter(linear.weight[:size].detach().clone()), size
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias[:size].detach().clone())
        down = layer.mlp.down_proj
        down.weight, down.in_features = nn.Parameter(down.weight[:, :size].detach().clone()), size
    return model


@pytest.mark.parametrize("kind", CLASSES)
def test_packed_directory_loads_exactly(kind, tmp_path, tokenizer):
    model = tiny_model(kind)
    storage.save(model, tmp_path / "packed", tokenizer)
    loaded = load(tmp_path / "packed")
    assert type(loaded.model) is type(model)
    assert loaded.tokenizer("a")["input_ids"] == [3]
    assert loaded.parameters == model.num_parameters()
    assert torch.equal(logits(loaded.model, kind), logits(model, kind))


def test_packed_directory_keeps_mixed_dtypes_unless_asked(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    model.model.norm.to(torch.float32)
    storage.save(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed").model
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert {p.dtype for p in load(tmp_path / "packed", dtype="float32").model.parameters()} == {torch.float32}


@pytest.mark.parametrize("bias", [False, True])
def test_unevenly_shrunk_layers_load_with_their_own_sizes(tmp_path, bias):
    model = shrink(tiny_model(mlp_bias=bias), [5, 17])
    storage.save(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed").model
    assert [layer.mlp.down_proj.in_features for layer in loaded.model.layers] == [5, 17]
    assert torch.equal(logits(loaded), logits(model))


def test_only_linear_layers_may_have_another_shape(tmp_path):
    model = tiny_model()
    model.model.norm.weight = nn.Parameter(torch.ones(7))
    storage.save(model, tmp_path / "packed")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(7,\)"):
        load(tmp_path / "packed")


def test_packed_directory_cannot_stay_on_disk(tmp_path):
    storage.save(tiny_model(), tmp_path / "packed")
    with pytest.raises(ConfigurationError, match="export_dense"):
        load(tmp_path / "packed", offload="disk")


@pytest.mark.parametrize("kind", CLASSES)
def test_dense_export_loads_again(kind, tmp_path, tokenizer):
    model = tiny_model(kind)
    save_dense(model, tokenizer, tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense").model, kind), logits(model, kind))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_dense_export_does_not_replace_what_is_there(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="in use"):
        save_dense(tiny_model(), None, tmp_path / "dense")
    assert (tmp_path / "dense" / "thesis.tex").read_text() == "years of work"
    save_dense(tiny_model(), None, tmp_path / "dense", overwrite=True)
    assert load(tmp_path / "dense").tokenizer is None


def test_evenly_shrunk_layers_are_exported_with_their_new_size(tmp_path):
    model = shrink(tiny_model(), [10, 10])
    save_dense(model, None, tmp_path / "dense")
    loaded = load(tmp_path / "dense").model
    assert loaded.config.intermediate_size == 10
    assert model.config.intermediate_size == 24
    assert torch.equal(logits(loaded), logits(model))


def test_unevenly_shrunk_layers_need_the_packed_format(tmp_path):
    with pytest.raises(ConfigurationError, match="packed format"):
        save_dense(shrink(tiny_model(), [5, 17]), None, tmp_path / "dense")
    with pytest.raises(ConfigurationError, match="packed format"):
        save_dense(shrink(tiny_model(), [5, 24]), None, tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []


# -- GGUF --------------------------------------------------------------------------------------------------------


def write_gguf(path, state, config, architecture="llama"):
    """Write a real GGUF file, with one 4-bit matrix, of a tiny Llama."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    # pieces of a SentencePiece vocabulary, as many as the model has embeddings
    words = [*WORDS[:3], "\u2581", *"abcdefghijklmnopqrstuvwxyz", "\u2581a", "\u2581b", "\u2581c"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3, *[1] * (len(words) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, value in state.items():
        module = name.removesuffix(".weight")
        if module in outer:
            writer.add_tensor(f"{outer[module]}.weight", value.numpy())
            continue
        _, _, layer, rest = module.split(".", 3)
        target, data = f"blk.{layer}.{names[rest]}.weight", value.numpy()
        if rest in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads
            data = np.ascontiguousarray(
                data.reshape(heads, 2, data.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(data.shape)
            )
        if target == "blk.0.ffn_up.weight":
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path):
    """Return the path of a GGUF file and the model in it (blocks of 32 need a width of 32)."""
    model = tiny_model(hidden_size=32, intermediate_size=64, head_dim=16)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model.state_dict(), model.config)
    return path, model


def test_gguf_is_converted_once_and_can_be_saved(gguf_file, private_cache, tmp_path):
    path, model = gguf_file
    loaded = load(path)
    expected = model.state_dict()
    quantised = "model.layers.0.mlp.up_proj.weight"
    for name, value in loaded.model.state_dict().items():
        if name == quantised:
            assert (value - expected[name]).abs().max() < expected[name].abs().max() / 7
            assert not torch.equal(value, expected[name])
        else:
            assert torch.equal(value, expected[name]), name
    assert loaded.model.dtype == torch.float32
    (converted,) = (private_cache / "models").iterdir()
    before = (converted / "model.safetensors").stat().st_mtime_ns
    again = load(path)
    assert (converted / "model.safetensors").stat().st_mtime_ns == before
    assert torch.equal(logits(again.model), logits(loaded.model))
    loaded.model.save_pretrained(tmp_path / "plain")
    assert again.tokenizer.convert_ids_to_tokens(again.tokenizer("a b")["input_ids"]) == ["<s>", "▁a", "▁b"]


def test_gguf_whose_weights_fit_bfloat16_is_kept_in_it(tmp_path, private_cache):
    model = tiny_model(hidden_size=32, intermediate_size=64, head_dim=16)
    coarse = {name: value.to(torch.bfloat16).to(torch.float32) for name, value in model.state_dict().items()}
    coarse["model.layers.0.mlp.up_proj.weight"].zero_()
    write_gguf(tmp_path / "coarse.gguf", coarse, model.config)
    loaded = load(tmp_path / "coarse.gguf").model
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(value.float(), coarse[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_gguf_is_refused_and_leaves_nothing(gguf_file, private_cache, kept):
    path, _ = gguf_file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        load(path)
    assert list((private_cache / "models").iterdir()) == []


def test_part_of_a_split_gguf_is_refused(tmp_path):
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="one of several parts"):
        load(tmp_path / "big-00001-of-00003.gguf")


def test_gguf_of_an_unknown_architecture_is_refused(tmp_path):
    model = tiny_model(hidden_size=32, intermediate_size=64, head_dim=16)
    write_gguf(tmp_path / "odd.gguf", model.state_dict(), model.config, architecture="perceptron")
    with pytest.raises(ModelError, match="perceptron"):
        load(tmp_path / "odd.gguf")


def test_mark_of_real_quantisation_stays():
    model = tiny_model()
    model.quantization_method, model.is_quantized = "gptq", True
    clear_quantised_mark(model)
    assert model.is_quantized


def test_blank_model_needs_no_memory():
    model = tiny_model()
    blank = blank_model(model.config, type(model))
    assert all(p.is_meta for p in blank.parameters())
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


# -- the demo models themselves ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parameters", "first"), [("demo", 134_515_008, []), ("gemma", 268_098_176, [2])])
def test_demo_model_reads_a_page_of_moby_dick_with_understanding(name, parameters, first):
    loaded = load(name)
    assert loaded.parameters == parameters
    assert loaded.licence
    assert loaded.model.lm_head.weight is loaded.model.get_input_embeddings().weight
    assert bool(loaded.tokenizer.chat_template) == (name == "demo")
    tokens = evaluation_tokens(read_text("moby-dick")[200_000:204_000], loaded.tokenizer, limit=513)
    assert tokens[0, : len(first)].tolist() == first
    with torch.no_grad():
        perplexity = loaded.model(tokens, labels=tokens).loss.exp().item()
    assert 35 < perplexity < 55

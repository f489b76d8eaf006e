"""Models and masks survive storage: tied weights, buffers, configuration, and the mark of a GGUF file."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gossamer.core.masks import MaskSet
from gossamer.errors import CheckpointError, ConfigurationError, ModelError, OutputError
from gossamer.storage import export_dense, load_masks, load_state, read_index, save, save_masks, verify


class Tied(nn.Module):
    """Two names of one weight, a buffer that is stored and one that is not."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("scratch", torch.ones(3), persistent=False)


class Words:
    """The part of a tokenizer that saving needs."""

    def __init__(self, name: str = "tokenizer.json"):
        self.name = name

    def save_pretrained(self, directory: str) -> None:
        with open(f"{directory}/{self.name}", "w") as file:
            file.write("{}")


def randomised(module: nn.Module, sparsity: float = 0.6) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
            tensor[torch.rand(tensor.shape, generator=generator) < sparsity] = 0
    return module


def llama(**changes) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **{"tie_word_embeddings": True, **changes},
    )
    torch.manual_seed(0)
    return randomised(LlamaForCausalLM(config).bfloat16()).eval()


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    left_state, right_state = left.state_dict(), right.state_dict()
    assert left_state.keys() == right_state.keys()
    for name, tensor in left_state.items():
        assert torch.equal(tensor, right_state[name]), name


def test_a_plain_module_comes_back_with_ties_and_buffers(tmp_path):
    model = randomised(Tied())
    model.norm.running_mean.fill_(0.25)
    index = save(model, tmp_path / "model", settings={"seed": 3})
    assert index.aliases == {"head.weight": "embed.weight"}
    assert "scratch" not in index.names
    assert {"norm.running_mean", "norm.num_batches_tracked"} <= set(index.names)
    fresh = Tied()
    load_state(fresh, tmp_path / "model")
    assert_same_state(fresh, model)
    assert fresh.head.weight is fresh.embed.weight
    assert verify(tmp_path / "model").settings == {"seed": 3}


def test_slices_of_one_memory_are_not_taken_for_ties(tmp_path):
    model = nn.Module()
    memory = torch.arange(16.0)
    model.register_buffer("first", memory[:8])
    model.register_buffer("second", memory[8:])
    model.register_buffer("turned", memory[:8].view(2, 4).t())
    assert save(model, tmp_path / "model").aliases == {}


def test_a_language_model_is_saved_with_its_configuration(tmp_path):
    model = llama()
    index = save(model, tmp_path / "model", tokenizer=[Words(), Words("processor.json")])
    assert index.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "processor.json", "gossamer.json"} <= names
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.architectures == ["LlamaForCausalLM"]
    fresh = AutoModelForCausalLM.from_config(config).to(config.dtype)
    load_state(fresh, tmp_path / "model")
    assert fresh.dtype == torch.bfloat16
    assert_same_state(fresh, model)


@pytest.mark.parametrize("as_object", [False, True])
def test_the_mark_of_a_gguf_file_is_left_out_of_what_is_written_only(tmp_path, as_object):
    class Mark:
        quant_method = "gguf"

        def to_dict(self):
            return {"quant_method": "gguf"}

    model = llama()
    model.config.quantization_config = Mark() if as_object else {"quant_method": "gguf"}
    save(model, tmp_path / "model")
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert hasattr(model.config, "quantization_config")


def test_a_directory_in_use_is_kept_unless_overwriting_is_asked_for(tmp_path):
    save(Tied(), tmp_path / "model")
    before = sorted(path.read_bytes() for path in (tmp_path / "model").iterdir())
    with pytest.raises(OutputError, match="in use"):
        save(Tied(16), tmp_path / "model")
    assert sorted(path.read_bytes() for path in (tmp_path / "model").iterdir()) == before
    save(Tied(16), tmp_path / "model", overwrite=True)
    assert read_index(tmp_path / "model").tensors["embed.weight"].shape == (12, 16)


def test_a_tokenizer_that_fails_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, directory):
            raise ValueError("no\nvocabulary")

    with pytest.raises(ModelError, match="no vocabulary"):
        save(Tied(), tmp_path / "model", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []


def test_settings_that_cannot_be_stored_leave_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match="settings"):
        save(Tied(), tmp_path / "model", settings={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_weights_on_the_meta_device_are_named(tmp_path):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="weight is on the meta device"):
        save(model, tmp_path / "model")
    save(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(ModelError, match="to_empty"):
        load_state(model, tmp_path / "model")


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_offloaded_weights_are_fetched_and_stay_offloaded(tmp_path, offload):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cpu_offload(model) if offload == "cpu" else disk_offload(model, str(tmp_path / "offload"))
    save(model, tmp_path / "model")
    assert all(parameter.is_meta for parameter in model.parameters())
    fresh = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    load_state(fresh, tmp_path / "model")
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_module_that_does_not_fit_is_told_what_differs_and_not_touched(tmp_path):
    save(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "model")
    smaller, wider = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    longer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for module, words in (
        (smaller, r"0 missing, 2 unexpected \(1\.bias, 1\.weight\)"),
        (longer, r"2 missing \(2\.bias, 2\.weight\), 0 unexpected"),
        (wider, r"1\.weight has shape \(4, 4\) .* \(5, 4\) in the module"),
    ):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(CheckpointError, match=words):
            load_state(module, tmp_path / "model")
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("max_shard_bytes", [2**30, 2000])
def test_dense_export_is_what_transformers_loads(tmp_path, max_shard_bytes):
    model = llama()
    save(model, tmp_path / "packed", tokenizer=Words())
    export_dense(tmp_path / "packed", tmp_path / "dense", max_shard_bytes=max_shard_bytes)
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert "gossamer.json" not in names
    assert ("model.safetensors" in names) == (max_shard_bytes == 2**30)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert loaded.dtype == torch.bfloat16
    assert_same_state(loaded, model)


def test_dense_export_of_a_broken_checkpoint_leaves_nothing(tmp_path):
    save(Tied(), tmp_path / "packed")
    (shard,) = (tmp_path / "packed").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="altered"):
        export_dense(tmp_path / "packed", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


# ------------------------------------------------------------------------------------------- masks
@pytest.fixture
def masks() -> MaskSet:
    generator = torch.Generator().manual_seed(0)
    return MaskSet(
        {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in [("a", (3, 5)), ("b", (8, 8))]}
    )


def test_masks_come_back(tmp_path, masks):
    save_masks(masks, tmp_path / "masks.safetensors")
    assert load_masks(tmp_path / "masks.safetensors") == masks
    save_masks(MaskSet(), tmp_path / "masks.safetensors")
    assert len(load_masks(tmp_path / "masks.safetensors")) == 0


def test_any_flipped_bit_in_a_mask_file_is_refused(tmp_path, masks):
    path = tmp_path / "masks.safetensors"
    save_masks(masks, path)
    data = path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_masks(path)


def test_truncated_missing_and_foreign_mask_files_are_refused(tmp_path, masks):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_masks(path)
    save_masks(masks, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_masks(path)
    save(nn.Linear(2, 2), tmp_path / "model")
    with pytest.raises(CheckpointError, match="not a file of masks"):
        load_masks(tmp_path / "model" / "model-00001-of-00001.safetensors")

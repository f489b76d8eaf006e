import copy

import pytest
import torch
import transformers
from tiny_models import tiny_model

from gossamer.errors import ModelError
from gossamer.models.export import save_dense
from gossamer.models.rotation import is_rotated, orthogonalise, rotation_size
from gossamer.storage import save


def shaken(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 2, generator=generator)
            else:
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_the_rotated_model_computes_the_same(tied):
    model = shaken(tiny_model(tie_word_embeddings=tied)).double()
    ids = torch.randint(30, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits.clone()
        orthogonalise(model)
        after = model(ids).logits
    # transformers computes norms in float32, whatever the model's dtype
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    assert is_rotated(model)


def test_keys_and_gates_have_orthogonal_columns_afterwards():
    model = shaken(tiny_model())
    orthogonalise(model)
    for layer in model.model.layers:
        for matrix in (layer.self_attn.k_proj.weight, layer.mlp.gate_proj.weight):
            gram = (matrix.T @ matrix).detach()
            assert (gram - gram.diag().diag()).abs().max() < 1e-5 * gram.abs().max()


def test_a_cache_gives_the_same_continuation():
    model = shaken(tiny_model()).double()
    prompt = torch.randint(3, 30, (1, 5), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    before = model.generate(prompt, **options)
    orthogonalise(model)
    assert torch.equal(model.generate(prompt, **options), before)


def test_skip_matrices_are_counted_and_orthogonal():
    model = tiny_model()
    rotation = orthogonalise(model)
    assert rotation.size == rotation_size(model) == 4 * 16 * 16
    for matrix in rotation.skips.values():
        assert torch.allclose(matrix @ matrix.T, torch.eye(16), atol=1e-5)
    assert rotation_size(tiny_model()) == 0


def test_models_that_cannot_be_rotated_are_refused_and_left_alone():
    gemma = tiny_model("gemma3")
    before = {name: value.clone() for name, value in gemma.state_dict().items()}
    with pytest.raises(ModelError, match="norms after attention or feed-forward"):
        orthogonalise(gemma)
    assert all(torch.equal(value, before[name]) for name, value in gemma.state_dict().items())
    opt = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    with pytest.raises(ModelError, match="subtracts the mean"):
        orthogonalise(transformers.OPTForCausalLM(opt).eval())


SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_multiply_what_they_add_to_the_stream_compute_the_same(dtype):
    config = transformers.GraniteConfig(**SIZES, residual_multiplier=0.22, embedding_multiplier=3.0, logits_scaling=2.0)
    model = shaken(transformers.GraniteForCausalLM(config).eval())
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(ids).logits
        orthogonalise(model.to(dtype))
        after = model(ids).logits
    near = 1e-5 if dtype == torch.float32 else 0.05
    assert (after - before).norm() < near * before.norm()


def test_factors_that_a_coarse_dtype_hides_are_asked_for_in_a_finer_one():
    config = transformers.GraniteConfig(**SIZES, residual_multiplier=0.22)
    model = shaken(transformers.GraniteForCausalLM(config).eval()).bfloat16()
    for block in model.model.layers:
        block.residual_multiplier = 0.37  # as in models that reckon it
    with pytest.raises(ModelError, match=r"times about 0\.37.*float32"):
        orthogonalise(model)


def mixtures():
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
    yield transformers.Qwen2MoeConfig(**SIZES, **experts, num_experts=4, shared_expert_intermediate_size=24), "readers"
    yield transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2), "has no down layer"
    latent = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    heads = {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    sizes = {**SIZES, "num_key_value_heads": 4}
    yield transformers.DeepseekV2Config(**sizes, **experts, **latent, **heads), "no k matrix of its own"


@pytest.mark.parametrize(("config", "said"), list(mixtures()), ids=lambda value: getattr(value, "model_type", None))
def test_mixtures_and_latent_attention_are_refused_before_anything_is_touched(config, said):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=said):
        orthogonalise(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not is_rotated(model)


def test_a_rotation_that_changes_the_model_is_undone(monkeypatch):
    model = shaken(tiny_model(tie_word_embeddings=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr("gossamer.models.rotation._rotate_skip", lambda half, matrix: [])
    with pytest.raises(ModelError, match=r"computes something else.*put back"):
        orthogonalise(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert not is_rotated(model)


def test_a_rotated_model_cannot_be_saved_and_says_so(tmp_path):
    model = tiny_model()
    orthogonalise(model)
    for saved in (
        lambda: model.save_pretrained(tmp_path / "a"),
        lambda: copy.deepcopy(model).save_pretrained(tmp_path / "a"),
        lambda: save(model, tmp_path / "b"),
        lambda: save_dense(model, None, tmp_path / "c"),
    ):
        with pytest.raises(ModelError, match="orthogonalise"):
            saved()
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_rotated_model_computes_the_same_beside_it():
    model = shaken(tiny_model())
    orthogonalise(model)
    twin = copy.deepcopy(model)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)


def test_adapters_are_merged_before_a_rotation():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="has adapters"):
        orthogonalise(model)


def test_a_second_rotation_is_refused():
    model = tiny_model()
    orthogonalise(model)
    with pytest.raises(ModelError, match="rotated already"):
        orthogonalise(model)

import pytest
import torch
import transformers
from tiny_models import tiny_model

from gossamer.errors import ModelError
from gossamer.models.rotation import is_rotated, orthogonalise, rotation_size


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


def test_a_second_rotation_is_refused():
    model = tiny_model()
    orthogonalise(model)
    with pytest.raises(ModelError, match="rotated already"):
        orthogonalise(model)

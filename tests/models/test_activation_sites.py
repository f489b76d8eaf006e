import pytest
import torch
import transformers
from tiny_models import tiny_model
from torch import nn

from gossamer.errors import ModelError, TargetError, UnknownNameError
from gossamer.models.activation_sites import find_gate_sites, find_input_sites


def by_role(model):
    found = {}
    for site in find_input_sites(model):
        found.setdefault(site.role, []).append(site.name)
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_gated_decoder_has_seven_sites_a_block(kind):
    model = tiny_model(kind)
    found = by_role(model)
    assert {role: len(names) for role, names in found.items()} == dict.fromkeys(
        ("q", "k", "v", "o", "gate", "up", "down"), 2
    )
    for role, names in found.items():
        assert all(name.endswith(f"{role}_proj") for name in names)


def test_roles_come_from_what_layers_do_and_not_from_their_names():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    gate, up = mlp.gate_proj, mlp.up_proj
    forward = type(mlp).forward

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.gate_proj, self.down_proj, self.act_fn = gate, up, mlp.down_proj, mlp.act_fn

        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    model.model.layers[0].mlp = Renamed()
    roles = {site.name: site.role for site in find_input_sites(model)}
    assert forward is not Renamed.forward
    assert roles["model.layers.0.mlp.up_proj"] == "gate"
    assert roles["model.layers.0.mlp.gate_proj"] == "up"


def test_what_a_hook_in_a_layer_raises_comes_out():
    model = tiny_model()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_input_sites(model)


def test_large_weights_do_not_make_a_gate_look_linear():
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(200)
    assert all(name.endswith("gate_proj") for name in by_role(model)["gate"])


def test_fused_matrices_have_roles_of_their_own():
    config = transformers.Phi3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    assert set(by_role(model)) == {"qkv", "o", "gate_up", "down"}
    gate = find_gate_sites(model)[0]
    assert gate.gate is gate.up
    assert gate.width == 24


def test_a_plain_feed_forward_layer_has_an_activation_and_no_gate():
    site = find_gate_sites(tiny_model("bert"))[0]
    assert site.up is None
    assert site.gate.module_name.endswith("intermediate.dense")


def test_only_the_roles_and_names_asked_for_come_back():
    model = tiny_model()
    assert {site.role for site in find_input_sites(model, ["q", "o"])} == {"q", "o"}
    assert {site.block for site in find_input_sites(model, include=["*.layers.1.*"])} == {"model.layers.1"}


def test_attention_is_found_beside_stacked_experts():
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    assert set(by_role(model)) == {"q", "k", "v", "o"}
    with pytest.raises(TargetError, match="no layer of MixtralForCausalLM matches"):
        find_input_sites(model, ["gate", "up"])


def test_layers_inside_adapters_keep_their_roles_and_names():
    peft = pytest.importorskip("peft")
    before = {site.name: site.role for site in find_input_sites(tiny_model())}
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    sites = find_input_sites(model)
    assert {site.name: site.role for site in sites} == {f"base_model.model.{name}": r for name, r in before.items()}
    assert all(site.module is model.get_submodule(site.name) for site in sites)
    gate = find_gate_sites(model)[0]
    assert gate.called(gate.up) is model.get_submodule(gate.up.module_name)


def test_unknown_roles_and_empty_choices_are_refused():
    with pytest.raises(UnknownNameError, match="role"):
        find_input_sites(tiny_model(), ["w"])
    with pytest.raises(TargetError, match="no layer of LlamaForCausalLM matches"):
        find_input_sites(tiny_model(), include=["nothing"])
    with pytest.raises(TargetError, match="no feed-forward layer"):
        find_input_sites(nn.Sequential(nn.Linear(4, 4)))


def test_an_activation_without_a_module_is_refused_by_name():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    with pytest.raises(ModelError, match="0 modules compute its activation function"):
        find_gate_sites(nn.Sequential(Plain()))

import pytest
import torch
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM

from gossamer.activations.chess import Chess, partner_moments
from gossamer.errors import ConfigurationError, ModelError, TargetError
from gossamer.models.activation_sites import find_gate_sites


def gate_outputs(model, batches):
    """act(W_gate x) and W_up x of the first layer over all tokens."""
    mlp = model.model.layers[0].mlp
    seen = []
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
        x = torch.cat(seen)
        handle.remove()
        return mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)


def test_moments_are_means_of_squares(tiny_llama, batches):
    _, up = gate_outputs(tiny_llama, batches)
    found = partner_moments(tiny_llama, batches, find_gate_sites(tiny_llama), progress=False)
    assert torch.allclose(found["model.layers.0.mlp"], up.double().square().mean(0), rtol=1e-5)


def test_a_channels_threshold_is_the_root_of_the_common_bound_over_its_moment(tiny_llama, batches):
    a, up = gate_outputs(tiny_llama, batches)
    moment = up.double().square().mean(0)
    importance = a.double().square() * moment
    bound = importance.flatten().quantile(0.5)
    rule = Chess(sparsity=0.5).calibrate(tiny_llama, batches, progress=False).gates["model.layers.0.mlp"]
    assert torch.allclose(rule.thresholds(72).double(), (bound / moment).sqrt(), rtol=0.01)
    assert float((~rule.live(a)).double().mean()) == pytest.approx(0.5, abs=0.005)


def test_closed_gates_silence_their_channels(tiny_llama, batches):
    chess = Chess(sparsity=0.6, attention="none", dense_prefill=0.0)
    chess.calibrate(tiny_llama, batches, progress=False)
    seen = []
    handle = tiny_llama.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with chess.active(tiny_llama) as installed, torch.no_grad():
        tiny_llama(batches[0])
        share = installed.realised["model.layers.0.mlp"]
    handle.remove()
    assert float((seen[-1] == 0).double().mean()) == pytest.approx(share, abs=1e-12)
    assert share == pytest.approx(0.6, abs=0.1)


def test_up_and_down_are_spared_what_the_gate_closes(tiny_llama, batches):
    chess = Chess(sparsity=0.5, attention="none", dense_prefill=0.0)
    chess.calibrate(tiny_llama, batches, progress=False)
    with chess.active(tiny_llama) as installed, torch.no_grad():
        tiny_llama(batches[0])
        spared = sum(2 * 48 * 72 * share for share in installed.realised.values())
        found = installed.weights_read
    assert found.total - found.read == pytest.approx(spared)


def test_attention_modes_choose_the_layers(tiny_llama, batches):
    def layers(mode):
        rules = Chess(attention=mode).calibrate(tiny_llama, batches, progress=False)
        return {name.rpartition(".")[2] for name in rules.inputs}

    assert layers("selective") == {"q_proj", "o_proj"}
    assert layers("all") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert layers("none") == set()


def test_one_threshold_for_all_channels_is_cats(tiny_llama, batches):
    a, _ = gate_outputs(tiny_llama, batches)
    rules = Chess(sparsity=0.3, channel_thresholds=False).calibrate(tiny_llama, batches, progress=False)
    thresholds = rules.gates["model.layers.0.mlp"].thresholds(72)
    assert thresholds.unique().numel() == 1
    assert float(thresholds[0]) == pytest.approx(float(a.abs().flatten().quantile(0.3)), rel=0.01)


def test_layers_that_are_left_out_keep_their_gates(tiny_llama, batches):
    rules = Chess(exclude=["model.layers.0.*"]).calibrate(tiny_llama, batches, progress=False)
    assert set(rules.gates) == {"model.layers.1.mlp", "model.layers.2.mlp"}
    assert not any(name.startswith("model.layers.0.") for name in rules.inputs)
    with pytest.raises(TargetError, match="no feed-forward layer"):
        Chess(exclude=["*.mlp"]).calibrate(tiny_llama, batches, progress=False)


def fused_model():
    sizes = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "vocab_size": 97}
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)).eval()


def test_the_partner_of_a_fused_gate_is_the_other_half(batches):
    model = fused_model()
    seen = []
    handle = model.model.layers[0].mlp.gate_up_proj.register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    up = torch.cat(seen).flatten(0, 1)[:, 72:]
    found = partner_moments(model, batches, find_gate_sites(model), progress=False)
    assert torch.allclose(found["model.layers.0.mlp"], up.double().square().mean(0), rtol=1e-5)


def test_a_fused_gate_whose_partner_is_not_the_other_half_is_refused(batches):
    model = fused_model()
    sites = find_gate_sites(model)
    for layer in model.model.layers:
        act = layer.mlp.activation_fn
        act.register_forward_pre_hook(lambda module, args: (args[0].clamp(max=0.1),))
    with pytest.raises(ModelError, match="neither half"):
        partner_moments(model, batches, sites, progress=False)


def test_a_dead_partner_closes_its_channel_for_good(tiny_llama, batches):
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight[5] = 0
    rules = Chess().calibrate(tiny_llama, batches, progress=False)
    assert torch.isinf(rules.gates["model.layers.0.mlp"].thresholds(72)[5])
    assert not rules.gates["model.layers.0.mlp"].thresholds(72).isnan().any()


def test_down_norms_count_when_asked(tiny_llama, batches):
    plain = Chess().calibrate(tiny_llama, batches, progress=False).gates["model.layers.0.mlp"].scale
    normed = Chess(use_down_norm=True).calibrate(tiny_llama, batches, progress=False).gates["model.layers.0.mlp"].scale
    norms = tiny_llama.model.layers[0].mlp.down_proj.weight.norm(dim=0)
    assert torch.allclose(normed, plain * norms, rtol=1e-4)


def test_thresholds_for_kernels_cover_inputs_and_gates(tiny_llama, batches):
    rules = Chess().calibrate(tiny_llama, batches, progress=False)
    found = rules.thresholds(tiny_llama)
    assert found.inputs["model.layers.0.self_attn.q_proj"].shape == (48,)
    assert found.gates["model.layers.2.mlp"].shape == (72,)
    found.check(tiny_llama)


def test_bad_settings_and_models_are_refused(batches):
    with pytest.raises(ConfigurationError, match="attention is 'half'"):
        Chess(attention="half")
    with pytest.raises(ConfigurationError, match="counts no norms"):
        Chess(use_down_norm=True, channel_thresholds=False)
    with pytest.raises(ConfigurationError, match="allocation is 'greedy'"):
        Chess(allocation="greedy")

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    with pytest.raises(ModelError, match="modules compute its activation function"):
        Chess(attention="none").calibrate(nn.Sequential(Functional()), [torch.randn(2, 3, 6)], progress=False)


def test_a_single_threshold_drops_the_nearest_share_that_values_of_bfloat16_allow(tiny_llama, batches):
    model = tiny_llama.bfloat16()
    seen = []
    handle = model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    sizes = torch.cat(seen).abs().float()
    nearest = min(abs(float((sizes <= value).double().mean()) - 0.4) for value in sizes.unique())
    method = Chess(sparsity=0.4, attention="none", channel_thresholds=False)
    rule = method.calibrate(model, batches, progress=False).gates["model.layers.0.mlp"]
    dropped = float((sizes <= rule.selection.value).double().mean())
    assert abs(dropped - 0.4) == pytest.approx(nearest, abs=1e-9)
    assert torch.equal(rule.scale, torch.ones(72))

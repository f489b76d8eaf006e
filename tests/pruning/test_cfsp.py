"""CFSP, its baselines, and the pruning of feed-forward channels that they share."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer import storage
from gossamer.core.allocation import STEEPNESS, logistic_shares, sigmoid
from gossamer.core.calibration import InputNorm, Statistics
from gossamer.errors import CalibrationError, ConfigurationError, SparsityError, TargetError, UnknownNameError
from gossamer.models.feedforward_search import find_feed_forwards
from gossamer.pruning.base import prune
from gossamer.pruning.cfsp import COARSE, Cfsp
from gossamer.pruning.channels import MagnitudeChannels, RandomChannels, WandaChannels
from gossamer.pruning.flap import Flap

METHODS = [Cfsp, MagnitudeChannels, WandaChannels, Flap, RandomChannels]
WIDTH, HIDDEN, BLOCKS = 88, 32, 3


def llama(seed: int = 0, width: int = WIDTH, **settings) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=57, vocab_size=64
    )
    return transformers.BertForMaskedLM(config).eval()


def tokens(seed: int = 7, sequences: int = 4, length: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 64, (1, length), generator=generator) for _ in range(sequences)]


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).logits for batch in tokens(8)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_smaller_model_equals_the_original_with_its_masks(method, build):
    smaller, masked = build(), build()
    first = method(sparsity=0.3).prune(smaller, tokens(), progress=False)
    second = method(sparsity=0.3, physical=False).prune(masked, tokens(), progress=False)
    assert first.masks == second.masks
    assert first.widths == second.widths
    torch.testing.assert_close(outputs(smaller), outputs(masked), atol=1e-6, rtol=0)
    assert second.masks.violations(masked) == {}
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in masked.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_requested_share_of_channels_goes(method):
    model = llama(width=91)
    result = method(sparsity=0.37).prune(model, tokens(), progress=False)
    gone = sum(before - after for before, after in result.widths.values())
    assert gone == math.floor(0.37 * 91 * BLOCKS)
    assert result.sparsity == pytest.approx(gone / (91 * BLOCKS))
    assert {f.name: f.width for f in find_feed_forwards(model)} == {n: after for n, (_, after) in result.widths.items()}
    for report in result.layers:
        assert 0 < report.sparsity < 1
        assert 91 in report.shape


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_keep_ratios_average_to_one_minus_r_within_alignment(sparsity):
    result = Cfsp(sparsity=sparsity, align=8).prune(llama(width=256), tokens(), progress=False)
    widths = [after for _, after in result.widths.values()]
    assert all(width % 8 == 0 for width in widths)
    assert abs(sum(widths) / (256 * BLOCKS) - (1 - sparsity)) <= 4 / (256 * BLOCKS)


def test_masked_rows_and_columns_belong_to_the_same_channels():
    masks = Cfsp(sparsity=0.4).prune(llama(), tokens(), progress=False).masks
    up, down = masks["model.layers.1.mlp.up_proj.weight"], masks["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(up.all(1), up.any(1))
    assert torch.equal(up.all(1), down.all(0))
    assert torch.equal(up, masks["model.layers.1.mlp.gate_proj.weight"])


def test_statistics_are_those_of_the_dense_model():
    model = llama()
    layers = find_feed_forwards(model)
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    handles = [
        layer.down.module.register_forward_pre_hook(lambda _, args, n=layer.name: seen[n].append(args[0][0].double()))
        for layer in layers
    ]
    with torch.no_grad():
        hidden = [model(batch, output_hidden_states=True).hidden_states for batch in tokens()]
    for handle in handles:
        handle.remove()
    expected = {}
    for layer in layers:
        norm = torch.cat(seen[layer.name]).norm(dim=0)
        kept = norm.argsort(stable=True)[math.floor(WIDTH * 0.5) :]
        expected[layer.name] = set(kept.tolist())
    angles = []  # of the first block, from its definition
    for states in hidden:
        before, after = states[0][0].double(), states[1][0].double()
        cosine = (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
        angles += (cosine.arccos() / math.pi).tolist()
    result = Cfsp(sparsity=0.5, allocation="uniform", normalize="hidden").prune(model, tokens(), progress=False)
    assert result.importance["model.layers.0"] == pytest.approx(sum(angles) / len(angles), rel=1e-4)
    for name, channels in expected.items():
        mask = result.masks[f"{name}.up_proj.weight"].all(1)
        assert set(mask.nonzero().flatten().tolist()) == channels


def norms(layer, values: torch.Tensor) -> Statistics:
    stats = Statistics([InputNorm], layer.width, "cpu")
    stats.update(values)
    return stats


@given(st.integers(0, 2**31 - 1), st.floats(0.25, 2))
def test_hidden_normalizer_ranks_exactly_as_the_activation_norm(seed, power):
    generator = torch.Generator().manual_seed(seed)
    layer = LAYER
    values = torch.randn(3, layer.width, generator=generator) * torch.rand(layer.width, generator=generator)
    stats = norms(layer, values)
    score = Cfsp(normalize="hidden", c=power).score(layer, stats)
    assert torch.equal(score.argsort(), stats[InputNorm].norm.argsort())
    torch.testing.assert_close(score, 3 / HIDDEN * stats[InputNorm].norm ** power, rtol=1e-12, atol=0)


LAYER = find_feed_forwards(llama())[0]


def test_channel_normalizer_follows_the_formula_term_by_term():
    stats = norms(LAYER, torch.randn(5, WIDTH))
    n, b, c = stats[InputNorm].norm, 0.7, 1.3
    gate, up = (weight.abs().double() for weight in LAYER.widening())
    down = LAYER.down.matrix().abs().double()
    expected = torch.zeros(WIDTH, dtype=torch.float64)
    for j in range(WIDTH):
        terms = [
            down[i, j] * n[j] ** b / (down[i] * n**b).sum() + up[j, i] / up[:, i].sum() + gate[j, i] / gate[:, i].sum()
            for i in range(HIDDEN)
        ]
        expected[j] = sum(terms) / HIDDEN * n[j] ** c
    torch.testing.assert_close(Cfsp(b=b, c=c).score(LAYER, stats), expected)


def test_a_layer_without_a_gate_has_two_terms():
    layer = find_feed_forwards(gpt2())[0]
    stats = norms(layer, torch.randn(5, layer.width))
    score = Cfsp(normalize="hidden").score(layer, stats)
    torch.testing.assert_close(score, 2 / 32 * stats[InputNorm].norm)


def test_coarse_distances_by_hand():
    before = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    after = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(COARSE["angular"](before, after), torch.tensor([[0.0, 0.5, 1.0, 0.0]]))
    torch.testing.assert_close(COARSE["cosine"](before, after), torch.tensor([[0.0, 1.0, 2.0, 0.0]]))
    torch.testing.assert_close(COARSE["mse"](before, after), torch.tensor([[0.0, 5.0, 2.0, 0.5]]))
    torch.testing.assert_close(COARSE["mae"](before, after), torch.tensor([[0.0, 2.0, 1.0, 0.5]]))


def test_angle_of_almost_equal_states_is_never_nan():
    state = torch.randn(1, 500, 64, dtype=torch.bfloat16) * 300
    assert torch.isfinite(COARSE["angular"](state, state * 1.01)).all()


def test_sigmoid_budgets_follow_the_paper_and_average_to_one_minus_r():
    importance = {"a": 0.10, "b": 0.15, "c": 0.30}
    sums = {name: value * 128 * 1024 for name, value in importance.items()}  # as the paper adds them up
    mean = sum(sums.values()) / 3
    s = {name: 1 / (1 + math.exp(-(value - mean) / 1e4)) for name, value in sums.items()}
    keep = {name: (1 - 0.6) * value / (sum(s.values()) / 3) for name, value in s.items()}
    assert max(keep.values()) < 1
    budgets = sigmoid(importance, 0.6)
    assert {name: 1 - budgets[name] for name in budgets} == pytest.approx(keep)
    assert sum(budgets.values()) / 3 == pytest.approx(0.6)


def test_a_budget_above_the_whole_block_pulls_all_towards_the_mean():
    importance = {"a": 0.05, "b": 0.10, "c": 0.60}
    shares = logistic_shares(importance)
    assert (1 - 0.2) * max(shares.values()) >= 1
    shrink = (1 / (1 - 0.2) - 1) / (max(shares.values()) - 1) / 1.05
    budgets = sigmoid(importance, 0.2)
    for name in importance:
        assert 1 - budgets[name] == pytest.approx((1 - 0.2) * (1 + (shares[name] - 1) * shrink))
    assert 0 < min(budgets.values()) < 0.02
    assert sum(budgets.values()) / 3 == pytest.approx(0.2)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8), st.floats(0, 0.95), st.floats(0, 100))
def test_budgets_of_any_importance_are_possible_and_meet_their_mean(values, sparsity, steepness):
    budgets = sigmoid({str(i): value for i, value in enumerate(values)}, sparsity, steepness=steepness)
    assert all(0 <= budget <= 1 for budget in budgets.values())
    assert sum(budgets.values()) / len(values) == pytest.approx(sparsity, abs=1e-9)


def test_blocks_that_turn_their_input_more_keep_more():
    model = llama()
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            parameter.mul_(3)
    result = Cfsp(sparsity=0.4).prune(model, tokens(), progress=False)
    kept = [after for _, after in result.widths.values()]
    importance = list(result.importance.values())
    assert sorted(range(BLOCKS), key=kept.__getitem__) == sorted(range(BLOCKS), key=importance.__getitem__)
    assert kept[2] > kept[0]


@pytest.mark.parametrize("coarse", COARSE)
def test_every_coarse_measure_gives_its_own_importance(coarse):
    result = Cfsp(sparsity=0.3, coarse=coarse).prune(llama(), tokens(), progress=False)
    assert len(result.importance) == BLOCKS
    assert all(value > 0 for value in result.importance.values())


def test_zero_steepness_is_a_uniform_budget():
    result = Cfsp(sparsity=0.25, a=0.0).prune(llama(), tokens(), progress=False)
    assert {after for _, after in result.widths.values()} == {66}


def test_flap_ranks_all_layers_together_and_moves_the_mean_into_a_new_bias():
    model = llama()
    dense = copy.deepcopy(model)
    layers = find_feed_forwards(dense)
    inputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
    handles = [
        layer.down.module.register_forward_pre_hook(lambda _, args, n=layer.name: inputs[n].append(args[0][0].double()))
        for layer in layers
    ]
    outputs(dense)
    with torch.no_grad():
        for name in inputs:
            inputs[name].clear()
        for batch in tokens():
            dense(batch)
    for handle in handles:
        handle.remove()
    standard, means = [], {}
    for layer in layers:
        h = torch.cat(inputs[layer.name])
        fluctuation = h.var(0, correction=0) * layer.down.matrix().double().norm(dim=0) ** 2
        standard.append((fluctuation - fluctuation.mean()) / fluctuation.std(correction=0))
        means[layer.name] = h.mean(0)
    threshold = torch.cat(standard).sort().values[math.floor(0.3 * WIDTH * BLOCKS)]
    result = Flap(sparsity=0.3).prune(model, tokens(), progress=False)
    for layer, values in zip(layers, standard):
        keep = result.masks[f"{layer.name}.up_proj.weight"].all(1)
        assert torch.equal(keep, values >= threshold)
        bias = model.get_submodule(layer.name).down_proj.bias
        expected = layer.down.matrix().double()[:, ~keep] @ means[layer.name][~keep]
        torch.testing.assert_close(bias.double(), expected, rtol=1e-4, atol=1e-7)
        assert bias.requires_grad


def test_flap_adds_to_a_bias_that_is_there_and_leaves_it_alone_if_told_to():
    with_bias, without = gpt2(), gpt2()
    nn.init.constant_(with_bias.transformer.h[0].mlp.c_proj.bias, 0.5)
    before = with_bias.transformer.h[0].mlp.c_proj.bias.clone()
    Flap(sparsity=0.3).prune(with_bias, tokens(), progress=False)
    Flap(sparsity=0.3, bias=False).prune(without, tokens(), progress=False)
    after = with_bias.transformer.h[0].mlp.c_proj.bias
    assert not torch.equal(before, after)
    assert (after - 0.5).abs().max() < 0.1
    assert torch.equal(without.transformer.h[0].mlp.c_proj.bias, torch.zeros(32))


def test_flap_bias_lowers_the_error_of_the_layer():
    errors = []
    for bias in (True, False):
        model = gpt2()
        nn.init.constant_(model.transformer.h[0].mlp.c_fc.bias, 1.0)  # channels with a mean
        result = Flap(sparsity=0.5, bias=bias).prune(model, tokens(), progress=False)
        errors.append(next(r.error for r in result.layers if r.name == "transformer.h.0.mlp.c_proj.weight"))
    assert errors[0] < errors[1]


def test_reported_error_is_that_of_the_layer_output():
    model, dense = llama(), llama()
    result = WandaChannels(sparsity=0.5).prune(model, tokens(sequences=2), progress=False)
    seen: list[torch.Tensor] = []
    down = dense.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for batch in tokens(sequences=2):
            dense(batch)
    handle.remove()
    h, keep = torch.cat(seen), result.masks["model.layers.0.mlp.up_proj.weight"].all(1)
    lost = (h[:, ~keep] @ down.weight[:, ~keep].t()).norm() / (h @ down.weight.t()).norm()
    report = next(r for r in result.layers if r.name == "model.layers.0.mlp.down_proj.weight")
    assert report.error == pytest.approx(float(lost), rel=1e-5)


def test_equal_widths_go_into_the_configuration_and_unequal_ones_are_listed():
    even, odd = llama(width=96), llama(width=96)
    MagnitudeChannels(sparsity=0.25).prune(even, progress=False)
    assert even.config.intermediate_size == 72
    assert not hasattr(even.config, "feed_forward_widths")
    rebuilt = transformers.LlamaForCausalLM(even.config)
    rebuilt.load_state_dict(even.state_dict())
    torch.testing.assert_close(outputs(rebuilt.eval()), outputs(even))
    result = Cfsp(sparsity=0.3).prune(odd, tokens(), progress=False)
    assert odd.config.intermediate_size == 96
    assert odd.config.feed_forward_widths == {name: after for name, (_, after) in result.widths.items()}


def test_equal_widths_of_part_of_the_layers_stay_out_of_the_configuration():
    model = llama(width=96)
    MagnitudeChannels(sparsity=0.25, include=["*.0.*"]).prune(model, progress=False)
    assert model.config.intermediate_size == 96
    assert list(model.config.feed_forward_widths.values()) == [72, 96, 96]


def test_a_shrunk_model_is_saved_and_read_back_bit_for_bit(tmp_path):
    model = llama()
    Flap(sparsity=0.3).prune(model, tokens(), progress=False)
    storage.save(model, tmp_path / "model")
    again = copy.deepcopy(model)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    storage.load_state(again, tmp_path / "model")
    assert torch.equal(outputs(again), outputs(model))


def test_a_shrunk_model_prunes_again_and_generates():
    model = llama()
    Cfsp(sparsity=0.3).prune(model, tokens(), progress=False)
    result = Cfsp(sparsity=0.3).prune(model, tokens(), progress=False)
    assert max(before for before, _ in result.widths.values()) < WIDTH
    assert model.generate(tokens()[0], max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == 28


@pytest.mark.parametrize("physical", [True, False])
def test_a_model_offloaded_to_disk_gives_the_same(tmp_path, physical):
    from accelerate import disk_offload

    plain, away = llama(), llama()
    disk_offload(away, tmp_path / "weights", execution_device=torch.device("cpu"))
    first = Flap(sparsity=0.3, physical=physical).prune(plain, tokens(), progress=False)
    second = Flap(sparsity=0.3, physical=physical).prune(away, tokens(), workspace=tmp_path / "changed", progress=False)
    assert first.masks == second.masks
    assert away.model.layers[0].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(outputs(away), outputs(plain), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_stays_bfloat16(method):
    model = llama().to(torch.bfloat16)
    method(sparsity=0.3).prune(model, tokens(), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_random_channels_follow_their_seed():
    masks = [RandomChannels(sparsity=0.5, seed=s).prune(llama(), progress=False).masks for s in (0, 0, 1)]
    assert masks[0] == masks[1]
    assert masks[0] != masks[2]


def test_a_plain_feed_forward_model_without_blocks_gets_a_uniform_budget():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8))
    result = prune(model, "cfsp", sparsity=0.25, calibration=[torch.randn(2, 5, 8)], progress=False)
    assert list(result.widths.values()) == [(20, 15)]
    assert model[0].out_features == 15


def test_given_allocation_is_used_and_must_name_every_layer():
    names = [f"model.layers.{i}.mlp" for i in range(BLOCKS)]
    result = MagnitudeChannels(allocation=dict(zip(names, (0.25, 0.5, 0.75)))).prune(llama(), progress=False)
    assert [after for _, after in result.widths.values()] == [66, 44, 22]
    with pytest.raises(UnknownNameError, match=r"model\.layers\.2\.mlp"):
        MagnitudeChannels(allocation=dict(zip(names[:2], (0.2, 0.2)))).prune(llama(), progress=False)


def test_bad_values_are_refused_by_name():
    with pytest.raises(SparsityError, match="sparsity is 1"):
        Cfsp(sparsity=1.0)
    with pytest.raises(ConfigurationError, match="align is 0"):
        Cfsp(align=0)
    with pytest.raises(UnknownNameError, match="'anguler'; did you mean 'angular'"):
        Cfsp(coarse="anguler")
    with pytest.raises(UnknownNameError, match="normalizer 'channels'; did you mean 'channel'"):
        Cfsp(normalize="channels")
    with pytest.raises(ConfigurationError, match="b is nan"):
        Cfsp(b=math.nan)
    with pytest.raises(UnknownNameError, match="allocation 'sigmod'; did you mean 'sigmoid'"):
        Cfsp(allocation="sigmod").prune(llama(), tokens(), progress=False)
    with pytest.raises(ConfigurationError, match="finite"):
        logistic_shares({"a": math.inf})


def test_nothing_is_changed_when_pruning_is_refused():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match="align is 256"):
        Cfsp(align=256).prune(model, tokens(), progress=False)
    with pytest.raises(CalibrationError, match="cfsp needs calibration data"):
        Cfsp().prune(model, progress=False)
    with pytest.raises(CalibrationError, match="empty"):
        Cfsp().prune(model, [], progress=False)
    with pytest.raises(TargetError, match="no feed-forward layer"):
        Cfsp().prune(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), [torch.randn(1, 2, 4)], progress=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_steepness_is_that_of_the_paper_for_one_token():
    assert pytest.approx(13.1, abs=0.01) == STEEPNESS

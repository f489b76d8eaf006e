import dataclasses
import math

import pytest
import torch

from gossamer.activations.base import install
from gossamer.activations.budgets import GreedyAllocation, largest_within
from gossamer.activations.positions import DenseTokens
from gossamer.activations.rules import ActivationRules, LowRank
from gossamer.activations.teal import Teal
from gossamer.activations.wina import Wina
from gossamer.core.channel_rules import ChannelRule, Threshold, TopK
from gossamer.errors import (
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    ModelError,
    NonFiniteError,
    SparsityError,
)
from gossamer.measure import perplexity
from gossamer.models.activation_sites import find_input_sites


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def test_thresholds_drop_the_share_that_was_asked_for(tiny_llama, batches):
    teal = Teal(sparsity=0.4, dense_prefill=0.0)
    teal.calibrate(tiny_llama, batches, progress=False)
    # of the dense model's activations, which the first block still has
    with teal.active(tiny_llama) as installed:
        for batch in batches:
            logits(tiny_llama, batch)
        realised = installed.realised
    for name in ("q_proj", "k_proj", "v_proj"):
        assert realised[f"model.layers.0.self_attn.{name}"] == pytest.approx(0.4, abs=0.01)
    assert all(abs(share - 0.4) < 0.1 for share in realised.values())


def test_a_sparse_layer_computes_its_product_with_the_small_inputs_left_out(tiny_llama, batches):
    name = "model.layers.0.self_attn.q_proj"
    layer = tiny_llama.get_submodule(name)
    rules = ActivationRules({name: ChannelRule(Threshold(0.5))})
    x = torch.randn(2, 5, 48)
    kept = torch.where(x.abs() > 0.5, x, 0.0)
    with install(tiny_llama, rules):
        assert torch.equal(layer(x), kept @ layer.weight.T)
    assert torch.equal(layer(x), x @ layer.weight.T)


def test_a_sparsity_of_zero_is_exactly_dense_and_removal_restores_the_model(tiny_llama, batches):
    before = logits(tiny_llama, batches[0])
    teal = Teal(sparsity=0.0)
    teal.calibrate(tiny_llama, batches, progress=False)
    with teal.active(tiny_llama):
        assert torch.equal(logits(tiny_llama, batches[0]), before)
    teal = Teal(sparsity=0.7)
    teal.calibrate(tiny_llama, batches, progress=False)
    installed = teal.install(tiny_llama)
    assert not torch.equal(logits(tiny_llama, batches[0]), before)
    installed.remove()
    installed.remove()
    assert torch.equal(logits(tiny_llama, batches[0]), before)


def test_results_do_not_depend_on_what_else_is_in_the_batch(tiny_llama, batches):
    teal = Teal(sparsity=0.5)
    teal.calibrate(tiny_llama, batches, progress=False)
    ids = torch.cat(batches)
    with teal.active(tiny_llama):
        together = logits(tiny_llama, ids)
        alone = torch.cat([logits(tiny_llama, row[None]) for row in ids])
    assert torch.allclose(together, alone, atol=1e-6)


def test_padding_changes_nothing_and_is_not_counted(tiny_llama, batches):
    teal = Teal(sparsity=0.5, dense_prefill=0.25)
    teal.calibrate(tiny_llama, batches, progress=False)
    row = batches[0][:1, :12]
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), row], 1)
    mask = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.ones_like(row)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with teal.active(tiny_llama) as installed:
        expected = logits(tiny_llama, row)
        counted = {name: dataclasses.astuple(site.tally) for name, site in installed.sites.items()}
        installed.reset()
        found = logits(tiny_llama, padded, attention_mask=mask, position_ids=positions)[:, 7:]
        assert {n: dataclasses.astuple(site.tally) for n, site in installed.sites.items()} == counted
    assert torch.allclose(found, expected, atol=1e-5)
    assert next(iter(counted.values()))[2] == 9


def test_generation_with_a_cache_writes_what_running_the_whole_text_again_would(tiny_llama, batches):
    teal = Teal(sparsity=0.6, dense_prefill=1.0)
    teal.calibrate(tiny_llama, batches, progress=False)
    prompt = batches[0][:1, :6]
    with teal.active(tiny_llama) as installed:
        cached = tiny_llama.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert next(iter(installed.sites.values())).tally.tokens == 7
        ids = prompt
        # by hand: the prompt dense, all later tokens sparse
        for _ in range(8):
            installed.tokens.of_prompt = lambda shape, real=None: (torch.arange(shape[1]) < 6).expand(shape)
            ids = torch.cat([ids, logits(tiny_llama, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)


def test_kernels_write_what_masked_products_write_and_keep_one_copy_of_each_weight(tiny_llama, batches):
    teal = Teal(sparsity=0.6, dense_prefill=1.0)
    teal.calibrate(tiny_llama, batches, progress=False)
    weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with teal.install(tiny_llama) as masked:
        expected = tiny_llama.generate(batches[0][:, :6], **options)
        counted = masked.realised
    with teal.install(tiny_llama, kernels=True) as fast:
        assert torch.equal(tiny_llama.generate(batches[0][:, :6], **options), expected)
        assert fast.realised == pytest.approx(counted, abs=0.01)
    assert tiny_llama.model.layers[0].mlp.up_proj.weight is weight
    assert torch.equal(weight, before)
    assert weight.t().is_contiguous()
    assert "forward" not in vars(tiny_llama.model.layers[0].mlp.up_proj)


def test_the_first_tokens_of_a_prompt_stay_dense():
    tokens = DenseTokens(0.3)
    assert tokens.of_prompt((2, 10))[0].nonzero().flatten().tolist() == [0, 1, 2]
    real = torch.tensor([[False, False, True, True, True, True]])
    assert tokens.of_prompt((1, 6), real)[0].tolist() == [True, True, True, True, False, False]
    assert DenseTokens(0.0).of_prompt((2, 10)) is None


def test_a_share_of_a_prompt_is_the_same_number_with_and_without_padding():
    for share in (0.01, 0.07, 0.3):
        tokens = DenseTokens(share)
        for count in (50, 100, 400):
            real = torch.tensor([[False] + [True] * count])
            alone, padded = tokens.of_prompt((1, count)), tokens.of_prompt((1, count + 1), real)
            assert torch.equal(padded[:, 1:], alone)
            assert int(alone.sum()) == math.ceil(round(share * count, 6))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_stays_out_of_generation_whatever_the_cache(tiny_llama, batches, cache):
    teal = Teal(sparsity=0.6, dense_prefill=0.5)
    teal.calibrate(tiny_llama, batches, progress=False)
    row = batches[0][:1, :12]
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), row], 1)
    mask = (torch.arange(19) >= 7).long()[None]
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with teal.active(tiny_llama) as installed:
        expected = tiny_llama.generate(row, **options)[:, 12:]
        counted = dataclasses.astuple(next(iter(installed.sites.values())).tally)
        installed.reset()
        found = tiny_llama.generate(padded, attention_mask=mask, cache_implementation=cache, **options)[:, 19:]
        assert dataclasses.astuple(next(iter(installed.sites.values())).tally) == counted
    assert torch.equal(found, expected)


def test_a_mask_given_by_position_counts_too(tiny_llama, batches):
    mask = (torch.arange(24) >= 4).long()[None]
    tokens = DenseTokens(0.5)
    tokens.attach(tiny_llama)
    seen = []
    tiny_llama.lm_head.register_forward_hook(lambda module, args, output: seen.append(tokens.dense))
    logits(tiny_llama, batches[0][:1], attention_mask=mask)
    with torch.no_grad():
        tiny_llama(batches[0][:1], mask)
    assert [int(dense.sum()) for dense in seen] == [14, 14]
    assert torch.equal(*seen)
    assert tokens.dense is None


def test_nothing_stays_in_a_model_into_which_rules_could_not_be_put(tiny_llama, batches, monkeypatch):
    rules = Teal().calibrate(tiny_llama, batches, progress=False)
    before = logits(tiny_llama, batches[0])

    def fails(weight):
        raise MemoryError

    layers = list(tiny_llama.modules())
    monkeypatch.setattr("gossamer.activations.installed.lay_by_channels", fails)
    with pytest.raises(MemoryError):
        install(tiny_llama, rules, kernels=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layers)
    with install(tiny_llama, rules):
        pass
    assert torch.equal(logits(tiny_llama, batches[0]), before)


def test_a_layer_called_by_itself_has_no_prompt(tiny_llama, batches):
    teal = Teal(dense_prefill=1.0)
    teal.calibrate(tiny_llama, batches, progress=False)
    layer = tiny_llama.model.layers[0].mlp.up_proj
    x = torch.randn(3, 48)
    with teal.active(tiny_llama):
        before = layer(x)
        logits(tiny_llama, batches[0])
        assert torch.equal(layer(x), before)


def test_greedy_budgets_meet_the_sparsity_in_every_block_and_hurt_its_output_less(tiny_llama, batches):
    sites = find_input_sites(tiny_llama)
    teal = Teal(sparsity=0.5, allocation="greedy", step=0.4)
    budget = teal.calibrate(tiny_llama, batches[:2], progress=False).requested
    for block in {site.block for site in sites}:
        own = [site for site in sites if site.block == block]
        total = sum(site.size for site in own)
        assert sum(budget[site.name] * site.size for site in own) == pytest.approx(0.5 * total, rel=1e-9)
    assert len(set(budget.values())) > 3

    uniform = Teal(sparsity=0.5)
    uniform.calibrate(tiny_llama, batches[:2], progress=False)
    first = [site.name for site in sites if site.block == "model.layers.0"]

    def change(rules):
        own = ActivationRules({name: rules.inputs[name] for name in first})
        seen = []
        handle = tiny_llama.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(out))
        with install(tiny_llama, own, dense_prefill=0.0):
            logits(tiny_llama, batches[0])
        logits(tiny_llama, batches[0])
        handle.remove()
        return float((seen[0] - seen[1])[:, -6:].norm())

    assert change(teal.rules_) < change(uniform.rules_)


def test_other_sparsities_come_from_the_same_calibration(tiny_llama, batches):
    once = Teal(sparsity=0.5)
    once.calibrate(tiny_llama, batches, progress=False)
    again = Teal(sparsity=0.25).calibrate(tiny_llama, batches, progress=False)
    found, expected = ({n: r.selection for n, r in rules.inputs.items()} for rules in (once.at(0.25), again))
    assert found == expected


def test_a_sparsity_can_be_chosen_by_its_price(tiny_llama, batches):
    teal = Teal(dense_prefill=0.0)
    teal.calibrate(tiny_llama, batches, progress=False)
    dense = perplexity(tiny_llama, batches, 24, 24, progress=False).value
    found = teal.within(tiny_llama, batches, 1.005)
    assert teal.sparsity == found > 0
    with teal.active(tiny_llama):
        assert perplexity(tiny_llama, batches, 24, 24, progress=False).value <= 1.005 * dense
    with pytest.raises(ConfigurationError, match="ratio is 1"):
        teal.within(tiny_llama, batches, 1)


def test_rules_survive_a_file_and_give_the_same_model(tiny_llama, batches, tmp_path):
    for method in (Teal(sparsity=0.5), Wina(sparsity=0.5), Wina(sparsity=0.5, gate="threshold")):
        rules = method.calibrate(tiny_llama, batches, progress=False)
        rules.save(tmp_path / "rules.safetensors")
        read = ActivationRules.load(tmp_path / "rules.safetensors")
        with install(tiny_llama, rules):
            expected = logits(tiny_llama, batches[0])
        with install(tiny_llama, read):
            assert torch.equal(logits(tiny_llama, batches[0]), expected)
        assert read.settings["method"] == type(method).__name__


def test_broken_rules_are_refused(tmp_path):
    file = tmp_path / "rules.safetensors"
    with pytest.raises(CheckpointError, match="holds no activation rules"):
        ActivationRules.load(file)
    file.write_bytes(b"not a file of rules")
    with pytest.raises(CheckpointError, match="holds no activation rules"):
        ActivationRules.load(file)


def test_rules_of_another_model_are_refused(tiny_llama, batches):
    rules = Teal().calibrate(tiny_llama, batches, progress=False)
    with pytest.raises(ModelError, match="which this one lacks"):
        install(tiny_llama, ActivationRules({"model.layers.9.mlp.up_proj": ChannelRule(Threshold(1.0))}))
    wide = {"model.layers.0.mlp.up_proj": ChannelRule(Threshold(1.0), torch.ones(49))}
    with pytest.raises(ModelError, match="49 channels, this model has 48"):
        install(tiny_llama, ActivationRules(wide))
    with pytest.raises(ModelError, match="keeps 49 channels, this model has 48"):
        install(tiny_llama, ActivationRules({"model.layers.0.mlp.up_proj": ChannelRule(TopK(49))}))
    layer = {"model.layers.0.mlp.up_proj": ChannelRule(Threshold(1.0))}
    with pytest.raises(ModelError, match="which this one lacks"):
        install(tiny_llama, ActivationRules({}, layer))
    low_rank = {"model.layers.0.mlp.up_proj": LowRank(torch.zeros(72, 2), torch.zeros(2, 47))}
    with pytest.raises(ModelError, match="low-rank part is of 72 × 47"):
        install(tiny_llama, ActivationRules(layer, low_rank=low_rank))
    with pytest.raises(ModelError, match="which this one lacks"):
        ActivationRules({"model.layers.9.mlp.up_proj": ChannelRule(Threshold(1.0))}).thresholds(tiny_llama)
    with install(tiny_llama, rules), pytest.raises(ModelError, match="other activation rules are at work"):
        install(tiny_llama, rules)


def test_bad_parameters_and_data_are_refused(tiny_llama, batches):
    for wrong in (1.0, -0.1, 1.5, "half"):
        with pytest.raises(SparsityError):
            Teal(sparsity=wrong)
    with pytest.raises(ConfigurationError, match="allocation is 'best'"):
        Teal(allocation="best")
    with pytest.raises(CalibrationError, match="empty"):
        Teal().calibrate(tiny_llama, [], progress=False)
    with pytest.raises(CalibrationError, match="no rules yet"):
        Teal().install(tiny_llama)
    with pytest.raises(CalibrationError, match="has not seen data"):
        Teal().at(0.5)
    with pytest.raises(CalibrationError, match="one batch"):
        Teal().calibrate(tiny_llama, batches[0], progress=False)
    for batch, said in (
        (batches[0][0], r"\(24,\) torch.int64"),
        (batches[0].float(), "torch.float32"),
        (batches[0][:, :0], r"\(2, 0\)"),
        (batches[0] + 97, "outside the model's vocabulary of 97"),
        ("a text", "is text"),
    ):
        with pytest.raises(CalibrationError, match=said):
            Teal().calibrate(tiny_llama, [batch], progress=False)
    with pytest.raises(ConfigurationError, match="dense_prefill is 2"):
        Teal(dense_prefill=2)
    with pytest.raises(ConfigurationError, match="step is 0"):
        Teal(step=0.0)
    with pytest.raises(SparsityError, match=r"sparsity of a is 1\.5"):
        Teal(allocation={"a": 1.5})
    with pytest.raises(ConfigurationError, match="dense_prefill is 2"):
        install(tiny_llama, Teal().calibrate(tiny_llama, batches, progress=False), dense_prefill=2)
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj"):
        Teal().calibrate(tiny_llama, batches, progress=False)


def test_greedy_budgets_beyond_what_a_layer_may_drop_are_refused_at_once():
    with pytest.raises(
        ConfigurationError, match=r"sparsity is 0\.97; with allocation='greedy' it must be at most 0\.95"
    ):
        Teal(sparsity=0.97, allocation="greedy")


def test_greedy_budgets_beyond_what_a_layer_may_drop_are_refused_before_the_search(tiny_llama, batches):
    calls = []
    with pytest.raises(
        ConfigurationError, match=r"sparsity is 0\.97; with allocation='greedy' it must be at most 0\.95"
    ):
        GreedyAllocation().allocate(tiny_llama, batches, [], lambda site, sparsity: calls.append(site), 0.97)
    assert not calls


def test_greedy_steps_are_checked():
    with pytest.raises(ConfigurationError, match="step is 0"):
        GreedyAllocation(step=0.0)


def test_bisection_returns_the_largest_setting_within_the_limit():
    assert largest_within(lambda x: x * x, 2.0, 0.0, 4.0, 1e-6) == pytest.approx(math.sqrt(2), abs=1e-5)
    assert largest_within(lambda x: 0.0, 2.0, 0.0, 4.0, 1e-6) == 4.0

"""Rules at work in models that change, are wrapped, read images or mixtures, and rules that are for other models."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from gossamer.activations.base import install
from gossamer.activations.chess import Chess
from gossamer.activations.r_sparse import RSparse
from gossamer.activations.rules import ActivationRules
from gossamer.activations.sparsing_law import PPLBudget
from gossamer.activations.teal import Teal
from gossamer.core.channel_rules import ChannelRule, Everything, GroupTopK, Threshold, TopK
from gossamer.errors import ModelError, OutputError, TargetError
from gossamer.runtime.compress import compress

SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@torch.no_grad()
def logits(model, ids, **options):
    return model(ids, **options).logits


def at_half(model, batches, **options):
    teal = Teal(sparsity=0.5, **{"dense_prefill": 0.0, **options})
    teal.calibrate(model, batches, progress=False)
    return teal


def first(installed):
    return next(iter(installed.sites.values())).tally


def assert_near(found, expected):
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("change", ["data", "parameter", "in place", "dtype"])
def test_kernels_multiply_by_the_weights_that_are_there_now(tiny_llama, batches, change):
    teal = at_half(tiny_llama, batches)
    ids = batches[0][:1, :8]
    with teal.install(tiny_llama, kernels=True):
        logits(tiny_llama, ids)
        with torch.no_grad():
            for module in tiny_llama.model.layers.modules():
                if isinstance(module, torch.nn.Linear):
                    if change == "data":
                        module.weight.data = module.weight.data * 2
                    elif change == "parameter":
                        module.weight = torch.nn.Parameter(module.weight.detach() * 2)
                    elif change == "in place":
                        module.weight.mul_(2)
        if change == "dtype":
            tiny_llama.bfloat16()
        found = logits(tiny_llama, ids)
    with teal.install(tiny_llama):
        expected = logits(tiny_llama, ids)
    near = 1e-5 if change != "dtype" else 0.02
    assert (found - expected).norm() <= near * expected.norm()


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("method", [Teal, RSparse])
def test_a_copy_of_a_sparse_model_has_weights_counts_and_dense_tokens_of_its_own(tiny_llama, batches, method, kernels):
    sparsifier = method(sparsity=0.5, dense_prefill=0.5)
    sparsifier.calibrate(tiny_llama, batches, progress=False)
    ids = batches[0][:1, :8]
    with sparsifier.install(tiny_llama, kernels=kernels) as installed:
        twin = copy.deepcopy(tiny_llama)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        found = logits(twin, ids)
        assert first(installed).tokens == 0
        assert first(twin._activation_rules).tokens == 4
        twin._activation_rules.remove()
        sparse = logits(tiny_llama, ids)
    with sparsifier.install(twin):
        assert_near(found, logits(twin, ids))
    with sparsifier.install(tiny_llama):
        assert_near(sparse, logits(tiny_llama, ids))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"hidden_size": 64}, "64 weights.* was of"),
        ({"intermediate_size": 80}, r"80 × 48 weights.*72 × 48"),
        ({"num_hidden_layers": 5}, r"without a layer 'model\.layers\.3"),
        ({"num_hidden_layers": 2}, r"with a layer 'model\.layers\.2.*lacks"),
    ],
)
@pytest.mark.parametrize("method", [Teal, Chess, RSparse, PPLBudget])
def test_rules_of_a_model_of_another_size_are_refused(tiny_llama, batches, tmp_path, method, sizes, said):
    rules = method().calibrate(tiny_llama, batches[:2], progress=False)
    rules.save(tmp_path / "rules")
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **sizes})).eval()
    for each in (rules, ActivationRules.load(tmp_path / "rules")):
        with pytest.raises(ModelError, match=said):
            install(other, each)
        if not each.low_rank:
            with pytest.raises(ModelError, match=said):
                each.thresholds(other)


def test_rules_by_price_are_for_the_rotated_model_or_the_other(tiny_llama, batches):
    rules = PPLBudget().calibrate(tiny_llama, batches[:2], progress=False)
    assert rules.settings["rotated"] is False


def test_a_file_that_does_not_name_its_model_is_taken_with_a_warning(tiny_llama, batches, tmp_path):
    rules = at_half(tiny_llama, batches).rules_
    rules.layers = {}
    rules.save(str(tmp_path / "rules"))
    with pytest.warns(UserWarning, match="does not say for which model"):
        old = ActivationRules.load(str(tmp_path / "rules"))
    with install(tiny_llama, old):
        pass


@pytest.mark.parametrize("selection", [Everything(), Threshold(0.25), TopK(3), GroupTopK(2, 8)])
def test_every_selection_survives_a_file(selection, tmp_path):
    rules = ActivationRules({"up": ChannelRule(selection)}, layers={"up": (64, 48)})
    rules.save(tmp_path / "rules")
    assert ActivationRules.load(tmp_path / "rules").inputs["up"].selection == selection


def test_rules_are_saved_under_names_and_refused_in_folders_that_are_missing(tmp_path):
    rules = ActivationRules({"a": ChannelRule(Threshold(1.0))}, layers={"a": (2, 3)})
    rules.save(str(tmp_path / "rules"))
    assert ActivationRules.load(str(tmp_path / "rules")).layers == {"a": (2, 3)}
    with pytest.raises(OutputError, match="does not exist"):
        rules.save(tmp_path / "missing" / "rules")


def test_prompts_that_come_in_pieces_stay_dense(tiny_llama, batches):
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    ids = batches[0][:1, :12]
    with at_half(tiny_llama, batches, dense_prefill=1.0).active(tiny_llama) as installed:
        tiny_llama.generate(ids, prefill_chunk_size=4, **options)
        assert first(installed).tokens == 0
        past = tiny_llama(ids, use_cache=True).past_key_values
        logits(tiny_llama, batches[0][:1, 12:20], past_key_values=past)
        assert first(installed).tokens == 0
        logits(tiny_llama, batches[0][:1, 20:21], past_key_values=past)
        assert first(installed).tokens == 1


def test_padding_in_front_of_a_piece_is_not_in_the_piece(tiny_llama, batches):
    ids = batches[0][:2, :12]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with at_half(tiny_llama, batches, dense_prefill=0.5).active(tiny_llama) as installed, torch.no_grad():
        past = tiny_llama(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
        installed.reset()
        tiny_llama(ids[:, 6:], attention_mask=mask, past_key_values=past)
        assert first(installed).tokens == 6


def test_rules_are_not_calibrated_on_a_sparse_model(tiny_llama, batches):
    with at_half(tiny_llama, batches).active(tiny_llama):
        for method in (Teal(), Chess(), RSparse(), PPLBudget()):
            with pytest.raises(ModelError, match="is not dense"):
                method.calibrate(tiny_llama, batches[:1], progress=False)


def test_before_any_token_everything_is_read(tiny_llama, batches):
    with at_half(tiny_llama, batches).active(tiny_llama) as installed:
        assert installed.weights_read.share == 1.0


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "up_proj"], "all-linear"])
def test_adapters_belong_to_the_layers_they_wrap(tiny_llama, batches, targets):
    peft = pytest.importorskip("peft")
    plain = copy.deepcopy(tiny_llama)
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=targets)).eval()
    teal = at_half(model, batches, dense_prefill=1.0)
    base = at_half(plain, batches)
    assert {f"base_model.model.{name}" for name in base.rules_.inputs} == set(teal.rules_.inputs)
    ids = batches[0][:1, :6]
    with teal.active(model) as installed:
        model.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert first(installed).tokens == 1
        installed.reset()
        logits(model, ids)
        assert first(installed).tokens == 0
    with install(model, teal.rules_, 0.0) as installed, install(plain, base.rules_, 0.0) as other:
        assert_near(logits(model, ids), logits(plain, ids))
        assert installed.weights_read.read - installed.weights_read.total == pytest.approx(
            other.weights_read.read - other.weights_read.total
        )


def test_adapters_see_the_sparse_inputs_too(tiny_llama, batches):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer, x = model.get_submodule(name), torch.randn(2, 48)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    kept = torch.where(x.abs() > 0.5, x, 0.0)
    with torch.no_grad():
        expected = layer(kept)
        with install(model, ActivationRules({name: ChannelRule(Threshold(0.5))})):
            assert torch.equal(layer(x), expected)


def llava():
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**SIZES),
            vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
            image_token_index=90,
            image_seq_length=16,
        )
    ).eval()
    ids = torch.tensor([[3, 4, *[90] * 16, 5, 6, 7]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}


def test_images_have_no_dense_tokens_and_their_prompts_do():
    model, inputs = llava()
    with at_half(model, [inputs], dense_prefill=1.0).active(model) as installed, torch.no_grad():
        model(**inputs)
        assert {site.tally.tokens for name, site in installed.sites.items() if "language_model" in name} == {0}
        assert all(site.tally.tokens for name, site in installed.sites.items() if "vision_tower" in name)


def test_layers_that_calibration_never_reached_are_told_and_stay_dense(batches):
    model, inputs = llava()
    text = [batch.clamp(max=80) for batch in batches]
    teal = Teal(sparsity=0.5)
    with pytest.warns(UserWarning, match="never ran on the calibration data and stay dense"):
        rules = teal.calibrate(model, text, progress=False)
    assert rules.inputs
    assert all("language_model" in name for name in rules.inputs)
    with teal.active(model), torch.no_grad():
        model(**inputs)


def test_encoders_and_decoders_of_different_lengths_run():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    teal = at_half(model, [{"input_ids": ids, "labels": ids[:, :9].contiguous()}], dense_prefill=0.5)
    with teal.active(model) as installed, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids[:, :4])
        tokens = {name: site.tally.tokens for name, site in installed.sites.items()}
    assert {tokens[name] for name in tokens if name.startswith("encoder")} == {12}
    assert {tokens[name] for name in tokens if name.startswith("decoder") and "EncDec" not in name} == {
        4,
    }
    assert {tokens[name] for name in tokens if "EncDecAttention.k" in name} == {24}


def test_attention_of_a_mixture_is_treated_and_its_active_experts_are_counted(batches):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config).eval()
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    with at_half(model, batches).active(model) as installed:
        logits(model, batches[0])
        read = installed.weights_read
    attention = 3 * (2 * 48 * 48 + 2 * 48 * 24)
    assert (read.total, read.treated) == (attention + experts // 2 + 97 * 48, attention)
    assert read.dense_share == pytest.approx(1 - attention / read.total)
    assert 0.4 < (read.total - read.read) / attention < 0.6


_ON_A_GPU = """
import copy, torch
from torch import nn
from gossamer.activations import installed
from gossamer.activations.positions import DenseTokens
from gossamer.core.channel_rules import ChannelRule, Threshold

installed._product = lambda device: installed.channels_triton.input_sparse  # the interpreter's tensors are on the CPU
torch.manual_seed(0)
layer, x = nn.Linear(40, 70), torch.randn(2, 3, 40)
wanted = layer(torch.where(x.abs() > 0.5, x, 0.0))
rule = ChannelRule(Threshold(0.5))
site = installed.Site(rule, DenseTokens(0.0), installed.Tally())
[handle] = installed._hook_input(layer, site, rule.thresholds(40))
with torch.no_grad():
    assert torch.allclose(layer(x), wanted, atol=1e-5)
assert site.tally.tokens == 6
handle.remove()
print("as on the CPU")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_of_a_gpu_writes_what_a_masked_product_writes():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_GPU], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "as on the CPU" in done.stdout


def test_the_device_says_which_product_is_taken(monkeypatch):
    from gossamer.activations import installed

    assert installed._product(torch.device("cpu")) is installed.input_sparse
    monkeypatch.setattr(installed.channels_triton, "triton", None)
    assert installed._product(torch.device("cuda")) is None
    monkeypatch.setattr(installed.channels_triton, "triton", object())
    assert installed._product(torch.device("cuda")) is installed.channels_triton.input_sparse


def test_groups_that_do_not_divide_the_channels_are_refused(tiny_llama):
    rules = ActivationRules({"model.layers.0.mlp.up_proj": ChannelRule(GroupTopK(2, 5))})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj: .* groups of 5 .* do not divide .* 48"):
        install(tiny_llama, rules)


def test_layers_are_not_packed_under_rules_and_packed_ones_are_not_calibrated(tiny_llama, batches):
    teal = at_half(tiny_llama, batches)
    for part in (tiny_llama, tiny_llama.model):
        with teal.active(tiny_llama), pytest.raises(ModelError, match="would not survive"):
            compress(part, "int8", progress=False)
    compress(tiny_llama, "int8", progress=False)
    with pytest.raises(TargetError, match="compress last"):
        teal.calibrate(tiny_llama, batches, progress=False)
    assert teal.rules_.thresholds(tiny_llama).inputs


def gradients_and_counts(model, inputs):
    model.zero_grad()
    sum(model(**each, labels=each["input_ids"], use_cache=False).loss for each in inputs).backward()
    sites = model._activation_rules.sites
    counted = {name: (int(site.tally.live), site.tally.tokens) for name, site in sites.items()}
    model._activation_rules.reset()
    return [parameter.grad for parameter in model.parameters()], counted


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", [Teal, RSparse, Chess])
def test_checkpointing_computes_again_with_the_dense_tokens_of_its_call(tiny_llama, batches, method, reentrant):
    sparsifier = method(sparsity=0.5, dense_prefill=0.4)
    sparsifier.calibrate(tiny_llama, batches, progress=False)
    mask = torch.ones_like(batches[0][:2, :12])
    mask[1, :5] = 0
    inputs = [
        {"input_ids": batches[0][:2, :12], "attention_mask": mask},
        {"input_ids": batches[1][:2, :12]},
    ]
    tiny_llama.train()
    with sparsifier.active(tiny_llama) as installed:
        expected, counted = gradients_and_counts(tiny_llama, inputs)
        tiny_llama.activation_checkpointing_enable({"use_reentrant": reentrant})
        found, counted_again = gradients_and_counts(tiny_llama, inputs)
        assert all(site._rest is None for site in installed.sites.values())
    assert counted_again == counted
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("part", ["mlp", "down_proj"])
def test_checkpointing_of_parts_is_exact_as_well(tiny_llama, batches, part):
    tiny_llama.train()
    ids = batches[0][:1, :8]
    with at_half(tiny_llama, batches, dense_prefill=0.5).active(tiny_llama):
        tiny_llama(ids, labels=ids).loss.backward()
        mlp = tiny_llama.model.layers[1].mlp
        wanted, mlp.gate_proj.weight.grad = mlp.gate_proj.weight.grad, None
        module = mlp if part == "mlp" else mlp.down_proj
        forward = module.forward
        module.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
        tiny_llama(ids, labels=ids).loss.backward()
        assert torch.allclose(mlp.gate_proj.weight.grad, wanted, atol=1e-6)


def test_what_is_computed_again_from_copies_is_refused(tiny_llama, batches):
    tiny_llama.train()
    tiny_llama.activation_checkpointing_enable({"use_reentrant": False})
    ids = batches[0][:1, :8]
    with at_half(tiny_llama, batches, dense_prefill=0.5).active(tiny_llama):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            loss = tiny_llama(ids, labels=ids, use_cache=False).loss
        with pytest.raises(ModelError, match="checkpoint whole blocks, or set dense_prefill=0"):
            loss.backward()


@pytest.mark.parametrize("inner_first", [True, False])
def test_rules_in_a_part_of_a_model_and_in_the_model_exclude_each_other(tiny_llama, batches, inner_first):
    models = [tiny_llama.model, tiny_llama] if inner_first else [tiny_llama, tiny_llama.model]
    first_rules, second_rules = [at_half(model, batches) for model in models]
    with first_rules.active(models[0]):
        with pytest.raises(ModelError, match="other activation rules are at work"):
            second_rules.install(models[1])
        with pytest.raises(ModelError, match="is not dense"):
            second_rules.calibrate(models[1], batches, progress=False)
    with second_rules.active(models[1]):
        pass


def test_a_layer_that_raises_keeps_nothing(tiny_llama, batches):
    sparsifier = RSparse(sparsity=0.5)
    sparsifier.calibrate(tiny_llama, batches, progress=False)
    with sparsifier.active(tiny_llama) as installed:
        layer = tiny_llama.model.layers[1].mlp.down_proj
        layer.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            logits(tiny_llama, batches[0][:1, :6])
        assert all(site._rest is None for site in installed.sites.values())

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gossamer
from gossamer.core.calibration import InputNorm, observe
from gossamer.core.targets import find_targets
from gossamer.errors import CalibrationError
from gossamer.models.blocks import find_stacks, run_batch, stages

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 97}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def gemma():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SIZES, **HEADS, head_dim=8, sliding_window=4, layer_types=kinds)
    return Gemma3ForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, bos_token_id=0, eos_token_id=0)
    ).eval()


def last_hidden(model, batch):
    return model(batch, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("make", [gemma, gpt2, None])
def test_the_blocks_one_by_one_are_the_model(make, tiny_llama, batches):
    model = make() if make else tiny_llama
    expected = []
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    handle = norm.register_forward_pre_hook(lambda module, args: expected.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    stage = None
    for stage in stages(model, batches):
        stage.forward(store=True)
    for found, wanted in zip(stage.outputs, expected):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_both_stacks_of_an_encoder_decoder_are_found(batches):
    config = T5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=97, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    assert [stack.name for stack in find_stacks(model)] == ["encoder.block", "decoder.block"]
    data = [{"input_ids": batch, "decoder_input_ids": batch[:, :5]} for batch in batches]
    assert len(list(stages(model, data))) == 4


def test_a_block_that_runs_several_times_is_left_whole(batches):
    config = AlbertConfig(
        hidden_size=32,
        embedding_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
    )
    assert [stage.name for stage in stages(AlbertModel(config), batches)] == [""]


def test_the_training_flags_come_back(tiny_llama, batches):
    tiny_llama.train()
    list(stages(tiny_llama, batches))
    assert all(module.training for module in tiny_llama.modules())
    assert "forward" not in tiny_llama.model.layers[0].__dict__


def test_no_data_is_refused(tiny_llama):
    with pytest.raises(CalibrationError, match="empty"):
        next(stages(tiny_llama, []))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_no_trace_in_the_statistics(tiny_llama, side):
    words = torch.randint(0, 97, (1, 9))
    padding = torch.zeros(1, 5, dtype=torch.long)
    order = (padding, words) if side == "left" else (words, padding)
    mask = torch.cat([torch.zeros_like(p) if p is padding else torch.ones_like(p) for p in order], 1)
    padded = [{"input_ids": torch.cat(order, 1), "attention_mask": mask}]
    target = find_targets(tiny_llama)[0]
    norms = []
    for data in (padded, [words]):
        with observe([target], (InputNorm,)) as seen:
            next(stages(tiny_llama, data)).forward()
        norms.append(seen[target.name][InputNorm].norm)
    torch.testing.assert_close(*norms)


def test_stacked_experts_see_the_tokens_that_are_routed_to_them(batches):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)).eval()
    experts = model.model.layers[0].mlp.experts
    targets = [t for t in find_targets(model) if t.module is experts]
    routed = []
    handle = experts.register_forward_pre_hook(lambda module, args: routed.append((args[0].clone(), args[1].clone())))
    with torch.no_grad(), observe(targets, (InputNorm,)) as seen:
        for batch in batches:
            model(batch)
    handle.remove()
    for index in range(4):
        reached = torch.cat([hidden[(chosen == index).any(1)] for hidden, chosen in routed])
        stats = seen[f"model.layers.0.mlp.experts.gate_up_proj[{index}]"]
        assert stats.tokens == len(reached)
        torch.testing.assert_close(stats[InputNorm].norm, reached.double().norm(dim=0), rtol=1e-5, atol=1e-7)


def test_an_encoder_without_a_head_is_pruned(batches):
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    model = BertModel(config).eval()
    result = gossamer.prune(model, "wanda", calibration=batches, sparsity=0.5, progress=False)
    assert any("layer.1" in name for name in result.masks)
    assert not result.masks.violations(model)


def test_a_plain_network_is_one_stage():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    assert [stage.name for stage in stages(model, [torch.randn(2, 3, 8, 8)])] == [""]


@pytest.mark.parametrize("method", ["wanda", "magnitude", "sparsegpt"])
def test_a_model_on_disk_is_pruned_like_one_in_memory(method, tiny_llama, batches, tmp_path):
    folder = tmp_path / "dense"
    tiny_llama.save_pretrained(folder)
    before = (folder / "model.safetensors").read_bytes()
    inside = copy.deepcopy(tiny_llama)
    outside = LlamaForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    data = None if method == "magnitude" else batches
    expected = gossamer.prune(inside, method, calibration=data, sparsity=0.5, progress=False)
    found = gossamer.prune(outside, method, calibration=data, sparsity=0.5, progress=False, workspace=tmp_path / "work")
    assert found.masks == expected.masks
    with torch.no_grad():
        torch.testing.assert_close(outside(batches[0]).logits, inside(batches[0]).logits, rtol=0, atol=1e-5)
    assert (folder / "model.safetensors").read_bytes() == before
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again.lm_head.weight, tiny_llama.lm_head.weight)


def test_logits_of_the_last_token_are_enough_for_who_looks_inside(tiny_llama, batches):
    with torch.no_grad():
        whole, last = run_batch(tiny_llama, batches[0]), run_batch(tiny_llama, batches[0], logits=False)
        assert last.logits.shape[1] == 1
        torch.testing.assert_close(last.logits, whole.logits[:, -1:])
        labelled = {"input_ids": batches[0], "labels": batches[0]}
        assert run_batch(tiny_llama, labelled, logits=False).loss.equal(run_batch(tiny_llama, labelled).loss)
        layer = nn.Linear(3, 2)
        assert run_batch(layer, torch.ones(1, 3), logits=False).equal(layer(torch.ones(1, 3)))

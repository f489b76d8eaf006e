"""Attention taken over in models of several families, and given back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    StaticCache,
    ViTConfig,
    ViTModel,
)

from gossamer.errors import ModelError
from gossamer.models import attention_sites
from gossamer.models.attention_sites import AttentionSite


@pytest.fixture
def sliding():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return Gemma3ForCausalLM(config).eval()


def seen(model, run):
    """Calls of a run whose attention is computed from what the call says, and the run's result."""
    calls = []

    def attend(call):
        calls.append(call)
        return call.dense()

    site = AttentionSite(model, attend)
    try:
        with torch.no_grad():
            return run(), calls
    finally:
        site.remove()


def ids(shape, seed=0):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(seed))


def padded(side):
    tokens, mask = ids((2, 18)), torch.ones(2, 18, dtype=torch.long)
    mask[0, slice(0, 7) if side == "left" else slice(11, 18)] = 0
    return tokens, mask


@pytest.mark.parametrize("family", ["tiny_llama", "sliding"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_what_a_call_says_is_what_the_model_computes(family, side, request):
    model = request.getfixturevalue(family)
    tokens, mask = (ids((2, 18)), None) if side is None else padded(side)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
    found, calls = seen(model, lambda: model(tokens, attention_mask=mask).logits)
    real = torch.ones(2, 18, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert [call.layer for call in calls] == [0, 1, 2]
    assert {call.phase for call in calls} == {"prefill"}
    assert all(call.group == 2 for call in calls)
    if family == "sliding":
        assert [call.window for call in calls] == [5, None, 5]


@pytest.mark.parametrize("family", ["tiny_llama", "sliding"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_same_with_any_cache(family, cache, request):
    model = request.getfixturevalue(family)
    tokens, mask = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def run():
        options["cache_implementation"] = cache
        return model.generate(tokens, **options)

    with torch.no_grad():
        expected = run()
    found, calls = seen(model, run)
    assert found.equal(expected)
    assert sum(call.phase == "decode" for call in calls) == 5 * 3


def test_a_prompt_in_pieces_is_aligned_at_its_end(tiny_llama):
    tokens = ids((2, 17))

    def run():
        first = tiny_llama(tokens[:, :9], use_cache=True)
        return tiny_llama(tokens[:, 9:], past_key_values=first.past_key_values).logits

    found, calls = seen(tiny_llama, run)
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_llama(tokens).logits[:, 9:], rtol=1e-4, atol=1e-5)
    assert calls[-1].query.shape[2] == 8
    assert calls[-1].key.shape[2] == 17


def test_a_prompt_into_a_cache_of_fixed_size_reads_no_empty_places(tiny_llama):
    tokens = ids((1, 11))
    found, calls = seen(
        tiny_llama, lambda: tiny_llama(tokens, past_key_values=StaticCache(tiny_llama.config, max_cache_len=32)).logits
    )
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_llama(tokens).logits, rtol=1e-4, atol=1e-5)
    assert calls[0].key.shape[2] == 11
    assert calls[0].key_mask is None


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders_are_not_causal(kind):
    torch.manual_seed(0)
    if kind == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        model = BertModel(BertConfig(vocab_size=97, **sizes)).eval()
        tokens, mask = padded("right")
        run = lambda: model(tokens, attention_mask=mask).last_hidden_state[mask.bool()]  # noqa: E731
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        model = ViTModel(ViTConfig(image_size=16, patch_size=4, **sizes)).eval()
        images = torch.rand(2, 3, 16, 16)
        run = lambda: model(images).last_hidden_state  # noqa: E731
    with torch.no_grad():
        expected = run()
    found, calls = seen(model, run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not any(call.causal for call in calls)
    assert [call.layer for call in calls] == [0, 1]


def test_a_mask_of_its_own_goes_to_dense_attention(tiny_llama):
    tokens = ids((1, 8))
    special = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    special[..., 5, 2] = False
    with torch.no_grad():
        expected = tiny_llama(tokens, attention_mask=special).logits
    found, calls = seen(tiny_llama, lambda: tiny_llama(tokens, attention_mask=special).logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls == []


@pytest.mark.parametrize("family", ["tiny_llama", "bert"])
def test_a_batch_padded_beyond_its_longest_sequence_is_still_a_call(family, request):
    tokens, mask = ids((2, 18)), torch.ones(2, 18, dtype=torch.long)
    mask[:, 14:], mask[1, 9:] = 0, 0
    if family == "bert":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
        model = BertModel(BertConfig(vocab_size=97, **sizes)).eval()
    else:
        model = request.getfixturevalue(family)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask)[0]
    found, calls = seen(model, lambda: model(tokens, attention_mask=mask)[0])
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert [call.key_mask.equal(mask.bool()) for call in calls] == [True] * 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [lambda mask: mask[..., :3].fill_(False), lambda mask: mask[..., 9, 4].fill_(False)])
def test_a_mask_that_is_changed_in_place_is_read_again(tiny_llama, mode, change):
    tokens = ids((2, 12))
    with mode():
        mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
        expected = [tiny_llama(tokens, attention_mask=mask).logits]
        change(mask)
        expected.append(tiny_llama(tokens, attention_mask=mask).logits)
        mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
        site = AttentionSite(tiny_llama, lambda call: call.dense())
        found = [tiny_llama(tokens, attention_mask=mask).logits]
        change(mask)
        found.append(tiny_llama(tokens, attention_mask=mask).logits)
    site.remove()
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours[:, 3:], theirs[:, 3:], rtol=1e-4, atol=1e-5)


def test_a_mask_for_the_whole_batch_is_one_for_every_sequence(tiny_llama):
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    mask[..., :3] = False
    _, calls = seen(tiny_llama, lambda: tiny_llama(ids((2, 12)), attention_mask=mask))
    assert [call.key_mask.tolist() for call in calls] == [[[False] * 3 + [True] * 9] * 2] * 3


def test_layers_with_and_without_a_window_read_one_mask_each_for_itself(sliding):
    tokens = ids((1, 12))
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    masks = dict.fromkeys(("full_attention", "sliding_attention"), mask)
    with torch.no_grad():
        expected = sliding(tokens, attention_mask=masks).logits
    found, calls = seen(sliding, lambda: sliding(tokens, attention_mask=masks).logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [call.layer for call in calls] == [1]


def test_a_mask_is_parsed_once_for_all_layers_that_ask_the_same(tiny_llama, monkeypatch):
    parsed, parse = [], attention_sites.parse_mask
    monkeypatch.setattr(attention_sites, "parse_mask", lambda *args: parsed.append(args) or parse(*args))
    tokens, mask = padded("left")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            seen(tiny_llama, lambda: tiny_llama(tokens, attention_mask=mask))
    assert len(parsed) == 2


def test_a_mask_that_biases_scores_is_not_taken_for_causality(tiny_llama):
    tokens = ids((1, 8))
    bias = torch.zeros(1, 1, 8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), torch.finfo(torch.float32).min)
    plain, calls = seen(tiny_llama, lambda: tiny_llama(tokens, attention_mask=bias).logits)
    assert len(calls) == 3
    bias[..., 5, 2] = -3.0
    with torch.no_grad():
        expected = tiny_llama(tokens, attention_mask=bias).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
    found, calls = seen(tiny_llama, lambda: tiny_llama(tokens, attention_mask=bias).logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert calls == []


@pytest.mark.parametrize("cached", [False, True])
def test_under_autocast_a_call_is_of_its_dtype(tiny_llama, cached):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            expected = tiny_llama(ids((2, 18)), use_cache=cached).logits
        found, calls = seen(tiny_llama, lambda: tiny_llama(ids((2, 18)), use_cache=cached).logits)
    assert {part.dtype for call in calls for part in (call.query, call.key, call.value)} == {torch.bfloat16}
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_removal_gives_the_model_back_and_only_one_may_be_at_work(tiny_llama):
    before = tiny_llama.config._attn_implementation
    site = AttentionSite(tiny_llama, lambda call: None)
    with pytest.raises(ModelError, match="another attention method"):
        AttentionSite(tiny_llama, lambda call: None)
    site.remove()
    site.remove()
    assert tiny_llama.config._attn_implementation == before


def test_models_without_the_interface_are_refused():
    with pytest.raises(ModelError, match="not a Hugging Face model"):
        AttentionSite(nn.Linear(3, 3), lambda call: None)


def test_dropout_is_refused(tiny_llama):
    tiny_llama.config.attention_dropout = 0.1
    for layer in tiny_llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    site = AttentionSite(tiny_llama.train(), lambda call: None)
    with pytest.raises(ModelError, match="dropout"):
        tiny_llama(ids((1, 4)))
    site.remove()

"""Keys and values that lie elsewhere are brought to the queries where all of them are read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from gossamer.attention import offloaded_decoding
from gossamer.attention.offloaded_decoding import OffloadedDoubleSparsity, OffloadedLayer
from gossamer.models.attention_sites import AttentionCall


def test_fetched_tokens_are_counted_without_padding(tiny_llama):
    tokens = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :15] = 0
    rules = OffloadedDoubleSparsity(tokens=8, channels=4, dense_layers=(), dense_last=False)
    rules.calibrate(tiny_llama, [tokens], progress=False)
    with rules.active(tiny_llama) as installed:
        tiny_llama.generate(tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
        tallies = installed.report().tallies
    for layer in range(3):
        tally = tallies[layer, "decode"]
        assert tally.allowed == (41 + 26) + (42 + 27)
        assert tally.computed == pytest.approx(2 * 2 * 8)


def test_dense_attention_over_keys_that_lie_elsewhere_brings_them_first(tiny_llama, monkeypatch):
    tokens = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    rules = OffloadedDoubleSparsity(tokens=64, channels=4, dense_layers=(0,), dense_last=False, place="host")
    rules.calibrate(tiny_llama, [tokens], progress=False)
    cache, dense, elsewhere = DynamicCache(config=tiny_llama.config), AttentionCall.dense, []

    def checked(call):
        held = cache.layers[call.layer]
        places = {part.untyped_storage().data_ptr() for part in getattr(held, "_memory", None) or ()}
        elsewhere.append(call.key.untyped_storage().data_ptr() in places)
        return dense(call)

    # the processor's memory stands for a device's: bringing is copying
    brought = lambda call: replace(call, key=call.key.clone(), value=call.value.clone())  # noqa: E731
    monkeypatch.setattr(offloaded_decoding, "_here", brought)
    monkeypatch.setattr(AttentionCall, "dense", checked)
    with torch.no_grad(), rules.active(tiny_llama) as installed:
        for first, last in ((0, 30), (30, 50), (50, 51)):  # a prompt, a second piece, and a step that reads all
            found = tiny_llama(tokens[:, first:last], past_key_values=cache).logits
        assert installed.report().density("decode") == 1
    assert [type(layer) is OffloadedLayer for layer in cache.layers] == [False, True, True]
    assert elsewhere == [False] * 9
    with torch.no_grad():
        torch.testing.assert_close(found, tiny_llama(tokens[:, :51]).logits[:, 50:], rtol=1e-4, atol=1e-4)

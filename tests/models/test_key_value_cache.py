"""Keys and values of fixed size: written in place, rewound, and given back."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import tiny_model

from gossamer.errors import ConfigurationError
from gossamer.models.key_value_cache import StaticMemory, rewritable

IDS = torch.tensor([[3, 7, 1, 12, 9, 4, 20]])


def prompt_cache(model, tokens):
    cache = rewritable(transformers.DynamicCache())
    model(IDS[:, :tokens], past_key_values=cache)
    return cache


def read(model, memory, ids):
    positions, mask = memory.places(ids.shape[1])
    out = model(ids, position_ids=positions, attention_mask=mask, past_key_values=memory.cache)
    memory.length += ids.shape[1]
    return out.logits


@torch.no_grad()
def test_tokens_are_read_over_what_was_there_and_memory_never_moves():
    model = tiny_model()
    expected = model(IDS).logits
    memory = StaticMemory(2, 16)
    memory.fill(prompt_cache(model, 4))
    addresses = [layer.keys.data_ptr() for layer in memory.cache.layers]
    read(model, memory, IDS[:, :3])  # a wrong turn, which is taken back
    memory.rewind(4)
    torch.testing.assert_close(read(model, memory, IDS[:, 4:]), expected[:, 4:])
    memory.rewind(5)
    torch.testing.assert_close(read(model, memory, IDS[:, 5:6]), expected[:, 5:6])
    memory.fill(prompt_cache(model, 2))
    assert memory.length == 2
    torch.testing.assert_close(read(model, memory, IDS[:, 2:]), expected[:, 2:])
    assert [layer.keys.data_ptr() for layer in memory.cache.layers] == addresses


@torch.no_grad()
def test_a_growing_cache_gets_the_tokens_that_it_does_not_have():
    model = tiny_model()
    cache, whole = prompt_cache(model, 3), prompt_cache(model, 6)
    memory = StaticMemory(2, 16)
    memory.fill(cache)
    read(model, memory, IDS[:, 3:])
    memory.rewind(6)  # the last of them does not count
    memory.append_to(cache)
    for ours, theirs in zip(cache.layers, whole.layers):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
    before = cache.layers[0].keys.clone()
    memory.rewind(3)
    read(model, memory, IDS[:, :3])
    assert torch.equal(cache.layers[0].keys, before)  # a copy, no view


def test_places_are_positions_and_what_each_token_sees():
    memory = StaticMemory(1, 5)
    cache = rewritable(transformers.DynamicCache())
    cache.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    memory.fill(cache)
    positions, mask = memory.places(2)
    assert positions.tolist() == [[2, 3]]
    assert (mask[0, 0] == 0).int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert mask.min() == torch.finfo(torch.float32).min


def test_a_text_that_is_too_long_is_refused():
    cache = rewritable(transformers.DynamicCache())
    cache.update(torch.ones(1, 1, 6, 4), torch.ones(1, 1, 6, 4), 0)
    with pytest.raises(ConfigurationError, match="6 tokens do not fit into a static cache of 5"):
        StaticMemory(1, 5).fill(cache)

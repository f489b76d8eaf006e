"""Quest: pages are those of the cache that is read, whatever happens to it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from gossamer.attention.page_cache import PagedLayer, Pages
from gossamer.attention.quest import Quest


def ids(*shape, seed=0):
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


def keys(count, seed=0, batch=2):
    return torch.randn(batch, 2, count, 5, generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    assert (found.tokens, found.size) == (expected.tokens, expected.size)
    return torch.equal(found.low, expected.low) and torch.equal(found.high, expected.high)


@pytest.fixture
def watched(tiny_llama):
    """A method, its model, and of every step whether the bounds it used are those of the keys it read."""
    method, right = Quest(token_budget=8, page_size=4), []
    bounds = method._bounds

    def check(call):
        found = bounds(call)
        right.append(same(found, Pages.of(call.key, 4)))
        return found

    method._bounds = check
    with torch.no_grad(), method.active(tiny_llama):
        yield tiny_llama, right


@pytest.mark.parametrize("pieces", [(7, 1, 1, 1, 1, 9), (8, 3, 8, 1), (1, 1, 2, 5, 4)])
def test_pages_grow_by_any_number_of_keys(pieces):
    whole = keys(sum(pieces))
    parts = whole.split(pieces, 2)
    pages = Pages.of(parts[0], 4)
    for part in parts[1:]:
        pages = pages.extended(part)
    assert same(pages, Pages.of(whole, 4))
    assert pages.low[0, 1, 1, 3] == whole[0, 1, 4:8, 3].min()


def test_a_layer_keeps_its_bounds_through_everything_that_happens_to_a_cache():
    layer = PagedLayer(keys(11), keys(11), 4)
    for change in (
        lambda: layer.update(keys(1, 1), keys(1, 1)),
        lambda: layer.reorder_cache(torch.tensor([1, 1])),
        lambda: layer.crop(-3),
        lambda: layer.batch_repeat_interleave(2),
        lambda: layer.update(keys(6, 2, 4), keys(6, 2, 4)),
        lambda: layer.batch_select_indices(torch.tensor([2, 0])),
        lambda: layer.update(keys(1, 3), keys(1, 3)),
    ):
        change()
        assert same(layer.pages, Pages.of(layer.keys, 4))
    layer.reset()
    layer.update(keys(6), keys(6))
    assert same(layer.pages, Pages.of(keys(6), 4))


@pytest.mark.parametrize("beams", [1, 3])
def test_bounds_follow_the_beams(watched, beams):
    model, right = watched
    model.generate(ids(2, 40), num_beams=beams, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert right == [True] * 11 * 3


def test_two_caches_may_be_decoded_in_turns(watched):
    model, right = watched
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for seed, cache in enumerate(caches):
        model(ids(1, 40, seed=seed), past_key_values=cache)
    for step in range(6):
        for cache in caches:
            model(ids(1, 1, seed=step), past_key_values=cache)
    assert right == [True] * 2 * 6 * 3
    assert all(type(layer) is PagedLayer for cache in caches for layer in cache.layers)


def test_tokens_may_be_taken_back_and_caches_may_be_of_another_kind(watched):
    model, right = watched
    model.generate(
        ids(1, 40), assistant_model=model, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    cache = StaticCache(model.config, max_cache_len=64)
    model(ids(1, 40), past_key_values=cache)
    model(ids(1, 1), past_key_values=cache)
    assert right == [True] * len(right)
    assert len(right) >= 3


def test_two_page_sizes_may_read_one_cache(tiny_llama):
    cache, whole = DynamicCache(config=tiny_llama.config), ids(1, 42)
    with torch.no_grad():
        expected = tiny_llama(whole).logits[:, -1]
        with Quest(token_budget=8, page_size=4).active(tiny_llama):
            tiny_llama(whole[:, :40], past_key_values=cache)
            tiny_llama(whole[:, 40:41], past_key_values=cache)
        with Quest(token_budget=42, page_size=2).active(tiny_llama):
            tiny_llama.forward(whole[:, 41:], past_key_values=cache)
        assert cache.layers[1].pages.size == 4  # all is read: no bounds are asked for
        cache.crop(-1)
        with Quest(token_budget=40, page_size=1).active(tiny_llama):
            found = tiny_llama(whole[:, 41:], past_key_values=cache).logits[:, -1]
        assert cache.layers[1].pages.size == 1
    assert not torch.equal(found, expected)


def test_a_prompt_in_inference_mode_may_be_decoded_outside(tiny_llama):
    method, tokens = Quest(token_budget=8, page_size=4), ids(1, 44)
    logits = []
    for mode in (torch.no_grad, torch.inference_mode):
        with method.active(tiny_llama):
            cache = DynamicCache(config=tiny_llama.config)
            with mode():
                tiny_llama(tokens[:, :40], past_key_values=cache)
                tiny_llama(tokens[:, 40:41], past_key_values=cache)
            with torch.no_grad():
                found = [tiny_llama(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(41, 44)]
        logits.append(torch.cat(found))
    assert torch.equal(*logits)

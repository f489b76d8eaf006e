"""Training-free methods of the frontier: what they select, what they evict, and that nothing is lost at full budget."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from gossamer.attention.ada_snap_kv import AdaSnapKV
from gossamer.attention.base import AttentionCall
from gossamer.attention.block_sparse import BlockSparse
from gossamer.attention.eviction import EvictedLayer, cache_bytes
from gossamer.attention.flex_prefill import FlexPrefill
from gossamer.attention.last_queries import diagonal_sums, last_query_weights, strips
from gossamer.attention.quest import Quest
from gossamer.attention.snap_kv import SnapKV
from gossamer.attention.vertical_slash import VerticalSlash, line_weights
from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError
from gossamer.methods import method

NAMES = ("vertical-slash", "block-sparse", "flex-prefill", "quest", "snap-kv", "ada-snap-kv")


def call(batch=1, heads=4, shared=2, queries=40, keys=40, size=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, count, length, size, generator=generator)
        for count, length in ((heads, queries), (shared, keys), (shared, keys))
    )
    return AttentionCall(0, query, key, value, size**-0.5, **options)


def dense_weights(made: AttentionCall) -> torch.Tensor:
    key = made.key.repeat_interleave(made.group, 1)
    scores = (made.query @ key.mT) * made.scale
    return scores.masked_fill(~made.links(), float("-inf")).softmax(-1)


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 48), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_registered_under_the_paper(name):
    spec = method(name)
    assert (spec.paper, spec.when, spec.room) == ("sparse-frontier", "at inference", "attention")


class TestLastQueries:
    def test_their_weights_are_those_of_dense_attention(self):
        made = call(queries=10, keys=23)
        assert torch.allclose(last_query_weights(made, 6), dense_weights(made)[:, :, -6:], atol=1e-6)

    def test_padding_gets_no_weight(self):
        real = torch.ones(1, 40, dtype=torch.bool)
        real[:, :7] = False
        weights = last_query_weights(call(key_mask=real), 5)
        assert weights[..., :7].eq(0).all()
        assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 5))

    def test_diagonals_are_summed_by_distance(self):
        weights = torch.rand(2, 3, 5, 11)
        found = diagonal_sums(weights)
        for distance in range(11):
            wanted = sum(weights[:, :, row, 6 + row - distance] for row in range(5) if 6 + row - distance >= 0)
            assert torch.allclose(found[..., distance], torch.as_tensor(wanted), atol=1e-6)

    @pytest.mark.parametrize(("queries", "keys", "block"), [(40, 40, 8), (37, 37, 8), (10, 23, 4), (9, 9, 16)])
    def test_strips_hold_exactly_what_columns_and_diagonals_touch(self, queries, keys, block):
        made = call(queries=queries, keys=keys)
        generator = torch.Generator().manual_seed(1)
        columns = torch.rand(1, 4, keys, generator=generator) < 0.1
        diagonals = torch.rand(1, 4, keys, generator=generator) < 0.1
        found = strips(made, columns, diagonals, block)
        shift = keys - queries
        for row in range(found.grid[0]):
            for key in range(keys):
                places = [shift + q for q in range(row * block, (row + 1) * block)]
                touched = torch.stack(
                    [diagonals[..., p - key] for p in places if 0 <= p - key < keys] or [columns[..., key]]
                )
                wanted = (touched.any(0) | columns[..., key]) & found.allowed[row, key]
                assert torch.equal(found.blocks[:, :, row, key], wanted)


class TestVerticalSlash:
    def test_it_finds_the_column_and_the_diagonal_that_are_there(self):
        made = call(heads=1, shared=1, queries=64, keys=64, size=4, seed=5)
        made.query.mul_(0.01)
        made.key.mul_(0.01)
        made.query[..., 0] = 3.0
        made.key[:, :, 21, 0] = 9.0  # a key that everybody looks at
        mask = VerticalSlash(vertical_size=1, slash_size=1, sinks=0, local=1, block_size=1, approximation=8).prefill(
            made
        )
        wanted = torch.eye(64, dtype=torch.bool)
        wanted[21:, 21] = True
        assert torch.equal(mask.to_dense()[0, 0], wanted)

    def test_sinks_and_main_diagonals_are_always_read(self):
        dense = VerticalSlash(density=0.4, sinks=2, local=3, block_size=2).prefill(call()).to_dense()
        places = torch.arange(40)
        near = (places[:, None] - places >= 0) & (places[:, None] - places < 3)
        assert dense[..., near].all()
        assert dense[:, :, 2:, :2].all()

    @pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
    def test_a_density_is_filled_by_every_head_and_not_exceeded(self, density):
        made = call(batch=2, queries=64, keys=64)
        found = VerticalSlash(density=density, sinks=1, local=1, block_size=1, approximation=16).prefill(made).densities
        assert (found <= density).all()
        assert (found > density - 2 * 64 / (64 * 65 / 2)).all()  # a column and a diagonal more would be too many

    def test_padding_on_the_left_moves_the_sinks(self):
        real = torch.ones(1, 40, dtype=torch.bool)
        real[:, :9] = False
        mask = VerticalSlash(vertical_size=2, slash_size=1, sinks=2, local=1, block_size=1).prefill(call(key_mask=real))
        assert mask.to_dense()[:, :, 12:, 9:11].all()
        assert not mask.to_dense()[:, :, 12:, :9].any()


class TestFlexPrefill:
    def test_heads_with_spread_attention_get_more(self):
        made = call(heads=2, shared=2, queries=64, keys=64, size=8)
        made.query[:, 0] = 0.0  # looks at everything equally
        made.query[:, 1, :, 0] = 4.0
        made.key[:, 1, 5, 0] = 20.0  # and this head at one key
        columns, _ = line_weights(made, 8)
        assert FlexPrefill(alpha=0.5, min_budget=1)._count(columns)[0, :, 0].tolist() == [31, 1]

    def test_counts_are_the_fewest_that_reach_the_share(self):
        shares = torch.tensor([[[0.5, 0.1, 0.3, 0.1]]])
        counts = [int(FlexPrefill(alpha=alpha, min_budget=1)._count(shares)) for alpha in (0.4, 0.5, 0.6, 0.85)]
        assert counts == [1, 1, 2, 3]
        assert int(FlexPrefill(alpha=0.4, min_budget=3)._count(shares)) == 3

    def test_a_share_of_one_is_dense(self):
        assert FlexPrefill(alpha=1.0).prefill(call()) is None


class TestBlockSparse:
    def test_rows_read_the_blocks_whose_mean_agrees_best(self):
        made = call(heads=1, shared=1, queries=80, keys=80)
        mask = BlockSparse(chunk_size=8, top_chunks=4).prefill(made)
        means = made.query.unflatten(2, (10, 8)).mean(3), made.key.unflatten(2, (10, 8)).mean(3)
        scores = (means[0] @ means[1].mT)[0, 0]
        for row in range(10):
            forced = {0, row, row - 1} & set(range(row + 1))
            rest = sorted(set(range(row + 1)) - forced, key=lambda block: -float(scores[row, block]))
            wanted = forced | set(rest[: 4 - len(forced)])
            assert set(mask.blocks[0, 0, row].nonzero().flatten().tolist()) == wanted

    def test_short_prompts_are_dense(self):
        assert BlockSparse(chunk_size=8, top_chunks=5).prefill(call()) is None


class TestQuest:
    def test_page_scores_choose_the_pages_with_the_best_corner(self):
        made = call(heads=2, shared=1, queries=1, keys=37)
        chosen = Quest(page_size=4, token_budget=12).decode(made)
        pages = made.key[0, 0, :36].unflatten(0, (9, 4))
        low, high = pages.amin(1), pages.amax(1)
        query = made.query[0, :, 0]
        scores = torch.maximum(query[:, None] * low, query[:, None] * high).sum(-1).sum(0)
        best = scores.topk(3).indices.sort().values
        wanted = [int(page) * 4 + i for page in best for i in range(4)] + [36]
        assert chosen.indices[0, 0].tolist() == wanted

    def test_bounds_that_grow_token_by_token_are_those_made_at_once(self):
        made = call(queries=1, keys=50)
        quest = Quest(page_size=8, token_budget=16)
        for keys in range(40, 51):
            part = AttentionCall(0, made.query, made.key[:, :, :keys], made.value[:, :, :keys], made.scale)
            grown = quest.decode(part)
            assert torch.equal(grown.indices, Quest(page_size=8, token_budget=16).decode(part).indices)

    def test_a_context_of_few_pages_is_read_whole(self):
        assert Quest(page_size=8, token_budget=40).decode(call(queries=1, keys=41)) is None

    def test_padding_is_not_read(self):
        real = torch.ones(1, 50, dtype=torch.bool)
        real[:, :13] = False
        found = Quest(page_size=8, token_budget=24).decode(call(queries=1, keys=50, key_mask=real))
        for head in range(2):
            read = found.indices[0, head, : found.counts[0, head]]
            assert (read >= 13).all()
            assert len(set(read.tolist())) == len(read)


def cached(model, method, ids, **options):
    """The cache after a prompt, and the report."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), method.active(model) as installed:
        model(input_ids=ids, past_key_values=cache, **options)
        output = model(input_ids=ids[:, -1:], past_key_values=cache).logits
    return cache, installed.report(), output


class TestEviction:
    @pytest.mark.parametrize("factory", [SnapKV, AdaSnapKV])
    def test_a_capacity_that_holds_all_changes_nothing(self, tiny_llama, ids, factory):
        plain = DynamicCache(config=tiny_llama.config)
        with torch.no_grad():
            tiny_llama(input_ids=ids, past_key_values=plain)
            wanted = tiny_llama(input_ids=ids[:, -1:], past_key_values=plain).logits
        cache, _, found = cached(tiny_llama, factory(token_capacity=48, local_window=4), ids)
        assert torch.equal(found, wanted)
        assert cache_bytes(cache) == cache_bytes(plain)

    def test_memory_falls_to_the_capacity(self, tiny_llama, ids):
        whole, _, _ = cached(tiny_llama, SnapKV(token_capacity=48, local_window=4), ids)
        cache, report, _ = cached(tiny_llama, SnapKV(token_capacity=12, local_window=4, approximation=8), ids)
        assert cache_bytes(cache) == cache_bytes(whole) * 13 / 49  # twelve of the prompt and one decoded
        assert report.density("decode") == pytest.approx(13 / 49)
        assert cache.get_seq_length() == 49

    def test_ada_shares_one_budget_and_stores_as_wide_as_the_widest_head(self, tiny_llama, ids):
        cache, report, _ = cached(
            tiny_llama, AdaSnapKV(token_capacity=12, local_window=2, sinks=1, approximation=8), ids
        )
        for layer in cache.layers:
            assert isinstance(layer, EvictedLayer)
            assert (layer.counts.sum(1) == 12 * 2).all()
            assert (layer.counts >= 3).all()
            assert layer.keys.shape[2] == int(layer.counts.max()) + 1
        assert any(len(set(layer.counts.flatten().tolist())) > 1 for layer in cache.layers)
        assert report.density("decode") == pytest.approx(13 / 49)

    def test_decoding_is_attention_over_what_each_head_kept(self):
        made = call(batch=2, queries=30, keys=30)
        kept = torch.rand(2, 2, 30, generator=torch.Generator().manual_seed(2)) < 0.4
        layer = EvictedLayer(made.key, made.value, kept)
        new = call(batch=2, queries=1, keys=1, seed=9)
        layer.update(new.key, new.value)
        snap = SnapKV()
        snap.cache = lambda: DynamicCacheOf(layer)
        one = AttentionCall(0, new.query, layer.keys, layer.values, made.scale)
        found = snap.attend(one)
        key, value = torch.cat([made.key, new.key], 2), torch.cat([made.value, new.value], 2)
        links = torch.cat([kept, torch.ones(2, 2, 1, dtype=torch.bool)], 2).repeat_interleave(2, 1)[:, :, None]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            new.query, key, value, links, scale=made.scale, enable_gqa=True
        )
        assert torch.allclose(found.output, wanted, atol=1e-6)
        assert found.density == pytest.approx(float((kept.sum(-1) + 1).double().mean()) / 31)

    def test_snap_kv_keeps_what_the_last_queries_look_at(self):
        made = call(heads=2, shared=1, queries=40, keys=40, size=4)
        made.query.mul_(0.01)
        made.query[..., 0] = 3.0
        made.key.mul_(0.01)
        made.key[:, :, 17, 0] = 9.0
        kept = SnapKV(token_capacity=6, kernel_size=1, sinks=1, local_window=4, approximation=8).kept(made)[0, 0]
        assert kept.nonzero().flatten().tolist() == [0, 17, 36, 37, 38, 39]

    def test_generation_goes_on_at_the_right_position(self, tiny_llama, ids):
        seen = []
        handle = tiny_llama.model.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["position_ids"].flatten().tolist()), with_kwargs=True
        )
        with SnapKV(token_capacity=12, local_window=4).active(tiny_llama):
            tiny_llama.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        handle.remove()
        assert [positions[-1] for positions in seen] == [47, 48, 49]

    def test_padding_is_evicted_before_anything_else(self, tiny_llama, ids):
        mask = torch.ones_like(ids)
        mask[1, :20] = 0
        padded = ids.clone()
        padded[1, :20] = 0
        with torch.no_grad(), SnapKV(token_capacity=40, local_window=4).active(tiny_llama):
            found = tiny_llama.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)[
                1
            ]
            alone = tiny_llama.generate(ids[1:, 20:], max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
        assert found[48:].tolist() == alone[28:].tolist()

    def test_a_second_part_of_a_prompt_is_refused(self, tiny_llama, ids):
        cache = DynamicCache(config=tiny_llama.config)
        with torch.no_grad(), SnapKV(token_capacity=12, local_window=4).active(tiny_llama):
            tiny_llama(input_ids=ids, past_key_values=cache)
            with pytest.raises(ConfigurationError, match="one by one"):
                tiny_llama(input_ids=ids[:, :5], past_key_values=cache)

    def test_the_model_is_itself_again_afterwards(self, tiny_llama, ids):
        with torch.no_grad():
            before = tiny_llama(input_ids=ids).logits
            with SnapKV(token_capacity=12, local_window=4).active(tiny_llama):
                tiny_llama(input_ids=ids)
            cache = DynamicCache(config=tiny_llama.config)
            assert torch.equal(tiny_llama(input_ids=ids, past_key_values=cache).logits, before)
        assert not any(isinstance(layer, EvictedLayer) for layer in cache.layers)


class DynamicCacheOf:
    """Just the layers of a cache."""

    def __init__(self, *layers):
        self.layers = list(layers)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (VerticalSlash, {"density": 0.0}, "density is 0.0"),
        (VerticalSlash, {"vertical_size": 0}, "vertical_size is 0"),
        (VerticalSlash, {"local": 0}, "local is 0"),
        (FlexPrefill, {"alpha": 1.5}, "alpha is 1.5"),
        (FlexPrefill, {"min_budget": 0}, "min_budget is 0"),
        (BlockSparse, {"chunk_size": 4}, "chunk_size is 4"),
        (BlockSparse, {"top_chunks": 2}, "top_chunks is 2"),
        (Quest, {"token_budget": 17}, "token_budget is 17"),
        (SnapKV, {"token_capacity": 100}, "token_capacity is 100"),
        (SnapKV, {"kernel_size": 6}, "kernel_size is 6"),
        (AdaSnapKV, {"min_head_capacity_ratio": 0.0}, "min_head_capacity_ratio is 0.0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(factory, options, message):
    with pytest.raises(ConfigurationError, match=message):
        factory(**options)


@pytest.mark.parametrize("factory", [FlexPrefill, VerticalSlash, BlockSparse])
def test_a_sequence_without_tokens_is_refused(factory):
    empty = torch.zeros(1, 2, 0, 8)
    with pytest.raises(ConfigurationError, match="0 queries and 0 keys; there must be at least one"):
        factory()(empty, empty, empty)


@pytest.mark.parametrize(
    "made",
    [
        VerticalSlash(vertical_size=40, slash_size=40),
        BlockSparse(chunk_size=8, top_chunks=5),
        FlexPrefill(alpha=1.0),
        VerticalSlash(density=1.0),
    ],
)
def test_a_full_budget_is_dense_attention(made):
    given = call()
    answer = made.attend(given)
    found = given.dense() if answer is None else answer.output
    assert torch.allclose(found, given.dense(), atol=1e-6)
    assert answer is None or answer.density == 1


def test_sparse_attention_is_exact_over_the_mask():
    given = call()
    mask = VerticalSlash(density=0.5, sinks=1, local=1, block_size=1).prefill(given)
    links = mask.to_dense()
    wanted = torch.nn.functional.scaled_dot_product_attention(
        given.query, given.key, given.value, links, scale=given.scale, enable_gqa=True
    )
    found = VerticalSlash(density=0.5, sinks=1, local=1, block_size=1)(
        given.query, given.key, given.value, is_causal=True
    )
    assert torch.allclose(found, wanted, atol=1e-5)
    assert isinstance(mask, BlockMask)

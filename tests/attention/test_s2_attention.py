"""S2-Attention: its patterns, the module against dense masks, its place in models, and what its cache frees."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.attention.s2_attention import LocalStridePattern, S2Attention, S2Cache, SparseAttention
from gossamer.attention.s2_pattern import common_and_rest, split_tiles
from gossamer.errors import ConfigurationError, ModelError
from gossamer.models.attention_sites import AttentionCall

patterns = st.builds(
    lambda groups, kv, local, stride, dense, same, offset: LocalStridePattern(
        groups * kv, kv, local, stride, min(dense, kv), same, offset
    ),
    groups=st.integers(1, 3),
    kv=st.integers(1, 6),
    local=st.integers(1, 4),
    stride=st.integers(1, 9),
    dense=st.integers(0, 2),
    same=st.booleans(),
    offset=st.integers(0, 5),
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(q, k, v, links):
    return scaled_dot_product_attention(q, k, v, links, enable_gqa=q.shape[1] != k.shape[1])


# ------------------------------------------------------------------------------------------------------- patterns


@settings(max_examples=60, deadline=None)
@given(pattern=patterns, count=st.integers(1, 20))
def test_a_block_is_read_by_the_published_rule(pattern, count):
    blocks = pattern.mask(count * 16, 16).blocks[0]
    sparse = pattern.kv_heads - pattern.num_dense_heads
    step = max(1, pattern.vert_stride // max(1, sparse))
    for head in range(pattern.num_heads):
        shared = head // (pattern.num_heads // pattern.kv_heads)
        for i in range(count):
            for j in range(count):
                shift = 0 if pattern.homogeneous else shared * step
                striped = (j + shift + pattern.offset) % pattern.vert_stride == 0
                expected = j <= i and (i - j < pattern.local_blocks or striped or shared >= sparse)
                assert bool(blocks[head, i, j]) == expected


@settings(max_examples=60, deadline=None)
@given(pattern=patterns, count=st.integers(1, 30))
def test_blocks_never_come_back_and_the_cache_holds_what_is_read(pattern, count):
    mask = pattern.mask(count * 16, 16)
    assert mask.is_cache_efficient
    kept = pattern.kept_blocks(count - 1)
    group = pattern.num_heads // pattern.kv_heads
    for head, blocks in enumerate(kept):
        assert mask.blocks[0, head * group, -1].nonzero().flatten().tolist() == blocks


@settings(max_examples=60, deadline=None)
@given(pattern=patterns)
def test_heads_together_read_everything_where_the_pattern_says_so(pattern):
    count = 2 * pattern.vert_stride + pattern.local_blocks + 3
    assert pattern.is_union_complete == pattern.mask(count * 16, 16).is_union_complete


def test_as_many_heads_as_strides_are_union_complete_and_grouped_queries_do_not_count():
    assert LocalStridePattern(8, None, 1, 8).is_union_complete
    assert LocalStridePattern(8, 4, 1, 4).is_union_complete
    assert not LocalStridePattern(8, 4, 1, 8).is_union_complete
    assert LocalStridePattern(8, 4, 1, 8, num_dense_heads=1).is_union_complete
    assert not LocalStridePattern(8, None, 1, 8, homogeneous=True).is_union_complete


def test_more_strides_than_heads_are_spread_by_steps():
    assert LocalStridePattern(4, None, 1, 16).stripes == [0, 12, 8, 4]


def test_the_density_is_that_of_the_formula():
    count, local, stride = 512, 1, 16
    blocks = LocalStridePattern(16, None, local, stride).mask(count * 64, 64).blocks
    a_row = float(blocks.sum()) / (16 * count)
    assert a_row == pytest.approx(local + (count - 1) / (2 * stride), abs=0.5)


@settings(max_examples=40, deadline=None)
@given(pattern=patterns, length=st.integers(1, 200))
def test_the_last_token_reads_the_tokens_of_its_row(pattern, length):
    links = pattern.mask(length, 16).to_dense()[0]
    indices, counts = pattern.tokens(length, 16)
    for head in range(pattern.kv_heads):
        row = links[head * (pattern.num_heads // pattern.kv_heads), -1].nonzero().flatten()
        assert sorted(indices[head, : counts[head]].tolist()) == row.tolist()


@settings(max_examples=40, deadline=None)
@given(pattern=patterns, count=st.integers(1, 12), factor=st.integers(1, 4))
def test_split_and_common_tiles_are_the_same_links(pattern, count, factor):
    mask = pattern.mask(count * 16 - 3, 16)
    assert torch.equal(split_tiles(mask, 8, 4).to_dense(), mask.to_dense())
    common, rest = common_and_rest(mask, factor)
    assert torch.equal(common.to_dense() | rest.to_dense(), mask.to_dense())
    assert not bool((common.to_dense() & rest.to_dense()).any())


# --------------------------------------------------------------------------------------------------------- module


@settings(max_examples=25, deadline=None)
@given(
    pattern=patterns,
    length=st.integers(1, 70),
    past=st.integers(0, 60),
    tile=st.sampled_from([(None, None), (16, 16), (64, None), (32, 16)]),
)
def test_the_module_is_dense_attention_under_the_mask(pattern, length, past, tile):
    keys = length + past
    q, k = draw(2, pattern.num_heads, length, 4), draw(2, pattern.kv_heads, keys, 4, seed=1)
    v = draw(2, pattern.kv_heads, keys, 6, seed=2)
    block = 32 if tile[1] else 16
    attention = SparseAttention(block, pattern, block_m=tile[0], block_n=tile[1])
    links = pattern.mask(keys, block).to_dense()[:, :, past:]
    torch.testing.assert_close(attention(q, k, v), dense(q, k, v, links))


@pytest.mark.parametrize("block_m", [None, 64])
def test_gradients_are_those_of_dense_masked_attention(block_m):
    pattern = LocalStridePattern(4, 2, 1, 3)
    attention = SparseAttention(16, pattern, block_m=block_m)
    inputs = [draw(1, 4, 75, 4), draw(1, 2, 75, 4, seed=1), draw(1, 2, 75, 4, seed=2)]
    weight = draw(1, 4, 75, 4, seed=3)
    grads = []
    for function in (attention, lambda *x: dense(*x, pattern.mask(75, 16).to_dense())):
        leaves = [part.clone().requires_grad_() for part in inputs]
        (function(*leaves) * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)


def test_tokens_may_be_dimension_one():
    pattern = LocalStridePattern(2, None, 1, 2)
    q, k, v = draw(3, 1, 2, 40, 4)
    swapped = [part.transpose(1, 2) for part in (q, k, v)]
    first, second = SparseAttention(16, pattern, seq_dim=1)(*swapped), SparseAttention(16, pattern)(q, k, v)
    torch.testing.assert_close(first.transpose(1, 2), second)


def test_padding_on_either_side_changes_nothing():
    attention = SparseAttention(16, LocalStridePattern(2, None, 1, 2))
    q, k, v = draw(3, 2, 2, 70, 4)
    left = attention(q, k, v, left_paddings=torch.tensor([0, 23]))
    right = attention(q, k, v, seqlens=torch.tensor([70, 47]))
    torch.testing.assert_close(left[:1], attention(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(left[1:, :, 23:], attention(q[1:, :, 23:], k[1:, :, 23:], v[1:, :, 23:]))
    torch.testing.assert_close(right[1:, :, :47], attention(q[1:, :, :47], k[1:, :, :47], v[1:, :, :47]))
    assert (left[1, :, :23] == 0).all()
    assert (right[1, :, 47:] == 0).all()


def test_packed_sequences_do_not_see_each_other_and_may_have_a_past():
    attention = SparseAttention(16, LocalStridePattern(2, 1, 1, 2))
    k, v = draw(2, 90, 1, 4)
    q = draw(63, 2, 4, seed=1)
    starts_q, starts_k = torch.tensor([0, 33, 33, 63]), torch.tensor([0, 33, 40, 90])
    got = attention(q, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k)

    def alone(queries, keys):
        parts = [part.transpose(0, 1)[None] for part in (q[queries], k[keys], v[keys])]
        return attention(*parts)[0].transpose(0, 1)

    torch.testing.assert_close(got[:33], alone(slice(0, 33), slice(0, 33)))
    torch.testing.assert_close(got[33:], alone(slice(33, 63), slice(40, 90)))


def test_processes_may_hold_a_range_of_the_heads():
    pattern = LocalStridePattern(4, None, 1, 4)
    q, k, v = draw(3, 1, 4, 70, 4)
    whole = SparseAttention(16, pattern)(q, k, v)
    part = SparseAttention(16, pattern, head_range=(1, 3))(q[:, 1:3], k[:, 1:3], v[:, 1:3])
    torch.testing.assert_close(part, whole[:, 1:3])


def test_patterns_of_ones_own_are_checked():
    blocks = torch.eye(4, dtype=torch.bool)
    blocks[2, 0] = True
    with pytest.warns(UserWarning, match="cannot be freed"):
        attention = SparseAttention(16, blocks)
    assert not attention.is_kv_cache_efficient
    assert not attention.is_union_complete
    q, k, v = draw(3, 1, 2, 50, 4)
    links = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:50, :50].tril()
    torch.testing.assert_close(attention(q, k, v), dense(q, k, v, links))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseAttention(16, torch.ones(4, 4).tril())
    for wrong, said in (
        (torch.ones(4, 4, dtype=torch.bool), "head 0 reads block 1 from block 0"),
        (torch.ones(4, 3), "as many rows as columns"),
        (torch.ones(2, 2).tril(-1), "block 0 of head 0 reads nothing"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            SparseAttention(16, wrong)
    with pytest.raises(ConfigurationError, match="4 blocks of 16"):
        attention(*draw(3, 1, 2, 65, 4))


def test_bad_input_is_refused():
    pattern = LocalStridePattern(2)
    for make, said in (
        (lambda: LocalStridePattern(4, None, 0, 2), "local_blocks is 0"),
        (lambda: LocalStridePattern(4, None, 1, 0), "vert_stride is 0"),
        (lambda: LocalStridePattern(4, 3), "multiple"),
        (lambda: LocalStridePattern(4, 2, num_dense_heads=3), "num_dense_heads is 3"),
        (lambda: pattern.mask(100, 16, past=10), "past 10"),
        (lambda: SparseAttention(24, pattern), "block_size is 24"),
        (lambda: SparseAttention(16, pattern, block_n=32), "block_n is 32"),
        (lambda: SparseAttention(16, pattern, seq_dim=0), "seq_dim is 0"),
        (lambda: SparseAttention(16, pattern, head_range=(1, 3)), "head_range"),
        (lambda: SparseAttention(16, pattern)(*draw(3, 1, 3, 20, 4)), "3 heads, the pattern 2"),
        (lambda: SparseAttention(16, pattern)(draw(1, 2, 9, 4), *draw(2, 1, 2, 8, 4)), "9 queries but 8 keys"),
        (lambda: SparseAttention(16, pattern)(*draw(3, 9, 2, 4)), "4 dimensions"),
        (
            lambda: SparseAttention(16, pattern)(*draw(3, 9, 2, 4), cu_seqlens_q=torch.tensor([0, 8])),
            "rise from 0 to 9",
        ),
        (
            lambda: SparseAttention(16, pattern)(*draw(3, 1, 2, 9, 4), left_paddings=torch.tensor([10])),
            "between 0 and 9",
        ),
        (lambda: S2Attention(dense_period=0), "dense_period is 0"),
        (lambda: S2Attention(vert_stride=0), "vert_stride is 0"),
        (lambda: S2Attention(block_size=0), "block_size is 0"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            make()


# --------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 50}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval().double()


METHOD = {"block_size": 4, "local_blocks": 2, "vert_stride": 3, "dense_layers": (0,), "num_dense_heads": 1}


def tokens(batch, length, seed=0):
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_model_reads_by_the_pattern_and_is_left_as_it_was(llama):
    ids = tokens(2, 41)
    method = S2Attention(**METHOD)
    before = llama(ids).logits
    seen = []

    def check(call):
        answer = S2Attention.attend(method, call)
        if answer is not None:
            seen.append(call.layer)
            links = method.pattern(6, 3).mask(41, 4).to_dense()
            torch.testing.assert_close(answer.output, dense(call.query, call.key, call.value, links))
        return answer

    method.attend = check
    with method.active(llama) as installed, torch.no_grad():
        llama(ids)
    assert seen == [1, 2]
    assert installed.report().layers("prefill")[0] == 1
    expected = method.pattern(6, 3).mask(41, 4).density
    assert installed.report().layers("prefill")[1] == pytest.approx(expected)
    torch.testing.assert_close(llama(ids).logits, before)


def test_a_model_trains_with_the_pattern(llama):
    ids = tokens(1, 30)
    with S2Attention(**METHOD).active(llama):
        llama(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in llama.parameters())
    llama.zero_grad()


def test_left_padding_does_not_shift_the_shards(llama):
    ids = tokens(2, 30)
    mask = torch.arange(30) >= torch.tensor([[0], [7]])
    with S2Attention(**METHOD).active(llama), torch.no_grad():
        both = llama(ids, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        alone = llama(ids[1:, 7:]).logits
    torch.testing.assert_close(both[1:, 7:], alone)


@pytest.mark.parametrize("cached", ["all", "shards"])
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_gives_what_the_whole_sequence_gives(llama, cached, padded):
    ids = tokens(2, 60)
    mask = torch.arange(60) >= (torch.tensor([[0], [5]]) if padded else torch.zeros(2, 1))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    method = S2Attention(**METHOD)
    with method.active(llama), torch.no_grad():
        whole = llama(ids, attention_mask=mask.long(), position_ids=positions).logits
        cache = S2Cache(method, 3, mask[:, :17] if padded else None) if cached == "shards" else None
        got, places = [], [0, 17, 18, 29, *range(30, 61)]  # a prompt, a token, a piece, and then token by token
        for begin, end in itertools.pairwise(places):
            out = llama(
                ids[:, begin:end],
                attention_mask=mask[:, :end].long() if padded else None,
                position_ids=positions[:, begin:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            got.append(out.logits)
    real = mask[..., None]
    torch.testing.assert_close(torch.cat(got, 1) * real, whole * real)


def test_generation_with_the_cache_is_generation_without_it(llama):
    prompt = tokens(2, 21)
    mask = (torch.arange(21) >= torch.tensor([[0], [6]])).long()
    method = S2Attention(**METHOD)
    with method.active(llama):
        options = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False, "pad_token_id": 0}
        plain = llama.generate(prompt, **options)
        freed = llama.generate(prompt, past_key_values=S2Cache(method, 3, mask), **options)
    assert torch.equal(plain, freed)


def test_the_cache_frees_blocks_as_tokens_come():
    method = S2Attention(block_size=4, local_blocks=1, vert_stride=4, dense_layers=())
    cache = S2Cache(method, 1)
    bytes_of_a_token = 4 * 2 * 8 * 4
    key = torch.zeros(1, 4, 400, 8)
    cache.update(key, key, 0)
    for _ in range(200):
        cache.update(key[:, :, :1], key[:, :, :1], 0)
        cache.layers[0].read()
    assert cache.get_seq_length() == 600
    kept = [len(blocks) for blocks in method.pattern(4).kept_blocks(149)]
    assert max(kept) <= 39
    assert cache.nbytes <= 1.15 * max(kept) * 4 * bytes_of_a_token < 0.32 * 600 * bytes_of_a_token
    assert method.pattern(4).kv_share(600, 4) == pytest.approx(sum(kept) / 4 / 150)


def test_the_cache_is_refused_where_it_would_be_read_wrongly(llama):
    method = S2Attention(**METHOD)
    ids = tokens(1, 20)
    cache = S2Cache(method, 3)
    llama(ids[:, :18], past_key_values=cache)
    llama(ids[:, 18:19], past_key_values=cache)
    with pytest.raises(ModelError, match="not at work"):
        llama(ids[:, 19:], past_key_values=cache)
    with pytest.raises(ConfigurationError, match="left only"):
        S2Cache(method, 3, torch.tensor([[1, 0]]))
    with pytest.raises(ConfigurationError, match="2 numbers, but the batch 1"):
        S2Cache(method, 3, torch.ones(2, 5)).update(torch.zeros(1, 3, 5, 8), torch.zeros(1, 3, 5, 8), 1)


def test_a_cache_that_was_not_told_of_the_padding_is_refused(llama):
    method, mask = S2Attention(**METHOD), (torch.arange(21) >= torch.tensor([[0], [6]])).long()
    options = {"attention_mask": mask, "max_new_tokens": 3, "pad_token_id": 0}
    with method.active(llama):
        with pytest.raises(ConfigurationError, match=r"\[0, 0\] tokens of padding in front, but these have \[0, 6\]"):
            llama.generate(tokens(2, 21), past_key_values=S2Cache(method, 3), **options)
        with pytest.raises(ConfigurationError, match=r"\[0, 6\] tokens of padding in front, but these have \[0, 0\]"):
            llama.generate(tokens(2, 21), past_key_values=S2Cache(method, 3, mask), max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize("padded", [0, 150])
def test_density_with_the_cache_is_that_without_it(llama, padded):
    method, ids = S2Attention(**METHOD), tokens(2, 200)
    mask = (torch.arange(200) >= torch.tensor([[0], [padded]])).long()
    found = []
    for cache in (None, S2Cache(method, 3, mask)):
        with method.active(llama) as installed:
            llama.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, pad_token_id=0)
            found.append(installed.report())
    assert found[1].density("decode") == pytest.approx(found[0].density("decode"))
    assert found[1].layers("decode") == pytest.approx(found[0].layers("decode"))


def test_tokens_are_not_taken_out_of_the_cache_again(llama):
    method, other = S2Attention(**METHOD), copy.deepcopy(llama)
    other.lm_head.weight.data.neg_()  # guesses that are never taken
    with method.active(llama), pytest.raises(ConfigurationError, match="without an assistant model"):
        llama.generate(
            tokens(1, 20), assistant_model=other, past_key_values=S2Cache(method, 3), max_new_tokens=8, pad_token_id=0
        )
    S2Cache(method, 3).crop(0)


def test_a_cache_may_be_filled_under_autocast_and_read_without_and_in_inference_mode_and_out_of_it(llama):
    method, ids = S2Attention(**METHOD), tokens(1, 30)
    model = copy.deepcopy(llama).float()
    with method.active(model), torch.no_grad():
        cache, expected = S2Cache(method, 3), model(ids).logits
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids[:, :20], past_key_values=cache)
            model(ids[:, 20:21], past_key_values=cache)
        assert cache.layers[1].read()[0].keys.dtype == torch.bfloat16
        found = [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(21, 30)]
    difference = (torch.cat(found, 1) - expected[:, 21:]).norm() / expected[:, 21:].norm()
    assert 0 < difference < 0.05


def test_layers_with_a_window_of_their_own_must_be_dense_for_the_cache():
    method = S2Attention(**METHOD)
    cache = S2Cache(method, 3)
    key, value = cache.update(*torch.zeros(2, 1, 3, 1, 8), 1)
    with pytest.raises(ConfigurationError, match="layer 1 has a sliding window"):
        method.attend(AttentionCall(1, torch.zeros(1, 6, 1, 8), key, value, 1.0, window=4))


def test_some_layers_stay_dense():
    method = S2Attention(dense_period=6)
    assert [layer for layer in range(14) if method.is_dense(layer)] == [0, 1, 6, 12]

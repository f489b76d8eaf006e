"""Block masks against the single links that they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from gossamer.core.block_mask import BlockMask, block_count
from gossamer.errors import ConfigurationError


@st.composite
def masks(draw):
    triangle = draw(st.booleans())
    keys = draw(st.integers(1, 40))
    queries = draw(st.integers(1, keys if triangle else 40))
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    grid = (block_count(queries, size[0]), block_count(keys, size[1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    blocks = torch.rand(draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), *grid, generator=generator)
    return BlockMask(blocks > draw(st.sampled_from([0.0, 0.5, 1.0])), queries, keys, size, triangle)


def triangle(mask):
    links = torch.ones(mask.query_length, mask.key_length, dtype=torch.bool)
    return links.tril(mask.key_length - mask.query_length) if mask.causal else links


@settings(max_examples=80, deadline=None)
@given(masks())
def test_density_is_the_share_of_allowed_links(mask):
    expected = mask.to_dense().sum((-2, -1)).double() / triangle(mask).sum()
    torch.testing.assert_close(mask.densities, expected)
    assert BlockMask.full(mask.query_length, mask.key_length, mask.block_size, mask.causal).density == 1


@settings(max_examples=60, deadline=None)
@given(masks())
def test_every_block_knows_how_many_links_it_allows(mask):
    full = torch.zeros(mask.grid, dtype=torch.int64)
    for row, column in ((q, k) for q in range(mask.query_length) for k in range(mask.key_length)):
        full[row // mask.block_size[0], column // mask.block_size[1]] += int(triangle(mask)[row, column])
    assert mask.pairs.equal(full)
    assert mask.allowed.equal(full > 0)


@settings(max_examples=60, deadline=None)
@given(masks())
def test_lists_name_exactly_the_kept_blocks_in_order(mask):
    for (counts, indices), blocks in (
        (mask.lists(), mask.blocks),
        (mask.transposed_lists(), mask.blocks.transpose(-1, -2)),
    ):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
            row = tuple(place)
            assert indices[row][: counts[row]].tolist() == blocks[row].nonzero().flatten().tolist()
            assert not indices[row][counts[row] :].any()


@settings(max_examples=60, deadline=None)
@given(masks(), st.integers(1, 4))
def test_merged_blocks_cover_and_split_ones_are_the_same_links(mask, factor):
    links = mask.to_dense()
    assert not (links & ~mask.merge(factor).to_dense()).any()
    assert BlockMask.from_tokens(links, mask.block_size, mask.causal).to_dense().equal(links)
    larger = BlockMask.full(mask.query_length, mask.key_length, tuple(s * factor for s in mask.block_size), mask.causal)
    assert larger.split(factor).to_dense().equal(larger.to_dense())


@settings(max_examples=40, deadline=None)
@given(masks())
def test_flex_attention_sees_the_same_links(mask):
    flex = mask.to_flex()
    assert BlockMask.from_flex(flex, mask.causal).blocks.equal(mask.blocks)
    batch, heads = mask.blocks.shape[:2]
    links = flex.mask_mod(
        torch.arange(batch)[:, None, None, None],
        torch.arange(heads)[:, None, None],
        torch.arange(mask.query_length)[:, None],
        torch.arange(mask.key_length),
    )
    assert links.equal(mask.to_dense())


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2)])
def test_uncompiled_flex_attention_reads_the_blocks_and_nothing_else(shape):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 48, 8, generator=generator)
    blocks = (torch.rand(*shape, 6, 6, generator=generator) > 0.6) | torch.eye(6, dtype=torch.bool)
    mask = BlockMask(blocks, 48, 48, (8, 8))
    found = flex_attention(query, key, value, block_mask=mask.to_flex())
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask.to_dense())
    torch.testing.assert_close(found, expected)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (expected - dense).abs().max() > 0.1


def test_union_and_intersection_are_those_of_links():
    torch.manual_seed(0)
    one, two = (BlockMask(torch.rand(1, 2, 3, 4) > 0.5, 20, 26, (8, 7)) for _ in range(2))
    assert (one | two).to_dense().equal(one.to_dense() | two.to_dense())
    assert (one & two).to_dense().equal(one.to_dense() & two.to_dense())


def test_heads_that_read_everything_together_are_complete():
    blocks = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    blocks[0, 0, :, ::2] = True
    blocks[0, 1, :, 1::2] = True
    assert BlockMask(blocks, 32, 32, (8, 8)).is_union_complete
    blocks[0, 1, 3, 1] = False
    assert not BlockMask(blocks, 32, 32, (8, 8)).is_union_complete


def test_a_block_that_comes_back_spoils_the_cache():
    window = torch.ones(4, 4, dtype=torch.bool).tril().triu(-1)
    assert BlockMask(window[None, None].clone(), 32, 32, (8, 8)).is_cache_efficient
    window[3, 0] = True
    assert not BlockMask(window[None, None], 32, 32, (8, 8)).is_cache_efficient


def test_a_bidirectional_mask_is_causal_only_if_no_later_key_is_read():
    assert BlockMask(torch.eye(4, dtype=torch.bool)[None, None], 4, 4, (1, 1), causal=False).is_causal
    assert not BlockMask(torch.eye(4, dtype=torch.bool)[None, None], 8, 8, (2, 2), causal=False).is_causal


def test_recall_is_the_mass_in_kept_blocks():
    mask = BlockMask(torch.tensor([[[[True, False], [False, True]]]]), 4, 4, (2, 2), causal=False)
    assert mask.recall(torch.tensor([[[[3.0, 1.0], [2.0, 2.0]]]])).item() == 5 / 8
    with pytest.raises(ConfigurationError, match="must end with"):
        mask.recall(torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(1, 1, 2, 2), 4, 4, (2, 2)), "bool"),
        ((torch.ones(1, 1, 2, 3, dtype=torch.bool), 4, 4, (2, 2)), r"\(batch, heads, 2, 2\)"),
        ((torch.ones(1, 1, 4, 2, dtype=torch.bool), 8, 4, (2, 2)), "at least as many keys"),
        ((torch.ones(1, 1, 1, 1, dtype=torch.bool), 0, 4, (2, 2)), "at least one of each"),
        ((torch.ones(1, 1, 1, 1, dtype=torch.bool), 1, 4, (0, 2)), "block_size"),
    ],
)
def test_masks_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        BlockMask(*arguments)


def test_masks_of_another_length_do_not_mix():
    with pytest.raises(ConfigurationError, match="different geometry"):
        BlockMask.full(10) | BlockMask.full(11)
    with pytest.raises(ConfigurationError, match="divide"):
        BlockMask.full(10, block_size=6).split(4)

"""What masks of one shape share. Its tables are compared with single links in test_block_mask.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from gossamer.core.block_geometry import BlockGeometry
from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError

CPU = torch.device("cpu")


def test_masks_of_one_shape_share_their_tables():
    one, other = (BlockMask(torch.rand(1, 2, 5, 6) > 0.5, 38, 45, (8, 8)) for _ in range(2))
    assert one.allowed is other.allowed
    assert one.pairs is (one | other).pairs
    assert BlockMask.full(38, 46, 8).geometry != one.geometry
    assert BlockMask.full(38, 45, 8, causal=False).allowed.all()


def test_a_mask_does_not_write_to_what_it_shares():
    mask = BlockMask.full(40, block_size=8)
    mask.blocks.zero_()
    assert BlockMask.full(40, block_size=8).density == 1
    whole = BlockMask.full(40, block_size=8, causal=False)
    whole.blocks.zero_()
    assert BlockMask.full(40, block_size=8, causal=False).density == 1


def test_tables_that_were_made_without_gradients_serve_those_who_want_them():
    with torch.inference_mode():
        allowed = BlockMask.full(72, 77, 9).allowed
    scores = torch.rand(8, 9, requires_grad=True)
    torch.where(allowed, scores, 0).sum().backward()
    assert torch.equal(scores.grad, allowed.float())


@pytest.mark.parametrize("shape", [(40, 40, True), (17, 45, True), (40, 30, False)])
def test_ends_are_the_first_blocks_and_the_last_before_a_row(shape):
    queries, keys, causal = shape
    geometry = BlockGeometry(queries, keys, (8, 8), causal, CPU)
    for first, last in ((0, 1), (1, 1), (2, 3), (1, 0)):
        found = geometry.ends(first, last)
        for row in range(geometry.grid[0]):
            own = (min((row + 1) * 8, queries) - 1 + keys - queries) // 8
            wanted = [j for j in range(geometry.grid[1]) if j < first or own - last < j <= own]
            wanted = [j for j in wanted if not causal or j <= own]
            assert found[row].nonzero().flatten().tolist() == wanted
        assert geometry.ends(first, last) is found


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 7, 50])
@pytest.mark.parametrize(
    ("queries", "keys", "size"), [(23, 23, (4, 7)), (9, 23, (5, 3)), (1, 23, (1, 6)), (23, 23, (23, 23))]
)
def test_real_pairs_are_those_that_padding_causality_and_a_window_leave(queries, keys, size, window, causal):
    generator = torch.Generator().manual_seed(queries)
    real = torch.rand(3, keys, generator=generator) < torch.tensor([[1.0], [0.6], [0.0]])
    links = real[:, None].expand(-1, queries, -1)
    if causal or queries == keys:
        links = links & real[:, -queries:, None]
    if causal:
        place, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        links = links & (key <= place) & (key > place - (keys if window is None else window))
    found = BlockGeometry.of(queries, keys, size, causal, CPU).real_pairs(real, window)
    assert found.sum() == links.sum()
    for row, column in itertools.product(*map(range, found.shape[1:])):
        block = links[:, row * size[0] :][:, : size[0], column * size[1] :][..., : size[1]]
        assert found[:, row, column].tolist() == block.sum((1, 2)).tolist()


@pytest.mark.parametrize(
    ("queries", "keys", "size", "message"),
    [(5, 5, (0, 4), "block_size"), (0, 5, (4, 4), "at least one"), (6, 5, (4, 4), "at least as many keys")],
)
def test_geometries_without_pairs_are_refused(queries, keys, size, message):
    with pytest.raises(ConfigurationError, match=message):
        BlockGeometry.of(queries, keys, size, True, CPU)

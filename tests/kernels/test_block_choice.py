"""The choice of blocks by compiled code against torch alone, which must agree in every block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.block_mask import BlockMask
from gossamer.kernels import block_choice
from gossamer.kernels.block_choice import best_blocks, heaviest_blocks
from gossamer.kernels.native import offers

needs_compiled = pytest.mark.skipif(not offers("best_blocks"), reason="no compiled choice of blocks")


def by_torch(choose, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_choice, "offers", lambda name: False)
        return choose(*arguments)


@st.composite
def rows(draw):
    """Scores of some kind, what is allowed, and what is always read, in one of the shapes it may have."""
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    grid = (draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 7, 16, 33, 100, 257])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    scores = torch.rand(batch, heads, *grid, generator=generator)
    kind = draw(st.sampled_from(["plain", "ties", "steep", "zeros", "turned"]))
    if kind == "ties":
        scores = (scores * 4).round() / 4
    elif kind == "steep":  # sums in float64 depend on their order
        scores = scores ** draw(st.integers(10, 40))
    elif kind == "zeros":
        scores = torch.where(scores > 0.9, scores, 0)
    elif kind == "turned":
        scores = scores.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    allowed = torch.rand(grid, generator=generator) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    shape = draw(st.sampled_from([None, grid, (batch, 1, *grid), (batch, heads, *grid), (1, grid[1])]))
    always = None if shape is None else torch.rand(shape, generator=generator) < 0.2
    return scores.to(draw(st.sampled_from(block_choice._DTYPES))), allowed, always, generator


@needs_compiled
@settings(max_examples=150, deadline=None)
@given(rows())
def test_compiled_code_keeps_the_best_that_torch_keeps(case):
    scores, allowed, always, generator = case
    width = scores.shape[-1]
    for shape in ((), (scores.shape[1], 1), scores.shape[:3]):
        counts = torch.randint(1, width + 2, shape, generator=generator)
        found = best_blocks(scores, counts, allowed, always)
        assert found.dtype == torch.bool
        assert found.equal(by_torch(best_blocks, scores, counts, allowed, always))


@needs_compiled
@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from([1e-9, 0.3, 0.9, 0.999999, 1.0]))
def test_compiled_code_keeps_the_mass_that_torch_keeps(case, share):
    scores, allowed, always, generator = case
    of_heads = torch.rand(scores.shape[1], 1, generator=generator).double() * 0.99 + 0.01
    of_heads[0] = 1
    for shares in (torch.tensor(share, dtype=torch.float64), of_heads):
        found = heaviest_blocks(scores, shares, allowed, always)
        assert found.equal(by_torch(heaviest_blocks, scores, shares, allowed, always))


def test_mass_is_counted_from_the_heaviest_on():
    scores = torch.tensor([[[[1.0, 4.0, 2.0, 4.0, 3.0, 50.0]]]])
    allowed = torch.tensor([[True] * 5 + [False]])

    def chosen(share, always=None):
        return heaviest_blocks(scores, torch.tensor(share), allowed, always)[0, 0, 0].nonzero().flatten().tolist()

    assert chosen(0.25) == [1]  # 4 of 14 hold more than 3.5
    assert chosen(0.5) == [1, 3]  # the first of equal ones comes first
    assert chosen(8 / 14 + 0.01) == [1, 3, 4]
    always = torch.tensor([[True, False, False, False, False, True]])
    assert chosen(0.25, always) == [0, 1]  # its mass counts, and what is not allowed is not read
    assert chosen(0.05, always) == [0]
    assert chosen(1.0) == [0, 1, 2, 3, 4]


def test_what_is_always_read_comes_out_of_the_same_budget():
    scores = torch.tensor([[[[5.0, 4.0, 3.0, 2.0]]]])
    allowed, always = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[False, False, True, True]])
    for count, wanted in ((1, [2, 3]), (2, [2, 3]), (3, [0, 2, 3]), (9, [0, 1, 2, 3])):
        found = best_blocks(scores, torch.tensor(count), allowed, always)
        assert found[0, 0, 0].nonzero().flatten().tolist() == wanted


@needs_compiled
def test_a_choice_does_not_depend_on_threads():
    geometry = BlockMask.full(300 * 8, block_size=8)
    scores = torch.rand(1, 2, *geometry.grid, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(heaviest_blocks(scores, torch.tensor(0.4), geometry.allowed))
            found.append(best_blocks(scores, torch.tensor(30), geometry.allowed))
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(other) for one, other in zip(found, found[2:]))


@needs_compiled
def test_what_compiled_code_cannot_read_is_left_to_torch():
    scores = torch.rand(2, 1, 3, 5, dtype=torch.float64)
    allowed = torch.ones(3, 5, dtype=torch.bool)
    assert best_blocks(scores, torch.tensor(2), allowed).sum(-1).eq(2).all()
    assert heaviest_blocks(scores[0], torch.tensor(0.5), allowed).any(-1).all()
    assert heaviest_blocks(scores.clone().requires_grad_(), torch.tensor(1.0), allowed).all()

"""Selections of blocks against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.attention.selection import mass_blocks, sinks_and_diagonal, top_blocks
from gossamer.core.block_mask import BlockMask
from gossamer.errors import ConfigurationError


def scores_of(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(2, 3, 6, 7, generator=generator)
    return (found * 4).round() / 4 if ties else found


ALLOWED = BlockMask.full(6 * 8, 7 * 8, 8).allowed
ALWAYS = sinks_and_diagonal(BlockMask.full(6 * 8, 7 * 8, 8))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.integers(1, 8), st.booleans())
def test_the_best_of_every_row_are_kept_and_the_first_of_equals(seed, ties, keep, forced):
    scores = scores_of(seed, ties)
    found = top_blocks(scores, keep, ALLOWED, ALWAYS if forced else None)
    for b, h, row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(6)).tolist():
        candidates = [j for j in range(7) if ALLOWED[row, j]]
        must = [j for j in candidates if forced and ALWAYS[row, j]]
        rest = sorted((j for j in candidates if j not in must), key=lambda j: (-scores[b, h, row, j].item(), j))
        expected = must + rest[: max(keep - len(must), 0)]
        assert found[b, h, row].nonzero().flatten().tolist() == sorted(expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.floats(0.05, 0.99), st.booleans())
def test_the_fewest_blocks_that_hold_the_share_are_kept(seed, ties, share, forced):
    scores = scores_of(seed, ties)
    found = mass_blocks(scores, share, ALLOWED, ALWAYS if forced else None)
    for b, h, row in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(6)).tolist():
        candidates = [j for j in range(7) if ALLOWED[row, j]]
        must = [j for j in candidates if forced and ALWAYS[row, j]]
        rest = sorted((j for j in candidates if j not in must), key=lambda j: (-scores[b, h, row, j].item(), j))
        values = scores[b, h, row].double()
        total = sum(values[j].item() for j in candidates)
        chosen, held = [], 0.0
        for j in must + rest:
            if j not in must and held >= share * total - 1e-12:
                break
            chosen.append(j)
            held += values[j].item()
        assert found[b, h, row].nonzero().flatten().tolist() == sorted(chosen)


def test_a_share_of_one_reads_everything_allowed():
    scores = torch.zeros(1, 1, 6, 7)
    scores[..., 0] = 1
    assert mass_blocks(scores, 1.0, ALLOWED)[0, 0].equal(ALLOWED)


def test_heads_may_have_thresholds_of_their_own():
    scores = scores_of(3, ties=False)
    shares = torch.tensor([0.2, 0.5, 1.0])
    together = mass_blocks(scores, shares, ALLOWED)
    for head, share in enumerate(shares.tolist()):
        assert together[:, head].equal(mass_blocks(scores[:, head : head + 1], share, ALLOWED)[:, 0])


def test_small_masses_still_add_up_in_half_precision():
    scores = torch.full((1, 1, 1, 4096), 1.0, dtype=torch.bfloat16)
    allowed = torch.ones(1, 4096, dtype=torch.bool)
    assert int(mass_blocks(scores, 0.5, allowed).sum()) == 2048


@pytest.mark.parametrize("share", [0.0, -0.1, 1.2, float("nan")])
def test_thresholds_outside_the_range_are_refused(share):
    with pytest.raises(ConfigurationError, match=r"\(0, 1\]"):
        mass_blocks(scores_of(0, False), share, ALLOWED)


def test_a_budget_that_selects_nothing_is_refused():
    with pytest.raises(ConfigurationError, match="at least one"):
        top_blocks(scores_of(0, False), 0, ALLOWED)

"""A tree of concepts has the structure that it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError
from gossamer.features.concept_tree import ConceptTree


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 0.95), st.floats(0, 0.9), st.integers(0, 9))
def test_directions_are_as_alike_as_asked(child, parent, seed):
    tree = ConceptTree(child_cosine=child, parent_cosine=parent, seed=seed)
    cosines = tree.directions() @ tree.directions().T
    above = tree.parent_of
    expected = torch.eye(tree.size)
    first = tree.parents + tree.leaves
    expected[:first, :first] = parent
    siblings = (above[:, None] == above) & (above[:, None] >= 0)
    expected[siblings] = child
    expected.fill_diagonal_(1)
    torch.testing.assert_close(cosines, expected, rtol=0, atol=2e-6)


def test_children_come_with_their_parents_and_exclude_each_other():
    tree = ConceptTree()
    x, values = tree.sample(20_000, torch.Generator().manual_seed(0))
    active, above = values > 0, tree.parent_of
    for child in (above >= 0).nonzero().flatten().tolist():
        assert bool(active[active[:, child], above[child]].all())
    first = tree.parents + tree.leaves
    assert int(active[:, :first].sum(1).max()) == 1
    assert int(active[:, first:].sum(1).max()) == 1
    frequencies = active.float().mean(0)
    expected = torch.tensor([0.2] * 3 + [0.05] * 8 + [0.04] * 9)
    torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.012)
    assert float(active.sum(1).float().mean()) == pytest.approx(tree.active, abs=0.02)
    torch.testing.assert_close(x, values @ tree.directions())
    assert float(values[active].mean()) == pytest.approx(1.5, abs=0.01)
    assert float(values[active].std()) == pytest.approx(0.25, abs=0.01)


def test_chances_that_exceed_one_are_refused():
    with pytest.raises(ConfigurationError, match="sum to 1\\.1"):
        ConceptTree(leaf_chance=0.0625)
    with pytest.raises(ConfigurationError, match=r"\[0, 1\)"):
        ConceptTree(child_cosine=1.0)
    with pytest.raises(ConfigurationError, match="children 0"):
        ConceptTree(children=0)

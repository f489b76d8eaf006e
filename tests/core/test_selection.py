from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core import selection
from gossamer.core.selection import dropped_count, keep_by_comparing, keep_highest, keep_highest_jointly, keep_one
from gossamer.errors import NonFiniteError, SparsityError


def reference(scores, dropped):
    keep = torch.ones(scores.shape, dtype=torch.bool)
    return keep.scatter_(1, scores.argsort(dim=1, stable=True)[:, :dropped], False)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.data())
def test_a_partition_keeps_what_a_stable_sort_keeps(rows, n, data):
    dropped = data.draw(st.integers(0, n))
    values = data.draw(st.lists(st.integers(-3, 3), min_size=rows * n, max_size=rows * n))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, n)
    assert torch.equal(keep_highest(scores, dropped), reference(scores, dropped))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 50), st.integers(1, 12), st.data())
def test_counting_comparisons_keeps_what_a_stable_sort_keeps(rows, m, data):
    dropped = data.draw(st.integers(0, m))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=rows * m, max_size=rows * m))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, m)
    assert torch.equal(keep_by_comparing(scores, dropped), reference(scores, dropped))


def test_comparing_is_right_across_the_borders_of_its_chunks():
    scores = torch.randint(0, 4, (200_000, 5), generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(keep_by_comparing(scores, 2), keep_highest(scores, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_joint_threshold_equals_a_stable_sort_of_everything(dtype):
    generator = torch.Generator().manual_seed(3)
    scores = {
        "a": torch.randint(-4, 5, (31, 7), generator=generator).to(dtype),
        "b": torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-40], dtype=dtype),
        "c": torch.randn(500, generator=generator).to(dtype),
    }
    flat = torch.cat([values.flatten() for values in scores.values()]).unsqueeze(0)
    for dropped in (0, 1, 100, 350, flat.shape[1] - 1, flat.shape[1]):
        masks = keep_highest_jointly(scores, dropped)
        assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), reference(flat, dropped)[0])


def misleading_sample(n: int) -> torch.Tensor:
    scores = torch.rand(n, generator=torch.Generator().manual_seed(1))
    scores[:: (n // selection._SAMPLED_PER_LAYER) | 1] += 5
    return scores


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("normal", torch.randn(100_003, generator=torch.Generator().manual_seed(0))),
        ("few levels", torch.randint(-3, 4, (100_003,), generator=torch.Generator().manual_seed(0)).float()),
        ("one level", torch.ones(100_003)),
        ("misleading sample", misleading_sample(100_003)),
    ],
)
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.9999])
def test_the_search_for_the_threshold_is_exact_whatever_its_sample_says(kind, layer, sparsity, monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 1 << 12)  # so that candidates can outgrow their room
    scores = {"a": layer, "b": layer[:777] * 0.5}
    dropped = int(sparsity * 100_780)
    flat = torch.cat(list(scores.values())).unsqueeze(0)
    masks = keep_highest_jointly(scores, dropped)
    assert torch.equal(torch.cat(list(masks.values())), reference(flat, dropped)[0])


def test_a_misleading_sample_is_noticed():
    scores = {"a": misleading_sample(100_003)}
    assert selection._bracketed_search(scores, ["a"], selection._sample(scores, ["a"]), 100_003, 50_000) is None


def test_counts_are_decimal_not_binary():
    assert dropped_count(100, 0.29) == 29  # 0.29 * 100 is 28.999… in floating point
    assert dropped_count(7, Fraction(3, 7)) == 3
    assert dropped_count(10, 0.0) == 0


def test_bad_input_is_named():
    with pytest.raises(NonFiniteError, match=r"layer: 1 of 4 scores"):
        keep_highest(torch.tensor([[1.0, float("nan"), 2.0, 3.0]]), 1, "layer")
    with pytest.raises(SparsityError):
        keep_highest(torch.ones(1, 4), 5)
    with pytest.raises(SparsityError):
        dropped_count(10, 1.0)


def test_infinite_scores_protect():
    scores = torch.tensor([[float("inf"), -float("inf"), 0.0, 5.0]])
    assert keep_highest(scores, 2).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("m", [1, 2, 17, 32, 64])
@pytest.mark.parametrize("tied", [False, True])
def test_the_one_that_is_kept_is_the_last_of_the_highest(m, tied):
    scores = torch.randn(50, m, generator=torch.Generator().manual_seed(m))
    scores = scores.round() if tied else scores
    expected = torch.zeros(50, m, dtype=torch.bool)
    expected[torch.arange(50), scores.argsort(dim=1, stable=True)[:, -1]] = True
    assert torch.equal(keep_one(scores), expected)


def test_a_graph_keeps_what_is_kept_without_it():
    scores = torch.tensor([[3.0, 1.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    kept = torch.compile(keep_highest, backend="eager", fullgraph=True)(scores, 2)
    assert torch.equal(kept, keep_highest(scores, 2))
    assert kept.tolist() == [[True, False, False, True, True], [False, False, True, True, True]]

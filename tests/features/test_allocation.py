"""Allocations of features to tokens, against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.features.allocation import allocate, rounded_budgets, zipf_budgets


def affinities(seed, ties):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(5, 7, generator=generator).relu()
    return (found * 3).round() / 3 if ties else found


def best(values, count):
    """Places of the highest that are above zero, of equals the first."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return {i for i in order[:count] if values[i] > 0}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.integers(1, 7))
def test_every_token_takes_its_best_features(seed, ties, count):
    z = affinities(seed, ties)
    found = allocate(z, 5 * count, "token")
    for token in range(5):
        assert set(found[token].nonzero().flatten().tolist()) == best(z[token].tolist(), count)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.integers(1, 35))
def test_all_matches_compete_with_each_other(seed, ties, budget):
    z = affinities(seed, ties)
    assert set(allocate(z, budget, "mutual").flatten().nonzero().flatten().tolist()) == best(
        z.flatten().tolist(), budget
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.booleans(), st.lists(st.integers(0, 5), min_size=7, max_size=7).filter(any))
def test_every_feature_takes_its_best_tokens(seed, ties, counts):
    z = affinities(seed, ties)
    found = allocate(z, sum(counts), "feature", torch.tensor(counts))
    for feature, count in enumerate(counts):
        assert set(found[:, feature].nonzero().flatten().tolist()) == best(z[:, feature].tolist(), count)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.floats(0.0, 2.0), st.floats(0.05, 0.9), st.booleans())
def test_whole_budgets_sum_to_what_was_asked_and_fit_the_batch(features, tokens, exponent, share, drawn):
    budget = max(1, round(share * features * tokens))
    generator = torch.Generator().manual_seed(0) if drawn else None
    found = rounded_budgets(zipf_budgets(features, budget, exponent), tokens, generator)
    assert int(found.sum()) == budget
    assert 0 <= int(found.min()) <= int(found.max()) <= tokens


def test_rare_features_get_their_share_in_the_long_run():
    wanted = zipf_budgets(40, 20, 1.0)
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([rounded_budgets(wanted, 100, generator) for _ in range(4000)]).double().mean(0)
    assert float((mean - wanted).abs().max()) < 0.1
    assert float(mean[-1]) > 0


def test_budgets_fall_as_the_law_says():
    found = zipf_budgets(4, 10.0, exponent=1.0, shift=1.0)
    expected = torch.tensor([1 / 2, 1 / 3, 1 / 4, 1 / 5], dtype=torch.float64)
    torch.testing.assert_close(found, 10 * expected / expected.sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "token"), "budget is 0"),
        ((36, "mutual"), "from 1 to 5 tokens"),
        ((7, "token"), "multiple"),
        ((5, "feature", torch.ones(7)), "sum to the budget of 5"),
        ((5, "feature", torch.ones(5)), "give 7"),
        ((5, "vote"), "one of token, feature, mutual"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        allocate(affinities(0, False), *arguments)


def test_damaged_activations_are_refused():
    z = affinities(0, False)
    z[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        allocate(z, 5)

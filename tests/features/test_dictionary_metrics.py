"""Metrics of dictionaries against brute force."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from torch.nn.functional import normalize

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError
from gossamer.features.dictionary_metrics import (
    absorption,
    babel,
    co_selected_babel,
    highest_cosines,
    interference,
    modalities,
    recovery,
)


def directions(count, size, seed):
    return normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_matches_have_the_largest_sum_of_cosines():
    truth, learned = directions(4, 6, 0), directions(6, 6, 1)
    cosines = (truth @ learned.T).abs()
    best = max(permutations(range(6), 4), key=lambda order: sum(float(cosines[i, j]) for i, j in enumerate(order)))
    found = recovery(learned * 3, truth)
    assert tuple(found.partner.tolist()) == best
    torch.testing.assert_close(found.cosine, cosines[range(4), list(best)])
    torch.testing.assert_close(highest_cosines(learned, truth, chunk=3), (truth @ learned.T).amax(1))


def test_a_shuffled_dictionary_with_other_signs_is_recovered_and_does_not_interfere():
    truth = directions(5, 8, 2)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    learned = -truth[order]
    assert recovery(learned, truth).partner[order].equal(torch.arange(5))
    assert interference(learned, truth) == pytest.approx(0, abs=1e-6)
    assert interference(directions(5, 8, 3), truth) > 0.1


def test_absorption_is_the_share_of_the_parent_in_the_feature_of_its_child():
    truth = torch.eye(4)
    learned = truth.clone()
    learned[2] = normalize(truth[2] + 0.75 * truth[0], dim=0)
    parents = torch.tensor([-1, -1, 0, 1])
    torch.testing.assert_close(absorption(learned, truth, parents), torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(absorption(-learned, truth, parents), torch.tensor([0.6, 0.0]))


def test_the_babel_function_is_the_worst_over_all_sets():
    atoms = directions(7, 5, 4)
    cosines = (atoms @ atoms.T).abs()
    expected = [
        max(
            float(cosines[i, list(others)].sum())
            for i in range(7)
            for others in combinations([j for j in range(7) if j != i], size)
        )
        for size in (1, 2, 3)
    ]
    torch.testing.assert_close(babel(atoms, 3, chunk=3), torch.tensor(expected))
    with pytest.raises(ConfigurationError, match="from 1 to 6"):
        babel(atoms, 7)


def test_features_that_are_active_together_are_compared_alone():
    atoms = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), torch.tensor([0.0, 1.0])])
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0], [0.0, 3.0, 0.0]]))
    torch.testing.assert_close(co_selected_babel(codes, atoms), torch.tensor([0.0, 1.4, 0.0]))


def test_features_of_two_kinds_of_inputs_are_counted():
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 0.0]]))
    found = modalities(codes, torch.tensor([True, True, False]))
    torch.testing.assert_close(found.first, torch.tensor([1.0, 0.5, 0.5, 0.0]))
    torch.testing.assert_close(found.second, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert found.shared == 2
    torch.testing.assert_close(found.score[:3], torch.tensor([1.0, 1 / 3, 1 / 3]))
    assert bool(found.score[3].isnan())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="at least as many"):
        recovery(directions(2, 4, 0), directions(3, 4, 0))
    with pytest.raises(ConfigurationError, match="both kinds"):
        modalities(SparseCodes.from_dense(torch.eye(3)), torch.ones(3, dtype=torch.bool))

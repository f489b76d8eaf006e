from __future__ import annotations

import math

import pytest
import torch

from gossamer.core.effective_rank import effective_rank, match_norm, truncate_rank
from gossamer.errors import ConfigurationError, NonFiniteError, UnknownNameError

KINDS = ("participation", "stable", "entropy")


@pytest.mark.parametrize("kind", KINDS)
def test_an_orthogonal_matrix_has_full_rank_and_an_outer_product_one(kind):
    assert effective_rank(3 * torch.linalg.qr(torch.randn(6, 6))[0], kind) == pytest.approx(6, rel=1e-5)
    assert effective_rank(torch.outer(torch.randn(5), torch.randn(7)), kind) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.zeros(3, 3), kind) == 0


def test_the_three_ranks_of_known_singular_values():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert effective_rank(matrix, "participation") == pytest.approx(36 / 14)
    assert effective_rank(matrix, "stable") == pytest.approx(14 / 9)
    entropy = -sum(p * math.log(p) for p in (1 / 2, 1 / 3, 1 / 6))
    assert effective_rank(matrix, "entropy") == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_gives_each_matrix_its_own_number(kind):
    stack = torch.randn(2, 3, 4, 5)
    found = effective_rank(stack, kind)
    assert found.shape == (2, 3)
    assert found[1, 2] == pytest.approx(effective_rank(stack[1, 2], kind))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncation_reaches_the_rank_and_keeps_the_norm(rank):
    matrix = torch.randn(8, 11)
    cut = truncate_rank(matrix, rank)
    assert int(torch.linalg.matrix_rank(cut)) == rank
    assert cut.norm() == pytest.approx(float(matrix.norm()), rel=1e-5)
    assert cut.dtype == matrix.dtype


def test_without_the_norm_truncation_is_the_best_approximation():
    matrix = torch.randn(8, 8, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    cut = truncate_rank(matrix, 3, keep_norm=False)
    assert (matrix - cut).norm() == pytest.approx(float(values[3:].norm()))
    assert torch.equal(truncate_rank(matrix, 8), matrix)


def test_norms_are_matched_matrix_by_matrix():
    stack, other = torch.randn(4, 3, 3), torch.randn(4, 2, 5)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(match_norm(stack, other)), torch.linalg.matrix_norm(other), rtol=1e-5, atol=0
    )
    assert not match_norm(torch.zeros(3, 3), 2.0).any()


def test_bad_input_is_refused():
    with pytest.raises(UnknownNameError, match="participation"):
        effective_rank(torch.eye(3), "particpation")
    with pytest.raises(ConfigurationError, match="matrix"):
        effective_rank(torch.ones(3))
    with pytest.raises(NonFiniteError, match="NaN"):
        truncate_rank(torch.full((2, 2), torch.nan), 1)
    for rank in (0, 4):
        with pytest.raises(ConfigurationError, match="between 1 and 3"):
            truncate_rank(torch.eye(3), rank)

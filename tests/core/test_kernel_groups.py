from __future__ import annotations

import pytest
import torch

from gossamer.core.kernel_groups import KernelRows
from gossamer.errors import PatternError


def test_the_weakest_rows_of_all_kernels_go():
    scores = torch.tensor([[[[1.0, 2.0], [5.0, 5.0]]], [[[9.0, 9.0], [0.0, 2.5]]]])  # rows: 3, 10, 18, 2.5
    mask = KernelRows().select(scores, 0.5)
    assert mask[:, 0, :, 0].tolist() == [[False, True], [True, False]]
    assert torch.equal(mask[..., 0], mask[..., 1])


def test_the_number_of_rows_is_exact_and_ties_are_stable():
    scores = torch.ones(7, 1, 3, 5)
    for sparsity, gone in ((0.0, 0), (0.3, 6), (0.5, 10), (0.95, 19)):
        mask = KernelRows().select(scores, sparsity)
        assert int((~mask).sum()) == 5 * gone
        assert torch.equal(mask[:, 0, :, 0].flatten(), torch.arange(21) >= gone)
        KernelRows().verify(mask, sparsity)


def test_what_has_no_rows_of_kernels_is_refused():
    with pytest.raises(PatternError, match="rows of kernels need"):
        KernelRows().select(torch.ones(4, 4), 0.5)
    assert str(KernelRows()) == "kernel-rows"

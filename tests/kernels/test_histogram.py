"""Streaming histograms of magnitudes count every number once, in the bin of its pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.histogram import BINS, magnitude_histogram


def expected(x: Tensor, scale: Tensor | None) -> Tensor:
    counts = torch.zeros(BINS, dtype=torch.int64)
    wide = x.float() if scale is None else x.float() * scale
    for value in wide.abs().flatten():
        counts[int(value.view(torch.int32)) >> 16] += 1
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (5, 37), (2, 600)])
def test_counts_are_those_of_the_patterns(shape, dtype, face):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, ::4] = 0
    scale = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) * 3
    for factor in (None, scale):
        counts = torch.zeros(BINS, dtype=torch.int64)
        assert magnitude_histogram(x, factor, counts) is counts
        assert torch.equal(counts, expected(x, factor))
        magnitude_histogram(x, factor, counts)
        assert torch.equal(counts, 2 * expected(x, factor))


def test_special_values_have_bins_of_their_own(face):
    x = torch.tensor([[0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-45]])
    counts = magnitude_histogram(x, None, torch.zeros(BINS, dtype=torch.int64))
    assert counts[0] == 3
    assert counts[0x3F80] == 2
    assert counts[0x7F80] == 2
    assert counts[0x7FC0] == 1
    assert int(counts.sum()) == 8


def test_many_numbers_are_counted_by_several_threads(face):
    x = torch.randn(700, 129, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(magnitude_histogram(x, None, torch.zeros(BINS, dtype=torch.int64)))
        finally:
            torch.set_num_threads(before)
    bins = x.view(torch.int32) >> 16 & 0x7FFF
    assert all(torch.equal(counts, torch.bincount(bins.flatten(), minlength=BINS)) for counts in found)


def test_every_range_of_bins_is_handed_over(face):
    """Counters are looked at between the smallest and the largest bin of a call, and must be empty afterwards."""
    counts, seen = torch.zeros(BINS, dtype=torch.int64), []
    for exponents in ((0, 1), (-140, -120), (100, 127), (-149, 127), (3, 3)):
        x = 2.0 ** torch.linspace(*exponents, 301, dtype=torch.float64).float()[None]
        seen.append(x)
        magnitude_histogram(x, None, counts)
        assert torch.equal(counts, expected(torch.cat(seen), None))


def test_numbers_may_lie_anywhere_in_memory(face):
    whole = torch.randn(40, 60, generator=torch.Generator().manual_seed(0))
    for view in (whole[::3, 5:41], whole.t(), whole[:, ::2]):
        one, two = (torch.zeros(BINS, dtype=torch.int64) for _ in range(2))
        assert torch.equal(magnitude_histogram(view, None, one), magnitude_histogram(view.contiguous(), None, two))


def test_what_does_not_fit_is_refused_by_name():
    x, counts = torch.ones(3, 4), torch.zeros(BINS, dtype=torch.int64)
    for wrong in (torch.ones(3), torch.ones(3, 4, dtype=torch.int64)):
        with pytest.raises(ConfigurationError, match="x is"):
            magnitude_histogram(wrong, None, counts)
    for scale in (torch.ones(3), torch.ones(4).double(), torch.ones(8)[::2]):
        with pytest.raises(ConfigurationError, match="scale is"):
            magnitude_histogram(x, scale, counts)
    for wrong in (counts[:-1], counts.int(), torch.zeros(2 * BINS, dtype=torch.int64)[::2]):
        with pytest.raises(ConfigurationError, match="counts are"):
            magnitude_histogram(x, None, wrong)

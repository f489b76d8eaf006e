"""The highest scores of long rows by counting digits, beside a stable sort."""

from __future__ import annotations

import pytest
import torch

from gossamer.core import selection
from gossamer.kernels import native
from gossamer.kernels.selection import keep_highest_of_rows

pytestmark = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")


def by_sorting(scores: torch.Tensor, dropped: int) -> torch.Tensor:
    keep = torch.ones_like(scores, dtype=torch.bool)
    return keep.scatter_(1, scores.argsort(dim=1, stable=True)[:, :dropped], False)


def scores_of(kind: str, rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randn(rows, columns, generator=generator)
    few = torch.rand(rows, columns, generator=generator) < 0.5
    if kind == "ties":
        return torch.randint(-3, 4, (rows, columns), generator=generator).float()
    if kind == "infinities":
        return torch.where(few, -torch.inf, scores).index_fill(1, torch.arange(0, columns, 17), torch.inf)
    if kind == "zeros of both signs":
        return torch.where(few, -0.0, 0.0).index_fill(1, torch.arange(0, columns, 7), 1e-40)
    return {"normal": scores, "subnormal": scores * 1e-42, "equal": torch.full((rows, columns), 2.5)}[kind]


@pytest.mark.parametrize("kind", ["normal", "ties", "infinities", "zeros of both signs", "subnormal", "equal"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (9, 4097), (1, 200_001)])
def test_it_keeps_what_a_stable_sort_keeps_with_any_number_of_threads(kind, rows, columns):
    scores = scores_of(kind, rows, columns)
    before = torch.get_num_threads()
    try:
        for dropped in (1, columns // 10, columns // 2, columns - 1):
            expected = by_sorting(scores, dropped)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(keep_highest_of_rows(scores, dropped), expected)
    finally:
        torch.set_num_threads(before)


def test_every_selection_of_long_rows_uses_it(monkeypatch):
    seen = []
    monkeypatch.setattr(selection, "_compiled", lambda scores, dropped: seen.append(tuple(scores.shape)))
    scores = torch.randn(2, 5000)
    assert torch.equal(selection.keep_highest(scores, 4000), by_sorting(scores, 4000))
    assert seen == [(2, 5000)]

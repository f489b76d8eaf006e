"""Both sides of the benchmark of truncated expectation maximization compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from benchmarks.harness import Options
from benchmarks.prosper_peer import prosper
from benchmarks.truncated_em import measure, ours, point_by_point, problem


def test_the_loop_over_points_takes_the_same_step():
    model, x, parameters = problem(150, 30, 12)
    np.testing.assert_allclose(ours(model, x, parameters), point_by_point(x.numpy(), parameters), rtol=1e-8, atol=1e-8)


def test_a_row_says_how_far_apart_both_are():
    (row,) = measure(Options(quick=True))
    assert row.peer == "a loop over points"
    assert "210 combinations" in row.case
    assert float(row.note.split()[-3]) < 1e-8


def test_a_folder_without_prosper_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no checkout"):
        prosper(tmp_path)

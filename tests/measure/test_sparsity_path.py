from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from gossamer.core.schedules import Cosine, Cubic, Geometric, Ladder, Linear, OneShot, Sine
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.measure.sparsity_path import SparsityPath, average_parameters


@pytest.mark.parametrize("kind", [OneShot, Linear, Cubic, Cosine, Sine, Geometric, Ladder])
@pytest.mark.parametrize(("initial", "begin", "end"), [(0.0, 25, 75), (0.2, 0, 100), (0.0, 10, 95)])
def test_closed_forms_equal_quadrature(kind, initial, begin, end):
    path = SparsityPath(kind(0.8, end, initial=initial, begin=begin), 100)
    assert path.average_sparsity() == pytest.approx(path.average_by_quadrature(), abs=1e-12)
    assert path.average_density() == 1 - path.average_sparsity()


def test_the_cubic_ramp_of_a_quarter_to_three_quarters_averages_five_eighths():
    path = SparsityPath(Cubic(0.8, 75, begin=25), 100)
    assert path.average_sparsity() == pytest.approx(0.625 * 0.8, abs=1e-12)


def test_a_path_in_tokens_is_its_schedule():
    path = SparsityPath(Linear(0.5, 80, begin=20), 100)
    assert [path.sparsity(share) for share in (0.0, 0.2, 0.5, 0.8, 1.0)] == [0.0, 0.0, 0.25, 0.5, 0.5]
    assert path.tokens_at(30) == pytest.approx(0.3)


def test_a_path_in_compute_agrees_with_a_simulated_run():
    schedule, fixed = Cubic(0.8, 75, begin=25), 0.3
    path = SparsityPath(schedule, 100, "compute", fixed)
    # small steps of compute, each of as many tokens as it can pay for
    moments = (np.arange(200_000) + 0.5) / 2000
    sparsities = np.array([schedule(moment) for moment in moments])
    tokens = 1 / (fixed + (1 - fixed) * (1 - sparsities))
    assert path.average_sparsity() == pytest.approx((sparsities * tokens).sum() / tokens.sum(), abs=1e-9)
    share = tokens[:80_000].sum() / tokens.sum()
    assert path.tokens_at(40) == pytest.approx(share, abs=1e-9)
    assert path.sparsity(share) == pytest.approx(schedule(40), abs=1e-9)


def test_cheap_late_steps_move_a_quarter_of_the_compute_before_a_quarter_of_the_tokens():
    path = SparsityPath(OneShot(0.75, 50, begin=25), 100, "compute")
    # a quarter of the compute at full price, three quarters at a quarter of it
    assert path.tokens_at(25) == pytest.approx(0.25 / (0.25 + 0.75 * 4))
    assert path.average_sparsity() == pytest.approx(0.75 * 3 / 3.25)


def test_where_nothing_can_be_saved_both_clocks_agree():
    for fixed in (0.5, 0.99):
        path = SparsityPath(Cubic(0.0, 75, begin=25), 100, "compute", fixed)
        assert path.tokens_at(60) == pytest.approx(0.6)


def test_parameters_that_are_never_pruned_count_in_full():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 8), nn.Linear(8, 2))
    path = SparsityPath(Linear(0.5, 100), 100)  # a quarter of all moments' weights
    pruned = 4 * 8
    assert average_parameters(model, path, "all") == 40 + 8 + 16 + 2 + 0.75 * pruned
    assert average_parameters(model, path) == 8 + 16 + 2 + 0.75 * pruned
    assert average_parameters(model, path, "prunable") == 0.75 * pruned


def test_impossible_paths_are_refused():
    with pytest.raises(ConfigurationError, match="end the schedule within the run"):
        SparsityPath(Linear(0.5, 100), 50)
    with pytest.raises(SparsityError, match=r"\[0, 1\)"):
        SparsityPath(Linear(1.0, 100), 100)
    with pytest.raises(ConfigurationError, match="unit is 'steps'"):
        SparsityPath(Linear(0.5, 100), 100, "steps")
    with pytest.raises(ConfigurationError, match="fixed_cost is 1"):
        SparsityPath(Linear(0.5, 100), 100, "compute", 1.0)
    with pytest.raises(ConfigurationError, match="not after its beginning"):
        SparsityPath(Linear(0.5, 20, begin=20), 100)
    path = SparsityPath(Linear(0.5, 100), 100)
    with pytest.raises(ConfigurationError, match=r"share of the tokens is 1\.5"):
        path.sparsity(1.5)
    with pytest.raises(ConfigurationError, match="moment is 101"):
        path.tokens_at(101)

"""Solvers against brute force, conditions of optimality, and each other."""

from __future__ import annotations

import itertools

import pytest
import torch

from gossamer.coding.proximal_gradient import lipschitz, objective
from gossamer.coding.thresholding import (
    fitted_penalty,
    iterative_thresholding,
    lam_for_l0,
    locally_competitive,
    sparse_encode,
)
from gossamer.core.prox import CEL0, L0, L1, MCP, PENALTIES, KSparse
from gossamer.errors import ConfigurationError, NonFiniteError

WEIGHED = sorted(set(PENALTIES) - {"k-sparse"})


def problem(signals=30, atoms=12, size=8, seed=0, lengths=False):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(
        torch.randn(atoms, size, generator=generator, dtype=torch.float64), dim=1
    )
    if lengths:
        dictionary *= 0.5 + torch.rand(atoms, 1, generator=generator, dtype=torch.float64)
    return torch.randn(signals, size, generator=generator, dtype=torch.float64), dictionary


def smallest_l0(x, dictionary, lam):
    """The global minimum of the l0 objective, over all supports."""
    best = x.square().sum(1) / 2
    for size in range(1, min(dictionary.shape) + 1):
        for support in itertools.combinations(range(len(dictionary)), size):
            atoms = dictionary[list(support)]
            codes = torch.linalg.lstsq(atoms.T, x.T).solution.T
            best = torch.minimum(best, (x - codes @ atoms).square().sum(1) / 2 + lam * size)
    return best


@pytest.mark.parametrize("name", WEIGHED)
@pytest.mark.parametrize("atoms", [12, 40])
def test_the_objective_of_no_signal_ever_rises(name, atoms):
    x, dictionary = problem(atoms=atoms)
    one = fitted_penalty(name, 0.1, dictionary)
    for acceleration in ("none", "monotone"):
        found = iterative_thresholding(
            x, dictionary, one, max_iter=60, tolerance=0, acceleration=acceleration, monitor=True
        )
        assert found.worst_rise <= 1e-12
        assert len(found.history) == 61
        assert found.history[-1] == pytest.approx(float(objective(x, dictionary, found.codes, one).mean()))
        assert found.history[-1] < found.history[0]


@pytest.mark.parametrize("name", WEIGHED)
def test_a_converged_code_is_a_fixed_point(name):
    x, dictionary = problem()
    one = fitted_penalty(name, 0.2, dictionary)
    found = iterative_thresholding(x, dictionary, one, max_iter=5000, tolerance=1e-10)
    step = 0.99 / lipschitz(dictionary)
    again = one.prox(found.codes + step * (x - found.codes @ dictionary) @ dictionary.T, step)
    rows = found.converged
    assert rows.float().mean() > 0.9
    assert torch.allclose(again[rows], found.codes[rows], atol=1e-7)


def test_soft_thresholding_meets_the_conditions_of_optimality():
    x, dictionary = problem(atoms=30)
    codes = iterative_thresholding(x, dictionary, L1(0.3), max_iter=3000, tolerance=1e-12).codes
    common = (x - codes @ dictionary) @ dictionary.T
    assert (common.abs() <= 0.3 + 1e-6).all()
    assert torch.allclose(common[codes != 0], 0.3 * codes[codes != 0].sign(), atol=1e-6)


def test_acceleration_with_restart_is_faster_and_ends_in_the_same_place():
    x, dictionary = problem(atoms=16)
    plain = iterative_thresholding(x, dictionary, L1(0.3), max_iter=5000, tolerance=1e-11, acceleration="none")
    quick = iterative_thresholding(x, dictionary, L1(0.3), max_iter=5000, tolerance=1e-11)
    assert plain.converged.all()
    assert torch.allclose(plain.codes, quick.codes, atol=1e-6)
    assert quick.n_iter < plain.n_iter / 2


def test_both_ways_to_step_agree():
    x, dictionary = problem(atoms=9, size=9)
    wide = torch.cat([dictionary, dictionary.flip(0)])  # more than twice as many atoms as numbers
    wide = torch.cat([wide, wide[:3]])
    for penalty in (L1(0.2), MCP(0.2), L0(0.05)):
        rows = [iterative_thresholding(part, wide, penalty, max_iter=20, tolerance=0).codes for part in x.split(7)]
        whole = iterative_thresholding(x, wide, penalty, max_iter=20, tolerance=0).codes
        assert torch.allclose(torch.cat(rows), whole, atol=1e-10)
        step = 0.99 / lipschitz(wide)
        hand = torch.zeros_like(whole)
        if penalty.convex:
            continue
        for _ in range(20):
            hand = penalty.prox(hand + step * (x - hand @ wide) @ wide.T, step)
        assert torch.allclose(hand, whole, atol=1e-8)


def test_cel0_comes_closer_to_the_global_minimum_than_hard_thresholds():
    x, dictionary = problem(signals=40, atoms=9, size=5)
    lam = 0.1
    best = smallest_l0(x, dictionary, lam)
    excess = {}
    for penalty in (L0(lam), CEL0(lam)):
        codes = iterative_thresholding(x, dictionary, penalty, max_iter=3000, tolerance=1e-9).codes
        reached = objective(x, dictionary, codes, L0(lam))
        assert (reached >= best - 1e-9).all()
        excess[type(penalty)] = float((reached - best).mean())
    assert excess[CEL0] < excess[L0]


def test_continuation_leads_around_local_minima():
    x, dictionary = problem(signals=200, atoms=24, size=12)
    direct = iterative_thresholding(x, dictionary, CEL0(0.05), max_iter=300)
    guided = iterative_thresholding(x, dictionary, CEL0(0.05), max_iter=300, continuation=10)
    costs = [float(objective(x, dictionary, one.codes, L0(0.05)).mean()) for one in (direct, guided)]
    assert costs[1] < 0.9 * costs[0]
    assert guided.n_iter <= 300


def test_iterative_hard_thresholding_finds_a_planted_code():
    generator = torch.Generator().manual_seed(3)
    dictionary = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))[0]
    planted = torch.zeros(20, 32, dtype=torch.float64)
    planted[:, :3] = torch.tensor([2.0, -1.5, 1.0])
    found = iterative_thresholding(planted @ dictionary, dictionary, KSparse(k=3), max_iter=400)
    assert torch.allclose(found.codes, planted, atol=1e-3)


def test_neurons_that_inhibit_each_other_come_to_the_same_codes():
    x, dictionary = problem()
    neurons = locally_competitive(x, dictionary, L1(0.3), max_iter=4000)
    steps = iterative_thresholding(x, dictionary, L1(0.3), max_iter=4000, tolerance=1e-12).codes
    assert torch.allclose(neurons, steps, atol=1e-5)


@pytest.mark.parametrize("name", WEIGHED)
def test_the_weight_for_a_count_is_found(name):
    x, dictionary = problem(signals=400, atoms=24, size=12)
    lam = lam_for_l0(x, dictionary, name, 3.0, max_iter=100)
    codes = sparse_encode(x, dictionary, name, lam, max_iter=100)
    assert float((codes != 0).sum(1).double().mean()) == pytest.approx(3, rel=0.1)  # where the count jumps


def test_lengths_of_atoms_reach_cel0():
    x, dictionary = problem(lengths=True)
    one = fitted_penalty("cel0", 0.1, dictionary)
    assert torch.allclose(one.length, dictionary.norm(dim=1))
    assert fitted_penalty("cel0", 0.1, problem()[1]).length == 1.0
    # longer atoms with shorter codes are the same problem under l0, so its exact relaxation must agree
    unit = torch.nn.functional.normalize(dictionary, dim=1)
    a = iterative_thresholding(x, dictionary, one, max_iter=300).codes
    cost = objective(x, dictionary, a, L0(0.1))
    moved = a * dictionary.norm(dim=1)
    assert torch.allclose(objective(x, unit, moved, CEL0(0.1)), objective(x, dictionary, a, one), atol=1e-9)
    assert torch.allclose(objective(x, unit, moved, L0(0.1)), cost)


def test_a_start_is_where_it_starts():
    x, dictionary = problem()
    start = torch.ones(len(x), len(dictionary), dtype=torch.float64)
    one = iterative_thresholding(x, dictionary, L0(0.05), start=start, max_iter=1, monitor=True)
    assert one.history[0] == pytest.approx(float(objective(x, dictionary, start, L0(0.05)).mean()))


def test_no_signal_is_no_problem():
    _, dictionary = problem()
    assert iterative_thresholding(dictionary[:0], dictionary, L1(0.1)).codes.shape == (0, 12)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_iter": 0}, "max_iter is 0"),
        ({"tolerance": -1.0}, "tolerance -1.0"),
        ({"step": 0.0}, "step is 0.0"),
        ({"acceleration": "restart"}, "L0 is not convex"),
        ({"acceleration": "fast"}, "'fast'"),
        ({"continuation": 0.5}, "continuation is 0.5"),
        ({"start": torch.zeros(1, 1)}, "start is"),
    ],
)
def test_bad_input_is_named(options, word):
    x, dictionary = problem()
    with pytest.raises(ConfigurationError, match=word):
        iterative_thresholding(x, dictionary, L0(0.1), **options)


def test_bad_signals_and_atoms_are_named():
    x, dictionary = problem()
    with pytest.raises(ConfigurationError, match=r"\(30, 7\)"):
        iterative_thresholding(x[:, :7], dictionary, L1(0.1))
    broken = x.clone()
    broken[4, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="signal 4"):
        iterative_thresholding(broken, dictionary, L1(0.1))
    with pytest.raises(ConfigurationError, match="lam is None"):
        sparse_encode(x, dictionary)
    with pytest.raises(ConfigurationError, match="target_l0 is 99"):
        sparse_encode(x, dictionary, target_l0=99)
    with pytest.raises(ConfigurationError, match="atom 3 is zero"):
        sparse_encode(x, dictionary * (torch.arange(12) != 3)[:, None], lam=0.1)
    with pytest.raises(ConfigurationError, match="rate is 2"):
        locally_competitive(x, dictionary, L1(0.1), rate=2)

from __future__ import annotations

import pytest
import torch

from gossamer.coding import sparsity_curves as module
from gossamer.coding.sparsity_curves import l0_error_curve, point, refitted, units_needed
from gossamer.errors import ConfigurationError
from gossamer.kernels.pursuit import orthogonal_matching_pursuit


def problem(signals=300, atoms=32, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.nn.functional.normalize(torch.randn(atoms, size, generator=generator), dim=1)
    codes = torch.randn(signals, atoms, generator=generator) * (torch.rand(signals, atoms, generator=generator) < 0.1)
    return codes @ dictionary + 0.05 * torch.randn(signals, size, generator=generator), dictionary


def test_more_non_zeros_leave_less():
    x, dictionary = problem()
    for penalty in ("l1", "l0", "l1/2", "cel0", "omp"):
        curve = l0_error_curve(x, dictionary, penalty, [1, 3, 6])
        assert [one.l0 for one in curve] == pytest.approx([1, 3, 6], rel=0.1)
        errors = [one.error for one in curve]
        assert errors == sorted(errors, reverse=True)


def test_a_pursuit_spends_steps_where_they_pay():
    x, dictionary = problem()
    x[:150] *= 5
    (at,) = l0_error_curve(x, dictionary, "omp", [3])
    fixed = orthogonal_matching_pursuit(x, dictionary, 3)
    assert at.l0 == pytest.approx(3, abs=0.01)
    assert at.error < float(fixed.residual.square().sum() / x.square().sum())
    # where all may be taken, what is left is what steps leave
    gains = module._gains(x, dictionary, 5)
    left = x.square().sum(1).double() - gains.sum(1)
    assert torch.allclose(
        left, orthogonal_matching_pursuit(x, dictionary, 5).residual.square().sum(1).double(), atol=1e-3
    )


def test_at_equal_counts_the_l1_norm_leaves_most():
    x, dictionary = problem()
    left = {name: l0_error_curve(x, dictionary, name, [3])[0].error for name in ("l1", "cel0", "omp")}
    fair = l0_error_curve(x, dictionary, "l1", [3], refit=True)[0].error
    assert left["cel0"] < fair < left["l1"]


def test_a_refit_is_least_squares_on_the_same_atoms():
    x, dictionary = problem(signals=9)
    generator = torch.Generator().manual_seed(5)
    codes = (torch.rand(9, 32, generator=generator) < 0.15).float()
    codes[4] = 0
    found = refitted(x, dictionary, codes)
    assert ((found != 0) <= (codes != 0)).all()
    for row in range(9):
        atoms = dictionary[codes[row] != 0]
        if not len(atoms):
            assert not found[row].any()
            continue
        best = torch.linalg.lstsq(atoms.T.double(), x[row].double()).solution
        assert torch.allclose(found[row][codes[row] != 0].double(), best, atol=1e-4)


def test_a_point_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    at = point(x, torch.eye(2), torch.tensor([[0.0, 4.0], [0.0, 1.0]]), 0.5)
    assert (at.l0, at.lam) == (1.0, 0.5)
    assert at.error == pytest.approx(9 / 26)


def test_units_are_read_between_sizes():
    assert units_needed([10, 40], [0.4, 0.1], 0.2) == pytest.approx(20)
    assert units_needed([10, 40], [0.4, 0.1], 0.5) == 10
    assert units_needed([10, 40], [0.4, 0.1], 0.05) is None
    with pytest.raises(ConfigurationError, match="ascending"):
        units_needed([40, 10], [0.1, 0.4], 0.2)

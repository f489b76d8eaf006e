"""Fits and tuning of drawn Gabor functions, of which everything is known."""

from __future__ import annotations

import math

import pytest
import torch

from gossamer.coding import receptive_fields as module
from gossamer.coding.receptive_fields import (
    GaborFits,
    gabor_fit,
    kurtosis,
    orientation_histogram,
    orientation_selectivity,
    shape_variety,
    sparseness,
)
from gossamer.errors import ConfigurationError, NonFiniteError

SIDE = 12


def drawn(count=40, seed=0, noise=0.0):
    generator = torch.Generator().manual_seed(seed)

    def between(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    truth = GaborFits(
        between(-2, 2, count, 2),
        between(1.2, 2.5, count, 2),
        between(0.12, 0.35, count),
        between(0, math.pi, count),
        between(-3.1, 3.1, count),
        between(0.5, 2, count),
        torch.ones(count, dtype=torch.float64),
    )
    atoms = truth.drawn(SIDE)
    return truth, atoms + noise * torch.randn(atoms.shape, generator=generator, dtype=torch.float64)


def turned(one, other, period):
    apart = (one - other) % period
    return torch.minimum(apart, period - apart)


def test_derivatives_are_those_of_finite_differences():
    x, y = module._grid(SIDE)
    at = torch.tensor([[0.3, -0.7, 0.4, 0.7, 0.21, 0.8, 0.9, -0.4]], dtype=torch.float64)
    _, jacobian = module._gabor(at, x, y)
    for i in range(8):
        moved = at.clone(), at.clone()
        moved[0][0, i] += 1e-6
        moved[1][0, i] -= 1e-6
        slope = (module._gabor(moved[0], x, y)[0] - module._gabor(moved[1], x, y)[0]) / 2e-6
        assert torch.allclose(slope[0], jacobian[0, :, i], atol=1e-7)


def test_known_functions_are_found_again():
    truth, atoms = drawn()
    found = gabor_fit(atoms)
    exact = found.r2 > 0.9999
    assert exact.float().mean() > 0.95
    assert torch.allclose(found.drawn(SIDE)[exact], atoms[exact], atol=0.05)
    # what is wider than its wave has no second description
    clear = exact & (truth.cycles[:, 0] > 0.35)
    assert clear.sum() > 10
    assert torch.allclose(found.cycles[clear], truth.cycles[clear], atol=0.02)
    assert torch.allclose(found.centre[clear], truth.centre[clear], atol=0.1)
    assert turned(found.orientation[clear], truth.orientation[clear], math.pi).max() < 0.02
    assert turned(found.phase[clear], truth.phase[clear], 2 * math.pi).max() < 0.3
    assert torch.allclose(found.amplitude[clear], truth.amplitude[clear], rtol=0.05)


def test_noise_is_no_gabor_function():
    _, atoms = drawn(noise=0.02)
    assert gabor_fit(atoms).good.all()
    noise = torch.randn(40, SIDE**2, generator=torch.Generator().manual_seed(2))
    assert not gabor_fit(noise).good.any()


def test_a_round_spot_is_a_blob_and_a_grating_is_not():
    x, y = module._grid(SIDE)
    spot = torch.exp(-(x.square() + y.square()) / 4)
    centre_surround = torch.exp(-(x.square() + y.square()) / 3) - 0.5 * torch.exp(-(x.square() + y.square()) / 6)
    grating = torch.exp(-(x.square() + y.square()) / 12) * torch.cos(2 * math.pi * 0.25 * x)
    found = gabor_fit(torch.stack([spot, centre_surround, grating]))
    assert found.good.tolist() == [True, True, True]
    assert found.blobs.tolist() == [True, True, False]


def test_tuning_of_gratings_and_spots():
    truth, atoms = drawn(count=60)
    tuning = orientation_selectivity(atoms)
    narrow = truth.cycles.amin(1) > 0.4
    assert turned(tuning.orientation[narrow], truth.orientation[narrow], math.pi).max() < 0.15
    assert torch.allclose(tuning.frequency[narrow], truth.frequency[narrow], atol=0.04)
    assert tuning.selective[narrow].all()
    x, y = module._grid(SIDE)
    spot = torch.exp(-(x.square() + y.square()) / 3) - 0.5 * torch.exp(-(x.square() + y.square()) / 6)
    round_one = orientation_selectivity(spot[None])
    assert float(round_one.circular_variance) > 0.95
    assert not round_one.selective.any()
    assert float(round_one.bandwidth) == pytest.approx(math.pi / 2)


def test_orientations_are_counted_around_the_half_circle():
    x, y = module._grid(SIDE)
    angles = [0.0, 0.05, math.pi - 0.05, math.pi / 2]
    waves = [torch.cos(2 * math.pi * 0.25 * (x * math.cos(a) + y * math.sin(a))) for a in angles]
    bell = torch.exp(-(x.square() + y.square()) / 14)
    tuning = orientation_selectivity(torch.stack([wave * bell for wave in waves]))
    assert orientation_histogram(tuning, 4).tolist() == pytest.approx([0.75, 0, 0.25, 0])
    with pytest.raises(ConfigurationError, match="bins is 0"):
        orientation_histogram(tuning, 0)


def test_the_width_of_a_peak():
    angles = torch.arange(36) * (math.pi / 36)
    width = 0.3  # falls to 1/√2 at width · √(ln 2)
    apart = torch.minimum(angles, math.pi - angles)
    found = module._half_width(torch.exp(-apart.square() / (2 * width**2))[None].double())
    assert float(found) == pytest.approx(width * math.sqrt(math.log(2)), abs=math.pi / 36)


def test_variety_counts_cells():
    spread = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)) * 0.1 + 0.05
    assert shape_variety(spread) == pytest.approx(16)
    assert shape_variety(torch.zeros(9, 2)) == pytest.approx(1)
    assert shape_variety(torch.zeros(0, 2)) == 0
    # two cells of 3 and 1 units: of 6 pairs, 3 meet both
    assert shape_variety(torch.tensor([[0.0, 0]] * 3 + [[1.0, 1]]), units=2) == pytest.approx(1.5)
    assert shape_variety(torch.cat([spread] * 3), units=16) < 16


def test_sparseness_of_one_and_of_all():
    codes = torch.tensor([[0.0, -3.0, 0, 0], [1, 1, -1, 1], [0, 0, 0, 0]])
    assert sparseness(codes, 1).tolist() == pytest.approx([1, 0, 4 / 3])


def test_kurtosis_by_hand():
    values = torch.tensor([[1.0, -1, 1, -1], [0, 0, 0, 4], [2, 2, 2, 2]])
    assert kurtosis(values, 1).tolist() == pytest.approx([-2, 7 / 3 - 3, 0])


def test_bad_input_is_named():
    with pytest.raises(ConfigurationError, match=r"\(3, 10\)"):
        gabor_fit(torch.zeros(3, 10))
    broken = torch.zeros(3, 144)
    broken[1, 7] = torch.inf
    with pytest.raises(NonFiniteError, match="atom 1"):
        orientation_selectivity(broken)

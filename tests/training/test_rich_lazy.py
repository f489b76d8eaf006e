from __future__ import annotations

import math

import pytest
import torch

from gossamer.core.effective_rank import effective_rank
from gossamer.errors import ConfigurationError, SparsityError
from gossamer.training.rich_lazy import (
    GAIN,
    INITIALIZATIONS,
    aligned_low_rank,
    block_mask,
    cell_types,
    dale,
    gaussian,
    like_connectome,
    low_rank,
    modular,
    motifs,
    one_block,
    random_mask,
    sparse,
)

N = 120
NORM = GAIN * math.sqrt(N)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_all_have_the_norm_of_gaussian_weights_and_repeat(name):
    draw = INITIALIZATIONS[name]
    weights = draw(N, generator=seeded())
    assert weights.shape == (N, N)
    assert weights.norm() == pytest.approx(NORM, rel=0.03)
    assert torch.equal(weights, draw(N, generator=seeded()))
    assert draw(N, 2 * GAIN, generator=seeded()).norm() == pytest.approx(2 * float(weights.norm()), rel=1e-4)


def test_structure_lowers_the_effective_rank_and_random_places_do_not():
    full = effective_rank(gaussian(N, generator=seeded()))
    assert full > 0.6 * N
    assert effective_rank(low_rank(N, 5, generator=seeded())) <= 5
    assert effective_rank(dale(N, balanced=False, generator=seeded())) < 0.8 * full
    assert effective_rank(cell_types(N, generator=seeded())) < 0.8 * full
    assert effective_rank(motifs(N, chain=0.4, generator=seeded())) < 0.8 * full
    assert effective_rank(sparse(N, 0.1, generator=seeded())) > 0.9 * full
    assert effective_rank(modular(N, 10, generator=seeded())) > 0.8 * full
    assert effective_rank(one_block(N, 0.1, generator=seeded())) <= round(N * math.sqrt(0.1))


@pytest.mark.parametrize("balanced", [True, False])
def test_all_weights_of_a_unit_have_one_sign(balanced):
    weights = dale(N, inhibitory=0.25, balanced=balanced, generator=seeded())
    assert (weights[:, :90] >= 0).all()
    assert (weights[:, 90:] <= 0).all()
    assert (weights.sum(1).mean().abs() < 0.1 * weights.abs().sum(1).mean()) == balanced


def test_the_means_of_cell_types_are_there_in_blocks():
    weights = cell_types(N, types=3, strength=1.0, generator=seeded())
    assert int(torch.linalg.matrix_rank(weights)) <= 3
    for i in range(3):
        for j in range(3):
            block = weights[40 * i : 40 * i + 40, 40 * j : 40 * j + 40]
            assert torch.equal(block, block[:1, :1].expand(40, 40))


@pytest.mark.parametrize("value", [0.6, 0.0, -0.6])
def test_reciprocal_weights_correlate_as_asked(value):
    weights = motifs(400, reciprocal=value, generator=seeded())
    above = torch.triu_indices(400, 400, 1)
    pairs = torch.stack([weights[above[0], above[1]], weights[above[1], above[0]]])
    assert float(torch.corrcoef(pairs)[0, 1]) == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize("value", [0.3, -0.3])
def test_chains_correlate_as_asked(value):
    # mean of W_ij W_jk over k ≠ i, over many draws because all chains through a unit share a number
    total = square = 0.0
    for seed in range(60):
        weights = motifs(100, chain=value, generator=seeded(seed)).double()
        received, sent = weights.sum(0), weights.sum(1)
        diagonal = weights.diagonal()
        total += float(((received - diagonal) * (sent - diagonal)).mean()) / 99**2
        square += float(weights.square().mean())
    assert total / square == pytest.approx(value, abs=0.06)


def test_masks_have_exact_counts():
    assert int(random_mask(30, 0.1, seeded()).sum()) == 90
    assert int(block_mask(30, 0.25).sum()) == 15**2
    assert int((sparse(30, 0.1, generator=seeded()) != 0).sum()) == 90
    assert int((modular(30, 5, generator=seeded()) != 0).sum()) == 5 * 6**2
    assert sparse(30, 0.1, generator=seeded()).norm() == pytest.approx(GAIN * math.sqrt(30), rel=1e-5)


@pytest.mark.parametrize("cosine", [0.0, 0.6, 1.0])
def test_the_direction_of_a_rank_one_matrix_is_as_aligned_as_asked(cosine):
    direction = torch.randn(20, generator=seeded())
    weights = aligned_low_rank(direction, 30, 4.0, cosine, seeded(1))
    assert int(torch.linalg.matrix_rank(weights)) == 1
    assert weights.norm() == pytest.approx(4, rel=1e-5)
    read = torch.linalg.svd(weights).Vh[0]
    assert float((read @ direction / direction.norm()).abs()) == pytest.approx(cosine, abs=1e-5)


def test_a_connectome_gives_places_signs_and_sizes():
    counts = torch.zeros(6, 6)
    counts[0, 1], counts[2, 3], counts[4, 5] = 4.0, -2.0, 1.0
    weights = like_connectome(counts, 6, generator=seeded())
    assert int((weights != 0).sum()) == 3
    values = weights[weights != 0]
    torch.testing.assert_close(values / values.abs().max(), torch.tensor([1.0, -0.5, 0.25])[_order(values)])
    shuffled = like_connectome(counts, 6, randomize=True, generator=seeded())
    torch.testing.assert_close(shuffled.flatten().sort().values, weights.flatten().sort().values)


def _order(values):
    """Which of the three known values each is."""
    size = values.abs() / values.abs().max()
    return torch.tensor([{1.0: 0, 0.5: 1, 0.25: 2}[round(float(each), 2)] for each in size])


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="n and gain"):
        gaussian(0)
    with pytest.raises(ConfigurationError, match="inhibitory"):
        dale(10, inhibitory=1.0)
    with pytest.raises(ConfigurationError, match="types"):
        cell_types(10, types=11)
    with pytest.raises(ConfigurationError, match="chain"):
        motifs(10, chain=0.7)
    with pytest.raises(SparsityError, match="density"):
        random_mask(10, 0.0)
    with pytest.raises(ConfigurationError, match="vector"):
        aligned_low_rank(torch.zeros(3), 4, 1.0)
    with pytest.raises(ConfigurationError, match="no synapse"):
        like_connectome(torch.zeros(5, 5), 4)
    with pytest.raises(ConfigurationError, match=r"\(6, 6\)"):
        like_connectome(torch.ones(5, 5), 6)

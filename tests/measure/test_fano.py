from __future__ import annotations

import itertools
import math

import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.measure.fano import fano_samples, log_packing, mixture_kl


def test_a_greedy_packing_is_at_least_as_large_as_promised():
    for length, distance in ((6, 0.3), (8, 0.4), (9, 0.25)):
        chosen = []
        for pattern in itertools.product((0, 1), repeat=length):
            far = all(sum(a != b for a, b in zip(pattern, other)) >= distance * length for other in chosen)
            chosen += [pattern] if far else []
        assert math.log(len(chosen)) >= log_packing(length, distance) > 0


def test_a_packing_grows_with_the_number_of_coordinates():
    values = [log_packing(count) for count in (10, 100, 1000, 10000)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[3] / values[2] == pytest.approx(10, rel=0.05)


def test_the_divergence_of_single_gaussians_is_exact():
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    kl, error = mixture_kl(one, other, 0.5, 2000, torch.Generator().manual_seed(0))
    assert kl == pytest.approx(2 / (2 * 0.25), abs=4 * error + 1e-9)
    assert mixture_kl(one, one, 0.5)[0] == 0


def test_the_divergence_of_mixtures_is_that_of_quadrature():
    means, others, sigma = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-0.3], [2.0]]), 0.7
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)

    def density(centres):
        return sum(torch.distributions.Normal(float(m), sigma).log_prob(x).exp() for m in centres.double()) / 2

    p, q = density(means), density(others)
    exact = torch.trapezoid(p * (p / q).clamp_min(1e-300).log(), x)
    kl, error = mixture_kl(means, others, sigma, 20000, torch.Generator().manual_seed(0))
    assert error < 0.02
    assert kl == pytest.approx(float(exact), abs=4 * error)


def test_fano_counts_samples():
    assert fano_samples(math.log(2) * 11, 0.5) == pytest.approx(20 * math.log(2))
    assert fano_samples(math.log(2) * 11, 0.5, failure=0.5) == pytest.approx(9 * math.log(2))
    assert fano_samples(0.1, 0.5) == 0


def test_bad_input_is_refused():
    with pytest.raises(ConfigurationError, match="share"):
        log_packing(10, 0.5)
    with pytest.raises(ConfigurationError, match="kl"):
        fano_samples(3.0, 0.0)
    with pytest.raises(ConfigurationError, match="sigma"):
        mixture_kl(torch.eye(2), torch.eye(2), 0.0)

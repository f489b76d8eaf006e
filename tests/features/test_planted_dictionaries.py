"""Planted activations follow the laws that they are said to."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError
from gossamer.features.dictionary_metrics import modalities
from gossamer.features.matching_pursuit import MatchingPursuitSAE
from gossamer.features.planted_dictionaries import CausalFeatures, HeavyTailed, TwoModalities


def test_numbers_of_features_have_the_mean_and_a_heavy_tail():
    law = HeavyTailed(d=16, features=200, mean=8, most=40)
    x, values = law.sample(5000, torch.Generator().manual_seed(0))
    counts = (values > 0).sum(1).float()
    assert float(counts.mean()) == pytest.approx(8, rel=0.05)
    assert int(counts.min()) == 1
    assert int(counts.max()) == 40
    assert float(counts.std()) > 5
    torch.testing.assert_close(x, values @ law.directions())
    frequency = (values > 0).float().mean(0)
    assert float(frequency[:20].mean()) > 4 * float(frequency[100:].mean())
    constant = HeavyTailed(d=16, features=200, mean=8, most=40, spread=0.0)
    assert bool(((constant.sample(50, torch.Generator())[1] > 0).sum(1) == 8).all())


def test_gradients_are_those_of_the_loss_downstream():
    law = CausalFeatures(idle=12, causal=10, active=4)
    x, gradient, values = law.sample(30, torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(law.downstream(leaf).square().sum() / 2, leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(law.downstream(x), values[:, 12:], rtol=1e-4, atol=1e-5)
    active = values > 0
    assert bool((active[:, :12].sum(1) == 4).all())
    assert bool((active[:, 12:].sum(1) == 4).all())
    assert float(values[:, :12][active[:, :12]].mean()) == pytest.approx(3.0, rel=0.1)
    assert float(values[:, 12:][active[:, 12:]].mean()) == pytest.approx(0.3, rel=0.1)


def test_a_pursuit_finds_which_concepts_two_kinds_of_inputs_share():
    law = TwoModalities(d=64, shared=6, own=6, active=1, gap=1.5)
    x, is_first = law.sample(2000, torch.Generator().manual_seed(0))
    apart = x[is_first].mean(0) - x[~is_first].mean(0)
    own = law.directions()[6:12].mean(0) - law.directions()[12:].mean(0)
    assert float((apart - own).norm()) == pytest.approx(1.5, rel=0.1)
    sae = MatchingPursuitSAE(64, 18, k=2, bias=False)
    with torch.no_grad():  # a dictionary that has been learned perfectly
        sae.decoder.copy_(law.directions())
    sae.eval()
    codes = sae.encode(x - torch.where(is_first[:, None], 0.5, -0.5) * (apart - own))
    strong = SparseCodes.from_dense(codes.to_dense() * (codes.to_dense() > 0.3))
    found = modalities(strong, is_first)
    assert float(found.score[:6].max()) < 0.3
    assert float(found.score[6:].min()) > 0.7


def test_laws_that_cannot_be_are_refused():
    with pytest.raises(ConfigurationError, match="mean ≤ most"):
        HeavyTailed(mean=70)
    with pytest.raises(ConfigurationError, match="active 9 of 6"):
        TwoModalities(shared=6, active=9)
    with pytest.raises(ConfigurationError, match="active is 300"):
        CausalFeatures(active=300)

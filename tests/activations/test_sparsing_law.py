import copy

import numpy as np
import pytest
import torch

from gossamer.activations.base import install
from gossamer.activations.sparsing_law import (
    PPLBudget,
    fit_sparsing_law,
    ppl_p_of_checkpoints,
    ppl_p_sparsity,
)
from gossamer.activations.truncation import Truncation
from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure import perplexity


def material(seed=0, tokens=40, width=24):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator), torch.randn(10, width, generator=generator)


def test_the_error_is_the_norm_of_the_sum_of_what_goes():
    x, down = material()
    contributions = x.double().unsqueeze(1) * down.double()
    gone = contributions.norm(dim=1) <= 1.0
    expected = ((contributions * gone.unsqueeze(1)).sum(2).norm(dim=1) / contributions.sum(2).norm(dim=1)).mean()
    assert Truncation(x, down).error(1.0) == pytest.approx(float(expected), rel=1e-5)


def test_contributions_that_cancel_cost_nothing():
    x = torch.tensor([[1.0, 1.0, 5.0]])
    down = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 1.0]])
    assert Truncation(x, down).error(1.0) == 0


@pytest.mark.parametrize("cett", [0.05, 0.2, 0.5])
def test_the_threshold_is_the_largest_that_stays_within_the_tolerance(cett):
    truncation = Truncation(*material())
    threshold = truncation.threshold(cett)
    step = (truncation.high - truncation.low) / 65_535
    assert truncation.error(threshold) <= cett
    assert threshold == pytest.approx(truncation.high) or truncation.error(threshold + 2 * step) > cett


def test_the_price_in_perplexity_is_met_and_not_exceeded(tiny_llama, batches):
    found = ppl_p_sparsity(tiny_llama, batches, 1.0, progress=False)
    dense = perplexity(tiny_llama, batches, 24, 24, progress=False).value
    with install(tiny_llama, found.rules, 0.0):
        again = perplexity(tiny_llama, batches, 24, 24, progress=False).value
    assert again / dense == pytest.approx(found.ratio, rel=1e-6)
    assert found.ratio <= 1.01
    assert found.sparsity == pytest.approx(1 - np.mean(list(found.per_layer.values())))
    assert found.exact_ratio == 1.0


@pytest.mark.parametrize("metric", ["top-k", "fat"])
def test_the_rival_metrics_pay_the_same_price(tiny_llama, batches, metric):
    assert ppl_p_sparsity(tiny_llama, batches, 1.0, metric=metric, progress=False).ratio <= 1.01


def test_checkpoints_share_a_setting_whose_price_is_the_mean_of_theirs(tiny_llama, batches):
    other = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    both = ppl_p_of_checkpoints([tiny_llama, other], batches[:2], 1.0, tolerance=0.05, progress=False)
    assert both[0].setting == both[1].setting
    ratios = [found.ratio for found in both]
    assert np.mean(ratios) <= 1.01
    assert ratios[0] != ratios[1]
    for model, found in zip((tiny_llama, other), both):
        dense = perplexity(model, batches[:2], 24, 24, progress=False).value
        with install(model, found.rules, 0.0):
            again = perplexity(model, batches[:2], 24, 24, progress=False).value
        assert again / dense == pytest.approx(found.ratio, rel=1e-6)
    with pytest.raises(CalibrationError, match="give a model"):
        ppl_p_of_checkpoints([], batches, progress=False)


def test_a_price_is_a_budget_to_install(tiny_llama, batches):
    budget = PPLBudget(p=0.5)
    with pytest.raises(CalibrationError, match="no rules yet"):
        budget.install(tiny_llama)
    budget.calibrate(tiny_llama, batches, progress=False)
    with budget.install(tiny_llama) as installed, torch.no_grad():
        tiny_llama(batches[0])
        assert set(installed.realised) == {f"model.layers.{i}.mlp.down_proj" for i in range(3)}


def test_fits_find_the_laws_that_made_the_data():
    data = np.geomspace(1e6, 1e9, 12)
    falling = 0.07 + np.exp(-0.4 - 2e-4 * data**0.45)
    found = fit_sparsing_law(data, falling, "relu")
    assert found.limit == pytest.approx(0.07, abs=0.005)
    assert found.parameters["alpha"] == pytest.approx(0.45, abs=0.05)
    assert np.allclose(found.predict(data), falling, atol=2e-3)
    rising = 0.4 - 30 * data**-0.4
    found = fit_sparsing_law(data, rising, "silu")
    assert found.limit == pytest.approx(0.4, abs=0.01)
    assert found.r_squared > 0.999
    assert found.aic < fit_sparsing_law(data, rising, "constant").aic


def test_bad_input_is_refused(tiny_llama, batches):
    with pytest.raises(ConfigurationError, match="p is 0"):
        ppl_p_sparsity(tiny_llama, batches, 0, progress=False)
    for price in (-1, 0, float("nan")):
        with pytest.raises(ConfigurationError, match="price in percent above 0"):
            PPLBudget(p=price)
    with pytest.raises(ConfigurationError, match="dense_prefill is 2"):
        PPLBudget(dense_prefill=2)
    with pytest.raises(ConfigurationError, match="metric 'best'"):
        ppl_p_sparsity(tiny_llama, batches, metric="best", progress=False)
    with pytest.raises(CalibrationError, match="batches of token ids"):
        ppl_p_sparsity(tiny_llama, [{"input_ids": batches[0]}], progress=False)
    with pytest.raises(CalibrationError, match="needs 6 pairs"):
        fit_sparsing_law([1, 2, 3], [0.1, 0.2, 0.3])
    with pytest.raises(CalibrationError, match="above 0"):
        fit_sparsing_law([0, 1, 2, 3, 4, 5, 6], [0.1] * 7)

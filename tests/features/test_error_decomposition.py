"""The error of an autoencoder taken apart: planted splits are found again, and noise is not explained."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.regression import determination, fit_linear
from gossamer.errors import CalibrationError, ConfigurationError, NonFiniteError
from gossamer.features.activation_rules import TopK
from gossamer.features.error_decomposition import (
    error_decomposition,
    norm_predictability,
    reconstruct,
    rescaled,
    split_rows,
)
from gossamer.features.planted_activations import PlantedActivations, planted_in
from gossamer.features.sae import SAE


@pytest.fixture(scope="module")
def planted():
    return PlantedActivations().draw(8000)


def test_the_planted_split_is_found(planted):
    expected = PlantedActivations().linear_share()
    report = error_decomposition(planted.x, planted.x_hat)
    assert report.r2_vec_pooled == pytest.approx(expected, abs=0.03)
    assert 0.2 < expected < 0.9  # the test says something about both parts
    error = planted.error
    size = error.square().sum() / (planted.x - planted.x.mean(0)).square().sum()
    assert report.fvu == pytest.approx(float(size), rel=0.05)
    assert report.fvu_linear + report.fvu_nonlinear == pytest.approx(report.fvu)


def test_without_what_the_autoencoder_introduces_all_but_crosstalk_is_linear():
    kept = {"features": 40, "known": 20, "rank": 0, "shrinkage": 0.0}
    law = PlantedActivations(**kept)
    part = law.draw(3000)
    assert law.linear_share() == pytest.approx(1)
    assert error_decomposition(part.x, part.x_hat).fvu_nonlinear == pytest.approx(0, abs=1e-9)


def test_nothing_is_found_where_activations_belong_to_other_tokens(planted):
    order = torch.randperm(len(planted.x), generator=torch.Generator().manual_seed(2))
    x = planted.x[order]
    report = error_decomposition(x, x - planted.error)
    assert report.r2_vec < 0.01
    assert report.r2_norm < 0.01


def test_both_parts_make_the_error_and_reconstructions_are_stretched_first(planted):
    shrunk = rescaled(planted.x_hat, planted.x_hat.mean(0), 0.5)
    report = error_decomposition(planted.x, shrunk, refit_scale=True)
    free = error_decomposition(planted.x, planted.x_hat, refit_scale=True)
    assert report.shrinkage == pytest.approx(2 * free.shrinkage)
    assert report.r2_vec == pytest.approx(free.r2_vec, abs=1e-3)
    linear, nonlinear = report.parts(planted.x, shrunk)
    again = rescaled(shrunk, report.centre, report.shrinkage)
    torch.testing.assert_close(linear + nonlinear, planted.x - again)
    torch.testing.assert_close(linear, planted.x @ report.W)


def test_scores_are_of_tokens_that_were_not_fitted_and_are_what_they_say(planted):
    x, x_hat = planted.x[:2000].float(), planted.x_hat[:2000].float()
    report = error_decomposition(x, x_hat, seed=3)
    fitted, scored = split_rows(2000, None, 0.5, 3)
    assert not set(fitted.tolist()) & set(scored.tolist())
    assert len(fitted) + len(scored) == 2000
    solved = torch.linalg.lstsq(x[fitted].double(), (x - x_hat)[fitted].double()).solution
    torch.testing.assert_close(report.W, solved, rtol=1e-4, atol=1e-6)
    error = (x - x_hat)[scored].double()
    guess = x[scored].double() @ solved
    assert report.r2_vec == pytest.approx(determination(error, guess).mean, abs=1e-6)
    left = (error - guess).square().sum()
    total = (x[scored] - x[scored].mean(0)).double().square().sum()
    assert report.fvu_nonlinear == pytest.approx(float(left / total), rel=1e-5)
    nmse = (error.square().sum(1) / x[scored].double().square().sum(1)).mean()
    assert report.nmse == pytest.approx(float(nmse), rel=1e-6)
    assert report.tokens == len(scored) == report.with_outliers.tokens
    length = fit_linear(x[fitted].double().norm(dim=1)[:, None], (x - x_hat)[fitted].double().square().sum(1), 0, True)
    expected = determination(error.square().sum(1), length(x[scored].double().norm(dim=1)[:, None])[:, 0]).mean
    assert report.r2_norm_by_length == pytest.approx(expected, abs=1e-6)


def test_outliers_are_left_out_and_reported(planted):
    x, x_hat = planted.x.clone(), planted.x_hat.clone()
    x[:40] *= 1000
    report = error_decomposition(x, x_hat)
    assert report.outliers == 40
    assert report.with_outliers.tokens > report.tokens
    assert report.with_outliers.r2_vec > report.r2_vec + 0.05  # it fits the few long ones
    assert report.r2_vec == pytest.approx(error_decomposition(planted.x, planted.x_hat).r2_vec, abs=0.02)
    assert "outliers out" in report.table()
    assert f"{report.with_outliers.r2_vec:.4f}" in report.table()


def test_tokens_of_a_document_stay_together():
    documents = torch.arange(50).repeat_interleave(13)
    fitted, scored = split_rows(650, documents, 0.3, 1)
    assert not set(documents[fitted].tolist()) & set(documents[scored].tolist())
    assert len(documents[fitted].unique()) == 15
    assert len(split_rows(650, documents, 0.3, 1, most=20)[1]) == 20


def test_what_predicts_a_length_and_what_does_not(planted):
    generator = torch.Generator().manual_seed(0)
    squared = planted.error.square().sum(1)
    names = (squared > squared.median()).long() + 5
    found = norm_predictability(
        planted.error,
        {"itself": squared, "token": names, "noise": torch.randn(len(squared), 2, generator=generator)},
    )
    assert found["itself"] == pytest.approx(1)
    assert 0.2 < found["token"] < 0.9
    assert found["noise"] < 0.01


def test_an_autoencoder_explains_in_pieces_what_it_explains_at_once():
    sae, x = SAE(12, 40, TopK(3)).eval(), torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reconstruct(sae, x, 7), sae(x).output.detach())


def test_real_activations_become_planted_ones():
    sae, x = SAE(12, 40, TopK(5)).eval(), torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
    whole = planted_in(sae, x, 0.0)
    assert whole.error.abs().max() < 1e-6
    torch.testing.assert_close(whole.x, reconstruct(sae, x))
    some = planted_in(sae, x, 0.5, 0.1, 0.2)
    torch.testing.assert_close(some.x - some.x_hat, some.error)
    assert some.absent.norm() > 0
    assert float(some.introduced.std() / some.dense.std()) == pytest.approx(2, rel=0.1)
    with pytest.raises(ConfigurationError, match="dropped is 2"):
        planted_in(sae, x, 2)


def test_what_does_not_fit_is_refused(planted):
    x, x_hat = planted.x[:300], planted.x_hat[:300]
    with pytest.raises(CalibrationError, match="at least 320"):
        error_decomposition(x, x_hat)
    with pytest.raises(ConfigurationError, match="must be"):
        error_decomposition(x, x_hat[1:])
    with pytest.raises(ConfigurationError, match="train_frac is 1"):
        error_decomposition(x, x_hat, train_frac=1.0)
    with pytest.raises(ConfigurationError, match="documents is"):
        error_decomposition(x, x_hat, documents=torch.zeros(3))
    with pytest.raises(CalibrationError, match="1 documents"):
        error_decomposition(x, x_hat, documents=torch.zeros(300))
    with pytest.raises(ConfigurationError, match="outlier is 0"):
        error_decomposition(x, x_hat, outlier=0)
    damaged = x.clone()
    damaged[7, 3] = torch.inf
    with pytest.raises(NonFiniteError, match="x of token 7"):
        error_decomposition(damaged, x_hat)
    with pytest.raises(ConfigurationError, match="known 9 of 5"):
        PlantedActivations(features=5, known=9)
    with pytest.raises(ConfigurationError, match="probability is 0"):
        PlantedActivations(probability=0)

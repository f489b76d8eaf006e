from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from gossamer.errors import ConfigurationError
from gossamer.features.activation_rules import MutualChoice, TopK
from gossamer.features.sae import SAE
from gossamer.features.sae_transformer import SAETransformer


def rows(count=400, seed=0):
    generator = np.random.default_rng(seed)
    directions = generator.normal(size=(24, 12))
    return (generator.random((count, 24)) * (generator.random((count, 24)) < 0.08)) @ directions


def test_scikit_learn_finds_nothing_to_complain_about():
    check_estimator(SAETransformer(max_iter=15))


def test_training_explains_the_rows():
    X = rows()
    model = SAETransformer(48, 4, max_iter=400, learning_rate=3e-3, random_state=0).fit(X)
    codes = model.transform(X)
    assert codes.shape == (400, 48)
    assert (np.count_nonzero(codes, axis=1) <= 4).all()
    left = np.square(X - model.inverse_transform(codes)).sum() / np.square(X - X.mean(0)).sum()
    rough = SAETransformer(48, 4, max_iter=1, random_state=0).fit(X)
    assert left < 0.3
    assert (
        left < 0.6 * np.square(X - rough.inverse_transform(rough.transform(X))).sum() / np.square(X - X.mean(0)).sum()
    )
    assert model.get_feature_names_out()[0] == "saetransformer0"
    assert np.array_equal(
        SAETransformer(48, 4, max_iter=400, learning_rate=3e-3, random_state=0).fit_transform(X), codes
    )


def test_codes_and_back_are_those_of_the_autoencoder():
    X = rows().astype(np.float32)
    model = SAETransformer(k=3, activation=MutualChoice(3), max_iter=60, random_state=0).fit(X)
    explained = model.sae_.encode(torch.from_numpy(X))
    assert np.allclose(model.transform(X), explained.to_dense().detach(), atol=1e-6)
    assert np.allclose(model.inverse_transform(model.transform(X)), model.sae_.decode(explained).detach(), atol=1e-4)
    double = model.transform(X.astype(np.float64))
    assert double.dtype == np.float64
    assert np.allclose(double, model.transform(X), atol=1e-3)


def test_an_autoencoder_from_elsewhere_is_fitted():
    sae = SAE(12, 30, TopK(2))
    sae.prepare(torch.from_numpy(rows()).float())
    model = SAETransformer.of(sae, sparse_output=True)
    codes = model.transform(rows().astype(np.float32))
    assert codes.shape == (400, 30)
    assert codes.getnnz(1).max() <= 2
    assert np.allclose(model.components_, (sae.decoder / sae.scale).detach())


def test_bad_input_is_named():
    with pytest.raises(ConfigurationError, match="k is 99"):
        SAETransformer(8, 99).fit(rows())
    with pytest.raises(NotFittedError):
        SAETransformer().transform(rows())

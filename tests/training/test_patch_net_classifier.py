from __future__ import annotations

import numpy as np
import pytest
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from gossamer.errors import ConfigurationError
from gossamer.training.dynamic_signal_distribution import make_dsd
from gossamer.training.patch_net_classifier import PatchNetClassifier


def rows(n, seed):
    x, y, _ = make_dsd(n, 8, 10, 0.2, signal(), seed=seed)
    return x.flatten(1).numpy(), np.where(y > 0, "up", "down")


def signal():
    import torch

    return torch.nn.functional.one_hot(torch.tensor(3), 10).float()


def test_it_keeps_the_rules_of_scikit_learn():
    check_estimator(PatchNetClassifier(max_iter=25))


def test_it_is_chosen_among_its_kinds_by_cross_validation():
    x, labels = rows(80, 0)
    base = PatchNetClassifier(8, threshold=0.25, standardize=False, random_state=0)
    search = GridSearchCV(base, {"kind": ["fcn", "cnn"]}, cv=2).fit(x, labels)
    assert search.best_params_ == {"kind": "cnn"}
    test, truth = rows(400, 1)
    assert search.score(test, truth) > 0.9


def test_the_weights_are_those_of_a_masked_layer():
    x, labels = rows(60, 0)
    found = PatchNetClassifier(8, "lcn", random_state=0).fit(x, labels)
    blocks = np.kron(np.eye(8, dtype=bool), np.ones(10, dtype=bool))
    assert found.coef_.shape == (8, 80)
    assert not found.coef_[~blocks].any()
    assert set(found.predict(x)) <= {"up", "down"}


def test_patches_must_divide_the_features():
    with pytest.raises(ConfigurationError, match="80 features"):
        PatchNetClassifier(7).fit(*rows(20, 0))

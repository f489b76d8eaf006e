from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.training.g2g_classifier import G2GClassifier
from gossamer.training.g2gnet import g2g_mask


def rows(n=120, features=32, seed=0):
    """Three classes of noise around different centres."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    centres = np.random.default_rng(99).normal(size=(3, features))
    return centres[labels] + 0.7 * generator.normal(size=(n, features)), np.array(["ant", "bee", "cat"])[labels]


def test_it_keeps_the_rules_of_scikit_learn():
    check_estimator(G2GClassifier((32, 32), max_iter=60, batch_size=32))


def test_it_learns_from_few_edges():
    images, labels = load_digits(return_X_y=True)
    found = G2GClassifier(max_iter=150, random_state=0).fit(images[:1200], labels[:1200])
    assert found.masks_.density == pytest.approx(1 / 8 + 7 / 8 * 0.15, abs=1e-3)
    assert not found.masks_.violations(found.network_)
    assert found.score(images[1200:], labels[1200:]) > 0.85


def test_the_wiring_is_that_of_groups():
    found = G2GClassifier((16, 24), groups=4, p_inter=0.0, max_iter=2, random_state=0).fit(*rows())
    for name, shape in (("0.weight", (16, 32)), ("3.weight", (24, 16))):
        assert torch.equal(found.masks_[name], g2g_mask(*shape, groups=4, p_inter=0.0))
    assert set(found.masks_) == {"0.weight", "3.weight"}


@pytest.mark.parametrize(("prune", "growth"), [("set", "random"), ("hebbian", "hebbian"), ("random", "gradient")])
def test_edges_move_and_stay_as_many(prune, growth):
    options = {"hidden_layer_sizes": (16, 16), "groups": 4, "max_iter": 12, "random_state": 0}
    still = G2GClassifier(**options).fit(*rows())
    moved = G2GClassifier(**options, exchanges=3, exchange=0.2, prune=prune, growth=growth).fit(*rows())
    for name, mask in still.masks_.items():
        assert int(mask.sum()) == int(moved.masks_[name].sum())
        assert not torch.equal(mask, moved.masks_[name])
    assert not [module for module in moved.network_.modules() if module._forward_hooks]


def test_settings_are_chosen_by_cross_validation():
    x, labels = rows()
    base = G2GClassifier((16, 16), groups=4, max_iter=80, random_state=0)
    search = GridSearchCV(base, {"learning_rate": [1e-6, 3e-3]}, cv=2).fit(x, labels)
    assert search.best_params_ == {"learning_rate": 3e-3}
    assert search.score(*rows(seed=1)) > 0.9


def test_fewer_features_than_groups_leave_the_first_layer_dense():
    x, labels = rows(features=5)
    found = G2GClassifier((16, 16), max_iter=5, random_state=0).fit(x, labels)
    assert set(found.masks_) == {"3.weight"}
    assert isinstance(found.network_[0], nn.Linear)
    assert bool((found.network_[0].weight != 0).all())


def test_training_leaves_the_generator_of_torch_alone():
    state = torch.random.get_rng_state()
    G2GClassifier((8, 8), max_iter=2, dropout=0.5, random_state=0).fit(*rows())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hidden_layer_sizes": (4, 16)}, "8 units"),
        ({"hidden_layer_sizes": ()}, "at least one layer"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"p_inter": 2.0}, "p_inter is 2.0"),
    ],
)
def test_bad_settings_are_refused(wrong, named):
    with pytest.raises(ConfigurationError, match=named):
        G2GClassifier(**wrong).fit(*rows())

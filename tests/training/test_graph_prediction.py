from __future__ import annotations

import sys

import numpy as np
import pytest

from gossamer.errors import ConfigurationError, MissingDependencyError, NonFiniteError, UnknownNameError
from gossamer.training.graph_prediction import REGRESSORS, Prediction, feature_correlations, predict_result


def rows(count=40, noise=0.05, slope=1.0):
    generator = np.random.default_rng(0)
    table = []
    for _ in range(count):
        size, other = generator.normal(size=2)
        accuracy = slope * size + noise * generator.normal()
        table.append({"size": size, "other": other, "same": 3.0, "accuracy": accuracy})
    return table


def test_correlations_agree_with_numpy_and_leave_constants_out():
    table = rows()
    found = feature_correlations(table, ["size", "other", "same"], "accuracy")
    assert set(found) == {"size", "other"}
    columns = [[row[name] for row in table] for name in ("other", "accuracy")]
    assert found["other"] == pytest.approx(np.corrcoef(columns)[0, 1])
    assert found["size"] > 0.99


def test_p_counts_the_shuffles_that_did_as_well():
    assert Prediction(0.5, (0.6, 0.5, 0.1, -1.0)).p == pytest.approx(3 / 5)
    assert Prediction(0.5, ()).p == 1


@pytest.mark.parametrize("regressor", REGRESSORS)
def test_what_follows_from_the_features_is_foretold_and_what_does_not_is_not(regressor):
    pytest.importorskip("sklearn")
    found = predict_result(rows(), ["size", "other"], "accuracy", regressor, permutations=4, trees=10)
    assert found.r2 > 0.7
    assert found.p == pytest.approx(0.2)
    assert max(found.shuffled) < 0.3
    chance = predict_result(rows(slope=0.0), ["size", "other"], "accuracy", regressor, permutations=0, trees=10)
    assert chance.r2 < 0.2


def test_a_prediction_never_sees_the_graph_that_it_is_about():
    pytest.importorskip("sklearn")
    # one feature names each graph: anything that has seen it would be perfect
    table = [
        {"name": float(i), "accuracy": float(value)} for i, value in enumerate(np.random.default_rng(1).normal(size=60))
    ]
    assert predict_result(table, ["name"], "accuracy", permutations=0).r2 < 0.3


def test_the_same_seed_gives_the_same_numbers():
    pytest.importorskip("sklearn")
    one, other = (predict_result(rows(), ["size"], "accuracy", permutations=2, trees=5, seed=2) for _ in range(2))
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"folds": 1}, "folds is 1"),
        ({"permutations": -1}, "permutations -1"),
        ({"trees": 0}, "trees 0"),
        ({"result": "speed"}, "'speed'"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        predict_result(**{"rows": rows(), "features": ["size"], "result": "accuracy"} | arguments)


def test_data_that_cannot_be_predicted_are_refused():
    with pytest.raises(UnknownNameError, match="random forest"):
        predict_result(rows(), ["size"], "accuracy", "random forrest")
    with pytest.raises(ConfigurationError, match="nothing to predict"):
        predict_result(rows(), ["size"], "same")
    with pytest.raises(ConfigurationError, match="2 graphs"):
        predict_result(rows(2), ["size"], "accuracy")
    broken = rows()
    broken[3]["size"] = float("nan")
    with pytest.raises(NonFiniteError):
        feature_correlations(broken, ["size"], "accuracy")


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    for name in ("sklearn", "sklearn.ensemble", "sklearn.linear_model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"scikit-learn.*gossamer\[graphs\]"):
        predict_result(rows(), ["size"], "accuracy")

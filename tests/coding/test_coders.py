"""Coders as scikit-learn sees them, against its own."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.decomposition import SparseCoder
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from gossamer.coding.coders import LassoCoder, MatchingPursuitCoder, OMPCoder, ThresholdingCoder
from gossamer.coding.dictionary_learner import DictionaryLearner
from gossamer.errors import ConfigurationError, MissingDependencyError, UnknownNameError

CODERS = [
    OMPCoder(),
    MatchingPursuitCoder(),
    LassoCoder(),
    LassoCoder(method="cd", positive=True),
    ThresholdingCoder(),
    DictionaryLearner(max_iter=2),
]


def problem(signals=50, atoms=20, size=8, seed=0):
    generator = np.random.default_rng(seed)
    dictionary = generator.normal(size=(atoms, size))
    return generator.normal(size=(signals, size)), dictionary


@pytest.mark.parametrize("coder", CODERS, ids=repr)
def test_scikit_learn_finds_nothing_to_complain_about(coder):
    check_estimator(coder)


@pytest.mark.parametrize("algorithm", ["omp", "lasso_cd"])
def test_codes_are_those_of_scikit_learn(algorithm):
    X, dictionary = problem()
    unit = dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True)
    peer = SparseCoder(
        unit, transform_algorithm=algorithm, transform_n_nonzero_coefs=3, transform_alpha=0.4, transform_max_iter=10_000
    )
    ours = OMPCoder(unit, 3) if algorithm == "omp" else LassoCoder(unit, 0.4, tol=1e-10, transform_max_iter=20_000)
    assert np.allclose(ours.fit(X).transform(X), peer.fit_transform(X), atol=5e-4)


@pytest.mark.parametrize("coder", [OMPCoder, MatchingPursuitCoder])
def test_the_length_of_atoms_does_not_change_what_is_reconstructed(coder):
    X, dictionary = problem()
    unit = dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True)
    short, long = coder(unit, 3).fit(X), coder(dictionary, 3).fit(X)
    assert np.allclose(
        short.inverse_transform(short.transform(X)), long.inverse_transform(long.transform(X)), atol=1e-10
    )
    assert (np.count_nonzero(long.transform(X), axis=1) <= 3).all()
    done = coder(unit, 20, tol=1e3).fit(X)
    assert not done.transform(X).any()


def test_codes_may_be_a_sparse_matrix():
    X, dictionary = problem()
    dense, compressed = (OMPCoder(dictionary, 2, sparse_output=flag).fit(X) for flag in (False, True))
    codes = compressed.transform(X)
    assert codes.format == "csr"
    assert codes.nnz == 100
    assert np.array_equal(codes.toarray(), dense.transform(X))
    assert np.allclose(compressed.inverse_transform(codes), dense.inverse_transform(dense.transform(X)))


def test_names_of_codes_and_precision():
    X, dictionary = problem()
    coder = OMPCoder(dictionary).fit(X)
    assert coder.get_feature_names_out().tolist()[:2] == ["ompcoder0", "ompcoder1"]
    assert coder.transform(X.astype(np.float32)).dtype == np.float32
    assert coder.transform(X).dtype == np.float64
    with pytest.raises(NotFittedError):
        OMPCoder(dictionary).transform(X)


def test_many_rows_are_coded_in_parts(monkeypatch):
    X, dictionary = problem()
    whole = LassoCoder(dictionary).fit(X).transform(X)
    monkeypatch.setattr("gossamer.coding.coders._ROWS", 7)
    assert np.allclose(LassoCoder(dictionary).fit(X).transform(X), whole, atol=1e-8)


def test_too_few_steps_are_said():
    X, dictionary = problem()
    with pytest.warns(ConvergenceWarning, match="duality gap"):
        LassoCoder(dictionary, alpha=1e-3, transform_max_iter=1, tol=1e-9).fit_transform(X)


def test_a_learner_explains_more_than_rows_at_random():
    generator = np.random.default_rng(0)
    planted = generator.normal(size=(16, 12))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    codes = generator.normal(size=(1500, 16)) * (generator.random((1500, 16)) < 0.12)
    X = codes @ planted + 0.01 * generator.normal(size=(1500, 12))
    learner = DictionaryLearner(16, target_l0=2, max_iter=15, random_state=0).fit(X)
    alike = np.abs(learner.components_ @ planted.T).max(0)
    assert (alike > 0.95).mean() >= 0.8
    assert learner.transform(X).shape == (1500, 16)
    assert np.count_nonzero(learner.transform(X), axis=1).mean() == pytest.approx(2, rel=0.3)
    left = X - learner.inverse_transform(learner.transform(X))
    assert np.square(left).sum() < 0.1 * np.square(X).sum()
    again = DictionaryLearner(16, target_l0=2, max_iter=15, random_state=0).fit(X)
    assert np.array_equal(again.components_, learner.components_)


def test_rows_may_come_in_parts():
    X, _ = problem(signals=300)
    learner = DictionaryLearner(10, target_l0=2, random_state=0)
    for part in np.split(X, 3):
        learner.partial_fit(part)
    assert (learner.n_iter_, learner.n_steps_) == (3, 3)
    assert learner.error_[-1] < learner.error_[0]
    before = pickle.loads(pickle.dumps(learner)).components_
    after = learner.partial_fit(X).components_
    assert not np.array_equal(before, after)
    assert np.allclose(np.linalg.norm(after, axis=1), 1)
    assert DictionaryLearner(10, max_iter=2, random_state=0).fit(X).partial_fit(X).n_iter_ == 3
    with pytest.raises(ValueError, match="features"):
        learner.partial_fit(X[:, :4])


def test_coders_work_in_a_pipeline_and_a_search():
    X, _ = problem(signals=60)
    codes = make_pipeline(StandardScaler(), DictionaryLearner(6, max_iter=1, random_state=0)).fit_transform(X)
    assert codes.shape == (60, 6)

    def error(coder, X, y=None):
        return -np.square(X - coder.inverse_transform(coder.transform(X))).mean()

    search = GridSearchCV(OMPCoder(np.eye(8)), {"n_nonzero_coefs": [1, 2, 5]}, scoring=error, cv=2).fit(X)
    assert search.best_params_ == {"n_nonzero_coefs": 5}


@pytest.mark.parametrize(
    ("coder", "word"),
    [
        (OMPCoder(np.eye(3)), r"\(3, 3\)"),
        (OMPCoder(np.zeros((2, 8))), "atom 0"),
        (OMPCoder(np.eye(8), 9), "n_nonzero_coefs is 9"),
        (OMPCoder(n_components=0), "n_components is 0"),
        (LassoCoder(np.eye(8), alpha=0.0), "lam is 0"),
        (DictionaryLearner(0), "n_components is 0"),
        (DictionaryLearner(batch_size=0), "batch_size is 0"),
        (DictionaryLearner(update="newton"), "newton"),
        (DictionaryLearner(dict_init=np.eye(3)), "start is"),
    ],
)
def test_bad_input_is_named(coder, word):
    X, _ = problem()
    with pytest.raises(ConfigurationError, match=word):
        coder.fit(X).transform(X)


def test_unknown_penalties_and_wrong_codes_are_named():
    X, _ = problem()
    with pytest.raises(UnknownNameError, match="cel0"):
        DictionaryLearner(penalty="cel9").fit(X)
    with pytest.raises(ValueError, match=r"\(50, 3\)"):
        OMPCoder(np.eye(8)).fit(X).inverse_transform(np.zeros((50, 3)))


def test_without_scikit_learn_the_module_loads_and_says_what_is_missing(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from gossamer.coding.coders import OMPCoder\n"
        "from gossamer.errors import MissingDependencyError\n"
        "try: OMPCoder()\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "gossamer[coding]" in done.stdout
    assert issubclass(MissingDependencyError, ImportError)
    assert torch.get_num_threads() >= 1

"""The LASSO against scikit-learn's, and the certificate that it is solved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.coding.lasso import duality_gap, lasso
from gossamer.errors import ConfigurationError, NonFiniteError

pytest.importorskip("sklearn")
from sklearn.linear_model import Lasso


def problem(signals=20, atoms=30, size=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(atoms, size, generator=generator, dtype=torch.float64)
    return torch.randn(signals, size, generator=generator, dtype=torch.float64), dictionary


def cost(x, dictionary, codes, lam):
    return (x - codes @ dictionary).square().sum(1) / 2 + lam * codes.abs().sum(1)


@pytest.mark.parametrize("method", ["fista", "cd"])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_codes_are_those_of_scikit_learn(method, nonnegative):
    x, dictionary = problem()
    found = lasso(x, dictionary, 1.5, method=method, tolerance=1e-11, max_iter=20_000, nonnegative=nonnegative)
    peer = Lasso(alpha=1.5 / 12, fit_intercept=False, tol=1e-13, max_iter=100_000, positive=nonnegative)
    theirs = torch.from_numpy(peer.fit(dictionary.T.numpy(), x.T.numpy()).coef_)
    assert found.converged.all()
    assert torch.allclose(found.codes, theirs, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.floats(0.2, 5), st.sampled_from(["fista", "cd"]), st.booleans())
def test_the_gap_bounds_the_excess(seed, lam, method, nonnegative):
    x, dictionary = problem(signals=5, atoms=9, size=6, seed=seed)
    best = lasso(x, dictionary, lam, tolerance=1e-12, max_iter=50_000, nonnegative=nonnegative)
    rough = lasso(x, dictionary, lam, method=method, tolerance=0, max_iter=7, nonnegative=nonnegative)
    excess = cost(x, dictionary, rough.codes, lam) - cost(x, dictionary, best.codes, lam)
    assert (rough.gap >= excess - 1e-9).all()
    if nonnegative:
        assert (rough.codes >= 0).all()


def test_the_gap_closes_where_the_code_is_zero():
    x, dictionary = problem()
    lam = float((x @ dictionary.T).abs().max()) * 1.01
    zero = torch.zeros(20, 30, dtype=torch.float64)
    assert duality_gap(x, dictionary, zero, lam).max() < 1e-12
    assert not lasso(x, dictionary, lam).codes.any()


@pytest.mark.parametrize("method", ["fista", "cd"])
def test_signals_stop_at_their_tolerance(method):
    x, dictionary = problem()
    for tolerance in (1e-2, 1e-5):
        found = lasso(x, dictionary, 2.0, method=method, tolerance=tolerance, max_iter=5000)
        assert found.converged.all()
        assert (found.gap <= tolerance * x.square().sum(1) / 2).all()
    assert not lasso(x, dictionary, 0.01, method=method, tolerance=1e-12, max_iter=1).converged.all()


def test_atoms_and_signals_of_zero_are_left_alone():
    x, dictionary = problem()
    dictionary[4] = 0
    x[3] = 0
    for method in ("fista", "cd"):
        found = lasso(x, dictionary, 2.0, method=method)
        assert not found.codes[:, 4].any()
        assert not found.codes[3].any()
        assert found.converged[3]


def test_single_precision_reaches_a_plain_tolerance():
    x, dictionary = problem()
    found = lasso(x.float(), dictionary.float(), 0.5, tolerance=1e-4, max_iter=3000)
    assert found.codes.dtype == torch.float32
    assert found.converged.all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"lam": 0.0}, "lam is 0.0"),
        ({"tolerance": -1}, "tolerance -1"),
        ({"max_iter": 0}, "max_iter 0"),
        ({"method": "lars"}, "'lars'"),
        ({"start": torch.zeros(2, 2)}, "start is"),
    ],
)
def test_bad_input_is_named(options, word):
    x, dictionary = problem()
    with pytest.raises(ConfigurationError, match=word):
        lasso(x, dictionary, **{"lam": 0.5, **options})
    with pytest.raises(NonFiniteError, match="signal 0"):
        lasso(x / 0, dictionary, 0.5)

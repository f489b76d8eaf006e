"""Linear maps against scikit-learn and against exact answers, and shares of explained variance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score

from gossamer.core import regression as module
from gossamer.core.regression import determination, fit_linear
from gossamer.errors import ConfigurationError, NonFiniteError


def data(rows=200, inputs=7, outputs=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=generator, dtype=torch.float64) * torch.logspace(-2, 2, inputs)
    y = x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64) + 3
    return x, y + torch.randn(rows, outputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("intercept", [False, True])
def test_it_finds_what_scikit_learn_finds_however_the_rows_are_cut(intercept, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 33)
    x, y = data()
    ours = fit_linear(x, y, intercept=intercept)
    theirs = LinearRegression(fit_intercept=intercept).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(ours.weight.t(), torch.from_numpy(theirs.coef_), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours(x), torch.from_numpy(theirs.predict(x.numpy())), rtol=1e-6, atol=1e-6)


def test_ridge_is_in_units_of_the_inputs_squares():
    x, y = data()
    theirs = Ridge(alpha=0.1 * float(x.square().sum(0).mean()), fit_intercept=False).fit(x.numpy(), y.numpy())
    torch.testing.assert_close(fit_linear(x, y, ridge=0.1).weight.t(), torch.from_numpy(theirs.coef_))
    wider = fit_linear(1000 * x, 1000 * y, ridge=0.1)
    torch.testing.assert_close(wider.weight, fit_linear(x, y, ridge=0.1).weight)


@given(st.integers(0, 1000), st.floats(1e2, 1e5))
@settings(max_examples=20, deadline=None)
def test_small_dimensions_survive_beside_large_ones(seed, large):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 6, generator=generator)
    x[:, 0] = large * (1 + x[:, 0])
    truth = torch.randn(6, 2, generator=generator)
    truth[0] /= large
    found = fit_linear(x, (x.double() @ truth.double()).float())
    torch.testing.assert_close(found.weight[1:].float(), truth[1:], rtol=1e-2, atol=1e-2)


def test_of_many_solutions_it_takes_the_shortest():
    x, y = data(inputs=3)
    doubled = torch.cat([x, x], 1)
    found = fit_linear(doubled, y)
    torch.testing.assert_close(found.weight[:3], found.weight[3:])
    torch.testing.assert_close(found(doubled), fit_linear(x, y)(x))


def test_r_squared_is_scikit_learns():
    x, y = data()
    guess = fit_linear(x, y)(x)
    found = determination(y, guess)
    assert found.mean == pytest.approx(r2_score(y.numpy(), guess.numpy()))
    assert found.pooled == pytest.approx(r2_score(y.numpy(), guess.numpy(), multioutput="variance_weighted"))
    assert determination(y[:, 0], y[:, 0]).pooled == 1
    assert determination(torch.ones(4, 2), torch.zeros(4, 2)).mean == 0


def test_what_does_not_fit_is_refused():
    x, y = data()
    with pytest.raises(ConfigurationError, match="equally many"):
        fit_linear(x, y[1:])
    with pytest.raises(ConfigurationError, match="ridge is -1"):
        fit_linear(x, y, ridge=-1)
    with pytest.raises(ConfigurationError, match="alike"):
        determination(y, y[:, :1])
    x[3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="leave out"):
        fit_linear(x, y)

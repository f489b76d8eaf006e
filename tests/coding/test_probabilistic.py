"""The six probabilistic coders: they find what was planted, and behave as estimators do."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.utils.estimator_checks import parametrize_with_checks

from gossamer.coding.annealing import Annealing
from gossamer.coding.inference import draw, infer
from gossamer.coding.probabilistic import BSC, DSC, GSC, MCA, MMCA, TSC
from gossamer.errors import ConfigurationError

FLOAT = torch.float64
QUICK = {"n_components": 3, "n_steps": 3, "gamma": 2}
CODERS = {kind.__name__: kind for kind in (BSC, TSC, DSC, MCA, MMCA, GSC)}


def patterns(count=5, dimensions=12):
    """Components that share some dimensions."""
    generator = torch.Generator().manual_seed(5)
    size = 4 + 4 * torch.rand(count, dimensions, generator=generator, dtype=FLOAT)
    return size * (torch.rand(count, dimensions, generator=generator) < 0.4)


def planted(coder, count=400, seed=0):
    """Points of the coder's own model, their causes, and the parameters."""
    components = patterns()
    if isinstance(coder, MMCA):
        components[::2] *= -1
    parameters = {"components": components, "noise": torch.tensor(1.0, dtype=FLOAT)}
    if isinstance(coder, GSC):
        h = len(components)
        slab = {"slab_mean": torch.full((h,), 2.0, dtype=FLOAT), "slab_covariance": torch.eye(h, dtype=FLOAT)}
        parameters |= {"prior": torch.full((h,), 0.25, dtype=FLOAT), **slab}
    else:
        values = len(coder.model().values)
        parameters["prior"] = torch.full((values,), 0.25 / values, dtype=FLOAT)
    x, codes = draw(coder.model(), parameters, count, seed)
    return x.numpy(), codes.numpy(), parameters


def similarity(found, truth):
    """|cosine| of every true component with the one it is paired with."""
    found, truth = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (found, truth))
    cosine = np.abs(found @ truth.T)
    rows, columns = linear_sum_assignment(-cosine)
    return cosine[rows, columns]


@parametrize_with_checks([kind(**QUICK, random_state=0) for kind in CODERS.values()])
def test_they_are_estimators(estimator, check):
    check(estimator)


def assert_found(coder, truth):
    rounded = isinstance(coder, MMCA)  # its power mean stays at an exponent of 6, short of the maximum that is drawn
    assert similarity(coder.components_, truth["components"].numpy()).min() > (0.9 if rounded else 0.97)
    assert coder.noise_ == pytest.approx(1.0, abs=1.2 if rounded else 0.2)
    active = 1 - coder.prior_[0] if isinstance(coder, DSC) else np.mean(coder.prior_)
    assert active == pytest.approx(0.25, rel=0.15)


@pytest.mark.parametrize("name", CODERS)
def test_from_nearby_components_prior_and_noise_are_found(name):
    coder = CODERS[name](5, h_prime=5, gamma=5, n_steps=25, annealing=Annealing.none(), random_state=0)
    x, _, truth = planted(coder)
    moved = torch.randn(truth["components"].shape, generator=torch.Generator().manual_seed(1), dtype=FLOAT)
    coder.fit(x, start={"components": truth["components"] + 1.5 * moved, "noise": 9 * truth["noise"]})
    assert_found(coder, truth)


@pytest.mark.parametrize("name", ["BSC", "MCA"])
def test_from_nothing_the_best_of_a_few_starts_finds_them(name):
    best = None
    for seed in range(3):  # expectation maximization stops at the nearest optimum
        coder = CODERS[name](5, h_prime=5, gamma=4, n_steps=50, random_state=seed)
        x, _, truth = planted(coder)
        coder.fit(x)
        best = coder if best is None or coder.score(x) > best.score(x) else best
    assert_found(best, truth)


@pytest.mark.parametrize("name", CODERS)
def test_with_the_truth_inference_finds_the_causes(name):
    coder = CODERS[name](5, h_prime=5, gamma=5, n_steps=1, learn=())
    x, codes, truth = planted(coder)
    coder.fit(x, start=truth)
    found = coder.inference(x, top_k=3)
    right = (found.most_probable.numpy() != 0) == (codes != 0)
    assert right.mean() > 0.95
    assert bool((found.probabilities[:, 0] >= found.probabilities[:, 1]).all())
    if name not in ("MCA", "MMCA"):
        recovered = coder.inverse_transform(coder.transform(x))
        assert np.square(recovered - x).mean() < 1.5
    assert coder.score(x) == pytest.approx(coder.score_samples(x).mean())


def test_states_that_fill_what_is_allowed_are_looked_at_again():
    coder = BSC(5, h_prime=3, gamma=2, n_steps=1, learn=())
    p, noise = torch.tensor([0.3], dtype=FLOAT), torch.tensor(0.1, dtype=FLOAT)
    parameters = {"components": patterns(), "prior": p, "noise": noise}
    causes = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 1, 0]], dtype=FLOAT)
    x = causes @ parameters["components"]
    found = infer(coder.model(), parameters, x, top_k=2)
    assert torch.equal(found.most_probable, causes)
    assert found.gamma.tolist()[:3] == [2, 2, 5]
    kept = infer(coder.model(), parameters, x, top_k=2, adaptive=False)
    assert int((kept.most_probable != 0).sum(1).max()) == 2
    limited = infer(coder.model(), parameters, x, top_k=2, gamma_max=3)
    assert limited.gamma.tolist()[2] == 3
    assert int((limited.most_probable[2] != 0).sum()) == 3


def test_more_states_may_be_asked_for_than_there_are():
    coder = TSC(2, h_prime=2, gamma=2, n_steps=2, random_state=0)
    x, _, _ = planted(TSC(5))
    found = coder.fit(x).inference(x, top_k=20)
    assert found.states.shape == (400, 20, 2)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(400, dtype=FLOAT))
    nine = {tuple(state.tolist()) for state in found.states[0, :9]}
    assert len(nine) == 9


@pytest.mark.parametrize("name", CODERS)
def test_marginals_are_sums_over_states(name):
    coder = CODERS[name](4, h_prime=3, gamma=2, n_steps=3, random_state=0)
    x, _, _ = planted(CODERS[name](5), 50)
    found = coder.fit(x).inference(x, top_k=coder.model().n_states, adaptive=False)
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(50, dtype=FLOAT))
    expected = ((found.states != 0) * found.probabilities[..., None]).sum(1)
    torch.testing.assert_close(found.marginals, expected)


def test_samples_follow_the_model():
    coder = DSC(4, values=(-1, 0, 2), n_steps=1, learn=(), random_state=0)
    start = {
        "components": torch.eye(4, dtype=FLOAT),
        "prior": torch.tensor([0.1, 0.3], dtype=FLOAT),
        "noise": torch.tensor(0.04, dtype=FLOAT),
    }
    coder.fit(np.zeros((3, 4)) + np.arange(4), start=start)
    x, codes = coder.sample(20_000, random_state=1)
    shares = [(codes == value).mean() for value in coder.values_]
    np.testing.assert_allclose(shares, [0.6, 0.1, 0.3], atol=0.01)
    np.testing.assert_allclose(coder.prior_, [0.6, 0.1, 0.3], atol=1e-9)
    assert (x - codes).std() == pytest.approx(0.2, rel=0.02)


def test_the_slab_has_its_mean_and_covariance():
    coder = GSC(3, n_steps=1, learn=(), noise="full", random_state=0)
    covariance = torch.tensor([[1.0, 0.5, 0.0], [0.5, 2.0, 0.0], [0.0, 0.0, 0.5]], dtype=FLOAT)
    start = {
        "components": torch.eye(3, dtype=FLOAT),
        "prior": torch.full((3,), 0.999, dtype=FLOAT),
        "noise": 0.01 * torch.eye(3, dtype=FLOAT),
        "slab_mean": torch.tensor([1.0, -1.0, 0.0], dtype=FLOAT),
        "slab_covariance": covariance,
    }
    coder.fit(np.random.default_rng(0).normal(size=(20, 3)), start=start)
    x, _ = coder.sample(40_000, random_state=0)
    np.testing.assert_allclose(np.cov(x.T), (covariance + 0.01 * torch.eye(3)).numpy(), atol=0.05)
    np.testing.assert_allclose(coder.slab_mean_, [1, -1, 0])


def test_maxima_combine_as_they_are_named():
    components = torch.tensor([[1.0, 3.0], [2.0, 1.0]], dtype=FLOAT)
    both = torch.ones(1, 2, dtype=FLOAT)
    assert MCA(2).model().combine(both, components).tolist() == [[2.0, 3.0]]
    signed = torch.tensor([[1.0, -3.0], [-2.0, 1.0]], dtype=FLOAT)
    assert MMCA(2).model().combine(both, signed).tolist() == [[-2.0, -3.0]]
    assert MMCA(2).model().combine(0 * both, signed).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", CODERS)
def test_what_was_learnt_survives_pickling(name):
    coder = CODERS[name](**QUICK, random_state=0)
    x, _, _ = planted(CODERS[name](5), 40)
    coder.fit(x)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(coder)).transform(x), coder.transform(x))


def test_a_schedule_can_be_given_and_fits_repeat():
    x, _, _ = planted(BSC(5))
    fits = [BSC(5, n_steps=5, annealing=Annealing.none(), random_state=4).fit(x) for _ in range(2)]
    np.testing.assert_array_equal(fits[0].components_, fits[1].components_)
    assert {noted["temperature"] for noted in fits[0].history_} == {1.0}


def test_bad_parameters_are_named():
    x, _, _ = planted(BSC(5), 20)
    for wrong in ({"n_components": 0}, {"gamma": 0}, {"h_prime": -1}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(wrong))} is"):
            BSC(**wrong).fit(x)
    with pytest.raises(ConfigurationError, match="steps is 0"):
        BSC(n_steps=0).fit(x)
    with pytest.raises(ConfigurationError, match="at most 100,000"):
        DSC(40, h_prime=30, gamma=8).fit(x)
    fitted = BSC(**QUICK, random_state=0).fit(x)
    with pytest.raises(ConfigurationError, match="top_k is 0"):
        fitted.inference(x, top_k=0)
    with pytest.raises(ConfigurationError, match="gamma_max is 1"):
        fitted.inference(x, gamma_max=1)
    with pytest.raises(ConfigurationError, match="at least one"):
        fitted.sample(0)

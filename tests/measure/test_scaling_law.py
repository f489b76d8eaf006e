from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from gossamer.core.schedules import Geometric, Linear
from gossamer.errors import ConfigurationError, NonFiniteError, SparsityError, UnknownNameError
from gossamer.measure.pretraining_plan import plan_sparse_pretraining, pretraining_path
from gossamer.measure.scaling_law import PARAMETERS, LawFit, _objective, fit_scaling_law

LAW = LawFit(E=1.2, A=90.0, alpha=0.4, B=300.0, beta=0.35)


def runs(noise=0.0, sizes=(1e5, 2e5, 4e5, 8e5, 1.6e6), budgets=(2e6, 5e6, 1.2e7), seed=0):
    n, d = (axis.ravel() for axis in np.meshgrid(sizes, budgets))
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(n.size))
    return {"n_avg": n, "tokens": d, "loss": LAW.predict(n, d) * factors}


def test_a_law_without_noise_is_found_exactly():
    fit = fit_scaling_law(runs())
    for name in PARAMETERS:
        assert getattr(fit, name) == pytest.approx(getattr(LAW, name), rel=1e-6)
    assert fit.runs == 15
    assert fit.objective < 1e-15


def test_the_exponent_is_within_five_percent_under_noise_and_inside_its_interval():
    fit = fit_scaling_law(runs(noise=1e-3), resamples=12)
    assert fit.alpha == pytest.approx(LAW.alpha, rel=0.05)
    low, high = fit.intervals["alpha"]
    assert low <= LAW.alpha <= high
    assert set(fit.intervals) == set(PARAMETERS)


def test_one_wild_run_hardly_moves_the_law():
    data = runs(noise=1e-4)
    data["loss"][7] *= 1.3
    assert fit_scaling_law(data).alpha == pytest.approx(LAW.alpha, rel=0.05)


@pytest.mark.parametrize("power", [-0.05, 0.0])
def test_data_without_a_law_in_the_size_give_finite_exponents(power):
    data = runs(noise=1e-3)
    data["loss"] = (1 + 300 / data["tokens"] ** 0.35) * data["n_avg"] ** -power
    fit = fit_scaling_law(data)
    assert 0 < fit.alpha < 5
    assert np.isfinite(fit.predict(data["n_avg"], data["tokens"])).all()


def test_the_gradient_is_that_of_the_objective():
    data = runs(noise=0.01)
    logs = tuple(torch.from_numpy(np.log(data[name])) for name in ("n_avg", "tokens", "loss"))
    for delta in (1e-3, 0.1):
        evaluate = _objective(logs, delta)
        point = torch.tensor([4.0, 0.35, 5.0, 0.3, 0.1], dtype=torch.float64)
        gradient = evaluate(point)[1]
        for place in range(5):
            shift = torch.zeros(5, dtype=torch.float64)
            shift[place] = 1e-6
            slope = (evaluate(point + shift)[0] - evaluate(point - shift)[0]) / 2e-6
            assert float(gradient[place]) == pytest.approx(slope, rel=1e-4)


def test_rows_columns_and_data_frames_are_the_same():
    columns = runs()
    rows = [{"size": n, "text": d, "nll": loss} for n, d, loss in zip(*columns.values())]

    class Frame(Mapping):
        def __getitem__(self, key):
            return columns[key]

        def __iter__(self):
            return iter(columns)

        def __len__(self):
            return len(columns)

    found = [
        fit_scaling_law(rows, "size", "text", "nll").alpha,
        fit_scaling_law(columns).alpha,
        fit_scaling_law(Frame()).alpha,
    ]
    assert found[0] == found[1] == found[2]


def test_score_and_error_measure_the_distance():
    data = runs()
    assert LAW.score(*data.values()) == pytest.approx(1)
    assert LAW.relative_error(*data.values()) == pytest.approx(0)
    assert LAW.relative_error(data["n_avg"], data["tokens"], data["loss"] * 1.1) == pytest.approx(0.1 / 1.1)
    assert LAW.score(data["n_avg"], data["tokens"], data["loss"][::-1]) < 0


def test_the_best_dense_split_beats_its_neighbours():
    compute = 1e14
    n, d = LAW.best_split(compute)
    assert 6 * n * d == pytest.approx(compute)
    best = LAW.predict(n, d)
    for factor in (0.8, 1.25):
        assert LAW.predict(factor * n, d / factor) > best


def test_too_few_runs_and_bad_columns_are_refused():
    data = {name: values[:4] for name, values in runs().items()}
    with pytest.raises(ConfigurationError, match="4 runs cannot determine the 5 parameters"):
        fit_scaling_law(data)
    with pytest.raises(ConfigurationError, match="tokens takes 2 values"):
        fit_scaling_law(runs(budgets=(1e6, 2e6)))
    with pytest.raises(ConfigurationError, match="n_avg takes 2 values"):
        fit_scaling_law(runs(sizes=(1e5, 2e5)))
    with pytest.raises(UnknownNameError, match="did you mean 'tokens'"):
        fit_scaling_law(runs(), d_col="token")
    with pytest.raises(UnknownNameError, match="column 'n_avg'"):
        fit_scaling_law([{"n": 1.0}])
    with pytest.raises(NonFiniteError, match="loss holds nan"):
        fit_scaling_law(runs() | {"loss": np.full(15, np.nan)})
    with pytest.raises(ConfigurationError, match="above 0"):
        fit_scaling_law(runs() | {"tokens": np.zeros(15)})
    with pytest.raises(ConfigurationError, match="delta"):
        fit_scaling_law(runs(), delta=0)


def test_the_planned_run_equals_the_best_dense_one_and_ends_smaller():
    compute = 1e14
    size, tokens = LAW.best_split(compute)
    plan = plan_sparse_pretraining(compute, size / 2, LAW)
    assert plan.average_parameters == pytest.approx(size, rel=1e-3)
    assert plan.tokens == pytest.approx(tokens, rel=1e-3)
    assert plan.loss == pytest.approx(float(LAW.predict(size, tokens)), rel=1e-6)
    assert plan.loss < plan.small_dense_loss
    assert plan.inference_saving == pytest.approx(2, rel=1e-3)
    path = pretraining_path(plan.sparsity)
    ratio = (1 - plan.sparsity) / path.average_density()
    assert plan.final_parameters / plan.average_parameters == pytest.approx(ratio)
    assert plan.final_parameters == pytest.approx(plan.initial_parameters * (1 - plan.sparsity))


def test_a_final_size_beyond_the_best_one_is_planned_dense():
    size, _ = LAW.best_split(1e14)
    plan = plan_sparse_pretraining(1e14, 2 * size, LAW)
    assert plan.sparsity == 0
    assert plan.loss == plan.small_dense_loss


def test_shares_of_compute_are_checked():
    with pytest.raises(ConfigurationError, match="start < end"):
        pretraining_path(0.5, start=0.75, end=0.25)
    with pytest.raises(SparsityError):
        pretraining_path(1.0)
    with pytest.raises(ConfigurationError, match="both must be > 0"):
        plan_sparse_pretraining(0, 1e5, LAW)
    with pytest.raises(SparsityError, match="largest_sparsity"):
        plan_sparse_pretraining(1e14, 1e5, LAW, largest_sparsity=1.0)
    assert pretraining_path(0.5, schedule=Linear).schedule.final == 0.5
    assert isinstance(pretraining_path(0.5).schedule, Geometric)

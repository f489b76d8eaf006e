"""Truncated expectation maximization against the full sum over all states, and its engine."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.coding.annealing import Annealing
from gossamer.coding.discrete_models import DiscreteModel
from gossamer.coding.latent_models import equal_rows, truncated_binomial
from gossamer.coding.maximal_causes import MaximalModel
from gossamer.coding.spike_slab import SpikeSlabModel
from gossamer.coding.state_sets import count_combinations, state_set
from gossamer.coding.truncated_em import em_step, posteriors, truncated_em
from gossamer.errors import CalibrationError, CheckpointError, ConfigurationError, NonFiniteError

FLOAT = torch.float64
PLAIN = Annealing.none()


def models(h=4, h_prime=4, gamma=4):
    """One of each kind."""
    sizes = (h, h_prime, gamma)
    return {
        "binary": DiscreteModel(*sizes, selection="cosine"),
        "ternary": DiscreteModel(*sizes, values=(-1.0, 1.0), tied=True),
        "discrete": DiscreteModel(*sizes, values=(-1.0, 2.0)),
        "maximal": MaximalModel(*sizes),
        "magnitude": MaximalModel(*sizes, signed=True),
        "slab": SpikeSlabModel(*sizes),
        "diagonal slab": SpikeSlabModel(*sizes, noise="diagonal", slab="diagonal"),
        "full noise": SpikeSlabModel(*sizes, noise="full", slab="diagonal"),
    }


EXACT = ("binary", "ternary", "discrete", "diagonal slab", "full noise")
"""Models whose M-step is exact."""


def points(count=60, dimensions=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dimensions, generator=generator, dtype=FLOAT)
    shown = (torch.rand(count, 3, generator=generator) < 0.4).to(FLOAT)
    return x + shown @ (4 * torch.rand(3, dimensions, generator=generator, dtype=FLOAT))


def parameters_of(model, x, seed=1):
    """Parameters in the middle of a run, where nothing is symmetric."""
    return truncated_em(model, x, 3, PLAIN, seed=seed).parameters


def brute_force(model, parameters, x):
    """Log-joint of every state there is ``(points, states)``, and the states."""
    components, noise = parameters["components"], parameters["noise"]
    states = torch.tensor(list(itertools.product((0.0, *model.values), repeat=model.n_components)), dtype=FLOAT)
    identity = torch.eye(components.shape[1], dtype=FLOAT)
    found = []
    for state in states:
        covariance = noise if noise.dim() == 2 else noise * identity
        if isinstance(model, SpikeSlabModel):
            on = state.nonzero().flatten()
            p, active = parameters["prior"], components[on]
            log_prior = (state * p.log() + (1 - state) * torch.log1p(-p)).sum()
            mean = parameters["slab_mean"][on] @ active
            covariance = covariance + active.T @ parameters["slab_covariance"][on][:, on] @ active
        else:
            law = {0.0: float(1 - parameters["prior"].sum()), **dict(zip(model.values, parameters["prior"].tolist()))}
            log_prior = sum(math.log(law[float(value)]) for value in state)
            mean = state @ components
        if isinstance(model, MaximalModel):
            power = model.rho(1.0)
            total = (state[:, None] * components.sign() * components.abs() ** power).sum(0)
            mean = total.sign() * total.abs() ** (1 / power)
        law_of_x = torch.distributions.MultivariateNormal(mean, covariance)
        found.append(log_prior + law_of_x.log_prob(x))
    return torch.stack(found, 1), states


@pytest.mark.parametrize("name", models())
def test_with_all_states_the_posterior_is_the_exact_one(name):
    x, model = points(), models()[name]
    parameters = parameters_of(model, x)
    log_joint, states = brute_force(model, parameters, x)
    block, q, evidence = next(posteriors(model, model.prepare(parameters, 1.0), x))
    torch.testing.assert_close(evidence, torch.logsumexp(log_joint, 1), rtol=0, atol=1e-10)
    exact = torch.softmax(log_joint, 1)
    torch.testing.assert_close(model.marginals(block, q), exact @ (states != 0).to(FLOAT), rtol=0, atol=1e-10)
    if not isinstance(model, SpikeSlabModel):
        torch.testing.assert_close(
            model.means(model.prepare(parameters, 1.0), block, q), exact @ states, atol=1e-10, rtol=0
        )


@pytest.mark.parametrize("name", ["binary", "discrete"])
def test_one_step_of_all_states_is_one_step_of_exact_em(name):
    x, model = points(), models()[name]
    parameters = parameters_of(model, x)
    log_joint, states = brute_force(model, parameters, x)
    q = torch.softmax(log_joint, 1)
    second = torch.einsum("ns,si,sj->ij", q, states, states)
    components = torch.linalg.solve(second, (q @ states).T @ x)
    distances = (x[:, None] - states @ components).square().sum(2)
    fresh, _ = em_step(model, x, parameters, PLAIN, 0.0)
    torch.testing.assert_close(fresh["components"], components, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fresh["noise"], (q * distances).sum() / x.numel(), rtol=1e-9, atol=0)
    counts = torch.stack([(q @ (states == value).to(FLOAT)).sum() for value in model.values])
    torch.testing.assert_close(fresh["prior"], counts / (len(x) * model.n_components), rtol=1e-9, atol=0)


@pytest.mark.parametrize("noise", ["scalar", "diagonal", "full"])
def test_strengths_of_the_slab_are_those_of_a_joint_gaussian(noise):
    x, model = points(30), SpikeSlabModel(3, 3, 3, noise=noise)
    parameters = parameters_of(model, x)
    log_joint, states = brute_force(model, parameters, x)
    covariance = parameters["noise"] if noise == "full" else parameters["noise"] * torch.eye(x.shape[1], dtype=FLOAT)
    q, expected = torch.softmax(log_joint, 1), torch.zeros(len(x), 3, dtype=FLOAT)
    for weight, state in zip(q.T, states, strict=True):
        active = state[:, None] * parameters["components"]
        slab = parameters["slab_covariance"]
        gain = slab @ active @ torch.linalg.inv(covariance + active.T @ slab @ active)
        z = parameters["slab_mean"] + (x - parameters["slab_mean"] @ active) @ gain.T
        expected += weight[:, None] * state * z
    prepared = model.prepare(parameters, 1.0)
    block, q, _ = next(posteriors(model, prepared, x))
    torch.testing.assert_close(model.means(prepared, block, q), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EXACT)
def test_without_truncation_the_likelihood_never_falls(name):
    run = truncated_em(models()[name], points(), 30, PLAIN)
    energies = [noted["free_energy"] for noted in run.history]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(energies))
    assert energies[-1] > energies[0] + 0.1


@pytest.mark.parametrize("name", ["maximal", "magnitude"])
def test_the_gradient_of_the_mean_is_what_decides_how_much_of_an_element_shows(name):
    x, model = points(), models()[name]
    parameters = parameters_of(model, x)
    prepared = model.prepare(parameters, 2.0)
    block, q, _ = next(posteriors(model, prepared, x))
    found = model.statistics(prepared, block, q, x.new_ones(len(x)))
    components, power = prepared.components.clone().requires_grad_(), prepared.rho
    single = q[:, 1 : 1 + model.n_components]
    expected = single.T @ x
    for group in block.extra:
        states = model.table.states
        total = states @ (components[group.causes].sign() * components[group.causes].abs() ** power)
        images = total.sign() * total.abs() ** (1 / power)
        torch.testing.assert_close(images.detach(), group.images, rtol=1e-9, atol=1e-12)
        if name == "maximal":  # where magnitudes cancel, the share of MMCA is limited to one
            of_state = q[group.rows, 1 + model.n_components :].T @ x[group.rows]
            expected = expected + torch.autograd.grad((images * of_state).sum(), components)[0]
    if name == "maximal":
        torch.testing.assert_close(found["x shown"], expected, rtol=1e-8, atol=1e-8)
    else:
        assert bool((found["shown"] <= q[:, 1:].sum() * 2).all())


@pytest.mark.parametrize("name", models())
def test_blocks_and_kept_posteriors_change_nothing(name, monkeypatch):
    x, model = points(300), models(5, 4, 3)[name]
    cut = Annealing(temperature=2.0, cut=1.0)
    parameters = parameters_of(model, x)
    whole, noted = em_step(model, x, parameters, cut, 0.0)
    monkeypatch.setattr("gossamer.coding.truncated_em._BLOCK", 1)
    monkeypatch.setattr("gossamer.coding.truncated_em._KEPT", 0)
    parts, again = em_step(model, x, parameters, cut, 0.0)
    assert noted["points"] == again["points"] < 300
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-8, atol=1e-10)


def test_the_cut_leaves_out_the_points_with_the_least_evidence():
    x, model = points(200), models(5, 4, 2)["binary"]
    parameters = {**parameters_of(model, x), "prior": torch.tensor([0.4], dtype=FLOAT)}
    evidence = torch.cat([each for _, _, each in posteriors(model, model.prepare(parameters, 1.0), x)])
    used = int(200 * (1 - (1 - model.coverage(parameters)) * 0.5))
    best = x[evidence.argsort(descending=True)[:used].sort().values]
    cut, noted = em_step(model, x, parameters, Annealing(temperature=1.0, cut=0.5), 0.0)
    alone, _ = em_step(model, best, parameters, PLAIN, 0.0)
    assert noted["points"] == used
    torch.testing.assert_close(cut["components"], alone["components"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("anneal_prior", [False, True])
def test_temperature_divides_the_likelihood_and_the_prior_if_asked(anneal_prior):
    x = points()
    for hot in (DiscreteModel(4, 4, 4, anneal_prior=anneal_prior), SpikeSlabModel(4, 4, 4, anneal_prior=anneal_prior)):
        parameters = parameters_of(hot, x)
        log_joint, states = brute_force(hot, parameters, x)
        p = parameters["prior"].expand(4)
        log_prior = torch.where(states > 0, p.log(), torch.log1p(-p)).sum(1)
        expected = (log_joint - log_prior) / 3 + log_prior / (3 if anneal_prior else 1)
        evidence = next(posteriors(hot, hot.prepare(parameters, 3.0), x))[2]
        torch.testing.assert_close(evidence, torch.logsumexp(expected, 1), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------- states


@settings(max_examples=30, deadline=None)
@given(h_prime=st.integers(1, 6), gamma=st.integers(1, 6), kinds=st.integers(1, 3))
def test_every_combination_is_there_once(h_prime, gamma, kinds):
    if gamma > h_prime:
        with pytest.raises(ConfigurationError, match="gamma"):
            state_set(h_prime, gamma)
        return
    values = tuple(float(value) for value in range(1, kinds + 1))
    table = state_set(h_prime, gamma, values)
    every = [s for s in itertools.product((0.0, *values), repeat=h_prime) if 2 <= sum(v > 0 for v in s) <= gamma]
    assert sorted(map(tuple, table.states.tolist())) == sorted(every)
    assert len(every) == count_combinations(h_prime, gamma, kinds)
    torch.testing.assert_close(table.value_counts.sum(1), table.active.sum(1))


def test_the_published_sizes_have_210_combinations():
    assert len(state_set(8, 5).states) == 210


def test_too_many_states_are_refused():
    with pytest.raises(ConfigurationError, match=r"at most 100,000.*lower one"):
        state_set(20, 10)


@settings(max_examples=30, deadline=None)
@given(p=st.floats(0.01, 0.9), count=st.integers(1, 12), gamma=st.integers(1, 12))
def test_mass_and_mean_below_gamma(p, count, gamma):
    gamma = min(gamma, count)
    drawn = [math.comb(count, g) * p**g * (1 - p) ** (count - g) for g in range(count + 1)]
    mass, mean = truncated_binomial(p, count, gamma)
    assert math.isclose(mass, sum(drawn[: gamma + 1]), rel_tol=1e-9)
    assert math.isclose(mean, sum(g * each for g, each in enumerate(drawn[: gamma + 1])), rel_tol=1e-9)
    model = DiscreteModel(count, gamma, gamma)
    coverage = model.coverage({"prior": torch.tensor([p], dtype=FLOAT)})
    assert math.isclose(coverage, mass, rel_tol=1e-9)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 30), columns=st.integers(1, 4), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_equal_rows_are_those_of_unique(rows, columns, width, seed):
    x = torch.randint(0, width, (rows, columns), generator=torch.Generator().manual_seed(seed))
    sets, member = equal_rows(x)
    assert torch.equal(sets[member], x)
    assert torch.equal(sets, x.unique(dim=0))


# ---------------------------------------------------------------------------------------------- the engine


def test_a_schedule_is_joined_by_lines():
    annealing = Annealing(temperature=((0.0, 5.0), (0.8, 1.0)), cut=((0.5, 0.0), (1.0, 1.0)), batch=0.5)
    assert annealing.at("temperature", 0.4) == pytest.approx(3.0)
    assert annealing.at("temperature", 0.9) == 1.0
    assert annealing.at("cut", 0.2) == 0.0
    assert annealing.at("cut", 0.75) == pytest.approx(0.5)
    assert annealing.at("batch", 0.3) == 0.5


@pytest.mark.parametrize("wrong", [{"temperature": 0.5}, {"cut": 2.0}, {"batch": 0}, {"cut": ((0.5, 0), (0.2, 1))}])
def test_a_schedule_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Annealing(**wrong)


@pytest.mark.parametrize("name", ["binary", "maximal", "slab", "full noise"])
def test_jitter_moves_what_it_names_and_stays_in_range(name):
    x, model = points(), models()[name]
    parameters = parameters_of(model, x)
    moved = model.jitter(parameters, {"components": 0.5, "prior": 9.0, "noise": 0.1}, torch.Generator().manual_seed(0))
    assert not torch.equal(moved["components"], parameters["components"])
    assert bool(((moved["prior"] > 0) & (moved["prior"] < 1)).all())
    assert not torch.equal(moved["noise"], parameters["noise"])
    if name == "maximal":
        assert bool((moved["components"] > 0).all())


def test_batches_and_jitter_repeat_with_the_seed():
    schedule = Annealing(temperature=1.0, cut=0.0, batch=0.3, component_jitter=((0, 0.2), (0.5, 0)))
    runs = [truncated_em(models()["binary"], points(), 6, schedule, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].parameters["components"], runs[1].parameters["components"])
    assert not torch.equal(runs[0].parameters["components"], runs[2].parameters["components"])
    assert runs[0].history[0]["points"] == 18


def test_what_is_not_learnt_stays():
    x, model = points(), DiscreteModel(4, 4, 4, learn=("components",))
    start = {"prior": torch.tensor([0.3], dtype=FLOAT), "noise": torch.tensor(2.0, dtype=FLOAT)}
    run = truncated_em(model, x, 4, start=start)
    assert float(run.parameters["prior"]) == pytest.approx(0.3)
    assert float(run.parameters["noise"]) == 2.0


@pytest.mark.parametrize("name", ["ternary", "magnitude", "slab"])
def test_an_interrupted_run_ends_as_it_would_have(name, tmp_path):
    schedule = Annealing(component_jitter=0.1, batch=0.8)
    x, model = points(), models(5, 4, 3)[name]
    straight = truncated_em(model, x, 8, schedule)

    def stop_after_five(*arguments, **settings):
        if settings["step"] == 5:
            raise KeyboardInterrupt
        return em_step(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gossamer.coding.truncated_em.em_step", stop_after_five)
        with pytest.raises(KeyboardInterrupt):
            truncated_em(model, x, 8, schedule, checkpoint=tmp_path / "run.pt", every=2)
    resumed = truncated_em(model, x, 8, schedule, checkpoint=tmp_path / "run.pt")
    assert resumed.history == straight.history
    for key, value in straight.parameters.items():
        assert torch.equal(resumed.parameters[key], value)


def test_checkpoints_of_something_else_are_refused(tmp_path):
    file, x = tmp_path / "run.pt", points()
    truncated_em(models()["binary"], x, 2, checkpoint=file)
    with pytest.raises(CheckpointError, match="another model"):
        truncated_em(models()["ternary"], x, 2, checkpoint=file)
    with pytest.raises(CheckpointError, match="another schedule"):
        truncated_em(models()["binary"], x, 3, checkpoint=file)
    with pytest.raises(CheckpointError, match="another data"):
        truncated_em(models()["binary"], x + 1, 2, checkpoint=file)
    torch.save({**torch.load(file), "version": 99}, file)
    with pytest.raises(CheckpointError, match="version 99"):
        truncated_em(models()["binary"], x, 2, checkpoint=file)
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="delete it"):
        truncated_em(models()["binary"], x, 2, checkpoint=file)


def test_bad_input_is_named():
    model, x = models()["binary"], points()
    with pytest.raises(CalibrationError, match="shape"):
        truncated_em(model, x[0], 1)
    with pytest.raises(NonFiniteError, match="point 7"):
        truncated_em(model, torch.where(torch.arange(60)[:, None] == 7, torch.nan, x), 1)
    with pytest.raises(ConfigurationError, match="steps is 0"):
        truncated_em(model, x, 0)
    with pytest.raises(ConfigurationError, match="start names 'W'"):
        truncated_em(model, x, 1, start={"W": x})
    with pytest.raises(ConfigurationError, match="to start from"):
        truncated_em(model, x, 1, start={"components": x})
    with pytest.raises(ConfigurationError, match="gamma is 5"):
        DiscreteModel(4, 4, 5)
    with pytest.raises(ConfigurationError, match="learn names 'sigma'"):
        DiscreteModel(4, 4, 4, learn=("sigma",))
    with pytest.raises(ConfigurationError, match="values"):
        DiscreteModel(4, 4, 4, values=(0.0, 1.0))
    with pytest.raises(ConfigurationError, match="selection"):
        DiscreteModel(4, 4, 4, selection="best")
    with pytest.raises(ConfigurationError, match="noise is 'white'"):
        SpikeSlabModel(4, 4, 4, noise="white")


# ---------------------------------------------------------------------------------------------- several processes

SCHEDULE = Annealing(
    temperature=((0, 3.0), (0.6, 1.0)), cut=((0, 0.0), (0.5, 1.0)), component_jitter=((0, 0.1), (0.3, 0))
)


def _fit_all(x, seed):
    return {name: truncated_em(model, x, 6, SCHEDULE, seed=seed) for name, model in models(5, 4, 2).items()}


def _process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mine = points(151)[:100] if rank == 0 else points(151)[100:]
    runs = _fit_all(mine, seed=rank)
    checkpoint = f"{folder}/run.pt"
    truncated_em(models()["binary"], mine, 4, SCHEDULE, checkpoint=checkpoint, every=2)
    again = truncated_em(models()["binary"], mine, 4, SCHEDULE, checkpoint=checkpoint)
    torch.save(
        {**{name: (run.parameters, run.history) for name, run in runs.items()}, "again": again.done},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", models())
def test_two_processes_learn_what_one_learns(name, together):
    alone = truncated_em(models(5, 4, 2)[name], points(151), 6, SCHEDULE)
    for parameters, history in (together[0][name], together[1][name]):
        for key, value in alone.parameters.items():
            torch.testing.assert_close(parameters[key], value, rtol=1e-6, atol=1e-8)
        assert [noted["points"] for noted in history] == [noted["points"] for noted in alone.history]
    for key, value in together[0][name][0].items():
        assert torch.equal(value, together[1][name][0][key])


def test_a_checkpoint_is_shared_by_processes(together):
    assert [found["again"] for found in together] == [4, 4]

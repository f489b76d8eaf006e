from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.selection import dropped_count
from gossamer.core.workers import seeded, workers
from gossamer.errors import ConfigurationError, MissingDependencyError, SparsityError, UnknownNameError
from gossamer.methods import create
from gossamer.pruning import soup_branches
from gossamer.pruning.soup_baselines import (
    average_at_end,
    average_regardless,
    best_of,
    budgeted,
    longer,
    soup_of_frozen,
)
from gossamer.pruning.soup_branches import Branch, batches_of, branch_seed
from gossamer.pruning.soup_mixing import mix
from gossamer.pruning.sparse_model_soups import SparseModelSoup

INPUTS = torch.randn(96, 1, 6, 6, generator=torch.Generator().manual_seed(5))
LABELS = INPUTS.flatten(1)[:, :3].argmax(1)
BATCHES = list(zip(INPUTS.split(32), LABELS.split(32)))


def network(normalised=True):
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(6)] if normalised else []
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def retrain(model, masks, branch):
    """A few steps of SGD; at the top of the module, so that another process finds it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=branch.weight_decay)
    model.train()
    for rows, rate in zip(batches_of(branch, len(INPUTS), 16), branch.rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS[rows]), LABELS[rows]).backward()
        optimizer.step()


def accuracy(model):
    with torch.no_grad():
        return float((model.eval()(INPUTS).argmax(1) == LABELS).double().mean())


def method(**options):
    return SparseModelSoup(**{"sparsity": 0.8, "phases": 3, "n_models": 3, "steps": 6, **options})


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------------------------------- the loop


def test_each_phase_removes_the_same_share_of_what_is_left_and_the_last_is_exact():
    model = network()
    result = method().fit(model, retrain, batches=BATCHES)
    total = result.masks.total
    assert total == sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1)
    for number, phase in enumerate(result.phases, 1):
        assert total - phase.masks.kept == dropped_count(total, 1 - 0.2 ** (number / 3) if number < 3 else 0.8)
    for before, after in itertools.pairwise(result.phases):
        assert (after.masks & before.masks) == after.masks
    assert not result.masks.violations(result.model)


def test_the_soup_has_exactly_the_zeros_of_every_candidate():
    result = method().fit(network(), retrain, batches=BATCHES)
    for candidate in result.candidates():
        assert (
            MaskSet.from_model(candidate, result.masks)
            == result.masks
            == MaskSet.from_model(result.model, result.masks)
        )


def test_weights_are_the_mean_and_batch_norm_is_measured_anew():
    result = method(phases=1).fit(network(), retrain, batches=BATCHES)
    (phase,) = result.phases
    for name, parameter in result.model.named_parameters():
        mean = torch.stack([state[name].double() for state in phase.candidates]).mean(0).float()
        assert torch.equal(parameter.detach(), mean), name
    features = result.model[0](INPUTS).detach()
    torch.testing.assert_close(result.model[1].running_mean, features.mean((0, 2, 3)))
    averaged = torch.stack([state["1.running_mean"] for state in phase.candidates]).mean(0)
    assert not torch.allclose(result.model[1].running_mean, averaged, atol=1e-3)


def test_the_next_phase_begins_at_the_soup():
    starts = []

    def watch(model, masks, branch):
        starts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        retrain(model, masks, branch)

    result = method(phases=2).fit(network(), watch, batches=BATCHES)
    soup, masks = result.phases[0].soup, result.phases[1].masks
    for start in starts[3:]:
        assert torch.equal(
            start["5.weight"] if "5.weight" in start else start["4.weight"], soup["4.weight"] * masks["4.weight"]
        )
    assert same(starts[0], starts[1])


def test_the_model_and_the_generators_stay_as_they_were():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    method(phases=1).fit(model, retrain, batches=BATCHES)
    assert torch.equal(torch.rand(3), expected)
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("scope", ["global", "uniform", "random"])
def test_scopes_decide_where_weights_go(scope):
    model = network()
    result = method(scope=scope, phases=1, n_models=1).fit(model, retrain, batches=BATCHES)
    shares = result.masks.layer_sparsity()
    if scope == "uniform":
        assert shares == {
            n: dropped_count(result.masks.shapes[n].numel(), 0.8) / result.masks.shapes[n].numel() for n in shares
        }
    lost = [float(p[~result.masks[n]].abs().mean()) for n, p in model.named_parameters() if n in result.masks]
    kept = [float(p[result.masks[n]].abs().mean()) for n, p in model.named_parameters() if n in result.masks]
    if scope == "random":
        assert sum(kept) / sum(lost) == pytest.approx(1, abs=0.25)
    else:
        assert sum(kept) > 1.5 * sum(lost)


def test_momentum_starts_anew_and_data_order_differs_between_branches():
    orders = [list(map(tuple, (rows.tolist() for rows in batches_of(b, 96, 16)))) for b in method().branches(1)]
    assert len({tuple(order) for order in orders}) == 3
    first = method().branches(1)[0]
    assert orders[0] == [tuple(rows.tolist()) for rows in batches_of(first, 96, 16)]
    assert sorted(itertools.chain(*orders[0])) == list(range(96))  # an epoch is every example once
    assert len({branch_seed(s, p, n) for s in range(5) for p in range(5) for n in range(5)}) == 125


# ---------------------------------------------------------------------------------------------- what varies


@pytest.mark.parametrize(
    ("vary", "values", "field"),
    [("seed", (), "seed"), ("weight_decay", (0.0, 1e-3, 1e-2), "weight_decay"), ("length", (4, 6, 9), "rates"),
     ("schedule", ("llr", "ft", 0.3), "rates")],
)  # fmt: skip
def test_branches_differ_in_one_thing_only(vary, values, field):
    branches = method(vary=vary, values=values).branches(2)
    for name in ("seed", "weight_decay", "rates"):
        assert len({getattr(branch, name) for branch in branches}) == (3 if name == field else 1), name
    if vary == "length":
        assert [len(branch.rates) for branch in branches] == [4, 6, 9]
    if vary == "schedule":
        assert max(branches[2].rates) == pytest.approx(0.3)


def test_the_adaptive_schedule_sees_how_much_pruning_hurt():
    result = method(schedule="allr", rates=[0.1] * 1000, n_models=1, warm_up=0).fit(network(), retrain, batches=BATCHES)
    for phase in result.phases:
        assert 0 < phase.distortion < 1
        assert phase.branches[0].rates[0] == pytest.approx(0.1 * phase.distortion)


# ---------------------------------------------------------------------------------------------- mixing


def states(*values):
    return [{"weight": torch.tensor([[value, 0.0]])} for value in values]


def test_greedy_keeps_what_does_not_lower_the_score():
    line = nn.Linear(2, 1, bias=False)
    masks = MaskSet({"weight": torch.tensor([[True, False]])})

    def near_three(model):
        return -abs(float(model.weight.detach()[0, 0]) - 3)

    found = mix("greedy", line, masks, states(9.0, 2.0, 4.0, 3.5), near_three)
    # 3.5 is best; with 2 the mean 2.75 is better; 4 raises it to 3.17, which is better still; 9 would spoil it
    assert found.chosen == (1, 2, 3)
    assert float(found.state["weight"][0, 0]) == pytest.approx(9.5 / 3)
    assert found.scores == pytest.approx((-6, -1, -1, -0.5))
    assert mix("best", line, masks, states(9.0, 2.0, 4.0), near_three).chosen == (1,)
    assert mix("uniform", line, masks, states(9.0, 3.0)).state["weight"][0, 0] == 6


def test_a_choice_without_a_score_or_batch_norm_without_data_is_refused_before_training():
    def never(model, masks, branch):
        raise AssertionError("trained")

    with pytest.raises(ConfigurationError, match="give evaluate"):
        method(method="greedy").fit(network(), never, batches=BATCHES)
    with pytest.raises(ConfigurationError, match="batch norm"):
        method().fit(network(), never)


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.slow
def test_several_processes_give_the_result_of_one():
    one = method(phases=2, n_models=2).fit(network(), retrain, batches=BATCHES)
    two = method(phases=2, n_models=2).fit(network(), retrain, batches=BATCHES, n_jobs=2)
    assert one.masks == two.masks
    assert same(one.model.state_dict(), two.model.state_dict())


def test_work_that_cannot_travel_is_refused_with_a_remedy():
    with pytest.raises(ConfigurationError, match="top of a module"):
        method(phases=1).fit(network(False), lambda model, masks, branch: None, n_jobs=2)


def test_ray_runs_the_same_work_behind_the_same_interface(monkeypatch):
    fake = types.ModuleType("ray")
    started = []
    fake.is_initialized = lambda: bool(started)
    fake.init = lambda **options: started.append(options)
    fake.remote = lambda **options: lambda function: types.SimpleNamespace(remote=lambda *a: _Reference(function, a))
    fake.wait = lambda references, num_returns: (references[-1:], references[:-1])
    fake.get = lambda reference: reference.function(*reference.arguments)
    monkeypatch.setitem(sys.modules, "ray", fake)
    one = method(phases=1).fit(network(), retrain, batches=BATCHES)
    two = method(phases=1).fit(network(), retrain, batches=BATCHES, backend="ray")
    assert started
    assert same(one.model.state_dict(), two.model.state_dict())


class _Reference:
    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"gossamer\[cluster\]"), workers(2, "ray"):
        pass


@pytest.mark.parametrize("options", [{"n_jobs": 0}, {"threads": 0}, {"backend": "threads"}])
def test_impossible_workers_are_refused(options):
    with pytest.raises(ConfigurationError), workers(**options):
        pass


def test_seeding_is_undone():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    with seeded(7):
        first = torch.rand(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    with seeded(7):
        assert torch.equal(torch.rand(2), first)


# ---------------------------------------------------------------------------------------------- going on


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_with_the_branches_that_are_missing(tmp_path, monkeypatch):
    whole = method().fit(network(), retrain, batches=BATCHES)
    piece, done = soup_branches._retrain, []

    def stop_in_the_second_phase(task):
        if len(done) == 4:
            raise Interrupted
        done.append(task[3])
        return piece(task)

    monkeypatch.setattr(soup_branches, "_retrain", stop_in_the_second_phase)
    with pytest.raises(Interrupted):
        method().fit(network(), retrain, batches=BATCHES, directory=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    monkeypatch.setattr(soup_branches, "_retrain", lambda task: (done.append(task[3]), piece(task))[1])
    again = method().fit(network(), retrain, batches=BATCHES, directory=tmp_path)
    assert [(b.phase, b.number) for b in done] == [(p, n) for p in (1, 2, 3) for n in (0, 1, 2)]
    assert same(whole.model.state_dict(), again.model.state_dict())


def test_stored_branches_of_other_settings_or_damaged_ones_are_not_used(tmp_path):
    method(phases=1).fit(network(), retrain, batches=BATCHES, directory=tmp_path)
    other = method(phases=1, weight_decay=0.1)
    fresh = other.fit(network(), retrain, batches=BATCHES)
    reused = other.fit(network(), retrain, batches=BATCHES, directory=tmp_path)
    assert same(fresh.model.state_dict(), reused.model.state_dict())
    (tmp_path / "phase-1-branch-0.safetensors").write_bytes(b"damaged")
    assert same(
        fresh.model.state_dict(), other.fit(network(), retrain, batches=BATCHES, directory=tmp_path).model.state_dict()
    )


# ---------------------------------------------------------------------------------------------- errors


def test_a_branch_that_revives_weights_is_named():
    def revive(model, masks, branch):
        if branch.number == 1:
            with torch.no_grad():
                model[4].weight.add_(1)

    with pytest.raises(ConfigurationError, match=r"branch 1 of phase 1.*4\.weight"):
        method().fit(network(), revive, batches=BATCHES)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 0.0}, SparsityError, "nothing to prune"),
        ({"sparsity": 1.0}, SparsityError, r"\[0, 1\)"),
        ({"phases": 0}, ConfigurationError, "phases is 0"),
        ({"scope": "layer"}, ConfigurationError, "scope is 'layer'"),
        ({"souped": "first"}, ConfigurationError, "souped is"),
        ({"vary": "weight_decay", "values": (0.1, 0.1, 0.2)}, ConfigurationError, "as many different values"),
        ({"values": (1, 2, 3)}, ConfigurationError, "seeds are drawn"),
        ({"weight_decay": -1.0}, ConfigurationError, "weight_decay is"),
    ],
)
def test_impossible_settings_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        method(**options)


def test_it_is_found_by_name():
    assert isinstance(create("sparse-model-soups", sparsity=0.5), SparseModelSoup)
    with pytest.raises(UnknownNameError, match="did you mean 'sparse-model-soups'"):
        create("sparse-model-soup")


# ---------------------------------------------------------------------------------------------- baselines


def test_baselines_cost_what_the_soup_costs():
    soup = method()

    def steps(one):
        return sum(len(branch.rates) for phase in (1, 2, 3) for branch in one.branches(phase))

    assert steps(soup) == steps(longer(soup)) == 3 * 3 * 6
    assert steps(average_at_end(soup)) == (1 + 1 + 3) * 6
    assert longer(soup).n_models == 1


def test_only_the_last_phase_is_souped():
    result = average_at_end(method()).fit(network(), retrain, batches=BATCHES)
    assert [len(phase.candidates) for phase in result.phases] == [1, 1, 3]
    first = method(n_models=1).fit(network(), retrain, batches=BATCHES)
    assert first.phases[1].masks == result.phases[1].masks


def test_the_best_of_several_runs_is_kept():
    scores = {}

    def watch(model):
        scores[round(accuracy(model), 6)] = model
        return accuracy(model)

    best = best_of(method(phases=1), network(), retrain, evaluate=watch, batches=BATCHES)
    assert accuracy(best.model) == pytest.approx(max(scores))


def test_models_of_different_masks_lose_their_sparsity_in_the_mean():
    runs = [
        method(phases=1, scope="random", n_models=1, seed=s).fit(network(), retrain, batches=BATCHES) for s in range(3)
    ]
    mean, left = average_regardless([run.model for run in runs], BATCHES)
    assert left.density == pytest.approx(1 - 0.8**3, abs=0.05)
    union = runs[0].masks | runs[1].masks | runs[2].masks
    assert MaskSet.from_model(mean, union) == union


def test_a_run_with_a_frozen_mask_is_souped_and_restarted_from_the_mean():
    model = network()
    masks = MaskSet({"4.weight": torch.rand(16, 96, generator=torch.Generator().manual_seed(0)) > 0.7})
    masks.apply_(model)
    result = soup_of_frozen(method(), model, masks, retrain, restarts=2, batches=BATCHES)
    assert [len(phase.candidates) for phase in result.phases] == [3, 3]
    assert not result.masks.violations(result.model)
    assert result.phases[0].branches[0].seed != result.phases[1].branches[0].seed
    assert same(result.model.state_dict(), result.phases[1].soup)


def test_a_budget_is_shared_out_among_the_phases():
    assert budgeted(100, [0.1] * 40, phases=3, pretrained=40).steps == 20
    with pytest.raises(ConfigurationError, match="2 of 42 steps are left"):
        budgeted(42, [0.1] * 40, phases=3, pretrained=40)


def test_a_branch_knows_its_place():
    assert Branch(1, 0, 5, 0.0, (0.1,)) == Branch(1, 0, 5, 0.0, (0.1,))
    with pytest.raises(ConfigurationError, match="batch is 9"):
        next(batches_of(Branch(1, 0, 5, 0.0, (0.1,)), 8, 9))

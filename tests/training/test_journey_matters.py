from __future__ import annotations

import pytest
import torch

from gossamer.errors import ConfigurationError, SparsityError, UnknownNameError
from gossamer.measure.sparsity_path import average_parameters
from gossamer.measure.training_ledger import TrainingLedger
from gossamer.papers.byte_language import ByteGPT, next_byte_loss
from gossamer.training.journey_matters import PretrainingSchedule


def small():
    torch.manual_seed(0)
    return ByteGPT(layers=1, width=16, heads=2, length=8)


def run(method, steps, ledgered=False):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    training = method.attach(model, optimizer)
    tokens = torch.arange(16).view(2, 8)
    ledger = TrainingLedger(model, optimizer, tokens, training, of="prunable") if ledgered else None
    sparsities = []
    for _ in range(steps):
        optimizer.zero_grad()
        next_byte_loss(model, tokens).backward()
        optimizer.step()
        sparsities.append(training.sparsity)
    return model, training, sparsities, ledger


def test_pruning_runs_between_the_shares_of_compute():
    method = PretrainingSchedule(sparsity=0.8, total=100, every=1)
    _, training, sparsities, _ = run(method, 100)
    # the compute before `begin` is dense and that after `end` a fifth: more than half of the steps come after
    assert method.begin < 25
    assert method.end < 75
    assert sparsities[method.begin - 1] == 0
    assert sparsities[method.end - 1] == pytest.approx(0.8, abs=1e-3)
    costs = [1 - sparsity for sparsity in [0.0, *sparsities[:-1]]]
    assert sum(costs[: method.begin]) / sum(costs) == pytest.approx(0.25, abs=0.02)
    assert sum(costs[: method.end]) / sum(costs) == pytest.approx(0.75, abs=0.02)
    assert training.phase == "frozen"


def test_a_geometric_ramp_removes_the_same_share_each_time_per_compute():
    method = PretrainingSchedule(sparsity=0.9, total=1000)
    middle = method.path.sparsity(method.path.tokens_at(method.path.total / 2))
    assert middle == pytest.approx(1 - 0.1**0.5, abs=1e-6)


def test_the_ledger_confirms_the_closed_average():
    method = PretrainingSchedule(sparsity=0.8, total=200, every=1, ramp="cubic")
    model, _, _, ledger = run(method, 200, ledgered=True)
    expected = average_parameters(model, method.path, "prunable")
    assert ledger.cost.average_parameters == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_pruned_brings_the_clocks_together():
    begins = [PretrainingSchedule(sparsity=0.8, total=1000, fixed_cost=share).begin for share in (0.0, 0.5, 0.99)]
    assert begins[0] < begins[1] < begins[2] <= 250


def test_one_threshold_for_the_model_gives_layers_their_own_sparsity():
    _, training, _, _ = run(PretrainingSchedule(sparsity=0.5, total=20, every=1), 20)
    assert len({round(share, 3) for share in training.masks.layer_sparsity().values()}) > 1
    _, training, _, _ = run(PretrainingSchedule(sparsity=0.5, total=20, every=1, scope="layer"), 20)
    assert set(training.masks.layer_sparsity().values()) == {0.5}


def test_one_shot_prunes_once():
    method = PretrainingSchedule(sparsity=0.5, total=40, ramp="one-shot")
    _, training, sparsities, _ = run(method, 40)
    assert method.begin == method.end
    assert set(sparsities) == {0.0, training.sparsity}
    assert training.sparsity == pytest.approx(0.5, abs=1e-3)


def test_a_run_that_stops_early_still_ends_at_the_sparsity():
    _, training, _, _ = run(PretrainingSchedule(sparsity=0.5, total=100, every=10), 5)
    masks = training.finalize()
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("start", "stop"), [(0.75, 0.25), (0.5, 0.5), (-0.1, 0.5), (0.25, 1.1)])
def test_shares_out_of_order_are_refused(start, stop):
    with pytest.raises(ConfigurationError, match="start < end"):
        PretrainingSchedule(start_compute=start, stop_compute=stop)


def test_bad_parameters_are_refused():
    with pytest.raises(SparsityError):
        PretrainingSchedule(sparsity=1.0)
    with pytest.raises(UnknownNameError, match="did you mean 'cubic'"):
        PretrainingSchedule(ramp="cubik")
    with pytest.raises(ConfigurationError, match="total is 1"):
        PretrainingSchedule(total=1)
    with pytest.raises(ConfigurationError, match="starts dense"):
        PretrainingSchedule(initial_sparsity=0.2)

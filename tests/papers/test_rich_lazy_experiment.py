from __future__ import annotations

import copy
import json

import pytest
import torch

from gossamer.papers import feedforward_laziness as feedforward
from gossamer.papers import rich_lazy as paper
from gossamer.papers.digits import Digits
from gossamer.papers.linear_laziness import linear_laziness
from gossamer.papers.recurrent_runs import decisions, losses, single, take, train_until
from gossamer.papers.recurrent_tasks import Trials, draw_trials
from gossamer.training.ctrnn import CTRNN

RANKS = (1, 10, 30, 100)


def row(task, name, rank, shift):
    lazy = 0.2 + 0.1 * RANKS.index(rank) + shift
    return {
        "task": task,
        "first weights": name,
        "effective rank": float(rank),
        "norm": 1.0,
        "masked": False,
        "steps": 100,
        "rate": 0.01,
        "loss": 0.1,
        "weight_change": 2 - lazy,
        "plasticity_cost": 50.0,
        "kernel_alignment": lazy,
        "centred_kernel_alignment": lazy,
        "representation_alignment": lazy + 0.3,
        "sign_similarity": 0.5,
    }


def observation(shift=0.0):
    """What a run gives where the claim is right."""
    change = {"full": 0.5 + shift, "rank 1": 1.0, "rank 3": 1.1 + 2 * shift, "aligned": 0.001}
    return {
        "rows": [row(task, f"rank {rank}", rank, shift) for task in ("2AF", "DMS") for rank in RANKS]
        + [row("2AF", name, rank, shift) for name, rank in (("worm", 10), ("unstructured", 100))],
        "linear": {"change": {"1.0": change}, "theory": {"full": {"predicted": 0.8, "found": 0.79}}},
        "forgetting": [{"first weights": "rank 1", "before": 0.9, "after": 0.7 + shift, "steps": 5}],
    }


def observations():
    return [observation(shift) for shift in (0.0, 0.01, -0.01)]


def test_the_claim_holds_where_every_part_does():
    verdict = paper.decide(observations())
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["2AF, full − rank 1, laziness by weight_change"].mean == pytest.approx(0.3)
    assert verdict.numbers["DMS, rank correlation of laziness by kernel_alignment"].mean == pytest.approx(1)
    assert verdict.numbers["linear, change of the least low rank − full"].mean == pytest.approx(0.5)
    assert verdict.numbers["forgetting, rank 1"].mean == pytest.approx(0.2)
    structures = "structures, rank correlation of effective rank with laziness by weight_change"
    assert verdict.numbers[structures].mean == pytest.approx(1)


def test_one_seed_decides_nothing():
    assert paper.decide([observation()]).outcome == "inconclusive"


@pytest.mark.parametrize(("task", "measure"), [("DMS", "kernel_alignment"), ("2AF", "weight_change")])
def test_it_does_not_hold_where_full_rank_changes_more(task, measure):
    found = observations()
    for one in found:
        for each in one["rows"]:
            if each["task"] == task:
                each[measure] = 3 - each[measure]
    verdict = paper.decide(found)
    assert verdict.outcome == "does not hold"
    assert measure in verdict.reason


def test_it_does_not_hold_where_the_linear_network_disagrees():
    found = observations()
    for one in found:
        one["linear"]["change"]["1.0"]["full"] += 1
    assert paper.decide(found).outcome == "does not hold"


def test_ranks_out_of_order_leave_it_open():
    found = observations()
    for one in found:
        rows = [r for r in one["rows"] if r["task"] == "2AF" and r["first weights"].startswith("rank")]
        rows[1]["kernel_alignment"], rows[2]["kernel_alignment"] = 0.55, 0.15
    verdict = paper.decide(found)
    assert verdict.outcome == "inconclusive"
    assert "2AF, rank correlation of laziness by kernel_alignment" in verdict.reason


def test_networks_that_did_not_learn_are_not_compared():
    found = observations()
    for one in found:
        failed = copy.deepcopy(one["rows"][2])
        for key in ("weight_change", "kernel_alignment", "representation_alignment"):
            del failed[key]
        one["rows"][2] = {**failed, "steps": -1}
    verdict = paper.decide(found)
    assert verdict.outcome == "holds"
    assert verdict.numbers["2AF, rank 30, share that learnt it"] == 0


def test_each_network_of_a_stack_is_kept_when_it_is_good_enough():
    generator = torch.Generator().manual_seed(0)
    recurrent = torch.randn(2, 20, 20, generator=generator) / 20**0.5
    model = CTRNN(3, 20, 3, recurrent, copies=(2,), generator=generator)
    held_out = draw_trials("DMS", 100, generator)
    start = losses(model, held_out)
    target = float(start.detach().min()) / 2
    rates = torch.tensor([0.05, 1e-6])
    found = train_until(model, lambda: draw_trials("DMS", 16, generator), held_out, rates, target, 200, every=10)
    assert found.steps[0] > 0
    assert found.steps[1] == -1
    assert found.loss[0] <= target < found.loss[1]
    again = losses(take(found.weights, [0, 1]), held_out)
    torch.testing.assert_close(again, found.loss)
    assert found.quickest([0, 1]) == 0
    assert found.quickest([1]) is None
    alone = single(found.weights, 0)
    accuracy = (alone(held_out.inputs)[0][-1].argmax(-1) == held_out.targets[-1]).double().mean()
    assert decisions(take(found.weights, [0]), held_out)[0] == accuracy


def test_steps_without_an_answer_do_not_count():
    model = CTRNN(3, 5, 4, copies=(2,), generator=torch.Generator().manual_seed(0))
    trials = draw_trials("2AF", 30, torch.Generator().manual_seed(0))
    last = trials.targets.clone()
    last[:-1] = -100
    found = losses(model, Trials(trials.inputs, last))
    outputs = model(trials.inputs)[0][-1]
    for copy_, value in zip(outputs, found):
        torch.testing.assert_close(torch.nn.functional.cross_entropy(copy_, last[-1]), value)


def two_digits():
    """Images that are bright above or below."""
    labels = torch.arange(1000) % 2
    images = torch.rand(1000, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images[labels == 0, :, :14] += 1
    return Digits(images, labels)


@pytest.fixture
def small(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    worm = torch.randn(30, 30, generator=generator) * (torch.rand(30, 30, generator=generator) < 0.3)
    monkeypatch.setattr(paper, "worm_connectome", lambda: ([], worm))
    settings = json.loads(json.dumps(paper.QUICK))
    settings |= {"hidden": 24, "ranks": [1, 4, 24], "held_out": 60, "probe": 4, "rates": [0.03]}
    settings["tasks"] = {"2AF": {"target": 0.2, "steps": 100}, "DMS": {"target": 0.1, "steps": 100}}
    monkeypatch.setattr(feedforward, "digits", two_digits)
    settings["feed-forward"] |= {"width": 12, "ranks": [1, 12], "target": 0.5, "steps": 100, "probe": 4}
    settings["linear"] |= {"size": 12, "samples": 100, "ranks": [1, 3], "scales": [1.0], "draws": 1}
    return settings


def test_a_small_run_gives_what_the_verdict_needs(small):
    found = paper.run(small, 0, lambda items, description: items)
    json.dumps(found, allow_nan=False)
    weights = {each["first weights"] for each in found["rows"] if each["task"] == "2AF"}
    assert {"rank 1", "rank 24", "gain 2.5", "Dale", "worm", "sparse", "one block"} <= weights
    ranks = [each for each in found["rows"] if each["task"] == "2AF" and each["first weights"].startswith("rank")]
    norms = [each["norm"] for each in ranks]
    assert max(norms) == pytest.approx(min(norms), rel=1e-4)
    masked = {each["first weights"] for each in found["rows"] if each["masked"]}
    assert masked == {"sparse", "modules", "one block"}
    assert len(found["forgetting"]) == 3
    layered = [each for each in found["rows"] if each["task"] == "digits, feed-forward"]
    assert [each["first weights"] for each in layered] == ["rank 1", "rank 12"]
    assert layered[1]["steps"] > 0
    assert 0 < layered[1]["kernel_alignment"] < 1
    verdict = paper.decide([found, found])
    assert verdict.numbers["2AF, rank 24, share that learnt it"] == 1


def test_two_linear_layers_do_as_the_theory_says():
    own = {**paper.QUICK["linear"], "size": 40, "scales": [1.0], "ranks": [1], "draws": 4}
    found = linear_laziness(own, 0)
    for name, value in found["theory"].items():
        assert value["found"] == pytest.approx(value["predicted"], abs=0.1), name
    change = found["change"]["1.0"]
    assert change["aligned"] < change["full"] / 10 < change["full"] < change["rank 1"]

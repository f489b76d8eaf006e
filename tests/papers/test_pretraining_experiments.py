from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from gossamer.core.masking import static_masks
from gossamer.measure.report_card import observed_card
from gossamer.measure.scaling_law import LawFit
from gossamer.papers import docstrings as docstrings_module
from gossamer.papers import journey_matters, run_experiment, spdf
from gossamer.papers.byte_language import ByteGPT


def show(items, description):
    return iter(items)


SPDF = {
    **spdf.QUICK,
    **{"bytes": 60_000, "held_out": 4, "length": 80, "batch": 2, "layers": 1, "width": 16, "steps": 4},
    **{
        "packages": 3,
        "classes": 2,
        "examples": [8, 20],
        "tested": 20,
        "tuning_steps": 2,
        "tuning_batch": 4,
        "written": 2,
    },
    "inits": ["zero", "normal"],
}
JOURNEY = {
    **journey_matters.QUICK,
    **{"bytes": 50_000, "held_out": 8, "length": 16, "batch": 2, "layers": 1, "inner": [4, 8, 16]},
    **{"steps": [4, 6, 8], "sparse": [[16, 6, 0.5], [16, 8, 0.8]], "sweep": [16, 6, 0.8], "pairs": [[16, 8, 6]]},
}


@pytest.fixture(autouse=True)
def few_files(monkeypatch):
    """A made-up library instead of the whole of Python's."""
    words = [b"send", b"read", b"close", b"open", b"parse", b"write"]
    names = [b"_".join(pair) for pair in itertools.product(words, words)]

    def library(package, copies):
        functions = (
            b'def %s_%d(value):\n    """Make the %s %d of %s."""\n    return value\n\n' % (name, i, name, i, package)
            for i in range(copies)
            for name in names
        )
        return b"".join(functions)

    files = {package: [library(package.encode(), 24)] for package in docstrings_module.PACKAGES}
    others = [library(b"other", 1)]
    for module in ("docstrings", "python_source"):
        monkeypatch.setattr(f"gossamer.papers.{module}.read_sources", lambda root: (files, others))
    docstrings_module._pairs.cache_clear()
    yield
    docstrings_module._pairs.cache_clear()


def test_every_contestant_of_spdf_is_pretrained_and_fine_tuned(monkeypatch):
    kept = []

    def watched(model, masks):
        kept.append(masks.sparsity)
        return static_masks(model, masks)

    monkeypatch.setattr(spdf, "static_masks", watched)
    observed = spdf.run(json.loads(json.dumps(SPDF)), 0, show)
    json.dumps(observed, allow_nan=False)
    plain = {"dense", "spdf 0.5", "spdf 0.75", "rigl 0.75", "small dense"}
    variants = {f"spdf {s}, {how}" for s in (0.5, 0.75) for how in ("mask kept", "random start")}
    assert set(observed["losses"]) == plain | variants | {"no pretraining"}
    assert all(set(row) == {"docstrings, 8", "docstrings, 20", "packages, 8", "packages, 20"}
               for row in observed["losses"].values())  # fmt: skip
    assert sorted(set(kept)) == [0.5, 0.75]
    assert "chrF" in observed["quality"]["dense"]["docstrings, 20"]
    assert "chrF" not in observed["quality"]["dense"]["docstrings, 8"]
    assert 0 <= observed["quality"]["dense"]["packages, 8"]["accuracy"] <= 1
    assert observed["analysis"]["spdf 0.75, revived"] > 0


def test_the_small_dense_model_costs_what_the_sparse_one_does():
    for budget in (spdf.QUICK, spdf.FULL):
        inner = spdf._inner_of_equal_cost(budget, 0.25)
        small, sparse = spdf._model(budget, inner).flops(), spdf._model(budget).flops(0.25)
        assert inner < budget["width"]
        assert small.forward == pytest.approx(sparse.forward, rel=0.05)


def test_the_report_card_marks_what_cost_more():
    observed = [spdf.run(json.loads(json.dumps({**SPDF, "examples": [20], "inits": ["zero"]})), 0, show)]
    card = observed_card(observed, "loss")
    assert "dense" in card.differences
    assert {"spdf 0.75", "small dense"} & {card.runs[0].name, card.runs[1].name}
    assert "loss" in str(card)


def test_of_several_learning_rates_the_best_on_held_back_examples_is_taken():
    settings = {**SPDF, "tuning_rates": [1e-5, 1e-2], "tuning_steps": 20}
    task = spdf._docstring_task(settings, spdf._source(settings))
    torch.manual_seed(0)
    model = ByteGPT(1, 16, 2, 80)
    found = spdf._finetune(task, model, None, 20, settings, 0)[1]["loss"]
    fast, slow = (
        spdf._finetune(task, model, None, 20, {**settings, "tuning_rates": [rate]}, 0)[1]["loss"]
        for rate in (1e-2, 1e-5)
    )
    assert found == fast < slow


def spdf_observations(spread=0.002, **changes):
    """Losses whose logarithms differ from dense pretraining by what is given."""
    levels = {"dense": 0.0, "spdf 0.5": 0.005, "spdf 0.75": 0.02, "small dense": 0.05, "no pretraining": 0.4}
    levels |= {"spdf 0.5, mask kept": 0.03, "spdf 0.75, mask kept": 0.08, "rigl 0.75": 0.01} | changes
    cases = [f"{task}, {examples}" for task in ("docstrings", "packages") for examples in (200, 1000)]
    found = []
    for seed in (-1, 0, 1):
        losses = {
            label: {
                case: math.exp(level * (1 + 0.1 * place) + spread * seed * index) for place, case in enumerate(cases)
            }
            for index, (label, level) in enumerate(levels.items())
        }
        found.append({"losses": losses, "flops": {"0.75": 2.0}, "analysis": {"moved": 0.1}})
    return found


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"spdf 0.5": 0.09}, "does not hold"),  # also worse than keeping the mask
        ({"spdf 0.75, mask kept": 0.0}, "does not hold"),
        ({"spdf 0.75": 0.07, "small dense": 0.2}, "does not hold"),
        ({"small dense": 0.0}, "does not hold"),
        ({"no pretraining": 0.03}, "does not hold"),
        ({"small dense": 0.02}, "inconclusive"),
        ({"rigl 0.75": -0.5}, "holds"),  # a peer, not a rival
        ({"spread": 0.05}, "inconclusive"),
    ],
)
def test_the_rule_on_spdf_decides_as_stated(changes, outcome):
    assert spdf.decide(spdf_observations(**changes)).outcome == outcome


def test_the_relation_names_what_the_gap_depends_on():
    observations = spdf_observations(spread=0.0)
    found = spdf.relation(observations, [0.5, 0.75])
    assert set(found) == {f"gap, coefficient of {name}" for name in ("sparsity", "headroom", "log examples")}
    # 0.005 and 0.02 of log loss, on average 1.15 times
    assert found["gap, coefficient of sparsity"].mean == pytest.approx(0.015 * 1.15 / 0.25, rel=1e-6)


def test_every_run_of_the_journey_is_made_at_the_size_it_is_meant_to_have():
    observed = journey_matters.run(json.loads(json.dumps(JOURNEY)), 0, show)
    json.dumps(observed, allow_nan=False)
    assert len(observed["dense"]) == 9
    assert set(observed["schedules"]) == set(journey_matters._SCHEDULES)
    assert all(point["average"] == point["final"] == point["initial"] for point in observed["dense"])
    for point in observed["sparse"].values():
        assert point["final"] < point["average"] < point["initial"]
    assert set(observed["runs"]) == {"dense, average size", "pruned", "static"}
    assert set(observed["curves"]) == {"dense", "pruned, at its average size", "pruned, at its final size"}


def test_matched_models_have_the_average_size_of_the_dense_one():
    settings = {**journey_matters.QUICK, "bytes": 5000, "held_out": 2}
    laboratory = journey_matters._Laboratory(settings, 0)
    for inner, dense_inner, steps in settings["pairs"]:
        schedule, static = laboratory.matched(inner, dense_inner, steps)
        pruned, size = (journey_matters._prunable(laboratory.model(each)) for each in (inner, dense_inner))
        assert pruned * schedule.path.average_density() == pytest.approx(size, rel=1e-6)
        assert pruned * (1 - static.sparsity) == pytest.approx(size, rel=1e-6)


def test_schedules_are_compared_at_equal_compute():
    settings = {**journey_matters.QUICK, "bytes": 5000, "held_out": 2}
    laboratory = journey_matters._Laboratory(settings, 0)
    inner, steps, sparsity = settings["sweep"]
    flops = laboratory.model(inner).flops()
    costs = {}
    reference = laboratory.schedule(inner, steps, sparsity)
    for label, (start, stop) in settings["schedules"].items():
        method = laboratory.schedule(inner, steps, sparsity, start, stop)
        equal = laboratory.steps_of_equal_compute(inner, steps, method, reference)
        costs[label] = equal * flops.at(method.path.average_density()).forward
    assert max(costs.values()) / min(costs.values()) < 1.01
    early, late = (
        laboratory.steps_of_equal_compute(inner, steps, laboratory.schedule(inner, steps, sparsity, *share), reference)
        for share in ((0.0, 0.25), (0.75, 0.95))
    )
    assert early > steps > late


LAW = LawFit(E=1.5, A=30.0, alpha=0.35, B=200.0, beta=0.4)


def journey_observations(spread=0.0005, size="average", pair=0.0, control=0.02, **schedules):
    levels = {"0 % to 25 %": 0.02, "25 % to 75 %": 0.0, "50 % to 75 %": 0.004, "75 % to 95 %": 0.02} | schedules
    sparse = [
        {"initial": 4e5, "average": 4e5 * share, "final": 4e5 * share**2, "tokens": tokens}
        for share in (0.3, 0.5, 0.7) for tokens in (2e5, 4e5)
    ]  # fmt: skip
    found = []
    for seed in (-1, 0, 1):
        noise = 1 + spread * seed
        dense = [
            {"average": n, "tokens": d, "loss": float(LAW.predict(n, d)) * noise}
            for n in (5e4, 1e5, 2e5, 4e5) for d in (1e5, 2e5, 4e5)
        ]  # fmt: skip
        points = {
            str(place): {**point, "loss": float(LAW.predict(point[size], point["tokens"])) * noise}
            for place, point in enumerate(sparse)
        }
        pruned = 2 * math.exp(pair + spread * seed)
        found.append(
            {
                "dense": dense,
                "sparse": points,
                "schedules": {name: 2 * math.exp(levels[name] + spread * seed * i) for i, name in enumerate(levels)},
                "pairs": {"one": {"dense": 2.0, "pruned": pruned, "static": 2 * math.exp(pair + control)}},
            }
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"size": "final"}, "does not hold"),
        ({"size": "initial"}, "does not hold"),
        ({"pair": 0.03}, "does not hold"),
        ({"pair": -0.03}, "does not hold"),
        ({"pair": 0.0099}, "inconclusive"),
        ({"control": -0.01}, "does not hold"),
        ({"0 % to 25 %": -0.003}, "does not hold"),
        ({"75 % to 95 %": -0.02}, "does not hold"),
        ({"50 % to 75 %": -0.02}, "does not hold"),
        ({"50 % to 75 %": -0.003}, "holds"),  # within half a percent of the best
        ({"spread": 0.02}, "inconclusive"),
    ],
)
def test_the_rule_on_the_journey_decides_as_stated(changes, outcome, monkeypatch):
    monkeypatch.setattr(journey_matters, "fit_dense", lambda observations: LAW)  # found below; it takes its time
    assert journey_matters.decide(journey_observations(**changes)).outcome == outcome


def test_the_law_of_the_journey_is_that_of_its_dense_runs():
    observations = journey_observations(spread=0.0)
    law = journey_matters.fit_dense(observations)
    assert law.alpha == pytest.approx(LAW.alpha, rel=1e-3)
    assert max(journey_matters.law_errors(observations, law, "average")) < 1e-4
    assert min(journey_matters.law_errors(observations, law, "final")) > 1e-3


@pytest.mark.parametrize("module", [journey_matters, spdf])
def test_one_seed_decides_nothing(module):
    assert module.decide([{}]).outcome == "inconclusive"


@pytest.mark.parametrize(
    ("module", "settings"),
    [(spdf, {**SPDF, "inits": ["zero"], "written": 0}), (journey_matters, JOURNEY)],
)
def test_the_engine_runs_the_experiments_end_to_end(module, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(module.experiment.budgets, "tiny", settings)
    result = run_experiment(module.experiment, "tiny", seeds=2, output=tmp_path, progress=False)
    assert result.verdict.outcome in ("holds", "does not hold", "inconclusive")
    assert (tmp_path / f"{module.experiment.slug}.json").exists()

from __future__ import annotations

import json
import math

import pytest
import torch

from gossamer.models.load import LoadedModel
from gossamer.papers import one_shot_comparison, run_experiment, wanda
from gossamer.papers.wanda import FULL, QUICK, decide, experiment, run


class Letters:
    """Tokenises text into characters."""

    bos_token_id = eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) % 97 for letter in text]}


@pytest.fixture
def tiny(monkeypatch, tiny_llama):
    monkeypatch.setattr(one_shot_comparison, "load", lambda source, dtype: LoadedModel(tiny_llama, Letters(), source))
    return tiny_llama


SMALL = {"sequences": 3, "length": 32, "tokens": 80, "window": 40}


@pytest.mark.parametrize("budget", [QUICK, FULL])
def test_a_tiny_model_goes_through_every_case_and_stays_dense(budget, tiny):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    settings = {**budget, **SMALL, "other sequences": [1] * bool(budget["other sequences"])}
    observed = run(settings, 0, lambda items, description: iter(items))
    json.dumps(observed, allow_nan=False)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    points = observed["points"]
    assert len(points) == 1 + len(budget["cases"]) + len(settings["other sequences"])
    assert len({round(point["nll"], 9) for point in points.values()}) > 0.8 * len(points)
    assert observed["curves"]["wanda"]["x"] == sorted(observed["curves"]["wanda"]["x"])


def test_the_quick_budget_gives_sparsegpt_a_hessian_of_full_rank():
    assert QUICK["sequences"] * QUICK["length"] >= 1536


def observations(magnitude=1.0, surgeon=0.0, layer=0.2, spread=0.01):
    made = []
    for seed in range(3):
        shift = spread * (seed - 1)
        nll = {"dense": 4.0, "magnitude at 0.5": 6.0, wanda._ROW: 4.5 + magnitude + shift, wanda._WANDA: 4.5}
        nll |= {wanda._LAYER: 4.5 + layer + shift, wanda._SURGEON: 4.5 - surgeon + shift}
        times = {"selection seconds": 1.0, "total seconds": 10.0}
        made.append({"points": {label: {"nll": value, **times} for label, value in nll.items()}})
    return made


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "holds"),
        ({"surgeon": -0.5}, "holds"),  # Wanda may be better
        ({"magnitude": -1.0}, "does not hold"),
        ({"surgeon": math.log(1.1) + 0.1}, "does not hold"),
        ({"surgeon": math.log(1.1)}, "inconclusive"),
        ({"layer": -0.2}, "does not hold"),
        ({"layer": 0.0}, "inconclusive"),
        ({"spread": 3.0}, "inconclusive"),
    ],
)
def test_the_rule_decides_as_stated(changes, outcome):
    assert decide(observations(**changes)).outcome == outcome


def test_the_engine_runs_the_experiment_end_to_end(tmp_path, monkeypatch, tiny):
    monkeypatch.setitem(experiment.budgets, "tiny", {**QUICK, **SMALL})
    result = run_experiment(experiment, "tiny", seeds=2, output=tmp_path, progress=False)
    assert result.verdict.outcome in ("holds", "does not hold", "inconclusive")
    assert (tmp_path / "wanda.json").exists()

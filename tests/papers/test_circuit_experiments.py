"""Experiments on circuits and on supervised dictionaries: models that are known, and each part of a rule decides."""

from __future__ import annotations

import pytest
import torch

from gossamer.features.head_importance import ablation_effects
from gossamer.features.heads import mean_heads
from gossamer.papers import discrete_sae_circuits, principled_sae_evals
from gossamer.papers.discrete_sae_circuits import CODES, PRIOR, SHUFFLED
from gossamer.papers.indirect_object_subjects import small_subject
from gossamer.papers.planted_circuit import PlantedTransformer, repeated_prompts
from gossamer.papers.principled_sae_evals import REAL, SMALL, SUPERVISED, TASK_SAES


def shifted(build):
    return [build(shift) for shift in (0.0, 0.01, -0.01)]


# -------------------------------------------------------------------------------------------- the planted circuit


def test_planted_heads_are_those_that_matter():
    model = PlantedTransformer(vocabulary=24, length=16, heads=5, seed=3)
    task = repeated_prompts(24, 16, 16, 3)
    assert task.solved(model).float().mean() > 0.9
    effects = ablation_effects(model, task, mean_heads(model, task.prompts))
    assert model.truth.view(3, 5).sum(1).tolist() == [2, 2, 1]
    assert torch.equal(effects > 0.1, model.truth)


def test_twins_repeat_nothing():
    task = repeated_prompts(40, 32, 30, 0)
    for prompt, twin in zip(task.positive, task.negative):
        assert len(set(twin.tolist())) == len(twin)
        assert len(set(prompt.tolist())) < len(prompt)
    # twins leave nothing to be continued
    model = PlantedTransformer(seed=0)
    assert float(task.measure(model, negative=True).mean().abs()) < 0.2 * float(task.measure(model).mean())


# ------------------------------------------------------------------------------------------------- discrete codes


def circuit_observation(shift=0.0):
    """What a run gives where the claim is right."""
    areas = {
        CODES: 0.9,
        SHUFFLED: 0.5,
        "mean difference": 0.8,
        "attribution patching": 0.85,
        **dict.fromkeys(PRIOR, 0.8),
    }
    marks = {name: {"auc": area + shift, "best_f1": 0.5, "faithfulness": 0.8 + shift} for name, area in areas.items()}
    task = {
        "marks": marks,
        "truth": [1, 2],
        "heads": 24,
        "random faithfulness": 0.2,
        "seconds": {"ablation": 10.0, CODES: 2.0},
    }
    return {"tasks": {"repetition": task}}


def test_the_claim_of_discrete_codes_holds_where_every_part_does():
    verdict = discrete_sae_circuits.decide(shifted(circuit_observation))
    assert verdict.outcome == "holds", verdict.reason
    assert verdict.numbers["repetition: times quicker than ablation"] == 5


@pytest.mark.parametrize(
    ("name", "kind", "value", "part"),
    [
        (CODES, "auc", 0.7, "area − 0.85"),
        (SHUFFLED, "auc", 0.95, "labels shuffled"),
        (PRIOR[0], "auc", 0.99, "prior methods"),
        (CODES, "faithfulness", 0.1, "random heads"),
    ],
)
def test_each_part_of_the_rule_can_refute_discrete_codes(name, kind, value, part):
    rows = shifted(circuit_observation)
    for place, row in enumerate(rows):
        row["tasks"]["repetition"]["marks"][name][kind] = value + 0.001 * place
    verdict = discrete_sae_circuits.decide(rows)
    assert verdict.outcome == "does not hold"
    assert part in verdict.reason


# ----------------------------------------------------------------------------------------- supervised dictionaries


def evaluation_observation(shift=0.0):
    """What a run gives where the claim is right."""

    def known(sufficiency, necessity, agreement):
        return {
            "sufficiency": {"recovered": sufficiency + shift / 10},
            "necessity": {"recovered": necessity + shift},
            "edits": {"io, arithmetic": {"agreement": agreement + shift / 10}},
        }

    learned = {
        "sufficiency": {"recovered": 0.9},
        "necessity": {"recovered": 0.1},
        "cover": {"io": 0.5},
        "interpretable": 0.5,
        "control": {"io": {"2": {"agreement": 0.5 + shift}}},
    }
    model = {
        "supervised": {SUPERVISED: known(0.99, 0.02, 0.99), "shuffled": known(0.0, 1.0, 0.1)},
        "dictionaries": dict.fromkeys(TASK_SAES, learned),
    }
    return {
        "models": {SMALL: model, REAL: model},
        "occlusion": [{"smaller": 0.9 + shift}, {"smaller": 0.4}],
        "splits": [[4, 0.1, 1.0], [64, 0.1, 10.0 + shift]],
    }


def supervised(row):
    return row["models"][SMALL]["supervised"][SUPERVISED]


def test_the_claim_of_supervised_evaluation_holds_where_every_part_does():
    verdict = principled_sae_evals.decide(shifted(evaluation_observation))
    assert verdict.outcome == "holds", verdict.reason


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (
            lambda row: row["models"][SMALL]["supervised"][SUPERVISED]["sufficiency"].update(recovered=0.5),
            "sufficiency",
        ),
        (lambda row: row["models"][SMALL]["supervised"][SUPERVISED]["necessity"].update(recovered=0.5), "necessity"),
        (lambda row: row["occlusion"][0].update(smaller=0.1), "occlusion"),
        (lambda row: row["splits"][1].__setitem__(2, 0.5), "splitting"),
    ],
)
def test_each_part_of_the_rule_can_refute_supervised_evaluation(change, part):
    rows = shifted(evaluation_observation)
    for row in rows:
        change(row)
    verdict = principled_sae_evals.decide(rows)
    assert verdict.outcome == "does not hold"
    assert part in verdict.reason


@pytest.mark.slow
def test_a_tiny_run_of_supervised_evaluation_ends_well(monkeypatch):
    monkeypatch.setattr(principled_sae_evals, "real_subject", small_subject)
    settings = {**principled_sae_evals.QUICK, "names": 6, "width": 32, "steps": 250, "prompts": 400, "held_out": 60}
    settings |= {"sae_steps": 30, "toy_steps": 20, "edits": [2], "features": 32, "widths": [4, 8], "penalties": [0.03]}
    row = principled_sae_evals.run(settings, 0, lambda items, description: items)
    assert principled_sae_evals.decide([row, row]).outcome in ("holds", "does not hold", "inconclusive")
    assert {name.split(", ")[0] for name in row["models"][SMALL]["dictionaries"]} >= set(TASK_SAES)

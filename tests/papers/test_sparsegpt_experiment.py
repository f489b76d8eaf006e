"""The decision of the SparseGPT experiment, and the layer errors that it rests on."""

from __future__ import annotations

import copy

import pytest
import torch

from gossamer.papers.sparsegpt import decide, experiment, layer_errors

LABELS = ("dense", "wanda at 0.5", "sparsegpt at 0.5", "wanda at 0.7", "sparsegpt at 0.7")


def observation(noise=0.0):
    losses = dict(zip(LABELS, (3.0, 4.0, 3.8, 7.0, 5.5)))
    losses["wanda at 0.7"] += noise
    errors = {"magnitude": 0.5, "wanda": 0.3 + noise / 100, "mask only": 0.25, "sparsegpt": 0.2}
    errors |= {f"{name} (refitted rows)": value for name, value in errors.items()}
    errors["refit"] = 0.15
    return {"points": {label: {"nll": loss} for label, loss in losses.items()}, "errors": errors}


def seeds():
    return [observation(noise) for noise in (0.0, 0.1, -0.1)]


def test_the_claim_holds_where_errors_are_in_order_and_the_lead_grows():
    verdict = decide(seeds())
    assert verdict.outcome == "holds"
    assert verdict.numbers["the gap at 70 % − that at 50 %"].mean == pytest.approx(1.3)
    assert verdict.numbers["share of the best possible update"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("errors", "sparsegpt", 0.26), ("errors", "wanda", 0.6), ("points", "sparsegpt at 0.7", {"nll": 9.0})],
)
def test_the_claim_does_not_hold_where_one_comparison_is_reversed(part, key, value):
    observations = seeds()
    for index, one in enumerate(observations):
        one[part][key] = value if part == "points" else value + index / 1000
    assert decide(observations).outcome == "does not hold"


def test_a_lead_that_does_not_grow_for_sure_leaves_it_open():
    observations = seeds()
    for one, loss in zip(observations, (5.5, 6.7, 7.5)):
        one["points"]["sparsegpt at 0.7"]["nll"] = loss
    assert decide(observations).outcome == "inconclusive"


def test_a_layer_error_is_that_of_the_outputs_and_no_update_beats_the_refit():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    dense = torch.randn(6, 8, generator=generator)
    mask = torch.rand(6, 8, generator=generator) > 0.5
    updates = dense + 0.1 * torch.randn(6, 8, generator=generator)
    errors = layer_errors(dense, {"update": updates * mask, "mask only": dense * mask}, mask, inputs.t() @ inputs, 6, 6)
    expected = ((dense - updates * mask) @ inputs.t()).norm() / (dense @ inputs.t()).norm()
    assert errors["update"] == pytest.approx(float(expected), rel=1e-4)
    assert errors["refit"] < min(errors["update (refitted rows)"], errors["mask only (refitted rows)"])
    best = [torch.linalg.lstsq(inputs[:, m], inputs @ row).solution for row, m in zip(dense, mask)]
    left = [(inputs @ row - inputs[:, m] @ w).square().sum() for row, m, w in zip(dense, mask, best)]
    assert errors["refit"] == pytest.approx(float(sum(left).sqrt() / (inputs @ dense.t()).norm()), rel=1e-3)


def test_every_budget_has_what_the_decision_reads():
    for budget in experiment.budgets.values():
        assert set(LABELS[1:]) <= {label for label, _, _ in copy.deepcopy(budget["cases"])}

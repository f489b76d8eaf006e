from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.core.taxonomy import Taxonomy
from gossamer.measure import Timing
from gossamer.measure.fair_comparison import Violation
from gossamer.measure.training_cost import TrainingCost
from gossamer.measure.training_memory import training_memory
from gossamer.report.sparsity_report import SparsityReport

TAXONOMY = Taxonomy(
    timing="before training",
    path=("sparse-to-sparse",),
    topology="static",
    criterion=("random",),
    allocation="uniform",
    patterns=("unstructured",),
    aims=("training",),
)


@pytest.fixture
def report():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    first = torch.zeros(4, 8, dtype=torch.bool)
    first[:, :2] = True
    masks = MaskSet({"0.weight": first, "1.weight": torch.ones(2, 4, dtype=torch.bool)})
    with torch.no_grad():
        model[1].weight[0, 0] = 0  # by accident: no mask removed it
    masks.apply_(model)
    numbers = dict.fromkeys(TrainingCost.__dataclass_fields__, 100) | {"unit": "samples", "counted": "weights"}
    cost = TrainingCost(**numbers | {"training_flops": 40.0})
    return SparsityReport.of_run(
        "random",
        TAXONOMY,
        model,
        masks,
        (0.8, 0.9),
        cost,
        memory=training_memory(model),
        latency=Timing.of([1.0, 1.0]),
        dense_latency=Timing.of([1.5, 1.5]),
        device="a laptop",
        violations=[Violation("R7", "random", "random has 2 seeds; 3 are needed")],
    )


def test_zeros_are_counted_by_mask_and_by_weight(report):
    assert report.masked == 24 / 40
    assert report.zeros == 25 / 40
    assert report.of_all == pytest.approx(25 / 46)
    assert report.layers == {"0.weight": 0.75, "1.weight": 0.0}


def test_the_page_states_everything(report):
    page = report.to_markdown()
    for part in (
        "sparse training (sparse-to-sparse), static, before training",
        "60.00% by the mask, 62.50% in the weights",
        "0.00% (1.weight) to 75.00% (0.weight)",
        "40% of dense training",
        "parameters 184B",
        "1.50 times faster than dense on a laptop",
        "R7: random has 2 seeds",
    ):
        assert part in page


def test_it_becomes_plain_json(report):
    stored = report.to_dict()
    assert stored["taxonomy"]["criterion"] == ["random"]
    assert stored["violations"][0]["rule"] == "R7"
    assert stored["inference_bytes"] < stored["dense_inference_bytes"]

"""The walk that all layer-wise pruners share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.masks import MaskSet
from gossamer.models.blocks import Stage
from gossamer.pruning import walk


def test_blocks_after_the_last_target_are_not_run(tiny_llama, batches, monkeypatch):
    ran, forward = [], Stage.forward

    def note(self, *args, **options):
        ran.append(self.name)
        return forward(self, *args, **options)

    monkeypatch.setattr(Stage, "forward", note)
    gossamer.prune(tiny_llama, "wanda", calibration=batches, include=["model.layers.[01].*"], progress=False)
    assert set(ran) == {"model.layers.0", "model.layers.1"}


def test_the_last_block_is_put_away_before_the_run_ends_and_failures_are_heard(tiny_llama, batches, monkeypatch):
    stages = walk.stages

    def failing(*args, **options):
        try:
            yield from stages(*args, **options)
        finally:
            raise OSError("no space left")

    monkeypatch.setattr(walk, "stages", failing)
    with pytest.raises(OSError, match="no space left"):
        gossamer.prune(tiny_llama, "wanda", calibration=batches, include=["model.layers.0.*"], progress=False)


def test_the_reported_error_is_that_of_the_layer_output(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    dense, data = copy.deepcopy(model), torch.randn(40, 12)
    result = gossamer.prune(model, "wanda", calibration=[data], sparsity=0.5, heads=True, progress=False)
    assert result.layers[0].sparsity == 0.5
    before, after = data @ dense[0].weight.t(), data @ model[0].weight.t()
    assert result.layers[0].error == pytest.approx(float((before - after).norm() / before.norm()), rel=1e-5)
    untouched = gossamer.prune(dense, "wanda", calibration=[data], sparsity=0.0, heads=True, progress=False)
    assert [report.error for report in untouched.layers] == [0.0, 0.0]


def test_masks_follow_parameters_that_are_stored_transposed_or_stacked():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(4, 3, 2))

    model = nn.Sequential(conv1d(3, 5), nn.Linear(3, 4), nn.Linear(4, 2))
    model.experts = Experts()
    result = gossamer.prune(model, "magnitude", sparsity=0.5, heads=True, progress=False)
    assert {name: tuple(mask.shape) for name, mask in result.masks.items()} == {
        "0.weight": (5, 3),
        "1.weight": (4, 3),
        "2.weight": (2, 4),
        "experts.down_proj": (4, 3, 2),
    }
    assert result.masks == MaskSet({name: model.get_parameter(name) != 0 for name in result.masks})

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gossamer.errors import ConfigurationError, TargetError
from gossamer.measure import count_flops


def test_linear_layers_take_two_operations_for_each_weight_and_row():
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.fill_(1.0)[0] = 0
    (row,) = count_flops(model, torch.zeros(2, 7, 5)).layers
    assert (row.dense, row.effective, row.calls) == (2 * 14 * 15, 2 * 14 * 10, 1)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 2 * 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, (3, 2), stride=2), (2, 4, 9, 8), 2 * 2 * 4 * 4 * 6 * 4 * 6),
        (nn.Conv2d(4, 8, 3, groups=4, padding=1), (1, 4, 5, 5), 2 * 25 * 8 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 2 * 25 * 4 * 6 * 4),
        (Conv1D(6, 4), (3, 5, 4), 2 * 15 * 24),
    ],
)
def test_layers_of_every_kind_follow_their_formula(layer, shape, expected):
    nn.init.ones_(layer.weight)
    found = count_flops(layer, torch.zeros(shape))
    assert found.layers[0].dense == expected
    assert found.layers[0].effective == expected
    assert found.other == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_decoder_adds_up_to_its_formula(attention, build_llama):
    model = build_llama(attn_implementation=attention)
    batch, length = 2, 16
    found = count_flops(model, {"input_ids": torch.zeros(batch, length, dtype=torch.long)})
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + 64 * 32
    assert sum(row.dense for row in found.layers) == 2 * batch * length * matrices
    # Q @ K^T and P @ V: two layers of four heads, each eight wide.
    assert found.other == 2 * 2 * 2 * batch * 4 * length**2 * 8
    assert found.dense == found.effective == sum(row.dense for row in found.layers) + found.other


def test_zeros_reduce_only_the_effective_count(llama):
    ids = torch.zeros(1, 8, dtype=torch.long)
    before = count_flops(llama, ids)
    with torch.no_grad():
        llama.model.layers[0].mlp.gate_proj.weight.view(-1)[:100] = 0
    after = count_flops(llama, ids)
    assert after.dense == before.dense
    assert before.effective - after.effective == 2 * 8 * 100


def test_a_layer_that_runs_twice_counts_twice():
    shared = nn.Linear(4, 4)
    (row,) = count_flops(nn.Sequential(shared, nn.ReLU(), shared), torch.zeros(1, 4)).layers
    assert row.calls == 2
    assert row.dense == 2 * 2 * 16


def test_counting_leaves_no_hooks_behind(llama):
    count_flops(llama, (torch.zeros(1, 4, dtype=torch.long),))
    assert not any(module._forward_hooks for module in llama.modules())


def test_hooks_are_removed_after_a_failed_pass():
    model = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        count_flops(model, torch.zeros(1, 5))
    assert not model._forward_hooks


def test_unusable_inputs_are_refused():
    with pytest.raises(ConfigurationError, match="example_inputs is a str"):
        count_flops(nn.Linear(2, 2), "x")
    with pytest.raises(TargetError, match="nothing to count"):
        count_flops(nn.ReLU(), torch.zeros(2))

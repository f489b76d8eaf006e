"""Trained N:M models stored without their zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer
from gossamer.core.patterns import NM
from gossamer.errors import PatternError, TargetError
from gossamer.runtime.semi_structured import compress_nm, follows, form_for
from gossamer.storage.layers import SparseLinear


def trained(method, pattern="2:4", steps=8, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    training = gossamer.sparsify(model, optimizer, method, pattern=pattern, **options)
    x, y = torch.randn(64, 32), torch.randint(0, 3, (64,))
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    training.finalize()
    return model.eval(), x


def test_a_model_of_sr_ste_multiplies_the_same_from_its_packed_weights():
    model, x = trained("sr-ste")
    expected = model(x).detach()
    forms = compress_nm(model)
    assert forms == {"2": "packed"}, "first and last layer were not pruned"
    assert isinstance(model[2], SparseLinear)
    assert isinstance(model[4], nn.Linear)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert model[2].matrix.nbytes < 16 * 48 * 4 * 0.6


def test_packed_values_can_be_eight_bits():
    model, x = trained("sr-ste", "1:4")
    expected = model(x).detach()
    compress_nm(model, "1:4", "int8")
    assert model[2].format == "int8"
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


def test_only_layers_of_the_pattern_are_stored_in_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data *= NM(2, 4).select(model[1].weight.detach().abs())
    assert not follows(model[0].weight, NM(2, 4))
    assert list(compress_nm(model)) == ["1"]
    with pytest.raises(TargetError, match="no linear layer"):
        compress_nm(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(PatternError, match="along their inputs"):
        compress_nm(model, "2:4@0")


def test_without_a_gpu_everything_is_packed():
    weight = torch.randn(128, 128).half()
    assert form_for(weight * NM(2, 4).select(weight.abs()), NM(2, 4)) == "packed"

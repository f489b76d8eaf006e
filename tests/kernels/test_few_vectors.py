"""Linear layers on a few vectors: the kernel's results where it can work, torch's own everywhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.kernels import few_vectors
from gossamer.kernels.few_vectors import FewVectors
from gossamer.kernels.native import available, instruction_sets, using


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel is used."""
    made = []
    multiply = few_vectors._multiply
    monkeypatch.setattr(few_vectors, "_multiply", lambda *args: made.append(1) or multiply(*args))
    return made


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("shape", [(4, 48), (2, 3, 64), (1, 32, 16)])
@torch.no_grad()
def test_results_are_those_of_the_layer(isa, shape, calls):
    torch.manual_seed(0)
    x = torch.randn(shape)
    for bias in (True, False):
        layer = nn.Linear(shape[-1], 37, bias=bias)
        expected = layer.double()(x.double())
        layer.float()
        with using(isa), FewVectors():
            found = layer(x)
        assert found.shape == expected.shape
        assert torch.allclose(found.double(), expected, rtol=0, atol=2e-6)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(48, 8), (3, 48)),  # too few
        (nn.Linear(48, 8), (33, 48)),  # too many
        (nn.Linear(40, 8), (8, 40)),  # rows that the kernel would read beyond
        (nn.Linear(48, 8).double(), (8, 48)),
        (nn.Linear(48, 8).bfloat16(), (8, 48)),
    ],
)
@torch.no_grad()
def test_what_does_not_fit_goes_to_torch(layer, shape, calls):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
    with FewVectors():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    assert not calls


@pytest.mark.skipif(not available(), reason="there are no compiled kernels")
def test_gradients_and_turned_weights_are_left_to_torch(calls):
    layer, x = nn.Linear(48, 8), torch.randn(8, 48)
    with FewVectors():
        layer(x).sum().backward()
        with torch.no_grad():
            torch.nn.functional.linear(x, torch.randn(48, 8).t())
    assert layer.weight.grad is not None
    assert not calls


def test_it_ends_with_its_context(calls):
    with FewVectors():
        pass
    with torch.no_grad():
        nn.Linear(48, 8)(torch.randn(8, 48))
    assert not calls

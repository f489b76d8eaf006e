"""Packed masks applied in place by compiled code, beside torch."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.masks import pack_bits
from gossamer.kernels import native
from gossamer.kernels.masking import mask_, mask_natively

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
compiled = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@compiled
@pytest.mark.parametrize("name", native.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_removed_becomes_zero_and_the_rest_keeps_its_bits(name, dtype):
    generator = torch.Generator().manual_seed(0)
    for count in (1, 7, 8, 63, 64, 65, 127, 1000, 70_001):
        tensor = torch.randn(count, generator=generator).to(dtype)
        tensor[:: max(1, count // 5)] = float("nan")
        tensor[1 :: max(1, count // 3)] = -0.0
        mask = torch.rand(count, generator=generator) < 0.4
        expected = tensor.masked_fill(~mask, 0)
        with native.using(name):
            assert mask_natively(tensor, pack_bits(mask))
        assert torch.equal(bytes_of(tensor), bytes_of(expected))


@compiled
@pytest.mark.parametrize("name", native.instruction_sets())
def test_all_and_nothing(name):
    with native.using(name):
        tensor = torch.ones(130)
        mask_(tensor, pack_bits(torch.ones(130, dtype=torch.bool)))
        assert tensor.sum() == 130
        mask_(tensor, pack_bits(torch.zeros(130, dtype=torch.bool)))
        assert tensor.sum() == 0


@compiled
def test_nothing_beyond_the_tensor_is_touched():
    whole = torch.ones(200)
    assert mask_natively(whole[3:100], pack_bits(torch.zeros(97, dtype=torch.bool)))
    assert whole[3:100].sum() == 0
    assert whole[:3].sum() == 3
    assert whole[100:].sum() == 100


def test_tensors_that_do_not_lie_in_order_are_left_to_torch():
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    tensor = torch.ones(20, 30).t()
    assert not mask_natively(tensor, pack_bits(mask))
    mask_(tensor, pack_bits(mask))
    assert torch.equal(tensor, mask.float())
    assert not mask_natively(torch.ones(8, dtype=torch.int32), pack_bits(torch.ones(8, dtype=torch.bool)))


@compiled
def test_autograd_notices_the_change():
    weight = torch.ones(8, requires_grad=True)
    product = (weight * weight).sum()
    mask_(weight, pack_bits(torch.zeros(8, dtype=torch.bool)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()

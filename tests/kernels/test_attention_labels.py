"""Channels of keys in few bits: the nearest points of the grid that is stored."""

from __future__ import annotations

import pytest
import torch

from gossamer.kernels.attention import label_topk
from gossamer.kernels.attention_labels import make_labels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def keys(dtype, tokens=700, channels=7):
    return torch.randn(1, 2, tokens, channels, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_labels_are_the_nearest_points_of_their_grid(bits, dtype):
    values, labels = keys(dtype), make_labels(keys(dtype), bits)
    low, step, exact = labels.low.double(), labels.step.double(), values.double()
    assert labels.low.dtype == labels.step.dtype == dtype
    grid = low[..., None] + step[..., None] * torch.arange(2**bits)
    nearest = (grid - exact[..., None]).abs().amin(-1)
    found = (labels.values().double() - exact).abs()
    assert bool((found <= nearest + 1e-6).all())
    width = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
    torch.testing.assert_close(step, width / (2**bits - 1), rtol=torch.finfo(dtype).eps, atol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_labels_choose_what_their_values_say_in_float64(dtype):
    queries, labels = (
        torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(1)).to(dtype),
        make_labels(keys(dtype), 4),
    )
    codes = torch.stack([labels.codes & 15, labels.codes >> 4], -1).flatten(-2)[..., :7]
    stored = labels.low.double() + labels.step.double() * codes
    scores = (queries.double().unflatten(1, (2, 2)) @ stored.mT).flatten(1, 2)
    wanted = scores.topk(40).indices.sort().values
    assert label_topk(queries, labels, 40, pooling=None).equal(wanted)
    graph = torch.compile(label_topk, backend="eager", fullgraph=True)
    assert graph(queries, labels, 40, pooling=None).equal(wanted)


def test_ranges_that_are_no_numbers_of_their_dtype_are_taken_whole():
    values = torch.tensor([[[[-60000.0, 0.0, 60000.0]]]], dtype=torch.float16)
    torch.testing.assert_close(make_labels(values, 8).values(), values.float(), atol=240, rtol=0)

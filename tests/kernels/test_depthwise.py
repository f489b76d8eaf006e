from __future__ import annotations

import math

import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.kernels import depthwise as module
from gossamer.kernels.depthwise import depthwise
from gossamer.kernels.images import Window, convolve_densely
from gossamer.kernels.native import available, instruction_sets, using

SETS = instruction_sets()
native_only = pytest.mark.skipif(not available(), reason="the compiled kernels are missing")
WINDOWS = [
    Window(),
    Window(padding=(1, 1)),
    Window((2, 2), (1, 1)),
    Window((2, 2), (2, 2)),
    Window((1, 3), (2, 1), (2, 1)),
]


def exact(x, weight, bias=None, window=None, bounds=(-math.inf, math.inf)):
    """The convolution in float64, and the bound on what sums in float32 may be off."""
    window = window or Window()
    options = (window.stride, window.padding, window.dilation, len(weight))
    wide = None if bias is None else bias.double()
    result = torch.nn.functional.conv2d(x.double(), weight.double(), wide, *options).clamp(*bounds)
    sizes = torch.nn.functional.conv2d(
        x.double().abs(), weight.double().abs(), None if wide is None else wide.abs(), *options
    )
    return result, sizes * (weight[0].numel() + 2) * 2.0**-24


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (2, 3)])
@pytest.mark.parametrize("side", [(5, 5), (7, 7), (14, 33), (70, 9)])
def test_every_channel_is_convolved_with_its_own_kernel(name, window, kernel, side):
    if min(window.output_size(side, kernel)) < 1:
        pytest.skip("the image is smaller than the kernel")
    x, weight, bias = torch.randn(2, 6, *side), torch.randn(6, 1, *kernel), torch.randn(6)
    with using(name):
        y = depthwise(x, weight, bias, window)
    result, bound = exact(x, weight, bias, window)
    assert y.shape == result.shape
    assert ((y - result).abs() <= bound).all()


@native_only
@pytest.mark.parametrize("name", SETS)
def test_results_are_clamped_and_no_bias_is_a_zero_one(name):
    x, weight = 3 * torch.randn(1, 5, 12, 12), torch.randn(5, 1, 3, 3)
    window = Window(padding=(1, 1))
    with using(name):
        y = depthwise(x, weight, None, window, (0, 6))
        assert torch.equal(y, depthwise(x, weight, torch.zeros(5), window, (0, 6)))
    result, bound = exact(x, weight, None, window, (0, 6))
    assert ((y - result).abs() <= bound).all()
    assert float(y.min()) == 0
    assert float(y.max()) == 6


@native_only
@pytest.mark.parametrize("bounds", [None, (0, 6), (0, math.inf)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", SETS)
def test_what_is_not_finite_spreads_as_in_torch(name, bad, bounds):
    x, weight = torch.randn(1, 3, 11, 11), torch.randn(3, 1, 3, 3)
    x[0, 1, 5, 6] = bad
    with using(name):
        y = depthwise(x, weight, None, Window((2, 2), (1, 1)), bounds)
    wanted = convolve_densely(x, weight, None, Window((2, 2), (1, 1)), bounds or (-math.inf, math.inf), 3)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.isinf(), wanted.isinf())


@native_only
@pytest.mark.parametrize("batch", [1, 7, 70])
def test_the_result_does_not_depend_on_threads_or_on_what_ran_before(batch):
    x, weight, bias = torch.randn(batch, 9, 13, 13), torch.randn(9, 1, 5, 5), torch.randn(9)
    window = Window((2, 2), (2, 2))
    one = depthwise(x, weight, bias, window, threads=1)
    depthwise(torch.full((1, 9, 40, 40), math.nan), weight, bias, window, threads=2)
    assert torch.equal(one, depthwise(x, weight, bias, window, threads=2))
    assert torch.equal(one, torch.cat([depthwise(image[None], weight, bias, window) for image in x]))


@native_only
def test_other_dtypes_and_strides_are_read():
    x, weight = torch.randn(2, 4, 9, 10), torch.randn(4, 1, 3, 3)
    plain = depthwise(x, weight)
    assert torch.equal(depthwise(x.to(memory_format=torch.channels_last), weight), plain)
    assert torch.equal(depthwise(x.transpose(2, 3).contiguous().transpose(2, 3), weight), plain)
    half = depthwise(x.bfloat16(), weight)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, depthwise(x.bfloat16().float(), weight).bfloat16())


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 3)])
def test_rows_that_were_pruned_are_left_out_of_the_sums(name, kernel):
    x, weight, bias = torch.randn(2, 8, 13, 12), torch.randn(8, 1, *kernel), torch.randn(8)
    for channel in range(8):
        weight[channel, 0, : channel % (kernel[0] + 1)] = 0
    with using(name):
        y = depthwise(x, weight, bias, Window(padding=(1, 1)))
    result, bound = exact(x, weight, bias, Window(padding=(1, 1)))
    assert ((y - result).abs() <= bound).all()
    assert torch.equal(y[:, kernel[0]], bias[kernel[0]].expand_as(y[:, kernel[0]]))  # of which nothing is left


@native_only
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", SETS)
def test_pruned_weights_still_meet_what_is_not_finite(name, bad):
    x, weight = torch.randn(1, 3, 11, 11), torch.randn(3, 1, 3, 3)
    weight[:, :, 0] = 0
    x[0, 1, 5, 6] = bad
    with using(name):
        y = depthwise(x, weight, None, Window(padding=(1, 1)))
    wanted = convolve_densely(x, weight, None, Window(padding=(1, 1)), groups=3)
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.allclose(y.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0), atol=1e-5)


def test_without_native_kernels_torch_is_used(monkeypatch):
    monkeypatch.setattr(module, "available", lambda: False)
    x, weight, bias = torch.randn(2, 4, 9, 10), torch.randn(4, 1, 3, 3), torch.randn(4)
    result, bound = exact(x, weight, bias, Window(padding=(1, 1)))
    assert ((depthwise(x, weight, bias, Window(padding=(1, 1))) - result).abs() <= bound).all()
    assert depthwise(x[:0], weight).shape == (0, 4, 7, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 3, 8, 8)}, r"give \(batch, 4"),
        ({"x": torch.zeros(1, 4, 8, 8, dtype=torch.float64)}, "in float32, bfloat16 or"),
        ({"x": torch.zeros(1, 4, 2, 8)}, "smaller than kernels"),
        ({"weight": torch.zeros(4, 4, 3, 3)}, "the weight is"),
        ({"weight": torch.zeros(4, 1, 3, 3, dtype=torch.int64)}, "the weight is"),
        ({"bias": torch.zeros(3)}, "4 output channels take"),
        ({"bounds": (1, 0)}, "the smaller one first"),
        ({"bounds": (math.nan, 0)}, "the smaller one first"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    fitting = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(4, 1, 3, 3)}
    with pytest.raises(ConfigurationError, match=message):
        depthwise(**{**fitting, **change})

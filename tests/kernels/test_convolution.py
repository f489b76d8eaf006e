from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels import convolution as module
from gossamer.kernels.convolution import BlockedKernels, strip_width
from gossamer.kernels.images import BLOCKS, Window, convolve_densely
from gossamer.kernels.native import available, instruction_sets, using

SETS = instruction_sets()
native_only = pytest.mark.skipif(not available(), reason="the compiled kernels are missing")
WINDOWS = [
    Window(),
    Window(padding=(1, 1)),
    Window((2, 2), (1, 1)),
    Window((1, 2), (2, 1), (2, 1)),
    Window((3, 2), (0, 2), (1, 2)),
]


def sparse(shape, block, density, seed=0):
    """A dense weight of which blocks of output channels keep a share of the input channels."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-shape[0] // block), shape[1], generator=generator) < density
    weight = torch.randn(shape, generator=generator)
    return weight * kept.repeat_interleave(block, 0)[: shape[0], :, None, None]


def exact(x, weight, bias=None, window=None, bounds=(-math.inf, math.inf)):
    """The convolution in float64, and the bound on what sums in float32 may be off."""
    window = window or Window()
    options = (window.stride, window.padding, window.dilation)
    wide = None if bias is None else bias.double()
    result = torch.nn.functional.conv2d(x.double(), weight.double(), wide, *options).clamp(*bounds)
    sizes = torch.nn.functional.conv2d(
        x.double().abs(), weight.double().abs(), None if wide is None else wide.abs(), *options
    )
    terms = weight[0].numel() + 2
    return result, sizes * terms * 2.0**-24


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (37, 29, 1, 1), (16, 8, 3, 3), (5, 3, 2, 5)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_packed_kernels_unpack_bit_for_bit(block, shape, density):
    weight = sparse(shape, block, density)
    packed = BlockedKernels.from_dense(weight, block)
    packed.validate()
    assert torch.equal(packed.expand(), weight)
    assert packed.kept == int(packed.mask().sum())


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("side", [(1, 1), (7, 7), (1, 37), (12, 11)])
@pytest.mark.parametrize("batch", [1, 3])
def test_pointwise_convolutions_are_those_of_the_dense_weight(name, block, side, batch):
    weight = sparse((37, 29, 1, 1), block, 0.3, batch)
    x, bias = torch.randn(batch, 29, *side), torch.randn(37)
    with using(name):
        y = BlockedKernels.from_dense(weight, block).convolve(x, bias)
    result, bound = exact(x, weight, bias)
    assert y.shape == result.shape
    assert ((y - result).abs() <= bound).all()


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(
    ("block", "vectors"),
    [*((1, v) for v in (1, 2, 3, 4, 6, 8)), *((4, v) for v in (1, 2, 3, 4, 6)), *((16, v) for v in (1, 2, 3))],
)
def test_strips_of_every_width_give_the_same_convolution(name, vectors, block, monkeypatch):
    monkeypatch.setattr(module, "strip_width", lambda *_: vectors)
    for shape, window in (((19, 24, 1, 1), Window()), ((19, 5, 3, 3), Window(padding=(1, 1)))):
        weight, x = sparse(shape, block, 0.5), torch.randn(2, shape[1], 15, 17)
        with using(name):
            y = BlockedKernels.from_dense(weight, block).convolve(x, window=window)
        result, bound = exact(x, weight, window=window)
        assert ((y - result).abs() <= bound).all()


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
def test_larger_kernels_strides_paddings_and_dilations_are_those_of_the_dense_weight(name, block, window, kernel):
    weight = sparse((10, 7, *kernel), block, 0.5)
    x, bias = torch.randn(2, 7, 13, 12), torch.randn(10)
    with using(name):
        y = BlockedKernels.from_dense(weight, block).convolve(x, bias, window)
    result, bound = exact(x, weight, bias, window)
    assert y.shape == result.shape
    assert ((y - result).abs() <= bound).all()


@native_only
def test_batches_larger_than_a_chunk_are_convolved_image_by_image():
    weight = sparse((8, 64, 3, 3), 4, 0.5)
    x = torch.randn(7, 64, 40, 40)
    y = BlockedKernels.from_dense(weight, 4).convolve(x, window=Window(padding=(1, 1)))
    result, bound = exact(x, weight, window=Window(padding=(1, 1)))
    assert ((y - result).abs() <= bound).all()


@native_only
@pytest.mark.parametrize("batch", range(1, 71, 3))
def test_positions_of_many_small_images_share_strips(batch):
    weight = sparse((12, 20, 1, 1), 2, 0.4)
    x = torch.randn(batch, 20, 3, 3)
    y = BlockedKernels.from_dense(weight, 2).convolve(x)
    result, bound = exact(x, weight)
    assert ((y - result).abs() <= bound).all()


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("density", [0.0, 0.03])
def test_channels_that_keep_nothing_give_their_bias(name, density):
    weight, bias = sparse((40, 30, 1, 1), 1, density), torch.randn(40)
    with using(name):
        y = BlockedKernels.from_dense(weight).convolve(torch.randn(1, 30, 5, 5), bias)
    empty = ~(weight != 0).flatten(1).any(1)
    assert empty.any()
    assert torch.equal(y[:, empty], bias[empty].view(1, -1, 1, 1).expand(1, -1, 5, 5))


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("bounds", [(0.0, 6.0), (0.0, math.inf), (-1.0, 1.0)])
def test_results_are_clamped(name, bounds):
    weight, x = sparse((9, 40, 1, 1), 1, 0.5), torch.randn(1, 40, 6, 6)
    with using(name):
        y = BlockedKernels.from_dense(weight).convolve(x, bounds=bounds)
    result, bound = exact(x, weight, bounds=bounds)
    assert ((y - result).abs() <= bound).all()
    assert bounds[0] <= y.min() < y.max() <= bounds[1]


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_reach_every_channel_as_in_the_dense_convolution(name, kernel, value):
    window = Window(padding=(kernel // 2, kernel // 2))
    for block in (1, 16):
        weight = sparse((20, 11, kernel, kernel), block, 0.4)
        x = torch.randn(2, 11, 9, 9)
        x[1, 10, 4, 5] = value
        with using(name):
            y = BlockedKernels.from_dense(weight, block).convolve(x, window=window, bounds=(0, 6))
        wanted = convolve_densely(x, weight, None, window, (0, 6))
        assert torch.equal(y.isnan(), wanted.isnan())
        assert y.isnan().any()
        assert torch.allclose(y.nan_to_num(), wanted.nan_to_num(), atol=1e-5)


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("side", [3, 7, 30])
def test_neither_threads_nor_the_division_of_work_change_a_bit(name, side):
    for block, kernel in ((1, 1), (4, 1), (16, 1), (2, 3)):
        packed = BlockedKernels.from_dense(sparse((50, 40, kernel, kernel), block, 0.3), block)
        x = torch.randn(1, 40, side, side)
        with using(name):
            wanted = packed.convolve(x, threads=1)
            for threads in (2, 3):
                assert torch.equal(packed.convolve(x, threads=threads), wanted)


@native_only
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_images_of_two_bytes_are_summed_in_float32_and_rounded_once(dtype, unit):
    weight, x = sparse((17, 33, 1, 1), 1, 0.5), torch.randn(2, 33, 5, 5).to(dtype)
    y = BlockedKernels.from_dense(weight).convolve(x)
    result, bound = exact(x, weight)
    assert y.dtype == dtype
    assert ((y.double() - result).abs() <= bound + result.abs() * unit + 2.0**-25).all()


@native_only
def test_images_may_be_views_and_channels_last():
    weight = sparse((6, 8, 1, 1), 1, 0.5)
    packed = BlockedKernels.from_dense(weight)
    wide = torch.randn(3, 8, 20, 9)
    for x in (wide[:, :, 3:11], wide.transpose(2, 3), wide.to(memory_format=torch.channels_last), wide[:0]):
        result, bound = exact(x, weight)
        y = packed.convolve(x)
        assert y.shape == result.shape
        assert ((y - result).abs() <= bound).all()


@native_only
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_larger_kernels_read_images_with_the_channels_last_as_they_are(window, channels):
    packed = BlockedKernels.from_dense(sparse((10, channels, 3, 3), 16, 1.0), 16)
    x = torch.randn(3, channels, 13, 12)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(packed.convolve(last, window=window), packed.convolve(x, window=window))
    last[1, 0, 5, 6] = math.nan
    assert torch.equal(
        packed.convolve(last, window=window).isnan(), packed.convolve(last.contiguous(), window=window).isnan()
    )


@given(
    out=st.integers(1, 40),
    inputs=st.integers(1, 20),
    kernel=st.integers(1, 3),
    side=st.integers(3, 20),
    block=st.sampled_from(BLOCKS),
    density=st.floats(0, 1),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_weight_survives_packing_and_convolves_right(
    out, inputs, kernel, side, block, density, stride, padding, seed
):
    weight = sparse((out, inputs, kernel, kernel), block, density, seed)
    packed = BlockedKernels.from_dense(weight, block)
    packed.validate()
    assert torch.equal(packed.expand(), weight)
    x = torch.randn(2, inputs, side, side, generator=torch.Generator().manual_seed(seed))
    window = Window((stride, stride), (padding, padding))
    result, bound = exact(x, weight, window=window)
    assert ((packed.convolve(x, window=window) - result).abs() <= bound).all()


def test_without_compiled_kernels_the_result_is_the_same(monkeypatch):
    monkeypatch.setattr(module, "available", lambda: False)
    weight, x, bias = sparse((7, 9, 3, 3), 4, 0.5), torch.randn(2, 9, 6, 6), torch.randn(7)
    y = BlockedKernels.from_dense(weight, 4).convolve(x, bias, WINDOWS[2], (0, 6))
    result, bound = exact(x, weight, bias, WINDOWS[2], (0, 6))
    assert ((y - result).abs() <= bound).all()


def test_strips_are_as_wide_as_registers_allow_and_evenly_filled():
    assert [strip_width(1, positions) for positions in (1, 49, 196, 12544)] == [1, 4, 8, 8]
    assert [strip_width(16, positions) for positions in (16, 49, 12544)] == [1, 2, 3]


def test_strips_stay_in_the_second_cache_however_many_channels_there_are():
    assert [strip_width(1, 12544, inputs) for inputs in (64, 1024, 2048, 5000, 10**6)] == [8, 8, 4, 1, 1]


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_in_half_precision_are_those_of_the_rounded_weight(name, block, kernel):
    weight = sparse((37, 29, kernel, kernel), block, 0.4)
    packed = BlockedKernels.from_dense(weight, block, dtype=torch.float16)
    packed.validate()
    assert packed.values.dtype == torch.float16
    assert torch.equal(packed.expand(), weight.half().float())
    x, bias, window = torch.randn(2, 29, 9, 11), torch.randn(37), Window(padding=(kernel // 2, kernel // 2))
    with using(name):
        y = packed.convolve(x, bias, window)
        wide = BlockedKernels.from_dense(weight.half().float(), block).convolve(x, bias, window)
    result, bound = exact(x, weight.half(), bias, window)
    assert ((y - result).abs() <= bound).all()
    assert torch.equal(y, wide)


def test_weights_beyond_half_precision_are_refused():
    with pytest.raises(ConfigurationError, match="beyond ±65504"):
        BlockedKernels.from_dense(torch.full((2, 2), 1e5), dtype=torch.float16)
    with pytest.raises(ConfigurationError, match="stored as"):
        BlockedKernels.from_dense(torch.ones(2, 2), dtype=torch.bfloat16)


def test_packed_tensors_that_contradict_each_other_are_refused():
    good = BlockedKernels.from_dense(sparse((8, 12, 1, 1), 2, 0.6), 2)
    starts, swapped, far = good.starts.clone(), good.places.clone(), good.places.clone()
    starts[1] += 1000
    swapped[[0, 1]] = swapped[[1, 0]]
    far[-1] = 12
    cases = [
        ({"starts": starts}, "starts"),
        ({"starts": good.starts[:-1]}, "starts"),
        ({"places": swapped}, "do not rise"),
        ({"places": far}, "outside 0 … 11"),
        ({"places": -far - 1}, "outside"),
        ({"places": good.places[:-1]}, "starts|values"),
        ({"values": good.values.bfloat16()}, "values"),
        ({"places": good.places.long()}, "places"),
        ({"values": good.values[:, :, :1]}, "values"),
        ({"values": good.values.double()}, "values"),
        ({"block": 3}, "blocks have 3"),
        ({"shape": (8, 12, 3, 3)}, "values"),
        ({"shape": (8, 12, 0, 1)}, "no \\(out"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            dataclasses.replace(good, **change).validate("layer")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("layer")


def test_arguments_that_do_not_fit_are_refused():
    weight = sparse((8, 12, 1, 1), 2, 0.6)
    packed = BlockedKernels.from_dense(weight, 2)
    with pytest.raises(ConfigurationError, match="block is 3"):
        BlockedKernels.from_dense(weight, 3)
    with pytest.raises(ConfigurationError, match="give floating numbers"):
        BlockedKernels.from_dense(weight[0])
    with pytest.raises(ConfigurationError, match="not zero where nothing is kept"):
        BlockedKernels.from_dense(weight, 2, torch.zeros(4, 12, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="kept is"):
        BlockedKernels.from_dense(weight, 2, torch.ones(8, 12, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="batch, 12, height"):
        packed.convolve(torch.randn(1, 11, 4, 4))
    with pytest.raises(ConfigurationError, match="bias is"):
        packed.convolve(torch.randn(1, 12, 4, 4), torch.randn(7))
    with pytest.raises(ConfigurationError, match="smaller one first"):
        packed.convolve(torch.randn(1, 12, 4, 4), bounds=(6, 0))
    with pytest.raises(ConfigurationError, match="smaller than kernels"):
        BlockedKernels.from_dense(sparse((2, 2, 3, 3), 1, 1)).convolve(torch.randn(1, 2, 2, 2))
    with pytest.raises(ConfigurationError, match="impossible"):
        Window(stride=(0, 1))

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels import convolution_bytes as module
from gossamer.kernels.convolution_bytes import ByteKernels
from gossamer.kernels.images import BLOCKS, Window
from gossamer.kernels.native import available, instruction_sets, using

SETS = instruction_sets()
native_only = pytest.mark.skipif(not available(), reason="the compiled kernels are missing")
WINDOWS = [Window(), Window(padding=(1, 1)), Window((2, 2), (1, 1)), Window((1, 2), (2, 1), (2, 1))]
RELATIVE = 2.0**-22  # two roundings of a float32 result, of a sum and of its product with the scale


def sparse(shape, block, density, seed=0):
    """A dense weight of which blocks of output channels keep a share of the input channels."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-shape[0] // block), shape[1], generator=generator) < density
    weight = torch.randn(shape, generator=generator)
    return weight * kept.repeat_interleave(block, 0)[: shape[0], :, None, None]


def same(one, other):
    """Equal but for the last roundings; exact sums leave no other difference."""
    size = max(1.0, float(other.abs().nan_to_num(0, 0, 0).max())) if other.numel() else 1.0
    return torch.allclose(one, other, rtol=RELATIVE, atol=RELATIVE * size, equal_nan=True)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (37, 29, 1, 1), (16, 8, 3, 3), (5, 3, 2, 5)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_weights_are_within_half_a_step_of_their_channel(block, shape, density):
    weight = sparse(shape, block, density)
    packed = ByteKernels.from_dense(weight, block)
    packed.validate()
    step = packed.scales[: shape[0], None, None, None]
    assert ((packed.expand() - weight).abs() <= step * (0.5 + 1e-5)).all()
    assert torch.equal(packed.expand() != 0, packed.codes() != 0)
    assert int(packed.values.abs().max() if packed.values.numel() else 0) <= 127
    kept = (weight != 0).flatten(2).any(2)
    padded = torch.nn.functional.pad(kept, (0, 0, 0, -shape[0] % block)).view(-1, block, shape[1]).any(1)
    assert torch.equal(packed.mask(), padded)
    assert packed.kept == int(padded.sum())


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("side", [(1, 1), (7, 7), (1, 37), (12, 11)])
def test_pointwise_convolutions_are_exact_in_whole_numbers(name, block, side):
    packed = ByteKernels.from_dense(sparse((37, 29, 1, 1), block, 0.3), block)
    x, bias = torch.randn(3, 29, *side), torch.randn(37)
    with using(name):
        y = packed.convolve(x, bias)
    assert same(y, packed.reference(x, bias))


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
def test_larger_kernels_strides_and_paddings_are_too(name, block, window, kernel):
    packed = ByteKernels.from_dense(sparse((10, 7, *kernel), block, 0.5), block)
    x, bias = torch.randn(2, 7, 13, 12), torch.randn(10)
    with using(name):
        y = packed.convolve(x, bias, window, (-1.0, 2.0))
    assert same(y, packed.reference(x, bias, window, (-1.0, 2.0)))


@native_only
def test_every_instruction_set_rounds_inputs_alike():
    packed, x = ByteKernels.from_dense(sparse((8, 16, 1, 1), 1, 1.0), 1), torch.randn(1, 16, 30, 30)
    found = []
    for name in SETS:
        with using(name):
            found.append(packed.convolve(x))
    assert all(same(one, found[0]) for one in found)


@native_only
def test_the_result_is_near_that_of_the_weight_before_it_was_rounded():
    weight, x = sparse((32, 64, 1, 1), 16, 0.5), torch.randn(1, 64, 20, 20).relu()
    y = ByteKernels.from_dense(weight).convolve(x)
    wanted = torch.nn.functional.conv2d(x, weight)
    assert float((y - wanted).norm() / wanted.norm()) < 0.01


@native_only
@pytest.mark.parametrize("name", SETS)
def test_extreme_sums_do_not_overflow(name):
    weight = torch.ones(4, 4096, 1, 1)
    weight[1], weight[2] = -1, torch.arange(4096).view(-1, 1, 1) % 2 * 2.0 - 1
    x = torch.full((1, 4096, 3, 3), 7.0)
    packed = ByteKernels.from_dense(weight, 4)
    with using(name):
        y = packed.convolve(x)
    assert torch.allclose(y[0, :2, 0, 0], torch.tensor([7 * 4096.0, -7 * 4096.0]))
    assert same(y, packed.reference(x))


@native_only
@pytest.mark.parametrize("name", SETS)
def test_given_values_clip_and_save_the_search(name):
    packed = ByteKernels.from_dense(sparse((9, 20, 1, 1), 1, 0.5), 1)
    x = 4 * torch.randn(2, 20, 6, 6)
    with using(name):
        y = packed.convolve(x, values=(0.0, 6.0))
        assert torch.equal(y, packed.convolve(x.clamp(0, 6), values=(0.0, 6.0)))
    assert same(y, packed.reference(x, values=(0.0, 6.0)))


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("values", [None, (0.0, 6.0)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_image_that_is_not_finite_becomes_nan_and_no_other_does(name, values, bad):
    packed = ByteKernels.from_dense(sparse((9, 20, 3, 3), 1, 0.5), 1)
    x = torch.randn(3, 20, 6, 6)
    x[1, 19, 5, 5] = bad
    with using(name):
        y = packed.convolve(x, window=Window(padding=(1, 1)), bounds=(0, 6), values=values)
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()
    assert same(y, packed.reference(x, window=Window(padding=(1, 1)), bounds=(0, 6), values=values))


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("side", [3, 7, 30])
def test_neither_threads_nor_other_images_change_a_bit(name, side):
    for block, kernel in ((1, 1), (16, 1), (2, 3)):
        packed = ByteKernels.from_dense(sparse((50, 40, kernel, kernel), block, 0.3), block)
        x = torch.randn(3, 40, side, side)
        with using(name):
            wanted = packed.convolve(x, threads=1)
            for threads in (2, 3):
                assert torch.equal(packed.convolve(x, threads=threads), wanted)
            assert torch.equal(torch.cat([packed.convolve(image[None]) for image in x]), wanted)


@native_only
@pytest.mark.parametrize("name", SETS)
def test_constant_images_and_empty_channels(name):
    weight, bias = sparse((20, 30, 1, 1), 1, 0.03), torch.randn(20)
    packed = ByteKernels.from_dense(weight, 1)
    empty = ~(weight != 0).flatten(1).any(1)
    assert empty.any()
    with using(name):
        for x in (torch.zeros(1, 30, 5, 5), torch.full((1, 30, 5, 5), -2.5)):
            y = packed.convolve(x, bias)
            assert torch.equal(y[:, empty], bias[empty].view(1, -1, 1, 1).expand(1, -1, 5, 5))
            assert same(y, packed.reference(x, bias))


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
def test_any_weight_is_convolved_as_its_reference_says(
    out, inputs, kernel, side, block, density, stride, padding, seed
):
    packed = ByteKernels.from_dense(sparse((out, inputs, kernel, kernel), block, density, seed), block)
    packed.validate()
    x = torch.randn(2, inputs, side, side, generator=torch.Generator().manual_seed(seed))
    window = Window((stride, stride), (padding, padding))
    assert same(packed.convolve(x, window=window), packed.reference(x, window=window))


def test_other_dtypes_views_and_no_images(monkeypatch):
    packed = ByteKernels.from_dense(sparse((6, 8, 1, 1), 1, 0.5), 1)
    wide = torch.randn(3, 8, 20, 9)
    for x in (wide[:, :, 3:11], wide.transpose(2, 3), wide.to(memory_format=torch.channels_last), wide[:0]):
        assert torch.equal(packed.convolve(x), packed.convolve(x.contiguous()))
    half = packed.convolve(wide.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, packed.convolve(wide.bfloat16().float()).bfloat16())
    compiled = packed.convolve(wide)
    monkeypatch.setattr(module, "available", lambda: False)
    assert same(compiled, packed.convolve(wide))


def test_packed_tensors_that_contradict_each_other_are_refused():
    good = ByteKernels.from_dense(sparse((8, 13, 1, 1), 2, 0.8), 2)
    starts, swapped, far, endless = (t.clone() for t in (good.starts, good.places, good.places, good.scales))
    starts[1] += 1000
    swapped[0, [0, 1]] = swapped[0, [1, 0]]
    far[-1] = 13
    endless[3] = math.nan
    cases = [
        ({"starts": starts}, "starts"),
        ({"starts": good.starts[:-1]}, "starts"),
        ({"places": swapped}, "do not rise"),
        ({"places": far}, "outside 0 … 12"),
        ({"places": -far - 1}, "outside"),
        ({"places": good.places[:-1]}, "starts|values"),
        ({"values": good.values[:, :, :1]}, "values"),
        ({"values": good.values.float()}, "values"),
        ({"scales": good.scales[:-1]}, "scales"),
        ({"scales": endless}, "positive number"),
        ({"scales": -good.scales}, "positive number"),
        ({"block": 3}, "blocks have 3"),
        ({"shape": (8, 13, 3, 3)}, "values"),
    ]
    for change, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            dataclasses.replace(good, **change).validate("layer")
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("layer")


def test_arguments_that_do_not_fit_are_refused():
    weight = sparse((8, 12, 1, 1), 2, 0.6)
    packed = ByteKernels.from_dense(weight, 2)
    with pytest.raises(ConfigurationError, match="NaN or infinite"):
        ByteKernels.from_dense(weight * math.nan)
    with pytest.raises(ConfigurationError, match="does not fit into 32 bits"):
        ByteKernels.from_dense(torch.ones(1, 70_000))
    with pytest.raises(ConfigurationError, match="batch, 12, height"):
        packed.convolve(torch.randn(1, 11, 4, 4))
    for values in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ConfigurationError, match="values are"):
            packed.convolve(torch.randn(1, 12, 4, 4), values=values)

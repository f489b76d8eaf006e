"""Blocks of one column and single weights: what is stored, what comes back, and products with few and many vectors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.kernels.blocks import (
    FORMATS,
    BlockMatrix,
    CsrMatrix,
    EightRowMatrix,
    FourRowMatrix,
    SixteenRowMatrix,
    block_height,
)

SHAPES = [(1, 1), (3, 70), (17, 64), (65, 200), (40, 577), (0, 5), (9, 0), (9, 16)]
CLASSES = (CsrMatrix, FourRowMatrix, EightRowMatrix, SixteenRowMatrix)


def weight(shape: tuple[int, int], height: int, density: float = 0.3, seed: int = 0) -> Tensor:
    """A matrix of blocks of `height` rows; where there are several, the third band is empty and the fourth full."""
    generator = torch.Generator().manual_seed(seed)
    bands = torch.rand(-(-shape[0] // height), shape[1], generator=generator) < density
    if len(bands) > 3:
        bands[2], bands[3] = False, True
    return torch.randn(shape, generator=generator) * bands.repeat_interleave(height, 0)[: shape[0]]


def bound(matrix: BlockMatrix, x: Tensor) -> Tensor:
    """How far sums in float32 may be from the exact ones: a rounding for each term, of the sum of sizes."""
    sizes = x.double().abs() @ matrix.expand().double().abs().t()
    return (matrix.shape[1] + 2) * 2.0**-24 * sizes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_product_is_that_of_the_expanded_matrix(cls, format, shape, face):
    matrix = cls.from_dense(weight(shape, cls.height), format)
    matrix.validate()
    dense = matrix._reference(0, shape[0])
    assert torch.equal(matrix.expand(), dense)
    for count in (0, 1, 2, 3, 5, 11, 17, 33, 70):
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count))
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
        exact = x.double() @ dense.double().t()
        assert bool(((matrix.linear(x).double() - exact).abs() <= bound(matrix, x)).all())
        error = (matrix.linear(x, bias).double() - exact - bias.double()).abs()
        assert bool((error <= bound(matrix, x) + 2.0**-23 * (exact + bias).abs()).all())


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_stored_is_the_weight_or_its_nearest_step(cls):
    w = weight((37, 90), cls.height)
    assert torch.equal(cls.from_dense(w).expand(), w)
    assert torch.equal(cls.from_dense(w.bfloat16()).expand(), w.bfloat16().float())
    steps = w.abs().amax(1, keepdim=True) / 127
    rounded = cls.from_dense(w, "int8").expand()
    assert bool(((rounded - w).abs() <= 0.5001 * steps).all())
    assert bool((rounded[w == 0] == 0).all())


@pytest.mark.parametrize("cls", CLASSES)
def test_a_block_with_one_weight_is_stored_as_a_whole(cls):
    w = torch.zeros(35, 8)
    w[1, 3] = w[34, 5] = 2.0
    matrix = cls.from_dense(w)
    assert matrix.kept == 2
    assert len(matrix.values) == 2 * cls.height + 16
    assert int(matrix.mask().sum()) == 2
    assert torch.equal(matrix.expand(), w)
    assert torch.equal(matrix.linear(torch.ones(1, 8))[0], w.sum(1))


@pytest.mark.parametrize("cls", CLASSES)
def test_columns_beyond_sixteen_bits_are_found(cls, face):
    w = torch.zeros(20, 70_000)
    w[:16, 69_999] = torch.arange(16.0) + 1
    matrix = cls.from_dense(w)
    matrix.validate()
    assert matrix.places.dtype == torch.int32
    x = torch.zeros(6, 70_000)
    x[:, 69_999] = torch.arange(6.0)
    assert torch.equal(matrix.linear(x), x[:, -1:] * w[:, -1])
    assert torch.equal(matrix.linear(x[3]), 3 * w[:, -1])


@pytest.mark.parametrize("cls", CLASSES)
def test_some_rows_are_those_of_the_whole(cls, face):
    matrix = cls.from_dense(weight((29, 130), cls.height), "int8")
    assert torch.equal(matrix.expand(5, 22), matrix.expand()[5:22])
    assert matrix.expand(5, 5).shape == (0, 130)
    with pytest.raises(ConfigurationError, match="rows 4 to 30"):
        matrix.expand(4, 30)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("cls", CLASSES)
def test_empty_and_full_matrices_are_matrices_like_others(cls, density, face):
    w = torch.randn(21, 50, generator=torch.Generator().manual_seed(0)) * density
    matrix = cls.from_dense(w)
    for count in (1, 20):
        x = torch.randn(count, 50, generator=torch.Generator().manual_seed(0))
        assert bool(((matrix.linear(x).double() - x.double() @ w.double().t()).abs() <= bound(matrix, x)).all())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cls", CLASSES)
def test_threads_change_no_bit(cls, format, face):
    matrix = cls.from_dense(weight((101, 257), cls.height), format)
    for count in (1, 6, 40):
        x = torch.randn(count, 257, generator=torch.Generator().manual_seed(0))
        one, two, seven = (matrix.linear(x, threads=threads) for threads in (1, 2, 7))
        assert torch.equal(one, two)
        assert torch.equal(one, seven)


@pytest.mark.parametrize("cls", CLASSES)
def test_bfloat16_vectors_give_the_rounded_float32_result(cls, face):
    matrix = cls.from_dense(weight((33, 100), cls.height))
    for count in (1, 5, 40):
        x = torch.randn(count, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
        bias = torch.randn(33, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(matrix.linear(x, bias), matrix.linear(x.float(), bias.float()).bfloat16())


@pytest.mark.parametrize("cls", CLASSES)
def test_vectors_may_lie_anywhere_in_memory(cls, face):
    matrix = cls.from_dense(weight((20, 65), cls.height))
    whole = torch.randn(9, 3, 131, generator=torch.Generator().manual_seed(0))
    for view in (whole[:, 1, 1:66], whole[:, :, 66:].transpose(0, 1), whole[::2, 0, ::2][:, :65], whole[0, 0, :65]):
        assert torch.equal(matrix.linear(view), matrix.linear(view.contiguous()))
        assert matrix.linear(view).shape == (*view.shape[:-1], 20)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_not_finite_spreads_as_in_a_dense_product(cls, format, face):
    matrix = cls.from_dense(weight((21, 80), cls.height), format)
    for count in (2, 30):
        x = torch.ones(count, 80)
        x[0, 3], x[1, 70] = float("nan"), float("inf")
        found, expected = matrix.linear(x), torch.nn.functional.linear(x, matrix.expand())
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 90),
    density=st.floats(0, 1),
    cls=st.sampled_from(CLASSES),
    format=st.sampled_from(FORMATS),
    seed=st.integers(0, 99),
)
def test_packing_again_changes_nothing(rows, columns, density, cls, format, seed):
    matrix = cls.from_dense(weight((rows, columns), cls.height, density, seed), format)
    matrix.validate()
    again = cls.from_dense(matrix.expand(), format)
    assert torch.allclose(again.expand(), matrix.expand(), rtol=1e-6, atol=0)


def test_bytes_of_single_weights_and_of_blocks():
    w = weight((512, 1024), 16, 0.05).bfloat16()
    single, blocks = CsrMatrix.from_dense(w), SixteenRowMatrix.from_dense(w)
    kept = int((w != 0).sum())
    assert single.nbytes == pytest.approx(4 * kept, rel=0.1)
    assert blocks.nbytes == pytest.approx(2.125 * kept, rel=0.02)


@pytest.mark.parametrize("height", [1, 4, 8, 16])
def test_the_height_of_blocks_is_found(height):
    assert block_height(weight((160, 300), height)) == height


BROKEN = {
    "starts too short": lambda m: {"starts": m.starts[:-1]},
    "starts shifted": lambda m: {"starts": m.starts + 1},
    "starts falling": lambda m: {"starts": torch.cat([m.starts[:1], m.starts[1:-1].flip(0), m.starts[-1:]])},
    "place too large": lambda m: {"places": m.places.to(torch.int64).clamp_min(100).to(torch.uint16)},
    "place behind the last": lambda m: {"places": torch.cat([m.places[:-1], m.places.new_full((1,), 100)])},
    "places not rising": lambda m: {"places": torch.zeros_like(m.places)},
    "places of another dtype": lambda m: {"places": m.places.to(torch.int32)},
    "values too short": lambda m: {"values": m.values[:-1]},
    "values of another dtype": lambda m: {"values": m.values.double()},
    "scales too short": lambda m: {"scales": m.scales[:-1]},
    "scales missing": lambda m: {"scales": None},
    "a scale is NaN": lambda m: {"scales": m.scales * float("nan")},
    "format": lambda m: {"format": "int7"},
}


@pytest.mark.parametrize("part", BROKEN)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_matrix_whose_parts_disagree_is_refused(cls, part):
    matrix = cls.from_dense(weight((61, 100), cls.height), "int8")
    with pytest.raises(CheckpointError, match="layer"):
        dataclasses.replace(matrix, **BROKEN[part](matrix)).validate("layer")


def test_what_cannot_be_packed_is_refused_by_name():
    w = torch.ones(5, 100)
    with pytest.raises(ConfigurationError, match="int4"):
        CsrMatrix.from_dense(w, "int4")
    with pytest.raises(ConfigurationError, match="float64"):
        SixteenRowMatrix.from_dense(w.double())
    w[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="int8"):
        CsrMatrix.from_dense(w, "int8")

"""Packed matrices: what is stored, what comes back, and the products with one vector and with many."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.kernels import bitmask, dense
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.native import instruction_sets, using

SHAPES = [(1, 1), (3, 70), (17, 64), (65, 200), (40, 577), (0, 5), (9, 16)]
KINDS = [(BitmaskMatrix, f) for f in bitmask.FORMATS] + [(DenseMatrix, f) for f in dense.FORMATS]
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def weight(shape, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * (torch.rand(shape, generator=generator) < density)


def bound(matrix, x, terms):
    """How far sums in float32 may be from the exact ones: a rounding for each term, of the sum of sizes."""
    sizes = x.double().abs() @ matrix.expand().double().abs().t()
    return (terms + 2) * 2.0**-24 * sizes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_a_product_is_that_of_the_expanded_matrix(kind, format, shape, face):
    matrix = kind.from_dense(weight(shape), format)
    matrix.validate()
    for count in (0, 1, 2, 3, 4, 5, 7, 30, 70):
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(count))
        bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
        exact = x.double() @ matrix.expand().double().t()
        error = (matrix.linear(x).double() - exact).abs()
        assert bool((error <= bound(matrix, x, shape[1])).all())
        error = (matrix.linear(x, bias).double() - exact - bias.double()).abs()
        assert bool((error <= bound(matrix, x, shape[1]) + 2.0**-23 * (exact + bias).abs()).all())


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_every_face_expands_to_the_same_matrix(kind, format, face):
    for shape in SHAPES:
        w = weight(shape)
        expanded = kind.from_dense(w, format).expand()
        if format in ROUNDING:
            assert torch.equal(expanded, w.to(getattr(torch, format)).float())
        else:
            steps = {"int8": 127, "int4": 7}[format]
            largest = w.abs().amax(1, keepdim=True) if shape[1] else w
            assert bool(((expanded - w).abs() <= 0.5001 * largest / steps).all())
        assert bool((expanded[w == 0] == 0).all())


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_some_rows_are_those_of_the_whole(kind, format, face):
    matrix = kind.from_dense(weight((13, 130)), format)
    assert torch.equal(matrix.expand(4, 11), matrix.expand()[4:11])
    assert matrix.expand(5, 5).shape == (0, 130)
    with pytest.raises(ConfigurationError, match="rows 4 to 14"):
        matrix.expand(4, 14)


@pytest.mark.parametrize("density", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("format", bitmask.FORMATS)
def test_empty_and_full_rows_are_rows_like_others(format, density, face):
    w = weight((6, 130), density)
    w[2] = 0
    matrix = BitmaskMatrix.from_dense(w, format)
    x = torch.randn(3, 130, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(matrix.linear(x), x @ matrix.expand().t(), atol=1e-4)
    assert bool((matrix.linear(x)[:, 2] == 0).all())


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_threads_change_no_bit(kind, format, face):
    matrix = kind.from_dense(weight((101, 257)), format)
    for count in (1, 6, 40):
        x = torch.randn(count, 257, generator=torch.Generator().manual_seed(0))
        one, two, seven = (matrix.linear(x, threads=threads) for threads in (1, 2, 7))
        assert torch.equal(one, two)
        assert torch.equal(one, seven)


@pytest.mark.parametrize("columns", [5, 16, 47, 576, 1024, 1600, 2085])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_several_vectors_give_the_very_results_of_one_after_the_other(isa, format, columns):
    matrix = DenseMatrix.from_dense(weight((23, columns), density=1.0), format)
    x = torch.randn(23, columns, generator=torch.Generator().manual_seed(0))
    with using(isa):
        one = torch.stack([matrix.linear(row, threads=1) for row in x])
        for count in (2, 3, 4, 5, 8, 15, 23):
            assert torch.equal(matrix.linear(x[:count], threads=1), one[:count])


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_bfloat16_vectors_give_the_rounded_float32_result(kind, format, face):
    matrix = kind.from_dense(weight((33, 100)), format)
    for count in (1, 5, 40):
        x = torch.randn(count, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
        bias = torch.randn(33, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(matrix.linear(x, bias), matrix.linear(x.float(), bias.float()).bfloat16())


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_vectors_may_lie_anywhere_in_memory(kind, format, face):
    matrix = kind.from_dense(weight((20, 65)), format)
    whole = torch.randn(9, 3, 131, generator=torch.Generator().manual_seed(0))
    for view in (whole[:, 1, 1:66], whole[:, :, 66:].transpose(0, 1), whole[::2, 0, ::2][:, :65], whole[0, 0, :65]):
        assert torch.equal(matrix.linear(view), matrix.linear(view.contiguous()))
        assert matrix.linear(view).shape == (*view.shape[:-1], 20)


@pytest.mark.parametrize(("kind", "format"), KINDS)
def test_what_is_not_finite_spreads_as_in_a_dense_product(kind, format, face):
    matrix = kind.from_dense(weight((12, 80)), format)
    x = torch.ones(2, 80)
    x[0, 3] = float("nan")
    x[1, 70] = float("inf")
    assert torch.equal(matrix.linear(x).isnan(), torch.nn.functional.linear(x, matrix.expand()).isnan())


def test_half_the_weights_in_bfloat16_take_little_more_than_half_the_bytes():
    matrix = BitmaskMatrix.from_dense(weight((512, 4096)).bfloat16())
    assert matrix.nbytes <= 0.57 * 512 * 4096 * 2
    assert matrix.kept == int((matrix.expand() != 0).sum())


def test_a_mask_keeps_zeros_that_may_become_something_else():
    mask = torch.rand(7, 90, generator=torch.Generator().manual_seed(0)) < 0.4
    matrix = BitmaskMatrix.from_dense(torch.zeros(7, 90), mask=mask)
    assert matrix.kept == int(mask.sum())
    assert torch.equal(matrix.mask(), mask)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 200),
    density=st.floats(0, 1),
    format=st.sampled_from(bitmask.FORMATS),
    seed=st.integers(0, 99),
)
def test_packing_is_exact_for_whatever_the_format_can_hold(rows, columns, density, format, seed):
    matrix = BitmaskMatrix.from_dense(weight((rows, columns), density, seed), format)
    matrix.validate()
    again = BitmaskMatrix.from_dense(matrix.expand(), None if format.startswith("int") else format, matrix.mask())
    assert torch.equal(again.expand(), matrix.expand())
    assert torch.equal(again.bits, matrix.bits)


BROKEN = {
    "starts": lambda m: {"starts": m.starts + 1},
    "bits": lambda m: {"bits": m.bits.clone().index_fill_(0, torch.tensor([0]), -1)},
    "values": lambda m: {"values": m.values[:-1]},
    "dtype": lambda m: {"values": m.values.double()},
    "scales": lambda m: {"scales": m.scales[:-1]},
    "scale": lambda m: {"scales": m.scales * float("nan")},
    "group": lambda m: {"group": 63},
    "format": lambda m: {"format": "int7"},
}


@pytest.mark.parametrize("part", BROKEN)
def test_a_matrix_whose_parts_disagree_is_refused(part):
    matrix = BitmaskMatrix.from_dense(weight((5, 100)), "int8", group=64)
    broken = dataclasses.replace(matrix, **BROKEN[part](matrix))
    with pytest.raises(CheckpointError, match="layer"):
        broken.validate("layer")


@pytest.mark.parametrize("part", ["values", "dtype", "scales", "scale", "format"])
def test_a_dense_matrix_whose_parts_disagree_is_refused(part):
    matrix = DenseMatrix.from_dense(weight((5, 100)), "int8", group=64)
    with pytest.raises(CheckpointError, match="layer"):
        dataclasses.replace(matrix, **BROKEN[part](matrix)).validate("layer")


def test_what_cannot_be_packed_or_multiplied_is_refused_by_name():
    w = weight((5, 100))
    with pytest.raises(ConfigurationError, match="int5"):
        BitmaskMatrix.from_dense(w, "int5")
    with pytest.raises(ConfigurationError, match="float64"):
        DenseMatrix.from_dense(w.double())
    with pytest.raises(ConfigurationError, match="mask"):
        BitmaskMatrix.from_dense(w, mask=torch.ones(5, 99, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="group is 65"):
        BitmaskMatrix.from_dense(w, "int8", group=65)
    w[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="int8"):
        DenseMatrix.from_dense(w, "int8")
    matrix = DenseMatrix.from_dense(weight((5, 100)))
    for x in (torch.zeros(3, 99), torch.zeros(3, 100, dtype=torch.float64), torch.zeros(3, 100, device="meta")):
        with pytest.raises(ConfigurationError, match="100"):
            matrix.linear(x)
    with pytest.raises(ConfigurationError, match="bias"):
        matrix.linear(torch.zeros(100), torch.zeros(4))


def test_a_matrix_without_columns_gives_its_bias():
    bias = torch.tensor([1.0, -2.0, 3.0])
    matrix = DenseMatrix.from_dense(torch.zeros(3, 0))
    assert torch.equal(matrix.linear(torch.zeros(2, 0), bias), bias.expand(2, 3))

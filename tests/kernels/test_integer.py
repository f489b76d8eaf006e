"""Products of int8 weights with inputs in int8: exact sums, the promised order, and the bound of the rounding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError
from gossamer.kernels import integer
from gossamer.kernels.bitmask import BitmaskMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.integer import IntegerBitmaskMatrix, IntegerDenseMatrix, integer_product
from gossamer.kernels.kinds import kind_of, pack, pack_like, rebuild
from gossamer.kernels.matrix import round_inputs, rounded_codes, without_rounding
from gossamer.kernels.native import available, instruction_sets, using

SHAPES = [(1, 1), (3, 5), (2, 31), (7, 33), (5, 64), (4, 100), (6, 192), (3, 577), (2, 1537), (0, 8)]
KINDS = (IntegerDenseMatrix, IntegerBitmaskMatrix)
SETS = instruction_sets()
native_only = pytest.mark.skipif(not available(), reason="the compiled kernels are missing")


def weights(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns, generator=generator) < density
    return 0.05 * torch.randn(rows, columns, generator=generator) * kept


def vectors(count: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed + 100))


def packed(kind: type, weight: Tensor, group: int | None = None) -> IntegerDenseMatrix | IntegerBitmaskMatrix:
    return kind.from_dense(weight, group=group)


@pytest.fixture
def way(face: str, monkeypatch: pytest.MonkeyPatch) -> str:
    if face == "reference":
        monkeypatch.setattr(integer, "available", lambda: False)
    return face


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [None, 64, 128])
def test_every_instruction_set_gives_the_bits_of_the_reference(name, kind, shape, group):
    matrix = packed(kind, weights(*shape), group)
    matrix.validate()
    for count in (1, 2, 3, 5, 7):
        x = vectors(count, shape[1])
        expected = integer_product(x, matrix.steps(), matrix.scales, matrix.group)
        with using(name):
            for threads in (1, 2, 3):
                assert torch.equal(matrix.linear(x, threads=threads), expected)


@native_only
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("group", [16, 48, 80])
def test_dense_scales_may_change_within_a_word(name, group):
    matrix = IntegerDenseMatrix.from_dense(weights(5, 300, 1.0), group=group)
    x = vectors(3, 300)
    with using(name):
        assert torch.equal(matrix.linear(x), integer_product(x, matrix.steps(), matrix.scales, matrix.group))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_where_no_float_has_to_be_rounded_the_product_is_that_of_whole_numbers(way, kind, count):
    generator = torch.Generator().manual_seed(count)
    steps = torch.randint(-127, 128, (20, 320), generator=generator) * (torch.rand(20, 320, generator=generator) < 0.5)
    steps[:, 0] = 127  # so that the scale of a row is what it is multiplied by
    codes = torch.randint(-127, 128, (count, 320), generator=generator)
    codes[:, ::32] = 127
    matrix = packed(kind, steps.float() / 4)
    assert torch.equal(matrix.scales, torch.full((20, 1), 0.25))
    found = matrix.linear(codes.float() * 0.5)
    assert torch.equal(found.double(), (codes.long() @ steps.long().t()).double() / 8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 6, 23, 70])
def test_products_are_those_of_rounded_inputs(way, kind, count):
    matrix = packed(kind, weights(30, 333))
    x, bias = vectors(count, 333), vectors(1, 30)[0]
    dense, rounded = matrix.expand().double(), round_inputs(x) if matrix.rounds(count) else x
    exact = rounded.double() @ dense.t() + bias.double()
    bound = (rounded.double().abs() @ dense.abs().t() + bias.double().abs()) * 2.0**-20
    assert ((matrix.linear(x, bias).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_changes_a_product_by_no_more_than_is_said(way, kind):
    matrix = packed(kind, weights(40, 320))
    x = vectors(3, 320) * torch.logspace(-3, 3, 320)
    largest = x.view(3, 10, 32).abs().amax(2).repeat_interleave(32, 1).double()
    dense = matrix.expand().double()
    bound = largest / 254 @ dense.abs().t()
    error = (matrix.linear(x).double() - x.double() @ dense.t()).abs()
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > bound / 1000).any()  # inputs are rounded indeed


def test_inputs_are_rounded_to_the_nearest_step_of_their_block():
    x = vectors(4, 100) * torch.logspace(-2, 2, 100)
    codes, scales = rounded_codes(x)
    assert codes.shape == (4, 128)
    assert scales.shape == (4, 4)
    assert not codes[:, 100:].any()
    assert torch.equal(codes.view(4, 4, 32).abs().amax(2), torch.full((4, 4), 127))
    back = (codes.float() * scales.repeat_interleave(32, 1))[:, :100]
    assert ((back - x).abs() <= scales.repeat_interleave(32, 1)[:, :100] * 0.50001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_bytes_are_those_of_the_storage_without_rounding(kind):
    weight = weights(17, 200)
    plain = (DenseMatrix if kind is IntegerDenseMatrix else BitmaskMatrix).from_dense(weight, "int8")
    matrix = packed(kind, weight)
    assert torch.equal(matrix.expand(), plain.expand())
    assert torch.equal(matrix.steps().float() * matrix.scales, plain.expand())
    assert matrix.nbytes == plain.nbytes
    assert (matrix.activations, plain.activations) == ("int8", "float")


@pytest.mark.parametrize("kind", KINDS)
def test_comparisons_can_do_without_rounding(way, kind):
    matrix, x = packed(kind, weights(9, 90)), vectors(2, 90)
    with without_rounding():
        found = matrix.linear(x)
    assert torch.allclose(found, x @ matrix.expand().t(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_makes_all_of_its_outputs_nan(way, kind, value):
    x = vectors(3, 100)
    x[1, 70] = value
    found = packed(kind, weights(8, 100)).linear(x)
    assert torch.isfinite(found[[0, 2]]).all()
    assert torch.isnan(found[1]).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_empty_and_full_rows(way, kind, density):
    weight = weights(12, 256, density)
    weight[3] = 0
    matrix, x = packed(kind, weight), vectors(2, 256)
    expected = round_inputs(x).double() @ matrix.expand().double().t()
    assert torch.allclose(matrix.linear(x).double(), expected, atol=1e-5)
    assert not matrix.linear(x)[:, 3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_may_be_views_and_bfloat16(way, kind):
    matrix = packed(kind, weights(19, 48))
    wide = vectors(6, 101).view(2, 3, 101)
    for x in (wide[..., 5:53], wide.transpose(0, 1)[..., 1:49], wide[0, 0, 7:55], wide[:, :0, :48]):
        assert torch.equal(matrix.linear(x), matrix.linear(x.contiguous()))
    half = wide[0, :, :48].bfloat16()
    found = matrix.linear(half)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, matrix.linear(half.float()).bfloat16())


@native_only
@given(
    rows=st.integers(0, 12),
    columns=st.integers(1, 300),
    density=st.floats(0, 1),
    count=st.integers(0, 9),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=60, deadline=None)
def test_any_matrix_multiplies_alike_with_every_instruction_set(rows, columns, density, count, seed, kind):
    matrix = packed(kind, weights(rows, columns, density, seed))
    matrix.validate()
    x = vectors(count, columns, seed)
    expected = integer_product(x, matrix.steps(), matrix.scales, matrix.group)
    for name in SETS:
        with using(name):
            assert torch.equal(matrix.linear(x), expected)


@native_only
def test_the_extreme_numbers_do_not_overflow():
    steps = torch.full((2, 128), -127.0)
    steps[1] = 127
    x = torch.full((1, 128), 127.0)
    for kind in KINDS:
        matrix = packed(kind, steps)
        lowest = replace(matrix, values=torch.full_like(matrix.values, -128))  # which rounding never makes
        for name in SETS:
            with using(name):
                assert matrix.linear(x).tolist() == [[-127.0 * 127 * 128, 127.0 * 127 * 128]]
                assert lowest.linear(x).tolist() == [[-128.0 * 127 * 128] * 2]


@pytest.mark.parametrize("kind", ["integer_dense", "integer_bitmask"])
def test_kinds_are_packed_and_rebuilt_by_name(kind):
    matrix = pack(weights(5, 128), kind, group=64)
    assert kind_of(matrix) == kind
    about = {"kind": kind, "shape": (5, 128), "format": "int8", "group": 64}
    again = rebuild("layer", about, matrix.tensors())
    assert type(again) is type(matrix)
    x = vectors(2, 128)
    assert torch.equal(again.linear(x), matrix.linear(x))
    like = pack_like(matrix, weights(5, 128, seed=3))
    assert (type(like), like.group) == (type(matrix), 64)


def test_impossible_weights_and_broken_parts_are_refused():
    for kind in KINDS:
        with pytest.raises(ConfigurationError, match="format is 'bfloat16'"):
            kind.from_dense(weights(2, 64), "bfloat16")
        with pytest.raises(NonFiniteError, match="NaN"):
            kind.from_dense(torch.full((2, 64), torch.nan))
        matrix = packed(kind, weights(3, 64))
        with pytest.raises(CheckpointError, match="instead of 'int8'"):
            replace(matrix, format="int4").validate("layer")
        with pytest.raises(CheckpointError, match="values are"):
            replace(matrix, values=matrix.values[:-1]).validate("layer")

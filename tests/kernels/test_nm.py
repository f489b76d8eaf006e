"""Packed N:M matrices: what is stored, what comes back, and products with few and many vectors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core.patterns import NM
from gossamer.errors import CheckpointError, ConfigurationError, NonFiniteError, PatternError
from gossamer.kernels.kinds import pack, rebuild
from gossamer.kernels.nm import FORMATS, NMMatrix, find_pattern
from gossamer.kernels.operators import packed_linear
from gossamer.storage.nm import matrix_of, packed_of
from gossamer.storage.packing import encode

SHAPES = [(1, 1), (3, 70), (17, 64), (65, 200), (40, 577), (0, 5), (9, 0), (9, 16)]
PATTERNS = [NM(2, 4), NM(1, 4), NM(4, 8), NM(3, 8), NM(1, 16), NM(1, 32), NM(5, 32), NM(1, 2), NM(4, 4)]


def weight(shape: tuple[int, int], pattern: NM, seed: int = 0) -> Tensor:
    """Random N:M weights; columns need not be a multiple of M, and the second row is empty."""
    generator = torch.Generator().manual_seed(seed)
    padded = torch.randn(shape[0], -(-shape[1] // pattern.m) * pattern.m, generator=generator)
    found = padded.masked_fill(~pattern.select(padded.abs()), 0)[:, : shape[1]]
    found[1:2] = 0
    return found


def vectors(count: int, columns: int) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count))


def bound(matrix: NMMatrix, x: Tensor) -> Tensor:
    """How far sums in float32 may be from the exact ones: a rounding for each term, of the sum of sizes."""
    sizes = x.double().abs() @ matrix.expand().double().abs().t()
    return (matrix.shape[1] + 2) * 2.0**-24 * sizes


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_a_product_is_that_of_the_expanded_matrix(format, pattern, face):
    for shape in SHAPES:
        matrix = NMMatrix.from_dense(weight(shape, pattern), format, pattern)
        matrix.validate()
        dense = matrix._reference(0, shape[0])
        assert torch.equal(matrix.expand(), dense)
        for count in (0, 1, 2, 3, 7, 70):
            x, bias = vectors(count, shape[1]), torch.randn(shape[0], generator=torch.Generator().manual_seed(1))
            exact = x.double() @ dense.double().t()
            assert bool(((matrix.linear(x).double() - exact).abs() <= bound(matrix, x)).all())
            error = (matrix.linear(x, bias).double() - exact - bias.double()).abs()
            assert bool((error <= bound(matrix, x) + 2.0**-23 * (exact + bias).abs()).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("group", [64, 128, None])
def test_scales_belong_to_groups_of_columns(group, pattern, face):
    w = weight((37, 330), pattern)
    w[:, 200:] *= 100
    matrix = NMMatrix.from_dense(w, "int8", pattern, group)
    matrix.validate()
    assert torch.equal(matrix.expand(), matrix._reference(0, 37))
    width = 384 if group is None else group
    padded = torch.nn.functional.pad(w, (0, -330 % width)).view(37, -1, width)
    steps = (padded.abs().amax(2) / 127).repeat_interleave(width, 1)[:, :330]
    assert bool(((matrix.expand() - w).abs() <= 0.5001 * steps).all())
    for count in (1, 6):
        x = vectors(count, 330)
        exact = x.double() @ matrix.expand().double().t()
        assert bool(((matrix.linear(x).double() - exact).abs() <= bound(matrix, x)).all())


def test_what_is_stored_are_the_kept_weights_and_their_places():
    w = torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 0.0, 0.0, 0.0, 8.0, 9.0]])
    matrix = NMMatrix.from_dense(w, pattern=NM(2, 4))
    assert (matrix.n, matrix.m) == (2, 4)
    values, places = matrix.groups()
    assert values.tolist() == [[[5.0, 6.0], [7.0, 0.0], [8.0, 9.0]]]
    assert places.tolist() == [[[1, 3], [0, 1], [0, 1]]]
    # the first kept of all groups, then the second; two bits for each place, the first lowest
    assert matrix.values[0, :, 0].tolist() == [5.0, 7.0, 8.0, 6.0, 0.0, 9.0]
    assert matrix.places[0, :, 0].tolist() == [1 | 0 << 2 | 0 << 4, 3 | 1 << 2 | 1 << 4]
    assert torch.equal(matrix.expand(), w)
    assert torch.equal(matrix.linear(torch.ones(1, 10)), w.sum(1, keepdim=True).t())


@pytest.mark.parametrize(
    ("pattern", "bits"), [(NM(2, 4), 9), (NM(1, 4), 4.5), (NM(1, 16), 1.25), (NM(1, 32), 16 / 32 + 32 / 6 / 32)]
)
def test_bytes_of_a_weight_in_bfloat16(pattern, bits):
    matrix = NMMatrix.from_dense(weight((512, 6144), pattern).bfloat16())
    assert (matrix.n, matrix.m) == (pattern.n, pattern.m)
    assert 8 * matrix.nbytes / (512 * 6144) == pytest.approx(bits, rel=0.001)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_some_rows_are_those_of_the_whole(pattern, face):
    matrix = NMMatrix.from_dense(weight((45, 130), pattern), "int8", pattern, 64)
    whole = matrix.expand()
    for first, last in ((0, 16), (5, 22), (16, 45), (33, 34), (7, 7)):
        assert torch.equal(matrix.expand(first, last), whole[first:last])
    with pytest.raises(ConfigurationError, match="rows 4 to 46"):
        matrix.expand(4, 46)


@pytest.mark.parametrize("format", FORMATS)
def test_threads_change_no_bit(format, face):
    for pattern in (NM(2, 4), NM(1, 8)):
        matrix = NMMatrix.from_dense(weight((101, 257), pattern), format, pattern)
        for count in (1, 6, 40):
            x = vectors(count, 257)
            one, two, seven = (matrix.linear(x, threads=threads) for threads in (1, 2, 7))
            assert torch.equal(one, two)
            assert torch.equal(one, seven)


def test_bfloat16_vectors_give_the_rounded_float32_result(face):
    matrix = NMMatrix.from_dense(weight((33, 100), NM(2, 4)))
    for count in (1, 5, 40):
        x, bias = vectors(count, 100).bfloat16(), vectors(1, 33)[0].bfloat16()
        assert torch.equal(matrix.linear(x, bias), matrix.linear(x.float(), bias.float()).bfloat16())


def test_vectors_may_lie_anywhere_in_memory(face):
    matrix = NMMatrix.from_dense(weight((20, 65), NM(1, 4)))
    whole = torch.randn(9, 3, 131, generator=torch.Generator().manual_seed(0))
    for view in (whole[:, 1, 1:66], whole[:, :, 66:].transpose(0, 1), whole[::2, 0, ::2][:, :65], whole[0, 0, :65]):
        assert torch.equal(matrix.linear(view), matrix.linear(view.contiguous()))
        assert matrix.linear(view).shape == (*view.shape[:-1], 20)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("format", ["float32", "int8"])
def test_what_is_not_finite_spreads_as_in_a_dense_product(format, pattern, face):
    matrix = NMMatrix.from_dense(weight((21, 80), pattern), format, pattern)
    for count in (3, 30):
        x = torch.ones(count, 80)
        x[0, 3], x[1, 70], x[2, 79] = float("nan"), float("inf"), -float("inf")
        found, expected = matrix.linear(x), torch.nn.functional.linear(x, matrix.expand())
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.isinf(), expected.isinf())


def test_weights_that_are_not_finite_are_weights_like_others(face):
    w = weight((5, 64), NM(2, 4))
    kept = w[3].nonzero().flatten()
    w[3, kept[0]], w[4, w[4].nonzero()[0]] = float("inf"), float("nan")
    found = NMMatrix.from_dense(w).linear(torch.ones(1, 64))[0]
    assert found[3] == float("inf")
    assert found[4].isnan()
    assert bool(found[:3].isfinite().all())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(1, 150),
    pattern=st.sampled_from([4, 2, 8, 16, 32]).flatmap(lambda m: st.builds(NM, st.integers(1, m), st.just(m))),
    format=st.sampled_from(FORMATS),
    group=st.sampled_from([None, 64]),
    seed=st.integers(0, 99),
)
def test_packing_again_changes_nothing(rows, columns, pattern, format, group, seed):
    group = group if format == "int8" else None
    matrix = NMMatrix.from_dense(weight((rows, columns), pattern, seed), format, pattern, group)
    matrix.validate()
    assert torch.equal(matrix.expand(), matrix._reference(0, rows))
    assert bool((matrix.mask() | (matrix.expand() == 0)).all())
    again = NMMatrix.from_dense(matrix.expand(), format, pattern, group)
    assert torch.allclose(again.expand(), matrix.expand(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_groups_and_matrices_are_two_forms_of_one_thing(pattern):
    w = weight((37, 90), pattern)
    matrix = NMMatrix.from_dense(w, pattern=pattern)
    again = NMMatrix.from_groups(*matrix.groups(), pattern.m, 90)
    again.validate()
    for name, part in matrix.tensors().items():
        assert torch.equal(part, again.tensors()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS[:6], ids=str)
def test_a_stored_tensor_becomes_a_matrix_and_the_same_tensor_again(pattern, dtype):
    w = weight((19, 75), pattern).to(dtype)
    w[0, w[0].nonzero()[0]] = -0.0  # a value like others
    packed = encode(w, "nm", pattern)
    matrix = matrix_of(packed)
    matrix.validate()
    assert torch.equal(matrix.expand(), w.float())
    again = packed_of(matrix)
    assert (again.shape, again.dtype, again.nonzeros) == (packed.shape, packed.dtype, packed.nonzeros)
    assert all(torch.equal(part, again.parts[name]) for name, part in packed.parts.items())
    assert torch.equal(again.decode().signbit(), w.signbit())


def test_what_has_no_kernel_is_not_made_a_matrix():
    for packed in (
        encode(torch.eye(8), "bitmask"),
        encode(torch.eye(9), "nm", NM(1, 9)),
        encode(torch.eye(8), "nm", NM(1, 8, dim=0)),
    ):
        with pytest.raises(ConfigurationError, match="no N:M kernel"):
            matrix_of(packed)
    with pytest.raises(ConfigurationError, match="float64"):
        matrix_of(encode(torch.eye(8).double(), "nm", NM(1, 8)))
    with pytest.raises(ConfigurationError, match="scales"):
        packed_of(NMMatrix.from_dense(torch.eye(8), "int8"))
    with pytest.raises(PatternError, match="5:32"):
        packed_of(NMMatrix.from_dense(weight((4, 64), NM(5, 32)), pattern=NM(5, 32)))


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p.n < p.m], ids=str)
def test_the_pattern_of_a_weight_is_found(pattern):
    w = weight((160, 320), pattern)[2:]
    found = find_pattern(w, "bfloat16")
    assert found is not None
    assert found.n / found.m == pattern.n / pattern.m
    assert found.m <= pattern.m


def test_a_weight_of_scattered_zeros_follows_no_pattern():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, 320, generator=generator)
    for density in (0.05, 0.3, 0.5, 0.8, 1.0):
        assert find_pattern(w * (torch.rand(64, 320, generator=generator) < density), "float32") is None
    assert find_pattern(torch.zeros(64, 320), "float32") is None
    assert find_pattern(torch.zeros(0, 320), "float32") is None


def test_the_operator_gives_the_product_and_the_gradient_of_its_inputs(face):
    matrix = NMMatrix.from_dense(weight((20, 72), NM(2, 4)))
    parts = matrix.tensors()
    about = (",".join(parts), "nm", "float32", 20, 72, 0)
    x = vectors(3, 72).requires_grad_(True)
    y = packed_linear(x, list(parts.values()), None, *about)
    assert torch.equal(y, matrix.linear(x))
    y.square().sum().backward()
    assert torch.allclose(x.grad, 2 * y.detach() @ matrix.expand(), rtol=1e-5, atol=1e-5)


def test_kinds_pack_and_put_together_again():
    w = weight((20, 70), NM(2, 4))
    matrix = pack(w, "nm", "int8", 64)
    assert isinstance(matrix, NMMatrix)
    about = {"kind": "nm", "shape": (20, 70), "format": "int8", "group": 64}
    assert torch.equal(rebuild("layer", about, matrix.tensors()).expand(), matrix.expand())
    with pytest.raises(CheckpointError, match="a part is missing"):
        rebuild("layer", about, {"values": matrix.values})


BROKEN = {
    "pattern too short": lambda m: {"pattern": m.pattern[:1]},
    "pattern of another dtype": lambda m: {"pattern": m.pattern.long()},
    "n above m": lambda m: {"pattern": torch.tensor([5, 4], dtype=torch.int32)},
    "n of zero": lambda m: {"pattern": torch.tensor([0, 4], dtype=torch.int32)},
    "m no power of two": lambda m: {"pattern": torch.tensor([2, 6], dtype=torch.int32)},
    "another pattern": lambda m: {"pattern": torch.tensor([1, 2], dtype=torch.int32)},
    "places too short": lambda m: {"places": m.places[:, :-1]},
    "places of another dtype": lambda m: {"places": m.places.long()},
    "places not rising": lambda m: {"places": torch.zeros_like(m.places)},
    "values too short": lambda m: {"values": m.values[:-1]},
    "values of another dtype": lambda m: {"values": m.values.double()},
    "values not contiguous": lambda m: {"values": m.values.transpose(0, 2).contiguous().transpose(0, 2)},
    "a value beyond the last column": lambda m: {"values": m.values.clone().fill_(1)},
    "scales too short": lambda m: {"scales": m.scales[:-1]},
    "scales missing": lambda m: {"scales": None},
    "a scale is NaN": lambda m: {"scales": m.scales * float("nan")},
    "group": lambda m: {"group": 63},
    "format": lambda m: {"format": "int7"},
}


@pytest.mark.parametrize("part", BROKEN)
def test_a_matrix_whose_parts_disagree_is_refused(part):
    matrix = NMMatrix.from_dense(weight((61, 101), NM(2, 4)), "int8", group=64)
    matrix.validate("layer")
    with pytest.raises(CheckpointError, match="layer"):
        dataclasses.replace(matrix, **BROKEN[part](matrix)).validate("layer")


def test_what_cannot_be_packed_is_refused_by_name():
    w = torch.ones(5, 96)
    with pytest.raises(ConfigurationError, match="int4"):
        NMMatrix.from_dense(w, "int4")
    with pytest.raises(ConfigurationError, match="float64"):
        NMMatrix.from_dense(w.double())
    with pytest.raises(ConfigurationError, match="keeps 4, more than 2:4"):
        NMMatrix.from_dense(w, pattern=NM(2, 4))
    for pattern in (NM(2, 6), NM(1, 64), NM(2, 4, dim=0)):
        with pytest.raises(ConfigurationError, match=str(pattern)):
            NMMatrix.from_dense(w, pattern=pattern)
    for format, group in (("int8", 65), ("float32", 64)):
        with pytest.raises(ConfigurationError, match=f"group is {group}"):
            NMMatrix.from_dense(w, format, group=group)
    with pytest.raises(ConfigurationError, match="no N:M matrix"):
        NMMatrix.from_groups(torch.ones(3, 2, 2), torch.ones(3, 2, 2), 4, 8)
    with pytest.raises(ConfigurationError, match="float16"):
        NMMatrix.from_groups(torch.ones(3, 2, 2).half(), torch.ones(3, 2, 2), 4, 8)
    w[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="int8"):
        NMMatrix.from_dense(w, "int8")

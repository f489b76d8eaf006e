"""Packing loses no bit, takes the bytes it promises, and refuses parts that contradict each other."""

from __future__ import annotations

import dataclasses
from math import comb, prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.core.patterns import NM
from gossamer.errors import CheckpointError, ConfigurationError, PatternError
from gossamer.storage.combinations import (
    code_width,
    masks_by_rank,
    pack_codes,
    packed_length,
    rank_groups,
    unpack_codes,
)
from gossamer.storage.packing import DTYPES, KINDS, PackedTensor, encode

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
ALL_DTYPES = tuple(DTYPES.values())


@st.composite
def tensors(draw, shapes=SHAPES, dtypes=ALL_DTYPES) -> Tensor:
    """Random bit patterns (NaNs, infinities and negative zeros among them) at a random density."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    high = 2 if dtype == torch.bool else 256
    data = generator.integers(0, high, (prod(shape), dtype.itemsize), dtype=np.uint8)
    data[generator.random(prod(shape)) >= draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))] = 0
    words = np.frombuffer(data.tobytes(), f"i{dtype.itemsize}").copy()
    return torch.from_numpy(words).view(dtype).reshape(shape)


def bits(tensor: Tensor) -> bytes:
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(words).numpy().tobytes()


def assert_same_bits(left: Tensor, right: Tensor) -> None:
    assert left.dtype == right.dtype
    assert left.shape == right.shape
    assert bits(left) == bits(right)


def follow(tensor: Tensor, pattern: NM) -> Tensor:
    """Keep n positions of every m along the dimension, other ones from group to group; the last may be short."""
    index = torch.arange(tensor.shape[pattern.dim])
    kept = (index + index // pattern.m) % pattern.m < pattern.n
    shape = [1] * tensor.ndim
    shape[pattern.dim] = -1
    return torch.where(kept.reshape(shape), tensor, torch.zeros((), dtype=tensor.dtype))


@given(tensors(), st.sampled_from([None, "dense", "bitmask"]))
@settings(max_examples=300, deadline=None)
def test_every_shape_and_dtype_comes_back_bit_for_bit(tensor, kind):
    packed = encode(tensor, kind)
    assert_same_bits(packed.decode(), tensor)
    assert packed.nonzeros == sum(
        any(word) for word in np.frombuffer(bits(tensor), np.uint8).reshape(-1, tensor.dtype.itemsize)
    )


@given(
    tensors(SHAPES.filter(bool), (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64)),
    st.integers(1, 6),
    st.integers(0, 6),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_nm_pattern_with_tails_comes_back_bit_for_bit(tensor, n, more, data):
    pattern = NM(n, n + more, data.draw(st.integers(0, tensor.ndim - 1)))
    tensor = follow(tensor, pattern)
    packed = encode(tensor, "nm", pattern)
    assert packed.kind == "nm"
    assert_same_bits(packed.decode(), tensor)


@given(tensors(SHAPES, (torch.float32, torch.bfloat16, torch.int8)))
@settings(max_examples=100, deadline=None)
def test_the_free_choice_is_never_larger_than_a_named_kind(tensor):
    assert encode(tensor).nbytes <= min(encode(tensor, kind).nbytes for kind in ("dense", "bitmask"))


def test_negative_zero_and_nan_payloads_are_values():
    tensor = torch.tensor([0, -(2**31), 0x7FC01234, 1, 0], dtype=torch.int32).view(torch.float32)
    packed = encode(tensor, "bitmask")
    assert packed.parts["bits"].tolist() == [0b01110]
    assert_same_bits(packed.decode(), tensor)


def test_a_bitmask_is_bits_in_c_order_least_significant_first():
    packed = encode(torch.tensor([[0.0, 1, 0, 0, 2, 0], [0, 0, 3, 0, 0, 4]]), "bitmask")
    assert packed.parts["bits"].tolist() == [0b00010010, 0b1001]
    assert packed.parts["values"].tolist() == [1, 2, 3, 4]


def test_two_of_four_has_three_bit_codes_of_the_combinatorial_rank():
    # kept (0, 1) has rank 0 + C(1, 2) = 0; (1, 3) has 1 + C(3, 2) = 4; codes 000 and 100 -> 0b100000
    packed = encode(torch.tensor([[1.0, 2, 0, 0, 0, 3, 0, 4]]), "nm", NM(2, 4))
    assert packed.parts["codes"].tolist() == [0b100_000]
    assert packed.parts["values"].tolist() == [1, 2, 3, 4]


def test_groups_with_fewer_values_are_filled_with_explicit_zeros():
    packed = encode(torch.tensor([[0.0, 0, 0, 5, 0, 0, 0, 0]]), "nm", NM(2, 4))
    assert packed.parts["values"].tolist() == [0, 5, 0, 0]
    assert packed.nonzeros == 1


def test_groups_run_along_the_dimension_of_the_pattern():
    tensor = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 4]])
    packed = encode(tensor, "nm", NM(1, 2, dim=0))
    assert packed.parts["values"].tolist() == [1, 3, 2, 4]
    assert_same_bits(packed.decode(), tensor)


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (1, 2), (2, 4), (4, 8), (8, 16), (1, 16), (3, 5), (4, 32), (1, 256), (2, 200)]
)
def test_ranks_number_all_choices_once_and_in_order(n, m):
    table = masks_by_rank(n, m)
    assert len(table) == comb(m, n)
    assert (table.sum(1) == n).all()
    assert np.array_equal(rank_groups(table, n), np.arange(comb(m, n)))


@given(st.integers(0, 16), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_codes_of_any_width_come_back(width, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**width, count).astype(np.uint16)
    packed = pack_codes(codes, width)
    assert packed.size == packed_length(count, width)
    assert np.array_equal(unpack_codes(packed, width, count), codes)
    stream = sum(int(code) << (width * index) for index, code in enumerate(codes))
    assert packed.tobytes() == stream.to_bytes(packed.size, "little")


def test_half_sparse_bfloat16_takes_at_most_57_percent():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 768, generator=generator).bfloat16()
    weight[torch.rand(weight.shape, generator=generator) < 0.5] = 0
    packed = encode(weight)
    assert packed.kind == "bitmask"
    assert packed.nbytes <= 0.57 * packed.dense_nbytes


@pytest.mark.parametrize(
    ("pattern", "bits_per_weight"),
    [(NM(2, 4), 8.75), (NM(4, 8), 8.875), (NM(1, 4), 4.5), (NM(1, 2), 8.5), (NM(1, 8), 2.375), (NM(1, 16), 1.25)],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_nm_patterns_are_found_without_being_named(pattern, bits_per_weight, dim):
    pattern = NM(pattern.n, pattern.m, dim)
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[~pattern.select(weight.abs().float())] = 0
    packed = encode(weight)
    assert (packed.kind, packed.pattern) == ("nm", pattern)
    assert 8 * packed.nbytes == bits_per_weight * weight.numel()
    assert code_width(pattern.n, pattern.m) == (comb(pattern.m, pattern.n) - 1).bit_length()


def test_a_dense_tensor_stays_dense_and_independent_of_its_source():
    weight = torch.ones(4, 4)
    packed = encode(weight)
    weight.zero_()
    assert packed.kind == "dense"
    assert packed.decode().sum() == 16


def test_views_gradients_and_conjugates_are_packed_by_value():
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    assert_same_bits(encode(weight.t()[1:, ::2]).decode(), weight.detach().t()[1:, ::2].contiguous())
    twist = torch.tensor([1 + 2j, 0], dtype=torch.complex64).conj()
    assert_same_bits(encode(twist).decode(), twist.resolve_conj())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"kind": "zip"}, ConfigurationError, "'zip'"),
        ({"kind": "bitmask", "pattern": NM(2, 4)}, ConfigurationError, "2:4"),
        ({"kind": "nm", "pattern": NM(1, 4)}, PatternError, "4 non-zeros"),
        ({"kind": "nm", "pattern": NM(1, 4, dim=2)}, PatternError, "dimension 2"),
        ({"kind": "nm", "pattern": NM(16, 32)}, PatternError, "bitmask"),
    ],
)
def test_impossible_requests_say_what_is_allowed(arguments, error, words):
    with pytest.raises(error, match=words):
        encode(torch.ones(4, 8), **arguments)


def test_tensors_without_values_are_refused():
    with pytest.raises(ConfigurationError, match="meta"):
        encode(torch.empty(2, device="meta"))
    with pytest.raises(ConfigurationError, match="complex128"):
        encode(torch.zeros(2, dtype=torch.complex128))


def broken(packed: PackedTensor, **changes) -> PackedTensor:
    parts = {**packed.parts, **{key: changes.pop(key) for key in list(changes) if key in ("bits", "codes", "values")}}
    return dataclasses.replace(packed, parts=parts, **changes)


def bytes_of(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


BITMASK = encode(torch.tensor([0.0, 1, 0, 0, 2, 0, 0, 0, 0, 3]), "bitmask")
GROUPED = encode(torch.tensor([[1.0, 2, 0, 0, 0, 3, 0, 4, 5, 0]]), "nm", NM(2, 4))


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (broken(BITMASK, bits=bytes_of(0b10010)), "1 mask bytes"),
        (broken(BITMASK, bits=bytes_of(0b10010, 0b110)), "beyond the last element"),
        (broken(BITMASK, bits=bytes_of(0b10011, 0b10)), "keeps 4 elements and 3 values"),
        (broken(BITMASK, values=torch.tensor([1.0, 2])), "keeps 3 elements and 2 values"),
        (broken(BITMASK, values=torch.tensor([1.0, 0, 3])), "says 3 non-zeros and stores 2"),
        (broken(BITMASK, values=torch.tensor([1.0, 2, 3]).half()), "float16"),
        (broken(BITMASK, values=torch.tensor([[1.0, 2, 3]])), "flat"),
        (broken(BITMASK, nonzeros=4), "says 4 non-zeros and stores 3"),
        (broken(BITMASK, kind="zip"), "unknown kind"),
        (broken(BITMASK, kind="dense"), "parts"),
        (broken(encode(torch.ones(2, 3)), shape=(3, 2)), "shape"),
        (broken(GROUPED, pattern=None), "no pattern"),
        (broken(GROUPED, pattern=NM(2, 4, dim=5)), "dimension 5"),
        (broken(GROUPED, codes=bytes_of(0)), "1 code bytes"),
        (broken(GROUPED, values=torch.ones(4)), "4 values for 3 groups"),
        (broken(GROUPED, codes=bytes_of(0b111, 0)), "code 7 is out of range, 2:4 has 6"),
        (broken(GROUPED, codes=bytes_of(0, 0b10)), "beyond the last group"),
        # code 5 keeps the positions 2 and 3 of a last group that has only the positions 0 and 1
        (broken(GROUPED, codes=bytes_of(0b01_100_000, 0b1)), "beyond the end of its dimension"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_before_decoding(packed, words):
    with pytest.raises(CheckpointError, match=words):
        packed.decode()


def test_the_kinds_are_those_of_the_format():
    assert KINDS == ("dense", "bitmask", "nm")

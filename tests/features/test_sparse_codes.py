"""Sparse codes, and products with them, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels.codes import decode, products_at, scattered


def dense_codes(seed, rows, width, density):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return found * (torch.rand(rows, width, generator=generator) < density)


cases = st.tuples(st.integers(0, 99), st.integers(0, 6), st.integers(1, 9), st.sampled_from([0.0, 0.4, 1.0]))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_nothing_is_lost_on_the_way_there_and_back(case):
    dense = dense_codes(*case)
    codes = SparseCodes.from_dense(dense)
    codes.check()
    assert codes.to_dense().equal(dense)
    assert codes.counts.tolist() == (dense != 0).sum(1).tolist()
    assert codes.activity().tolist() == (dense != 0).sum(0).tolist()
    assert codes.transposed().to_dense()[:, : len(dense)].equal(dense.T.contiguous())
    if len(dense):
        assert codes.to_csr().to_dense().equal(dense)


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(-3, 6), st.integers(-3, 9))
def test_slices_and_their_union_are_those_of_rows(case, first, last):
    dense = dense_codes(*case)
    codes = SparseCodes.from_dense(dense)
    assert codes[first:last].to_dense().equal(dense[first:last])
    assert SparseCodes.cat([codes[:2], codes[2:]]).to_dense().equal(dense)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_decoding_is_the_dense_product_with_all_its_gradients(case):
    dense = dense_codes(*case).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    dictionary = torch.randn(dense.shape[1], 5, generator=generator, dtype=torch.float64).requires_grad_()
    bias = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(len(dense), 5, generator=generator, dtype=torch.float64)
    mask = dense.detach() != 0
    found = decode(SparseCodes.from_mask(dense, mask), dictionary, bias)
    torch.testing.assert_close(found, dense @ dictionary + bias)
    ours = torch.autograd.grad((found * weight).sum(), (dense, dictionary, bias))
    theirs = torch.autograd.grad(((dense @ dictionary + bias) * weight).sum(), (dense, dictionary, bias))
    torch.testing.assert_close(ours[0], theirs[0] * mask)
    torch.testing.assert_close(ours[1:], theirs[1:])


def test_products_at_what_is_stored_and_sums_over_rows():
    dense = dense_codes(3, 6, 9, 0.4)
    codes = SparseCodes.from_dense(dense)
    rows, dictionary = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(products_at(codes, rows, dictionary), (rows @ dictionary.T)[dense != 0])
    torch.testing.assert_close(scattered(codes, rows), dense.T @ rows)


def test_codes_of_a_fixed_number_may_be_in_any_order():
    indices, values = torch.tensor([[4, 1], [0, 3]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    codes = SparseCodes.from_rows(indices, values, 5)
    assert codes.to_dense().tolist() == [[0, 2, 0, 0, 1], [3, 0, 0, 4, 0]]
    assert codes.sorted().indices.tolist() == [1, 4, 0, 3]


def test_ten_bytes_a_row_instead_of_all_features():
    codes = SparseCodes.from_rows(torch.zeros(1000, 32, dtype=torch.int32), torch.zeros(1000, 32).half(), 16384)
    assert codes.nbytes <= 1000 * 16384 * 2 / 100


def test_damaged_codes_are_refused():
    codes = SparseCodes.from_dense(dense_codes(0, 3, 4, 0.5))
    with pytest.raises(CheckpointError, match="outside the 4"):
        SparseCodes(codes.indices + 4, codes.values, codes.starts, 4).check()
    with pytest.raises(CheckpointError, match="do not ascend"):
        SparseCodes(codes.indices, codes.values, codes.starts + 1, 4).check()
    with pytest.raises(ConfigurationError, match="features need"):
        decode(codes, torch.zeros(5, 2))
    with pytest.raises(ConfigurationError, match="one width"):
        SparseCodes.cat([codes, SparseCodes.from_dense(torch.zeros(2, 5))])
    with pytest.raises(ConfigurationError, match="vector"):
        SparseCodes(codes.indices[:, None], codes.values, codes.starts, 4)

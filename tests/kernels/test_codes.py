"""Products with sparse codes against dense ones, in every way there is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.core.sparse_codes import SparseCodes
from gossamer.errors import ConfigurationError
from gossamer.kernels import codes as products
from gossamer.kernels import native


@pytest.fixture(params=["reference", *native.instruction_sets()])
def path(request, monkeypatch):
    """Every way in which codes are multiplied on this machine, with torch alone first."""
    if request.param == "reference":
        monkeypatch.setattr(products, "offers", lambda name: False)
        yield request.param
    else:
        if not native.offers("code_gather"):
            pytest.skip("the compiled kernels are older than codes")
        with native.using(request.param):
            yield request.param


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes_of(rows, features, share, seed=0, wide=False):
    mask = torch.rand(rows, features, generator=torch.Generator().manual_seed(seed)) < share
    codes = SparseCodes.from_mask(draw(rows, features, seed=seed), mask)
    indices = codes.indices if wide else codes.indices.to(torch.int32)
    return SparseCodes(indices, codes.values, codes.starts, codes.width)


SHAPES = [(1, 1, 1), (3, 5, 7), (40, 33, 16), (17, 200, 161), (9, 64, 640)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_decoding_and_its_gradients_are_those_of_the_dense_product(path, dtype, shape, share):
    rows, features, size = shape
    codes = codes_of(rows, features, share, wide=bool(rows % 2))
    dictionary = draw(features, size, seed=1, dtype=dtype)
    tolerance = {"rtol": 2e-2, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    found = products.decode(codes, dictionary)
    assert found.dtype == dictionary.dtype
    torch.testing.assert_close(found.double(), codes.to_dense().double() @ dictionary.double(), **tolerance)
    if dtype == torch.bfloat16:
        return
    values = codes.values.to(dtype).requires_grad_()
    dictionary.requires_grad_()
    again = SparseCodes(codes.indices, values, codes.starts, codes.width)
    weight = draw(rows, size, seed=2, dtype=dtype)
    ours = torch.autograd.grad((products.decode(again, dictionary) * weight).sum(), (values, dictionary))
    theirs = torch.autograd.grad((again.to_dense() @ dictionary * weight).sum(), (values, dictionary))
    torch.testing.assert_close(ours, theirs, **tolerance)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 60), st.integers(1, 90), st.floats(0, 0.5))
def test_sampled_products_and_turned_codes(seed, rows, features, size, share):
    codes, x = codes_of(rows, features, share, seed), draw(rows, size, seed=seed)
    dictionary = draw(features, size, seed=seed + 1)
    everything = (x @ dictionary.t())[codes.row_of, codes.indices.long()]
    torch.testing.assert_close(products.products_at(codes, x, dictionary), everything, rtol=1e-4, atol=1e-4)
    turned = products.turn(codes)
    assert turned.to_dense().equal(codes.to_dense().t())
    assert turned.indices.equal(turned.sorted().indices)
    torch.testing.assert_close(products.scattered(codes, x), codes.to_dense().t() @ x, rtol=1e-4, atol=1e-4)


def test_nothing_depends_on_the_number_of_threads(path):
    codes, dictionary = codes_of(300, 50, 0.2), draw(50, 70, seed=1)
    rows = draw(300, 70, seed=2)
    threads, found = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append([products.decode(codes, dictionary), products.products_at(codes, rows, dictionary)])
        found[-1].append(products.scattered(codes, rows))
    torch.set_num_threads(threads)
    assert all(one.equal(other) for one, other in zip(*found))


def test_a_feature_outside_the_dictionary_is_refused(path):
    codes = SparseCodes(torch.tensor([0, 7]), torch.ones(2), torch.tensor([0, 2]), 5)
    with pytest.raises((ConfigurationError, RuntimeError, IndexError)):
        products.decode(codes, draw(5, 3))
    with pytest.raises(ConfigurationError, match="need"):
        products.decode(codes, draw(4, 3))

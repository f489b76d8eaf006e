"""Products with matrices of which only the non-zeros exist, beside dense ones in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.kernels import native, sparse_rows
from gossamer.kernels.sparse_rows import WIDTH, SparseRows, width_of

SHAPES = [(1, 1), (3, 5), (17, 33), (64, 64), (130, 100), (9, WIDTH + 1), (40, 2 * WIDTH + 40), (2 * WIDTH + 40, 19)]
compiled = pytest.mark.skipif(not native.available(), reason="needs the compiled kernels")


def problem(rows: int, columns: int, positions: int, density: float = 0.2):
    """A mask with an empty row, its weights, inputs, gradients of outputs and a bias."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns + positions)
    mask = torch.rand(rows, columns, generator=generator) < density
    if rows > 2:
        mask[1] = False
    weight = torch.randn(rows, columns, generator=generator) * mask
    x = torch.randn(positions, columns, generator=generator)
    return mask, weight, x, torch.randn(positions, rows, generator=generator), torch.randn(rows, generator=generator)


def assert_products_fit(mask, weight, x, outputs, bias, threads=None):
    """All three products, to the rounding error of float32 sums."""
    index, turned, values = SparseRows.from_mask(mask), SparseRows.transposed(mask), weight[mask]
    wide, sizes = weight.double(), weight.double().abs()
    unit = torch.finfo(torch.float32).eps

    def check(found, expected, magnitude, terms):
        # the classical bound of a sum of so many products in any order, plus bias and rounding of the result
        assert bool(((found - expected).abs() <= (terms + 3) * unit * (magnitude + expected.abs())).all())

    forward = index.multiply(values, x, bias, threads)
    check(forward, x.double() @ wide.t() + bias, x.double().abs() @ sizes.t() + bias.abs(), mask.shape[1])
    backward = turned.multiply(values, outputs, None, threads)
    check(backward, outputs.double() @ wide, outputs.double().abs() @ sizes, mask.shape[0])
    gradient = index.outer(x, outputs, threads)
    dense, largest = outputs.double().t() @ x.double(), outputs.double().abs().t() @ x.double().abs()
    check(gradient, dense[mask], largest[mask], len(x))
    return forward, backward, gradient


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_an_index_describes_its_mask(rows, columns, density):
    mask, weight, *_ = problem(rows, columns, 1, density)
    index, turned, values = SparseRows.from_mask(mask), SparseRows.transposed(mask), weight[mask]
    for each, expected_mask, expected in ((index, mask, weight), (turned, mask.t(), weight.t())):
        each.validate()
        assert torch.equal(each.mask(), expected_mask)
        assert torch.equal(each.expand(values), expected)
    assert index.nonzeros == turned.nonzeros == int(mask.sum())


def test_indices_are_small():
    mask = torch.rand(200, 3000, generator=torch.Generator().manual_seed(0)) < 0.05
    index, turned = SparseRows.from_mask(mask), SparseRows.transposed(mask)
    starts = 4 * (3 * 200 + 1) + 4 * (3000 + 1)
    assert index.nbytes + turned.nbytes == starts + int(mask.sum()) * (2 + 4 + 2 + 4)
    narrow = SparseRows.from_mask(mask[:, :WIDTH])
    assert narrow.order is None
    assert narrow.nbytes == 4 * 201 + 2 * narrow.nonzeros


def test_ranges_of_columns_are_equally_wide():
    assert [width_of(n) for n in (1, WIDTH, WIDTH + 1, 2560, 4096)] == [1, WIDTH, WIDTH // 2 + 1, 1280, 1024]


@compiled
@pytest.mark.parametrize("name", native.instruction_sets())
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_every_instruction_set_forms_the_products(name, rows, columns):
    with native.using(name):
        for density in (0.0, 0.2, 1.0):
            assert_products_fit(*problem(rows, columns, 37, density))


@compiled
@pytest.mark.parametrize("name", native.instruction_sets())
@pytest.mark.parametrize("rows", [2048, 2050])
def test_outputs_that_no_cache_holds(name, rows):
    with native.using(name):
        assert_products_fit(*problem(rows, 19, 200, 0.1))


@compiled
@pytest.mark.parametrize("name", native.instruction_sets())
def test_every_number_of_positions(name):
    with native.using(name):
        for positions in (*range(1, 71), 127, 300):
            assert_products_fit(*problem(21, 18, positions))


@compiled
@pytest.mark.parametrize("name", native.instruction_sets())
@pytest.mark.parametrize("positions", [5, 64, 200, 700])
def test_the_number_of_threads_changes_no_bit(name, positions):
    with native.using(name):
        case = problem(50, WIDTH + 70, positions)
        alone = assert_products_fit(*case, threads=1)
        for threads in (2, 3, 7):
            for found, expected in zip(assert_products_fit(*case, threads=threads), alone, strict=True):
                assert torch.equal(found, expected)


@compiled
@pytest.mark.parametrize("name", native.instruction_sets())
def test_images_are_batches_whose_positions_lie_together(name):
    mask, weight, *_ = problem(20, 30, 1)
    index, turned, values = SparseRows.from_mask(mask), SparseRows.transposed(mask), weight[mask]
    generator = torch.Generator().manual_seed(1)
    x, outputs = torch.randn(3, 30, 77, generator=generator), torch.randn(3, 20, 77, generator=generator)
    bias = torch.randn(20, generator=generator)
    with native.using(name):
        forward, backward = index.multiply(values, x, bias), turned.multiply(values, outputs)
        gradient = index.outer(x, outputs)
    close = {"rtol": 1e-5, "atol": 1e-4}
    assert torch.allclose(forward.double(), weight.double() @ x.double() + bias[:, None], **close)
    assert torch.allclose(backward.double(), weight.double().t() @ outputs.double(), **close)
    assert torch.allclose(gradient.double(), torch.einsum("nrp,ncp->rc", outputs.double(), x.double())[mask], **close)


@compiled
def test_inputs_may_lie_anyhow():
    mask, weight, x, outputs, bias = problem(33, 47, 70)
    index, values = SparseRows.from_mask(mask), weight[mask]
    expected = index.multiply(values, x, bias), index.outer(x, outputs)
    wide = torch.zeros(140, 100)
    wide[::2, 3:50] = x
    spread = torch.zeros(70, 94)
    spread[:, ::2] = x
    for same in (x.t().contiguous().t(), wide[::2, 3:50], spread[:, ::2]):
        assert torch.equal(index.multiply(values, same, bias), expected[0])
        assert torch.equal(index.outer(same, outputs.t().contiguous().t()), expected[1])
    one = outputs[:1].expand(70, -1)
    assert torch.equal(index.outer(x, one), index.outer(x, one.contiguous()))


@compiled
def test_nan_and_infinity_reach_what_they_are_connected_to_and_nothing_else():
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    index, values = SparseRows.from_mask(mask), torch.ones(4)
    x = torch.tensor([[float("nan"), 1.0], [1.0, float("inf")], [1.0, 2.0]])
    found = index.multiply(values, x)
    assert found.isnan().tolist() == [[True, False, True], [False, False, False], [False, False, False]]
    assert found[1:].tolist() == [[1, float("inf"), float("inf")], [1, 2, 3]]
    gradient = index.outer(x, torch.ones(3, 3))
    assert gradient.isnan().tolist() == [True, False, True, False]


def test_without_compiled_kernels_torch_forms_the_products(monkeypatch):
    monkeypatch.setattr(sparse_rows, "available", lambda: False)
    for density in (0.0, 0.2, 1.0):
        assert_products_fit(*problem(17, 33, 20, density))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_through_torch(dtype):
    mask, weight, x, outputs, bias = problem(17, 33, 20)
    index, values = SparseRows.from_mask(mask), weight[mask].to(dtype)
    found = index.multiply(values, x.to(dtype), bias.to(dtype))
    assert found.dtype == dtype
    assert torch.equal(found, torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype)))
    assert torch.equal(index.outer(x.to(dtype), outputs.to(dtype)), (outputs.to(dtype).t() @ x.to(dtype))[mask])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_times_nothing(shape):
    mask = torch.ones(shape, dtype=torch.bool)
    index, turned = SparseRows.from_mask(mask), SparseRows.transposed(mask)
    rows, columns = shape
    bias = torch.ones(rows)
    assert torch.equal(index.multiply(torch.empty(0), torch.ones(3, columns), bias), torch.ones(3, rows))
    assert turned.multiply(torch.empty(0), torch.ones(3, rows)).tolist() == torch.zeros(3, columns).tolist()
    assert index.outer(torch.ones(3, columns), torch.ones(3, rows)).shape == (0,)
    assert index.multiply(torch.empty(0), torch.ones(0, columns)).shape == (0, rows)


def test_what_does_not_fit_is_refused_before_a_kernel_runs():
    index = SparseRows.from_mask(torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match=r"values are \(23,\)"):
        index.multiply(torch.ones(23), torch.ones(2, 6))
    with pytest.raises(ConfigurationError, match=r"x is \(2, 5\)"):
        index.multiply(torch.ones(24), torch.ones(2, 5))
    with pytest.raises(ConfigurationError, match=r"bias is \(3,\)"):
        index.multiply(torch.ones(24), torch.ones(2, 6), torch.ones(3))
    with pytest.raises(ConfigurationError, match=r"outputs are \(2, 5\)"):
        index.outer(torch.ones(2, 6), torch.ones(2, 5))
    with pytest.raises(ConfigurationError, match="bool"):
        SparseRows.from_mask(torch.ones(4, 6))


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        ("starts", torch.tensor([0, 2, 1, 4], dtype=torch.int32)),
        ("starts", torch.tensor([0, 2, 3], dtype=torch.int32)),
        ("starts", torch.tensor([0, 2, 3, 9], dtype=torch.int32)),
        ("places", torch.tensor([0, 5, 0, 1], dtype=torch.int16)),
        ("places", torch.tensor([0, -1, 0, 1], dtype=torch.int16)),
        ("places", torch.tensor([0, 1, 0, 1])),
        ("order", torch.tensor([0, 1, 1, 3], dtype=torch.int32)),
    ],
)
def test_a_broken_index_is_found(part, broken):
    index = SparseRows.from_mask(torch.tensor([[True, True], [False, True], [True, False]]))
    with pytest.raises(CheckpointError, match="a layer"):
        dataclasses.replace(index, **{part: broken}).validate("a layer")

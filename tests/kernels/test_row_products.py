"""Products with rows where they lie, against float64 with copies of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels import native, row_products_native
from gossamer.kernels.row_products import gathered_linear, gathered_rms_norm, scattered_linear_
from gossamer.kernels.row_products_native import row_product

# rows, of which some, inputs, outputs; nothing divides anything, and single rows, columns and none at all
SHAPES = [(40, 17, 33, 50), (130, 90, 288, 70), (9, 1, 1, 1), (20, 20, 16, 16), (12, 0, 8, 8), (300, 260, 20, 100)]
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.fixture(params=["reference", *native.instruction_sets()])
def face(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(row_products_native, "offers", lambda name: False)
        yield request.param
    else:
        if not native.offers("row_product"):
            pytest.skip("the compiled kernels are older than products of rows")
        with native.using(request.param):
            yield request.param


class Draw:
    def __init__(self, dtype: torch.dtype):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype).requires_grad_()

    def rows(self, count: int, some: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)[:some].sort().values


def near(found: list[Tensor], wanted: list[Tensor], limit: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).norm()) <= limit * float(other.norm()) + 1e-12


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def with_gradients(output: Tensor, inputs: list[Tensor], flow: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, flow)]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gathered_products_and_gradients(face, shape, dtype):
    rows, some, inputs, outputs = shape
    draw = Draw(dtype)
    x, weight, bias, index = draw(rows, inputs), draw(outputs, inputs), draw(outputs), draw.rows(rows, some)
    flow = draw(some, outputs).detach()
    found = with_gradients(gathered_linear(x, index, weight, bias), [x, weight, bias], flow)
    a, b, c = wide(x, weight, bias)
    near(found, with_gradients(a[index] @ b.T + c, [a, b, c], flow.double()), LIMITS[dtype])
    assert found[0].dtype == dtype


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_scattered_products_and_gradients(face, shape, dtype):
    rows, some, inputs, outputs = shape
    draw = Draw(dtype)
    target, x, weight, bias = draw(rows, outputs), draw(some, inputs), draw(outputs, inputs), draw(outputs)
    index, flow = draw.rows(rows, some), draw(rows, outputs).detach()
    there = target.clone()
    result = scattered_linear_(there, index, x, weight, bias)
    assert result is there
    found = with_gradients(result, [target, x, weight, bias], flow)
    a, b, c, d = wide(target, x, weight, bias)
    near(found, with_gradients(a.index_add(0, index, b @ c.T + d), [a, b, c, d], flow.double()), LIMITS[dtype])
    out = torch.ones(rows, dtype=torch.bool)
    out[index] = False
    assert torch.equal(result[out], target[out])


@pytest.mark.parametrize("gain_trains", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(40, 17, 33), (50, 50, 64), (30, 11, 5)])
def test_gathered_norms_and_gradients(face, shape, dtype, zero, gain_trains):
    rows, some, width = shape
    draw = Draw(dtype)
    x, gain, index = draw(rows, width), draw(width), draw.rows(rows, some)
    flow = draw(some, width).detach()
    gain = gain.detach()
    gain[2] = 0.0 if zero else gain[2]
    gain.requires_grad_(gain_trains)
    inputs = [x, gain][: 1 + gain_trains]
    found = with_gradients(gathered_rms_norm(x, index, gain, 0.01), inputs, flow)
    a, b = wide(x, gain)
    square = a[index].square().mean(1, keepdim=True)
    wanted = with_gradients(b * a[index] / (square + 0.01).sqrt(), [a, b][: 1 + gain_trains], flow.double())
    near(found, wanted, 3 * LIMITS[dtype])


def test_a_norm_keeps_its_result_alone():
    draw = Draw(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gathered_rms_norm(draw(400, 32), draw.rows(400, 100), draw(32).detach(), 0.01)
    matrices = [tensor for tensor in kept if tensor.ndim == 2]
    assert [tensor.data_ptr() for tensor in matrices] == [y.data_ptr()]


@pytest.mark.parametrize("dtype", LIMITS)
def test_threads_change_no_bit(face, dtype):
    draw = Draw(dtype)
    x, weight, index = draw(500, 150).detach(), draw(130, 150).detach(), draw.rows(500, 333)
    target, rows, gain = draw(500, 130).detach(), draw(333, 150).detach(), draw(150).detach()
    results = []
    for threads in (1, 2, 3):
        turned = {"left_turned": True, "right_turned": True, "right_index": index, "threads": threads}
        back = row_product(rows, x, x.new_empty(150, 150), **turned)
        results.append(
            [
                gathered_linear(x, index, weight, None, threads),
                scattered_linear_(target.clone(), index, rows, weight, None, threads),
                gathered_rms_norm(x, index, gain, 1e-6, threads),
                back,
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other))


def test_rows_of_views_are_read_as_they_lie(face):
    draw = Draw(torch.float32)
    store, weight = draw(60, 100).detach(), draw(24, 40).detach()
    index = draw.rows(60, 20)
    for x in (store[:, 30:70], store.T[:60, :40], store[::2, :40]):
        rows = index[index < len(x)]
        near([gathered_linear(x, rows, weight)], [x[rows].double() @ weight.T.double()], 1e-6)
    there = store[:, :24]
    ones = torch.ones(20, 40)
    wanted = there.double().index_add(0, index, ones.double() @ weight.T.double())
    before = store[:, 24:].clone()
    near([scattered_linear_(there, index, ones, weight)], [wanted], 1e-6)
    assert torch.equal(store[:, 24:], before)


def test_not_a_number_reaches_its_own_row_only(face):
    draw = Draw(torch.float32)
    x, weight = draw(10, 20).detach(), draw(30, 20).detach()
    x[4, 3], x[5, 3] = float("nan"), float("inf")
    found = gathered_linear(x, torch.tensor([1, 4, 8]), weight)
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert gathered_rms_norm(x, torch.tensor([1, 4]), torch.ones(20)).isnan().all(1).tolist() == [False, True]


def test_bad_input_is_named():
    x, weight, index = torch.ones(5, 4), torch.ones(3, 4), torch.tensor([0, 2])
    target = torch.zeros(5, 3)
    for bad in (torch.tensor([2, 0]), torch.tensor([1, 1]), torch.tensor([0, 5]), torch.tensor([-1, 2])):
        with pytest.raises(ConfigurationError, match="must ascend from 0 on and stay below the 5"):
            gathered_linear(x, bad, weight)
    for arguments, words in (
        ((x, index.int(), weight), "torch.int32; give"),
        ((x[0], index, weight), "give a matrix"),
        ((x, index, weight[:, :3]), "columns must be equally many"),
        ((x, index, weight, torch.ones(4)), "3 outputs take one for each"),
        ((x, index, weight.bfloat16()), "all must be one"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            gathered_linear(*arguments)
    with pytest.raises(ConfigurationError, match="2 rows of 3 outputs"):
        scattered_linear_(target, index, torch.ones(3, 4), weight)
    with pytest.raises(ConfigurationError, match="2 rows of 3 outputs"):
        scattered_linear_(torch.zeros(5, 4), index, torch.ones(2, 4), weight)
    with pytest.raises(ConfigurationError, match="gain is"):
        gathered_rms_norm(x, index, torch.ones(5))

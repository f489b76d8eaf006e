"""Products of few channels as operators of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels import channel_products, histogram
from gossamer.kernels import channels_operators as operators
from gossamer.kernels.channels import ChannelMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.gated_feedforward import GatedFeedforward


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(matrix: ChannelMatrix | DenseMatrix) -> list[Tensor]:
    return list(matrix.tensors().values())


def test_operators_give_what_the_functions_give():
    matrix, rows = ChannelMatrix.from_dense(draw(20, 30), "int8"), DenseMatrix.from_dense(draw(20, 30))
    x, t, gate = draw(3, 30), torch.full((30,), 0.5), torch.relu(draw(3, 20))
    found = torch.ops.gossamer.input_sparse(x, parts(matrix), t, None, "int8", 20, 30, 0)
    assert torch.equal(found, channel_products.input_sparse(matrix, x, t))
    found = torch.ops.gossamer.masked_output(x, gate, parts(rows), None, "dense", "float32", 20, 30, 0)
    assert torch.equal(found, channel_products.masked_output(rows, x, gate))
    one, two = draw(3, 20), draw(3, 20)
    torch.ops.gossamer.delta_linear_(x, one, parts(matrix), t, "int8", 20, 30, 0)
    assert torch.equal(one, channel_products.delta_linear_(matrix, x, two, t))
    counts = [torch.zeros(histogram.BINS, dtype=torch.int64) for _ in range(2)]
    torch.ops.gossamer.magnitude_histogram_(x, None, counts[0])
    assert torch.equal(counts[0], histogram.magnitude_histogram(x, None, counts[1]))
    down = ChannelMatrix.from_dense(draw(7, 20))
    block = GatedFeedforward(rows, rows, down, "relu")
    found = torch.ops.gossamer.gated_feedforward(
        x, None, parts(rows), parts(rows), parts(down), None, "dense", "float32", [30, 20, 7], [0, 0, 0], "relu", 0.0
    )
    assert torch.equal(found, block(x))


def test_operators_agree_with_their_fake_versions():
    matrix, x = ChannelMatrix.from_dense(draw(20, 30)), draw(3, 30).requires_grad_(True)
    arguments = (x, parts(matrix), torch.full((30,), 0.5), draw(20), "float32", 20, 30, 0)
    torch.library.opcheck(operators.input_sparse, arguments)
    rows, gate = DenseMatrix.from_dense(draw(20, 30)), torch.relu(draw(3, 20))
    arguments = (draw(3, 30), gate, parts(rows), None, "dense", "float32", 20, 30, 0)
    torch.library.opcheck(operators.masked_output, arguments)
    arguments = (draw(3, 30), draw(3, 20), parts(matrix), None, "float32", 20, 30, 0)
    torch.library.opcheck(operators.delta_linear_, arguments)
    arguments = (draw(3, 30), torch.ones(30), torch.zeros(histogram.BINS, dtype=torch.int64))
    torch.library.opcheck(operators.magnitude_histogram_, arguments)


def test_the_gradient_of_silent_inputs_is_zero():
    matrix = ChannelMatrix.from_dense(draw(20, 30))
    x, t = draw(3, 30).requires_grad_(True), torch.full((30,), 0.5)
    y = operators.input_sparse(x, parts(matrix), t, None, "float32", 20, 30, 0)
    y.square().sum().backward()
    masked = torch.where(x.detach().abs() > t, x.detach(), 0.0)
    expected = 2 * (masked @ matrix.expand().t()) @ matrix.expand() * (masked != 0)
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4)

"""Triton versions of products of few channels, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_CHECKS = """
import torch
from gossamer.kernels import channels_triton as fast
from gossamer.kernels.channels import ChannelMatrix, NibbleRowMatrix
from gossamer.kernels.dense import DenseMatrix
from gossamer.kernels.gated_feedforward import GatedFeedforward

generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


def near(found, wanted, sizes):
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= 1e-5 * (1 + sizes)).all()


def rows_of(weight, format):
    return NibbleRowMatrix.from_dense(weight) if format == "int4" else DenseMatrix.from_dense(weight, format)


for format in ("float32", "bfloat16", "int8", "int4"):
    for rows, columns, batch in ((1, 1, 1), (70, 45, 2)):
        weight, x, bias = draw(rows, columns), draw(batch, columns), draw(rows)
        matrix, whole = ChannelMatrix.from_dense(weight, format), rows_of(weight, format)
        thresholds = torch.rand(columns, generator=generator)
        for t in (None, thresholds, torch.full((columns,), 99.0)):
            live = (x if t is None else torch.where(x.abs() > t, x, 0.0)).double()
            dense = matrix.expand().double()
            near(fast.input_sparse(matrix, x, t, bias), live @ dense.t() + bias, live.abs() @ dense.abs().t())
            state = draw(batch, rows)
            wanted = state.double() + live @ dense.t()
            near(fast.delta_linear_(matrix, x, state, t), wanted, live.abs() @ dense.abs().t())
        gate = torch.relu(draw(batch, rows))
        dense = whole.expand().double()
        wanted = gate.double() * (x.double() @ dense.t() + bias)
        near(fast.masked_output(whole, x, gate, bias), wanted, gate * (x.double().abs() @ dense.abs().t()))
    parts = rows_of(draw(50, 20), format), rows_of(draw(50, 20), format), ChannelMatrix.from_dense(draw(30, 50), format)
    for activation, cut, t in (("relu", 0.0, None), ("fatrelu", 0.5, None), ("silu", 0.0, torch.full((50,), 0.4))):
        block, x = GatedFeedforward(*parts, activation, cut, t), draw(3, 20)
        mask = torch.rand(3, 50, generator=generator) < 0.5
        for wanted in (None, mask):
            near(fast.gated_feedforward(block, x, wanted), block._reference(x, wanted).double(), 100.0)
x[0, 3] = float("nan")
assert fast.input_sparse(ChannelMatrix.from_dense(draw(5, 20)), x, torch.full((20,), 99.0))[0].isnan().all()
print("all products are right")
"""


def test_products_are_those_of_the_dense_matrix():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECKS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all products are right" in done.stdout

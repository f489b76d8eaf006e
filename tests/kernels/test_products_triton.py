"""Triton versions in Triton's interpreter, which needs no GPU.

The interpreter is chosen when Triton is imported: a process of its own keeps it away from all other tests.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_CHECKS = """
import torch
from gossamer.core.patterns import NM
from gossamer.kernels.integer import IntegerBitmaskMatrix, IntegerDenseMatrix
from gossamer.kernels.kinds import pack
from gossamer.kernels.matrix import round_inputs
from gossamer.kernels.nibbles import NibbleMatrix
from gossamer.kernels.nm import NMMatrix
from gossamer.kernels.products_triton import linear

generator = torch.Generator().manual_seed(0)


def check(matrix, batch):
    rows, columns = matrix.shape
    dense = matrix._reference(0, rows).double()
    bias = torch.randn(rows, generator=generator)
    for dtype in (torch.float32, torch.bfloat16) if rows == 5 else (torch.float32,):
        x = torch.randn(batch, columns, generator=generator).to(dtype)
        y = linear(matrix, x, bias)
        assert y.dtype == dtype and y.shape == (batch, rows)
        if matrix.activations == "int8":
            x = round_inputs(x)
        wanted = x.double() @ dense.t() + bias.double()
        # a term is at most as large as its two parts, of which four-bit weights with offsets have two
        sizes = x.double().abs() @ (dense.abs() + 16 * dense.abs().amax()).t() + bias.double().abs()
        bound = sizes * 8 * 2.0**-24 + (wanted.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0)
        assert ((y.double() - wanted).abs() <= bound).all(), (matrix, batch)


kinds = [("bitmask", f, g) for f, g in (("float32", None), ("bfloat16", None), ("int8", 64), ("int4", None))]
kinds += [(k, f, None) for k in ("csr", "blocks4", "blocks8", "blocks16") for f in ("float32", "int8")]
patterns = [(2, 4, "float32", None), (3, 8, "int8", 64), (1, 16, "bfloat16", None), (2, 32, "int8", None)]
shapes = [(1, 1, 1.0, 1), (5, 70, 0.5, 2), (18, 1100, 0.1, 1), (3, 48, 0.0, 1)]
for rows, columns, density, batch in shapes:
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.rand(rows, columns, generator=generator) < density
    if rows > 4:
        weight[2] = 0
    for kind, format, group in kinds:
        check(pack(weight, kind, format, group), batch)
    for n, m, format, group in patterns:
        padded = torch.nn.functional.pad(weight, (0, -columns % m))
        pruned = (padded * NM(n, m).select(padded.abs()))[:, :columns]
        check(NMMatrix.from_dense(pruned, format, NM(n, m), group), batch)
    for group in (None, 64):
        check(IntegerDenseMatrix.from_dense(weight, group=group), batch)
        check(IntegerBitmaskMatrix.from_dense(weight, group=group), batch)
    for group, offsets in ((32, True), (64, False)):
        check(NibbleMatrix.from_dense(weight, group, offsets), batch)
print("all products are right")
"""


def test_products_are_those_of_the_expanded_matrix():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECKS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all products are right" in done.stdout

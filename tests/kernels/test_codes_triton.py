"""Triton versions of sparse codes, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_CHECKS = """
import torch
from gossamer.core.sparse_codes import SparseCodes
from gossamer.kernels import codes, encode_select
from gossamer.kernels import codes_triton as fast

generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


for rows, features, size in ((1, 1, 1), (4, 20, 9), (5, 30, 150)):
    for share in (0.0, 0.2, 1.0):
        mask = torch.rand(rows, features, generator=generator) < share
        held, x, dictionary = SparseCodes.from_mask(draw(rows, features), mask), draw(rows, size), draw(features, size)
        torch.testing.assert_close(fast.decode(held, dictionary), held.to_dense() @ dictionary, rtol=1e-4, atol=1e-4)
        wanted = codes.products_at(held, x, dictionary)
        torch.testing.assert_close(fast.products_at(held, x, dictionary), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast.scattered(held, x), held.to_dense().t() @ x, rtol=1e-4, atol=1e-4)
for tokens, size, features, k in ((1, 1, 1, 1), (3, 9, 30, 3), (2, 70, 100, 20), (2, 5, 40, 40)):
    # whole numbers: affinities are equal often, and the same in any order of summing
    x, encoder = draw(tokens, size).mul(2).round(), draw(features, size).mul(2).round()
    for bias in (None, draw(features).mul(2).round()):
        found, wanted = fast.encode_topk(x, encoder, bias, k), encode_select.encode_topk(x, encoder, bias, k)
        assert found.indices.equal(wanted.indices), (found.indices, wanted.indices)
        assert found.values.equal(wanted.values)
        assert found.starts.equal(wanted.starts)
for refused in (lambda: fast.encode_topk(x, encoder[:, :4], None, 2), lambda: fast.encode_topk(x, encoder, None, 0)):
    try:
        refused()
    except codes.ConfigurationError:
        continue
    raise AssertionError("not refused")
print("all codes are right")
"""


def test_codes_are_those_of_the_dense_matrix():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECKS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all codes are right" in done.stdout

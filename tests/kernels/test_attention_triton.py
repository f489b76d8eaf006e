"""Triton versions of attention, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_CHECKS = """
import torch
from gossamer.kernels import attention_reference as reference
from gossamer.kernels import attention_triton as fast
from gossamer.kernels.attention_reference import Visibility

generator = torch.Generator().manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape):
    return torch.randn(*shape, generator=generator).to(device)


def near(found, wanted):
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-5, atol=2e-5)


for batch, heads, shared, queries, keys, size, value_size, block, causal, window, padded in (
    (1, 2, 1, 40, 70, 33, 20, (16, 16), True, None, True),
    (2, 2, 2, 50, 50, 64, 64, (20, 30), True, 17, False),
    (1, 2, 1, 33, 21, 16, 16, (64, 8), False, None, True),
):
    q, k = draw(batch, heads, queries, size), draw(batch, keys, shared, size).transpose(1, 2)
    v = draw(batch, shared, keys, value_size)
    grid = -(-queries // block[0]), -(-keys // block[1])
    kept = torch.rand(batch, heads, *grid, generator=generator).to(device) < 0.6
    real = (torch.rand(batch, keys, generator=generator) < 0.7).to(device) if padded else None
    for blocks in (None, kept):
        visible = Visibility(causal, window, real, blocks, block)
        wanted = reference.forward(q.double(), k.double(), v.double(), visible, 0.2)
        for found, right in zip(fast.forward(q, k, v, visible, 0.2), wanted):
            near(found, right)
for heads, shared, lists, queries, tokens in ((4, 2, 2, 1, 50), (4, 2, 4, 2, 33), (2, 2, 2, 1, 1100)):
    q, k, v = draw(2, heads, queries, 24), draw(2, shared, 300, 24), draw(2, shared, 300, 40)
    indices = torch.randint(300, (2, lists, tokens), generator=generator).to(device)
    counts = torch.randint(tokens + 1, (2, lists), generator=generator).to(device)
    counts[0, 0] = 0
    for some in (None, counts):
        wanted = reference.gather(q.double(), k.double(), v.double(), indices, some, 0.2)
        for found, right in zip(fast.gather(q, k, v, indices, some, 0.2), wanted):
            near(found, right)
print("all attention is right")
"""


def test_attention_is_that_of_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECKS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all attention is right" in done.stdout

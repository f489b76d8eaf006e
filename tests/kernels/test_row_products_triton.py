"""Triton versions of products of rows, in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_CHECKS = """
import itertools
import torch
from gossamer.kernels.row_products_native import reference_product
from gossamer.kernels.row_products_triton import row_product

generator = torch.Generator().manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape):
    return torch.randn(*shape, generator=generator).to(device)


def some(of, count):
    return torch.randperm(of, generator=generator)[:count].sort().values.to(device)


cases = [((70, 40, 20), *ways) for ways in itertools.product((False, True), repeat=4)]
cases += [(shape, turned, not turned, True, True) for shape in ((1, 1, 1), (30, 65, 130)) for turned in (False, True)]
for (rows, depth, width), left_turned, right_turned, indexed, add in cases:
    left = draw(depth, rows) if left_turned else draw(rows, depth)
    right = draw(depth, width) if right_turned else draw(width, depth)
    sides = {"left_turned": left_turned, "right_turned": right_turned, "add": add, "bias": draw(width)}
    outputs = draw(rows, width)
    if indexed:  # the same operands among others
        for name, side in (("left", left), ("right", right)):
            sides[name + "_index"] = some(len(side) + 9, len(side))
        sides["index"] = some(rows + 9, rows)
        left, right = (draw(len(side) + 9, side.shape[1]) for side in (left, right))
        outputs = draw(rows + 9, width)
    found = row_product(left, right, outputs.clone(), **sides)
    sides["bias"] = sides["bias"].double()
    wanted = reference_product(left.double(), right.double(), outputs.double(), **sides)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
print("all products are right")
"""


def test_products_are_those_of_the_copied_rows():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECKS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all products are right" in done.stdout

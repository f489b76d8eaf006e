"""Triton's matching pursuit, in its interpreter, which needs no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

_CHECKS = """
import torch
from gossamer.kernels import pursuit_triton as fast

generator = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=generator)


def by_hand(x, dictionary, k, tolerance, nonnegative):
    chosen = torch.full((len(x), k), -1)
    for signal, left in enumerate(x.double()):
        for step in range(k):
            common = dictionary.double() @ left
            size = common if nonnegative else common.abs()
            best = int(size.argmax())
            if size[best] <= 0 or left.norm() <= tolerance:
                break
            chosen[signal, step] = best
            left = left - common[best] * dictionary[best].double()
    return chosen


for signals, size, atoms, k in ((1, 1, 1, 1), (3, 7, 20, 5), (2, 300, 1100, 3), (2, 24, 40, 36), (0, 4, 5, 2)):
    dictionary = torch.nn.functional.normalize(draw(atoms, size), dim=1)
    x = draw(size, signals).t()
    for tolerance in (0.0, 0.6):
        for nonnegative in (False, True):
            found = fast.choose(x, dictionary, k, tolerance, nonnegative, dictionary @ dictionary.t())
            wanted = by_hand(x, dictionary, k, tolerance, nonnegative)
            assert found.equal(wanted), (signals, size, atoms, k, tolerance, nonnegative, found, wanted)

axes = torch.eye(4)
twice = torch.cat([axes, axes])  # every atom is there twice
x = torch.tensor([[1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, 0.0, 0.0]])
assert fast.choose(x, twice, 3, 0.0, True, twice @ twice.t()).tolist() == [[0, -1, -1], [-1] * 3, [-1] * 3]
assert fast.choose(x, twice, 3, 0.0, False, twice @ twice.t()).tolist() == [[0, 1, -1], [-1] * 3, [1, 0, -1]]
assert not fast.usable(x, twice)  # no GPU here
print("all pursuits are right")
"""


def test_pursuits_are_those_by_hand():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _CHECKS], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "all pursuits are right" in done.stdout

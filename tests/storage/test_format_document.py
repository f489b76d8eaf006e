"""docs/format.md tells the truth: its bytes are those that are written, and its reader reads them."""

from __future__ import annotations

import re
from math import comb
from pathlib import Path

import pytest
import torch

from gossamer.core.patterns import NM
from gossamer.storage import CheckpointWriter
from gossamer.storage.combinations import masks_by_rank
from gossamer.storage.packing import DTYPES, encode

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def block(kind: str) -> str:
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```", DOCUMENT, flags=re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture
def matrix() -> torch.Tensor:
    rows = [[float(number) for number in line.split()] for line in block("matrix").splitlines()]
    return torch.tensor(rows, dtype=torch.bfloat16)


@pytest.mark.parametrize(("kind", "side", "pattern"), [("bitmask", "bits", None), ("nm", "codes", NM(2, 4))])
def test_the_worked_example_has_the_bytes_that_are_written(matrix, kind, side, pattern):
    packed = encode(matrix, kind, pattern)
    assert packed.parts["values"].view(torch.uint8).tolist() == list(bytes.fromhex(block("values")))
    assert packed.parts[side].tolist() == list(bytes.fromhex(block(side)))
    assert packed.nbytes == 18


def test_the_table_of_ranks_is_the_one_in_use():
    ranks, positions = re.search(r"(\| rank .*)\n\|[-|]+\n(\| positions .*)\n", DOCUMENT).groups()
    listed = [tuple(map(int, pair.split(","))) for pair in positions.split("|")[2:-1]]
    assert listed == [tuple(row.nonzero()[0].tolist()) for row in masks_by_rank(2, 4)]
    assert ranks.count("|") == comb(4, 2) + 2


@pytest.mark.parametrize("n_m", ["2:4", "4:8", "1:2", "1:4", "1:8", "1:16"])
def test_the_sizes_of_nm_are_those_that_are_written(n_m):
    n, m = map(int, n_m.split(":"))
    row = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| nm {n_m} "))
    bits, fraction = (float(cell) for cell in row.split("|")[3:5])
    packed = encode((torch.arange(64 * m) % m < n).bfloat16().repeat(64, 1), "nm", NM(n, m))
    assert 8 * packed.nbytes == bits * 64 * 64 * m
    assert packed.nbytes / packed.dense_nbytes == fraction


def test_the_reader_of_the_document_reads_every_kind_and_dtype(tmp_path, matrix):
    generator = torch.Generator().manual_seed(0)
    tensors = {"matrix": matrix, "scalar": torch.tensor(3), "nothing": torch.zeros(0, 4), "zeros": torch.zeros(3, 5)}
    for name, dtype in DTYPES.items():
        data = torch.randint(1, 2 if dtype == torch.bool else 100, (5, 3, 7), generator=generator)
        data[torch.rand(data.shape, generator=generator) < 0.7] = 0
        tensors[name] = data.to(dtype)
    writer = CheckpointWriter(tmp_path, max_shard_bytes=300)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.add("mask", matrix, "bitmask")
    for dim in range(3):
        tall = torch.zeros(4, 5, 6)
        tall.movedim(dim, -1)[..., 1::3] = torch.rand((), generator=generator) + 1
        tensors[f"along {dim}"] = tall
        writer.add(f"along {dim}", tall, "nm", NM(2, 4, dim))
    writer.add_alias("tied", of="matrix")
    index = writer.finish()
    assert {entry.kind for entry in index.tensors.values()} == {"dense", "bitmask", "nm"}

    names: dict = {}
    exec(block("python"), names)
    found = names["read"](tmp_path)
    assert set(found) == set(index.names)
    for name, tensor in {**tensors, "mask": matrix, "tied": matrix}.items():
        dtype, shape, data = found[name]
        assert (DTYPES[dtype], tuple(shape)) == (tensor.dtype, tuple(tensor.shape))
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
        assert data == tensor.view(words).numpy().tobytes(), name

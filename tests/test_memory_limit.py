"""Models larger than the memory that pruning is allowed."""

from __future__ import annotations

import sys

import pytest
from benchmarks.pruning_memory import SHAPES, Shape, run_apart, write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs a limit that the kernel keeps"),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("larger-than-memory")
    write_model(directory, SHAPES["small"])
    return directory


def test_wanda_from_disk_takes_two_and_a_half_blocks_and_the_activations_at_most(stored):
    shape = SHAPES["small"]
    assert shape.limit < shape.model_bytes
    peak = run_apart(stored, "small", "wanda")
    # less than the block in hand would mean that the measurement sees nothing
    assert shape.block_bytes < peak.anonymous <= shape.bound


def test_the_same_limit_is_too_low_for_the_model_in_memory(stored):
    with pytest.raises(MemoryError, match="allocate memory"):
        run_apart(stored, "small", "wanda", offload=None)


def test_sizes_are_those_of_the_files(stored):
    shape: Shape = SHAPES["small"]
    sizes = {path.stem: path.stat().st_size for path in stored.glob("*.safetensors")}
    header = 4096
    assert shape.block_bytes <= sizes["block-000"] <= shape.block_bytes + header
    assert shape.model_bytes <= sum(sizes.values()) <= shape.model_bytes + header * len(sizes)

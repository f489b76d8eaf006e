from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from gossamer.models.blocks import stages
from gossamer.models.offload import is_offloaded, onloaded, spilled


@pytest.fixture
def outside(tiny_llama, tmp_path):
    """A tiny Llama whose weights stay in its checkpoint."""
    folder = tmp_path / "dense"
    tiny_llama.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


def test_a_block_is_there_inside_and_away_outside(outside, tiny_llama):
    block, original = outside.model.layers[1], tiny_llama.model.layers[1]
    assert is_offloaded(outside)
    with onloaded(block):
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert torch.equal(block.mlp.up_proj.weight, original.mlp.up_proj.weight)
    assert all(parameter.is_meta for parameter in block.parameters())
    assert is_offloaded(outside)


def test_changes_come_back_with_the_block_and_leave_the_checkpoint_alone(outside, tmp_path):
    checkpoint = next((tmp_path / "dense").glob("*.safetensors"))
    before = checkpoint.read_bytes()
    block = outside.model.layers[0]
    with onloaded(block, workspace=tmp_path / "work"), torch.no_grad():
        block.mlp.up_proj.weight[0] = 7
    with onloaded(block):
        assert (block.mlp.up_proj.weight[0] == 7).all()
    assert checkpoint.read_bytes() == before
    assert list((tmp_path / "work").glob("*.safetensors"))


def test_a_model_in_memory_is_not_offloaded(tiny_llama):
    assert not is_offloaded(tiny_llama)
    with onloaded(tiny_llama.model.layers[0]) as block:
        assert block is tiny_llama.model.layers[0]


def test_spilled_tensors_are_the_same_and_leave_no_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        for name, shape in {"one": (3, 5), "none": (0,), "many": (1000,)}.items()
    }
    moved = spilled(tensors, tmp_path)
    assert list(moved) == list(tensors)
    assert all(torch.equal(moved[name], tensors[name]) and moved[name].shape == tensors[name].shape for name in tensors)
    assert not list(tmp_path.iterdir())


def test_nothing_to_spill_is_nothing(tmp_path):
    assert spilled({}, tmp_path) == {}
    assert torch.equal(spilled({"empty": torch.zeros(0, dtype=torch.uint8)}, tmp_path)["empty"], torch.zeros(0))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the process status of Linux")
def test_spilled_tensors_take_no_memory_of_their_own(tmp_path):
    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before = anonymous()
    size = 64 * 2**20
    moved = spilled({"large": torch.full((size,), 3, dtype=torch.uint8)}, tmp_path)["large"]
    assert int(moved.sum(dtype=torch.int64)) == 3 * size
    assert anonymous() - before < size // 2


def test_a_walk_lets_go_of_the_activations_behind_it(tiny_llama, batches):
    first = None
    for number, stage in enumerate(stages(tiny_llama, batches)):
        if first is None:
            first = weakref.ref(stage.inputs[0])
        stage.forward(store=True)
        if number == 2:
            gc.collect()
            assert first() is None
        del stage


# Large tensors freed around small ones that live on, as in a walk over the blocks of a model.
WALK = """
import sys, torch
from pathlib import Path
from torch import nn
import gossamer.models.offload as offload
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
if sys.argv[1] == "returned":
    offload._give_back_what_is_freed()
freed = torch.ones(30 << 18)
del freed  # teaches malloc to keep allocations of 30 MB
before, kept = anonymous(), []
for _ in range(10):
    large = [torch.ones(5 << 18) for _ in range(3)]
    kept.append(torch.ones(64 << 8))
    del large[:2]
    kept.append(torch.ones(64 << 8))
    del large
print((anonymous() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about the C library of Linux")
def test_freed_tensors_go_back_to_the_system():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def megabytes(mode: str) -> int:
        command = [sys.executable, "-c", WALK, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert megabytes("returned") <= 4 < megabytes("kept")

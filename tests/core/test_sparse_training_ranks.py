"""Two processes train one model with gloo: their masks are the same, and those of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.progressive_gradient_flow import MaskDecay
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.sr_ste import SRSTE

METHODS = {
    "rigl": lambda: RigL(sparsity=0.8, every=2, end=20),
    "set": lambda: SET(sparsity=0.8, every=2, end=20),
    "gmp": lambda: GradualMagnitudePruning(sparsity=0.8, end=8, every=2),
    "sr-ste": lambda: SRSTE(pattern="1:4", decay=0.1, keep=()),
    "mask-decay": lambda: MaskDecay(pattern="1:4", total=10, final_value=0.1, keep=()),
}


def _train(rank: int, method: str, ranks: int) -> tuple[dict, dict]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    inputs, labels = torch.randn(32, 12).double(), torch.randint(0, 3, (32,))
    model = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = METHODS[method]().attach(model, optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        mine = slice(rank, None, ranks)
        nn.functional.cross_entropy(model(inputs[mine]), labels[mine]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    run.finalize()
    masks = {name.removeprefix("module."): mask for name, mask in run.masks.items()}
    return masks, {name: value.detach() for name, value in net.named_parameters()}


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({method: _train(rank, method, 2) for method in METHODS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_have_the_masks_of_one(method, trained):
    first, second = (ranks[method] for ranks in trained)
    alone = _train(0, method, 1)
    for name, mask in first[0].items():
        assert torch.equal(mask, second[0][name])
        assert torch.equal(mask, alone[0][name])
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name])
        torch.testing.assert_close(value, alone[1][name])

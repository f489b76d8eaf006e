"""Two processes train layers that store no zeros with gloo, whose lists change their length meanwhile."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gossamer.core.ranks import leave_out_of_ddp
from gossamer.errors import ConfigurationError
from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.rigl import RigL
from gossamer.training.sparse_layers import SparseLinear

METHODS = {
    "rigl": lambda: RigL(sparsity=0.8, every=2, end=20),
    "gmp": lambda: GradualMagnitudePruning(sparsity=0.8, end=8, every=2),
}
KEPT = torch.arange(360).view(30, 12) % 3 == 0


def network(mask=None):
    net = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    net[0] = SparseLinear.from_dense(net[0], mask)
    return net


def train(rank, ranks, method=None, apart=True, mask=None):
    """Ten steps with clipping, each on two micro-batches of which only the second is averaged by DDP."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(32, 12).double(), torch.randint(0, 3, (32,))
    torch.manual_seed(rank)  # replicas that start apart must become those of the first rank
    net = network(mask)
    names = leave_out_of_ddp(net) if apart else []
    model = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run = METHODS[method]().attach(model, optimizer) if method else None
    mine = torch.arange(rank, 32, ranks).chunk(2)
    for _ in range(10):
        optimizer.zero_grad()
        for rows, last in zip(mine, (False, True)):
            with contextlib.nullcontext() if last or ranks == 1 else model.no_sync():
                (nn.functional.cross_entropy(model(inputs[rows]), labels[rows]) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    if run:
        run.finalize()
    return names, {name: value.clone() for name, value in net.state_dict().items()}


def _process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {method: train(rank, 2, method) for method in METHODS}
    found["plain"] = train(rank, 2, apart=False, mask=KEPT)
    try:
        train(rank, 2, "rigl", apart=False)
    except ConfigurationError as error:
        found["refused"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_train_as_one(method, trained):
    names, alone = train(0, 1, method)
    assert names[0] == "0.values"
    for ranks in trained:
        assert ranks[method][0] == names
        assert ranks[method][1].keys() == alone.keys()
        for name, value in ranks[method][1].items():
            assert torch.equal(value, trained[0][method][1][name])
            torch.testing.assert_close(value, alone[name])
    zeros = 1 - float((alone["0.weight"] != 0).double().mean())
    assert zeros == pytest.approx(0.8, abs=0.01)


def test_a_layer_whose_topology_stays_needs_nothing(trained):
    alone = train(0, 1, mask=KEPT)[1]
    for ranks in trained:
        for name, value in ranks["plain"][1].items():
            torch.testing.assert_close(value, alone[name])


def test_a_change_of_length_is_refused_with_the_remedy(trained):
    for ranks in trained:
        assert ranks["refused"].startswith("module.0.weight stores no zeros")
        assert "leave_out_of_ddp(model) before DistributedDataParallel(model)" in ranks["refused"]


def test_what_is_left_out_is_named():
    net = nn.Sequential(network(), nn.Linear(3, 3))
    names = leave_out_of_ddp(net)
    assert {"0.0.values", "0.0.rows_starts", "0.0.rows_places"} <= set(names)
    assert "0.0.bias" not in names
    assert net._ddp_params_and_buffers_to_ignore == names
    assert leave_out_of_ddp(nn.Linear(3, 3)) == []

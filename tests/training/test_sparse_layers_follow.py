"""Methods change layers that store no zeros exactly as they change dense ones under masks."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from gossamer.training.gmp import GradualMagnitudePruning
from gossamer.training.granet import GraNet
from gossamer.training.rigl import RigL
from gossamer.training.set import SET
from gossamer.training.sparse_layers import SparseLinear
from gossamer.training.static import Static

METHODS = {
    "static": lambda: Static(sparsity=0.8),
    "set": lambda: SET(sparsity=0.8, every=3, end=40),
    "rigl": lambda: RigL(sparsity=0.8, every=3, end=40),
    "gmp": lambda: GradualMagnitudePruning(sparsity=0.8, begin=2, end=20, every=3, scope="model"),
    "granet": lambda: GraNet(sparsity=0.8, every=4, end=28, heads=False),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 12, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (32,), generator=generator)


def stored(net):
    """The same network with its hidden layers stored sparsely, all weights there."""
    return nn.Sequential(*(SparseLinear.from_dense(m) if i in (0, 2) else copy.deepcopy(m) for i, m in enumerate(net)))


def one_step(net, optimizer, batch):
    optimizer.zero_grad()
    for inputs, labels in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True):
        (nn.functional.cross_entropy(net(inputs), labels) / 2).backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_stored_layer_trains_as_a_masked_one(method, optimizer, net, batch):
    twin = stored(net)
    first, second = OPTIMIZERS[optimizer](net.parameters()), OPTIMIZERS[optimizer](twin.parameters())
    masked, sparse = METHODS[method]().attach(net, first), METHODS[method]().attach(twin, second)
    assert list(masked.targets) == list(sparse.targets)
    for _ in range(30):
        one_step(net, first, batch)
        one_step(twin, second, batch)
        for name in masked.targets:
            assert torch.equal(masked.mask(name), sparse.mask(name))
        assert twin[0].values.numel() == masked.active("0.weight")
        state = second.state[twin[0].values]
        assert all(v.shape in ((), twin[0].values.shape) for v in state.values() if isinstance(v, torch.Tensor))
    assert masked.finalize() == sparse.finalize()
    assert isinstance(twin[0], nn.Linear)  # a plain model again
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_stored_layer_resumes(net, batch):
    def begin():
        model = stored(net)
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return model, optimizer

    whole, optimizer = begin()
    run = METHODS["rigl"]().attach(whole, optimizer)
    for _ in range(20):
        one_step(whole, optimizer, batch)

    half, optimizer = begin()
    part = METHODS["rigl"]().attach(half, optimizer)
    for _ in range(8):
        one_step(half, optimizer, batch)
    file = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict(), "run": part.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    resumed, optimizer = begin()
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    part = METHODS["rigl"]().attach(resumed, optimizer, state["run"])
    for _ in range(12):
        one_step(resumed, optimizer, batch)
    assert part.history == run.history
    assert part.finalize() == run.finalize()
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)

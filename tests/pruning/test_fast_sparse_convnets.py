from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.schedules import Cubic
from gossamer.errors import ConfigurationError, PatternError, SparsityError, TargetError
from gossamer.methods import create
from gossamer.pruning.fast_sparse_convnets import FastSparseConvnets


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1), nn.ReLU6()),
        *(nn.Conv2d(32, 32, 1), nn.Conv2d(32, 24, 3, padding=1), nn.Conv2d(24, 40, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 4)),
    )


def trained(model, run, optimizer, steps, first=0):
    for step in range(first, first + steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.randint(4, (8,))).backward()
        optimizer.step()
    return run


def test_only_pointwise_convolutions_are_pruned_and_the_head_if_wanted():
    names = [target.name for target in FastSparseConvnets().targets(network())]
    assert names == ["4.weight", "6.weight", "8.weight"]
    assert [target.name for target in FastSparseConvnets(heads=True).targets(network())][-1] == "11.weight"
    assert [target.name for target in FastSparseConvnets(exclude=("6",)).targets(network())] == ["4.weight", "8.weight"]
    with pytest.raises(TargetError, match="no 1 × 1 convolution"):
        FastSparseConvnets().targets(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)))


def test_late_layers_share_zeros_among_neighbours():
    method = FastSparseConvnets(sparsity=0.75, late_layers=2, late_block=4, heads=True)
    masks = method.masks(network())
    assert {name: pattern.size for name, pattern in method.patterns(network()).items()} == {
        "4.weight": 1,
        "6.weight": 4,
        "8.weight": 4,
        "11.weight": 1,
    }
    for name in ("6.weight", "8.weight"):
        blocks = masks[name].flatten(1).view(-1, 4, masks[name].shape[1])
        assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    alone = masks["4.weight"].flatten(1).view(-1, 4, 16)
    assert not torch.equal(alone, alone[:, :1].expand_as(alone))
    for mask in masks.values():
        assert float((~mask).double().mean()) == 0.75


def test_more_late_layers_than_there_are_means_all():
    patterns = FastSparseConvnets(late_layers=99, late_block=2).patterns(network())
    assert {pattern.size for pattern in patterns.values()} == {2}


def test_the_largest_weights_stay():
    model = network()
    mask = FastSparseConvnets(sparsity=0.5).masks(model)["6.weight"]
    weight = model[6].weight.detach().abs()
    assert float(weight[mask].min()) >= float(weight[~mask].max())


def test_zeros_grow_along_the_cubic_schedule_and_stay():
    method = FastSparseConvnets(sparsity=0.9, begin=4, end=16, every=4)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    run, zeros = method.attach(model, optimizer), []
    for step in range(20):
        trained(model, run, optimizer, 1, step)
        zeros.append(int((model[6].weight == 0).sum()))
    schedule = Cubic(0.9, 16, begin=4)
    assert zeros[:7] == [0] * 7
    assert [zeros[step - 1] for step in (8, 12, 16)] == [int(schedule(step) * 1024) for step in (8, 12, 16)]
    assert zeros[15:] == [int(0.9 * 1024)] * 5
    masks = run.finalize()
    assert not masks.violations(model)
    assert float((model[7].weight == 0).sum()) == 0


def test_a_run_that_stops_and_goes_on_ends_the_same():
    method = FastSparseConvnets(sparsity=0.8, end=12, every=3)
    whole = network()
    optimizer = torch.optim.SGD(whole.parameters(), 0.05, momentum=0.9)
    trained(whole, method.attach(whole, optimizer), optimizer, 16).finalize()
    first = network()
    optimizer = torch.optim.SGD(first.parameters(), 0.05, momentum=0.9)
    run = trained(first, method.attach(first, optimizer), optimizer, 7)
    stored = first.state_dict(), optimizer.state_dict(), run.state_dict()
    second = network()
    optimizer = torch.optim.SGD(second.parameters(), 0.05, momentum=0.9)
    run = method.attach(second, optimizer)
    for part, state in zip((second, optimizer, run), stored):
        part.load_state_dict(state)
    trained(second, run, optimizer, 9, 7).finalize()
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), second.state_dict().values()))


def test_finishing_early_prunes_the_rest_and_lets_go():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = trained(model, FastSparseConvnets(end=1000).attach(model, optimizer), optimizer, 3)
    assert run.finalize().sparsity == pytest.approx(0.9, abs=2e-3)
    trained(model, run, optimizer, 1)
    assert float((model[6].weight == 0).double().mean()) < 0.1


def test_it_is_known_by_name_and_checks_its_parameters():
    assert create("fast-sparse-convnets", block=2).block == 2
    for options in ({"every": 0}, {"begin": 5, "end": 5}, {"late_layers": -1}):
        with pytest.raises(ConfigurationError):
            FastSparseConvnets(**options)
    for options in ({"block": 3}, {"late_block": 5}):
        with pytest.raises(PatternError, match="groups of"):
            FastSparseConvnets(**options)
    with pytest.raises(SparsityError):
        FastSparseConvnets(sparsity=1.0)

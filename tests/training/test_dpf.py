from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.training.dpf import DynamicPruningWithFeedback


def lone(weights=(4.0, 3.0, 2.0, 1.0)):
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([weights])
    return layer, torch.optim.SGD(layer.parameters(), lr=1.0)


def push(layer, optimizer, *by):
    """One step in which the gradient at every weight, zeros included, is given."""
    optimizer.zero_grad()
    (layer.weight * -torch.tensor([by])).sum().backward()
    optimizer.step()


def test_what_is_pruned_goes_on_learning_and_comes_back_when_it_is_large_enough():
    layer, optimizer = lone()
    run = DynamicPruningWithFeedback(sparsity=0.5, end=1, every=2, heads=True).attach(layer, optimizer)
    push(layer, optimizer, 0.0, 0.0, 0.0, 0.0)
    assert layer.weight.tolist() == [[4, 3, 0, 0]]
    push(layer, optimizer, 0.0, -0.5, 0.0, 1.0)
    assert layer.weight.tolist() == [[4, 2.5, 0, 0]]  # the last weight is 2 behind the scenes
    push(layer, optimizer, 0.0, 0.0, 0.0, 1.5)
    push(layer, optimizer, 0.0, 0.0, 0.0, 0.0)
    assert layer.weight.tolist() == [[4, 0, 0, 3.5]]
    masks = run.finalize()
    assert masks["weight"].tolist() == [[True, False, False, True]]


def test_frozen_masks_stay():
    layer, optimizer = lone()
    method = DynamicPruningWithFeedback(sparsity=0.5, end=1, every=1, freeze=2, heads=True)
    run = method.attach(layer, optimizer)
    for _ in range(4):
        push(layer, optimizer, 0.0, 0.0, 0.0, 0.9)
    assert layer.weight.tolist() == [[4, 3, 0, 0]]
    assert method.phase(1) == "explore"
    assert method.phase(2) == "frozen"
    run.finalize()


def test_layers_share_one_ranking():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[1].weight.mul_(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    run = DynamicPruningWithFeedback(sparsity=0.5, end=1, heads=True).attach(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert run.finalize().layer_sparsity() == {"0.weight": 10 / 16, "1.weight": 0.0}


def test_masks_cannot_freeze_before_the_ramp_ends():
    with pytest.raises(ConfigurationError, match="freeze is 5"):
        DynamicPruningWithFeedback(sparsity=0.5, end=10, freeze=5)

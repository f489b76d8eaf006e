from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.papers.sparse_runs import (
    Recipe,
    accuracy,
    batches,
    convolutional,
    cross_entropy,
    fully_connected,
    optimize,
    train_images,
)
from gossamer.training.static import Static

RECIPE = Recipe(steps=20, batch=8, learning_rate=0.1)


def test_the_rate_rises_and_falls_to_nothing():
    rates = [Recipe(100, 8).rate(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-3


def test_batches_follow_the_seed_alone_and_can_be_taken_from_the_middle(drawn_digits):
    torch.manual_seed(3)
    whole = [batch.labels for batch in batches(drawn_digits, RECIPE, 5)]
    torch.manual_seed(4)
    part = [batch.labels for batch in batches(drawn_digits, RECIPE, 5, 7, 12)]
    assert len(whole) == 20
    assert all(torch.equal(one, other) for one, other in zip(whole[7:12], part, strict=True))
    assert not torch.equal(torch.stack(whole), torch.stack([b.labels for b in batches(drawn_digits, RECIPE, 6)]))


def test_training_equals_its_steps_made_one_by_one(drawn_digits):
    torch.manual_seed(0)
    one = fully_connected(784, 12, 10)
    torch.manual_seed(0)
    other = fully_connected(784, 12, 10)
    train_images(one, drawn_digits, RECIPE, 1)
    optimizer = RECIPE.optimizer(other)
    for step, batch in enumerate(batches(drawn_digits, RECIPE, 1)):
        optimize(other, optimizer, batch, 0.1 * RECIPE.rate(step))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert accuracy(one, drawn_digits) > 0.5
    logits = one(drawn_digits.images).detach()
    assert cross_entropy(one, drawn_digits) == pytest.approx(
        float(nn.functional.cross_entropy(logits, drawn_digits.labels)), rel=1e-5
    )


def test_a_method_accompanies_the_training_and_its_masks_come_back(drawn_digits):
    model = convolutional(4, 8, 8)
    assert model(drawn_digits.images[:2]).shape == (2, 10)
    seen = []
    masks = train_images(model, drawn_digits, RECIPE, 0, Static(sparsity=0.5), lambda step, _: seen.append(step))
    assert seen == list(range(20))
    assert masks is not None
    assert not masks.violations(model)
    assert masks.sparsity == pytest.approx(0.5, abs=2e-3)
    assert not model.training

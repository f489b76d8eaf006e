from __future__ import annotations

import copy

import pytest
import torch

import gossamer
from gossamer.errors import NonFiniteError
from gossamer.pruning.recovery import rank_plan, recover


def zeros_of(model, masks):
    return sum(int((dict(model.named_parameters())[name] == 0).sum()) for name in masks)


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_training_lowers_the_loss_and_keeps_the_zeros(tiny_llama, batches, lora_rank):
    result = gossamer.prune(tiny_llama, "wanda", calibration=batches, sparsity=0.5, progress=False)
    names = set(tiny_llama.state_dict())
    found = recover(
        tiny_llama,
        batches,
        masks=result.masks,
        lora_rank=lora_rank,
        steps=30,
        learning_rate=5e-3,
        progress=False,
    )
    assert sum(found.losses[-5:]) < sum(found.losses[:5])
    assert not result.masks.violations(tiny_llama)
    assert set(tiny_llama.state_dict()) == names  # a plain model again, without wrappers


def test_merged_updates_really_changed_the_weights_that_remain(tiny_llama, batches):
    result = gossamer.prune(tiny_llama, "magnitude", sparsity=0.5, progress=False)
    before = copy.deepcopy(tiny_llama)
    recover(tiny_llama, batches, masks=result.masks, lora_rank=2, steps=5, learning_rate=1e-2, progress=False)
    after = dict(tiny_llama.named_parameters())
    changed = [name for name, p in before.named_parameters() if not torch.equal(p, after[name])]
    assert set(changed) == set(result.masks)
    assert zeros_of(tiny_llama, result.masks) >= result.masks.total - result.masks.kept


def test_a_seed_repeats_bit_for_bit_and_leaves_the_global_generator_alone(tiny_llama, batches):
    again = copy.deepcopy(tiny_llama)
    state = torch.get_rng_state()
    one = recover(tiny_llama, batches, lora_rank=2, steps=4, seed=7, progress=False)
    other = recover(again, batches, lora_rank=2, steps=4, seed=7, progress=False)
    assert one.losses == other.losses
    assert torch.equal(torch.get_rng_state(), state)
    for (name, first), (_, second) in zip(tiny_llama.named_parameters(), again.named_parameters()):
        assert torch.equal(first, second), name


def test_a_loss_that_is_not_finite_stops_the_training(tiny_llama, batches):
    before = copy.deepcopy(tiny_llama)

    def broken(model, batch):
        return model(batch).logits.sum() * float("nan")

    with pytest.raises(NonFiniteError):
        recover(tiny_llama, batches, lora_rank=2, steps=3, loss=broken, progress=False)
    for (name, first), (_, second) in zip(tiny_llama.named_parameters(), before.named_parameters()):
        assert torch.equal(first, second), name


def test_ranks_follow_importance_at_an_exact_total():
    ranks = rank_plan({"a": 0.1, "b": 0.2, "c": 0.4}, mean_rank=8, min_rank=2)
    assert sum(ranks.values()) == 24
    assert ranks["a"] <= ranks["b"] <= ranks["c"]
    assert min(ranks.values()) >= 2

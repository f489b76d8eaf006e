from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from gossamer.core.masks import MaskSet
from gossamer.errors import ConfigurationError, NonFiniteError, SparsityError, TargetError
from gossamer.pruning.lottery_tickets import (
    component_profile,
    iterative_magnitude_pruning,
    layer_profile,
    mask_similarity,
)
from gossamer.pruning.one_shot import one_shot_masks


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2))


def train(model, masks, steps=3, lr=0.05):
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(torch.randn(16, 8)) - 1).square().mean().backward()
        optimiser.step()


def test_without_training_a_ticket_is_the_one_shot_mask():
    model = network()
    tickets = iterative_magnitude_pruning(model, lambda model, masks: None, (0.3, 0.6))
    assert tickets == [one_shot_masks(model, 0.3), one_shot_masks(model, 0.6)]


def test_each_ticket_is_part_of_the_one_before_and_has_its_sparsity():
    tickets = iterative_magnitude_pruning(network(), train, (0.25, 0.5, 0.75))
    assert [ticket.sparsity for ticket in tickets] == pytest.approx([0.25, 0.5, 0.75], abs=0.005)
    for before, after in itertools.pairwise(tickets):
        assert (after & before) == after


def test_every_round_starts_from_the_same_weights_and_the_model_stays_as_it_is():
    model = network()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    starts = []

    def watch(copy, masks):
        starts.append((masks["0.weight"], copy[0].weight.detach().clone()))
        train(copy, masks)

    iterative_magnitude_pruning(model, watch, (0.4, 0.7))
    for mask, weight in starts:
        assert torch.equal(weight, original["0.weight"] * mask)
    assert not starts[1][0].all()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_rewinding_returns_to_where_the_warm_up_ended():
    starts = []

    def watch(copy, masks):
        starts.append((masks["0.weight"], copy[0].weight.detach().clone()))
        train(copy, masks)

    iterative_magnitude_pruning(network(), watch, (0.4, 0.7), rewind=lambda copy: train(copy, None))
    (_, first), (mask, second) = starts
    assert not torch.equal(first, network()[0].weight)
    assert torch.equal(second, first * mask)


def test_training_decides_which_weights_go_and_the_seed_decides_the_training():
    model = network()
    a = iterative_magnitude_pruning(model, train, (0.5,), seed=0)[0]
    assert a == iterative_magnitude_pruning(model, train, (0.5,), seed=0)[0]
    assert a != one_shot_masks(model, 0.5)


@pytest.mark.parametrize("sparsities", [(), (0.5, 0.4), (0.0, 0.5), (0.5, 1.0)])
def test_impossible_rounds_are_refused(sparsities):
    with pytest.raises(SparsityError, match="sparsities"):
        iterative_magnitude_pruning(network(), train, sparsities)


def test_divergence_and_moved_zeros_are_named():
    def diverge(model, masks):
        model[2].weight.data.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match=r"2\.weight"):
        iterative_magnitude_pruning(network(), diverge, (0.5,))

    def revive(model, masks):
        model[2].weight.data.add_(1)

    with pytest.raises(ConfigurationError, match="pruned weights of"):
        iterative_magnitude_pruning(network(), revive, (0.5, 0.6))


def test_similarity_worked_by_hand():
    a = MaskSet({"x": torch.tensor([[True, True, False, False]]), "y": torch.tensor([[True, False]])})
    b = MaskSet({"x": torch.tensor([[True, False, True, False]]), "y": torch.tensor([[True, False]])})
    first, second = mask_similarity(a, b)
    assert first == {
        "layer": "x",
        "weights": 4,
        "sparsity_a": 0.5,
        "sparsity_b": 0.5,
        "jaccard": pytest.approx(1 / 3),
        "cosine": pytest.approx(0.5),
        "chance": pytest.approx(0.25 / 0.75),
    }
    assert second["jaccard"] == second["cosine"] == 1


def test_unrelated_masks_share_what_chance_gives_them():
    generator = torch.Generator().manual_seed(0)
    a, b = (MaskSet({"w": torch.rand(300, 300, generator=generator) > s}) for s in (0.4, 0.7))
    row = mask_similarity(a, b)[0]
    assert row["jaccard"] == pytest.approx(row["chance"], abs=0.01)


def test_masks_over_different_parameters_do_not_compare():
    with pytest.raises(TargetError, match="different parameters"):
        mask_similarity(
            MaskSet({"a": torch.ones(2, dtype=torch.bool)}), MaskSet({"b": torch.ones(2, dtype=torch.bool)})
        )


def test_profile_counts_zeros_by_layer_and_component():
    masks = MaskSet(
        {
            "model.layers.0.self_attn.q_proj.weight": torch.tensor([[True, False], [False, False]]),
            "model.layers.0.mlp.up_proj.weight": torch.tensor([[True, True], [True, False]]),
            "encoder.layer.0.attention.output.dense.weight": torch.ones(2, 2, dtype=torch.bool),
            "encoder.layer.0.output.dense.weight": torch.ones(2, 2, dtype=torch.bool),
            "adapter.weight": torch.ones(1, 2, dtype=torch.bool),
        }
    )
    rows = layer_profile(masks)
    assert [row["component"] for row in rows] == ["attention", "feed-forward", "attention", "feed-forward", "other"]
    assert [row["sparsity"] for row in rows[:2]] == [0.75, 0.25]
    assert [row["share"] for row in rows[:2]] == [0.75, 0.25]
    assert component_profile(masks) == {"attention": 3 / 8, "feed-forward": 1 / 8, "other": 0.0}

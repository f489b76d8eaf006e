from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as reference

import gossamer
from gossamer.core.masking import static_masks
from gossamer.core.targets import find_targets
from gossamer.errors import NonFiniteError, PatternError, SparsityError, TargetError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def prune(model, **options):
    return gossamer.prune(model, "magnitude", progress=False, **options).masks


def one_layer(rows):
    model = nn.Sequential(nn.Linear(len(rows[0]), len(rows), bias=False), nn.Linear(len(rows), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(rows))
    return model


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_layers_equal_those_of_torch_where_there_are_no_ties(sparsity):
    model = network()
    theirs = copy.deepcopy(model)
    masks = prune(model, sparsity=sparsity)
    for index in (0, 2):
        # torch rounds the count, we round it down: give torch the count itself
        count = int((~masks[f"{index}.weight"]).sum())
        reference.l1_unstructured(theirs[index], "weight", count)
        assert torch.equal(theirs[index].weight_mask.bool(), masks[f"{index}.weight"])
        assert torch.equal(theirs[index].weight, model[index].weight)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_model_wide_ranking_equals_that_of_torch(sparsity):
    model = network()
    theirs = copy.deepcopy(model)
    masks = prune(model, sparsity=sparsity, pattern="unstructured:model")
    parameters = [(theirs[0], "weight"), (theirs[2], "weight")]
    reference.global_unstructured(parameters, pruning_method=reference.L1Unstructured, amount=masks.total - masks.kept)
    for index in (0, 2):
        assert torch.equal(theirs[index].weight_mask.bool(), masks[f"{index}.weight"])


def test_whole_rows_equal_torch_by_their_euclidean_norm():
    model = network()
    theirs = copy.deepcopy(model)
    masks = prune(model, sparsity=0.5, pattern="rows")
    for index in (0, 2):
        reference.ln_structured(theirs[index], "weight", 0.5, n=2, dim=0)
        assert torch.equal(theirs[index].weight_mask.bool(), masks[f"{index}.weight"])


def test_rows_and_columns_are_ranked_by_norm_and_blocks_by_mean_absolute_value():
    # row 0 has the larger norm (3 against 2.83), row 1 the larger mean absolute value
    rows = [[3.0, 0.0], [2.0, -2.0]]
    assert prune(one_layer(rows), sparsity=0.5, pattern="rows")["0.weight"].tolist() == [[True] * 2, [False] * 2]
    assert prune(one_layer(rows), sparsity=0.5, pattern="1x2")["0.weight"].tolist() == [[False] * 2, [True] * 2]
    columns = [[3.0, 2.0], [0.0, -2.0]]
    assert prune(one_layer(columns), sparsity=0.5, pattern="columns")["0.weight"].tolist() == [[True, False]] * 2


def test_norms_of_tiny_weights_do_not_vanish():
    rows = [[2e-30, 0.0], [1e-30, 1e-30], [3e-30, 0.0], [0.0, 0.0]]
    kept = prune(one_layer(rows), sparsity=0.5, pattern="rows")["0.weight"][:, 0]
    assert kept.tolist() == [True, False, True, False]


def test_each_scope_has_its_exact_count():
    expected = {"unstructured": 7, "unstructured:row": 6, "unstructured:model": 7}
    for pattern, zeros in expected.items():
        mask = prune(one_layer(torch.randn(3, 5).tolist()), sparsity=0.5, pattern=pattern)["0.weight"]
        assert int((~mask).sum()) == zeros, pattern


def test_ties_of_a_quantised_weight_are_broken_by_index_and_the_count_is_exact():
    rows = [[1.0, -1.0, 1.0, 1.0], [1.0, 1.0, -1.0, 1.0]]
    mask = prune(one_layer(rows), sparsity=0.5)["0.weight"]
    assert mask.tolist() == [[False] * 4, [True] * 4]
    # a threshold would remove all of these, or none
    model = one_layer((torch.randint(-8, 8, (64, 64)) / 8).tolist())
    assert int((~prune(model, sparsity=0.37)["0.weight"]).sum()) == int(0.37 * 64 * 64)


def test_bfloat16_is_ranked_as_stored_and_stays_bfloat16():
    model = network().to(torch.bfloat16)
    masks = prune(model, sparsity=0.5)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert weight.dtype == torch.bfloat16
        assert int((~mask).sum()) == mask.numel() // 2


def test_dropping_the_largest_is_the_mirror_image():
    small, large = network(), network()
    kept = prune(small, sparsity=0.5)["0.weight"]
    mirrored = prune(large, sparsity=0.5, largest=True)["0.weight"]
    assert torch.equal(kept, ~mirrored)


def test_nothing_is_the_same_bits_and_the_head_and_biases_are_left_alone():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before = {name: value.clone().view(torch.int32) for name, value in model.state_dict().items()}
    prune(model, sparsity=0.0)
    assert all(torch.equal(value.view(torch.int32), before[name]) for name, value in model.state_dict().items())
    prune(model, sparsity=0.9)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name]) == (name not in ("0.weight", "2.weight"))


def test_a_mask_survives_further_training():
    model = network()
    masks = prune(model, sparsity=0.5)
    dense = model[0].weight.detach().clone()
    with static_masks(model, masks):
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            model(torch.randn(8, 13)).square().sum().backward()
            optimiser.step()
    assert not masks.violations(model)
    assert not torch.equal(model[0].weight, dense)


def test_random_masks_follow_seed_and_name_and_not_the_weights():
    first, second = network(0), network(1)
    a, b = (gossamer.prune(m, "random", sparsity=0.5, progress=False).masks for m in (first, second))
    other = gossamer.prune(network(), "random", sparsity=0.5, seed=1, progress=False).masks
    assert a == b
    assert a != other


def test_transposed_layers_are_pruned_as_out_by_in():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(6, 8), nn.Linear(6, 2))
    prune(model, pattern="2:4", exclude=["1"])
    # stored (in, out): of every 4 inputs of an output 2 remain
    assert ((model[0].weight != 0).view(2, 4, 6).sum(1) == 2).all()


def test_bad_input_is_named():
    with pytest.raises(PatternError, match=r"0\.weight has shape \(24, 13\).*multiple of 4"):
        prune(network(), pattern="2:4")
    with pytest.raises(SparsityError, match=r"sparsity is 1.0"):
        prune(network(), sparsity=1.0)
    with pytest.raises(TargetError, match="none matches"):
        prune(network(), include=["decoder.*"])
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"2\.weight: 1 of 384"):
        prune(model)
    assert len(find_targets(model)) == 2

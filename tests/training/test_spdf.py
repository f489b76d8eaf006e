from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gossamer.core.masking import static_masks
from gossamer.errors import ConfigurationError, SparsityError, TargetError, UnknownNameError
from gossamer.measure.training_flops import TrainingFlops
from gossamer.papers.byte_language import ByteGPT, next_byte_loss
from gossamer.storage.masks import load_masks, save_masks
from gossamer.training.densification import movements, principal_angles, snapshot
from gossamer.training.spdf import SparsePretraining


def small(seed=0):
    torch.manual_seed(seed)
    return ByteGPT(layers=2, width=16, heads=2, length=8)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def train(model, optimizer, steps=3):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        next_byte_loss(model, torch.randint(0, 256, (4, 8), generator=generator)).backward()
        optimizer.step()


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.33])
def test_every_matrix_keeps_exactly_its_share_and_nothing_else_is_masked(sparsity):
    model = small()
    training = SparsePretraining(sparsity=sparsity).attach(model, adam(model))
    assert set(training.masks) == {n for n, p in model.blocks.named_parameters(prefix="blocks") if p.dim() == 2}
    for name, mask in training.masks.items():
        parts = mask.view(3, 16, 16) if "qkv" in name else mask[None]
        for part in parts:
            assert int(part.sum()) == round((1 - sparsity) * part.numel()), name


def test_masked_weights_stay_exactly_zero_through_decay_and_momentum():
    model = small()
    optimizer = adam(model)
    training = SparsePretraining(sparsity=0.75, seed=3).attach(model, optimizer)
    first = training.masks
    train(model, optimizer, 5)
    assert training.masks == first
    assert not first.violations(model)
    state = optimizer.state[model.blocks[0].up.weight]
    masked = ~first["blocks.0.up.weight"]
    assert not state["exp_avg"][masked].any()
    assert not state["exp_avg_sq"][masked].any()


def test_masks_depend_on_the_seed_and_on_nothing_else():
    runs = [
        SparsePretraining(seed=seed).attach(m, adam(m)).masks for seed, m in ((0, small()), (0, small(5)), (1, small()))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_interleaved_and_grouped_projections_are_drawn_apart():
    model = nn.ModuleDict({"query_key_value": nn.Linear(8, 24), "qkv_proj": nn.Linear(8, 16), "head": nn.Linear(8, 2)})
    model.config = type("Config", (), {"num_attention_heads": 2})()
    training = SparsePretraining(sparsity=0.5).attach(model, adam(model))
    interleaved = training.mask("query_key_value.weight").view(2, 3, 4, 8)
    assert [int(interleaved[:, place].sum()) for place in range(3)] == [32, 32, 32]
    grouped = training.mask("qkv_proj.weight").split([8, 4, 4])
    assert [int(part.sum()) for part in grouped] == [32, 16, 16]


def test_densified_weights_start_at_zero_and_then_learn():
    model = small()
    optimizer = adam(model)
    method = SparsePretraining(sparsity=0.75)
    training = method.attach(model, optimizer)
    train(model, optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = method.densify(training)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not optimizer.state
    train(model, adam(model))
    for name, mask in masks.items():
        moved = model.get_parameter(name)[~mask] != 0
        assert moved.float().mean() > 0.9, name


def test_fine_tuning_under_the_mask_is_the_other_choice():
    model = small()
    training = SparsePretraining(sparsity=0.75).attach(model, adam(model))
    masks = training.finalize()
    with static_masks(model, masks):
        train(model, adam(model))
    assert not masks.violations(model)


def test_missing_weights_may_start_from_small_random_numbers():
    model = small()
    training = SparsePretraining(sparsity=0.75).attach(model, adam(model))
    kept = snapshot(model, training.masks)
    masks = training.method.densify(training, init="normal")
    for name, mask in masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(weight[mask], kept[name][mask])
        assert float(weight[~mask].std() / weight[mask].std()) == pytest.approx(0.1, rel=0.15)
    other = small()
    training = SparsePretraining(sparsity=0.75).attach(other, adam(other))
    masks = training.method.densify(training, init="normal", std=0.5)
    assert float(other.blocks[0].up.weight.detach()[~masks["blocks.0.up.weight"]].std()) == pytest.approx(0.5, rel=0.1)


def test_a_checkpoint_is_a_plain_one_with_a_file_of_masks_beside_it(tmp_path):
    model = small()
    training = SparsePretraining(sparsity=0.5).attach(model, adam(model))
    assert set(model.state_dict()) == set(small().state_dict())
    save_masks(training.masks, tmp_path / "masks.safetensors")
    other = small(9)
    other.load_state_dict(model.state_dict())
    assert load_masks(tmp_path / "masks.safetensors") == training.masks
    assert not load_masks(tmp_path / "masks.safetensors").violations(other)


def test_a_resumed_run_equals_an_uninterrupted_one():
    whole, parts = small(), small()
    optimizer = adam(whole)
    SparsePretraining().attach(whole, optimizer)
    train(whole, optimizer, 2)
    train(whole, optimizer, 2)
    first = adam(parts)
    training = SparsePretraining().attach(parts, first)
    train(parts, first, 2)
    stored = copy.deepcopy((parts.state_dict(), first.state_dict(), training.state_dict()))
    again = small(7)
    second = adam(again)
    again.load_state_dict(stored[0])
    second.load_state_dict(stored[1])
    SparsePretraining(seed=9).attach(again, second, stored[2])
    train(again, second, 2)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_what_cannot_be_densified_is_said():
    model = small()
    method = SparsePretraining()
    with pytest.raises(ConfigurationError, match="no mask to drop"):
        method.densify(None)
    training = method.attach(model, adam(model))
    with pytest.raises(ConfigurationError, match="std > 0"):
        method.densify(training, init="normal", std=0)
    with pytest.raises(ConfigurationError, match="'ones'"):
        method.densify(training, init="ones")
    method.densify(training)
    with pytest.raises(ConfigurationError, match="densified already"):
        method.densify(training)


def test_another_sparsity_during_the_run_is_refused_with_the_methods_that_can():
    model = small()
    optimizer = adam(model)
    training = SparsePretraining(sparsity=0.5).attach(model, optimizer)
    training.method.sparsity = 0.75
    with pytest.raises(ConfigurationError, match=r"from 0\.5 to 0\.75.*use gmp, rigl or granet"):
        train(model, optimizer, 1)


def test_bad_parameters_are_refused():
    with pytest.raises(SparsityError):
        SparsePretraining(sparsity=1.0)
    with pytest.raises(UnknownNameError, match="allocation"):
        SparsePretraining(allocation="unifrom")
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with pytest.raises(SparsityError, match="leaves nothing of 0"):
        SparsePretraining(sparsity=0.9).attach(model, adam(model))


def test_the_whole_saves_less_than_its_pretraining():
    flops = TrainingFlops.of_shape(layers=24, width=2048, context=2048, vocabulary=50_257, density=0.25)
    assert flops.saving(1e9, 0) == pytest.approx(2.49, abs=0.005)
    assert 1 < flops.saving(1e9, 1e8) < flops.saving(1e9, 0)


def test_principal_angles_of_known_planes():
    plane = torch.eye(4)[:, :2]
    angle = 0.3
    turned = torch.tensor([[1, 0, 0, 0], [0, math.cos(angle), math.sin(angle), 0]]).T
    assert principal_angles(plane, turned, 2).tolist() == pytest.approx([0, angle], abs=1e-6)
    assert principal_angles(plane, torch.eye(4)[:, 2:], 2).tolist() == pytest.approx([math.pi / 2] * 2)
    tiny = torch.tensor([[1, 0, 0, 0], [0, 1, 1e-9, 0]], dtype=torch.float64).T
    assert float(principal_angles(plane.double(), tiny, 2)[1]) == pytest.approx(1e-9, rel=1e-3)
    with pytest.raises(ConfigurationError, match="rank is 0"):
        principal_angles(plane, turned, 0)


def test_movements_tell_revived_weights_from_pretrained_ones():
    model = small()
    training = SparsePretraining(sparsity=0.75).attach(model, adam(model))
    masks = training.method.densify(training)
    before = snapshot(model, masks)
    name = "blocks.0.up.weight"
    with torch.no_grad():
        model.get_parameter(name)[~masks[name]] += 0.3
        model.get_parameter(name)[masks[name]] -= 0.1
    moved = {row.name: row for row in movements(before, model, masks)}
    row = moved[name]
    assert (row.revived, row.kept) == pytest.approx((0.3, 0.1), rel=1e-5)
    assert row.revived_share == pytest.approx(0.75 * 0.09 / (0.75 * 0.09 + 0.25 * 0.01), rel=1e-5)
    assert row.angle > 1
    still = moved["blocks.1.up.weight"]
    assert (still.revived, still.kept, still.revived_share, still.relative) == (0, 0, 0, 0)
    assert still.angle == pytest.approx(0, abs=1e-4)
    with pytest.raises(TargetError, match="another model"):
        movements(before, nn.Linear(2, 2), masks)
    with pytest.raises(TargetError, match="take it with these masks"):
        movements({}, model, masks)

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.core.masking import parameter_masks, static_masks, zeroed
from gossamer.core.masks import MaskSet
from gossamer.core.targets import find_targets
from gossamer.errors import ConfigurationError, TargetError


def small(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)


def bits(model):
    return {n: p.detach().clone().contiguous().view(torch.uint8) for n, p in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_every_bit_comes_back_even_of_nan_and_negative_zero(seed, dtype):
    model = small(dtype)
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    before = bits(model)
    generator = torch.Generator().manual_seed(seed)
    masks = MaskSet({n: torch.rand(model.get_parameter(n).shape, generator=generator) > 0.6 for n in ("0.weight",)})
    with zeroed(model, masks):
        assert not masks.violations(model)
        assert torch.equal(model[2].weight, model[2].weight)
    assert same(bits(model), before)


def test_bits_come_back_after_an_error_inside():
    model = small()
    before = bits(model)
    with (
        pytest.raises(RuntimeError, match="inside"),
        zeroed(model, MaskSet({"0.weight": torch.zeros(5, 6, dtype=torch.bool)})),
    ):
        raise RuntimeError("inside")
    assert same(bits(model), before)


def test_masks_of_another_model_change_nothing():
    model = small()
    before = bits(model)
    masks = MaskSet({"0.weight": torch.zeros(5, 6, dtype=torch.bool), "1.weight": torch.zeros(2, 2, dtype=torch.bool)})
    with pytest.raises(TargetError, match="another model"), zeroed(model, masks):
        pass
    assert same(bits(model), before)


def test_a_tied_parameter_named_twice_is_restored():
    model = nn.Module()
    model.a, model.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model.b.weight = model.a.weight
    before = bits(model)
    mask = torch.eye(4, dtype=torch.bool)
    with zeroed(model, MaskSet({"a.weight": mask, "b.weight": mask})):
        assert int((model.a.weight != 0).sum()) == 4
    assert same(bits(model), before)


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_static_masks_hold_zeros_through_training_while_the_rest_moves(optimiser):
    model = small()
    before = model[0].weight.detach().clone()
    masks = MaskSet({"0.weight": torch.rand(5, 6) > 0.5})
    with static_masks(model, masks):
        steps = optimiser(model.parameters(), lr=0.05, weight_decay=0.1)
        for _ in range(5):
            steps.zero_grad()
            model(torch.ones(2, 6)).square().sum().backward()
            steps.step()
    kept = masks["0.weight"]
    assert int((model[0].weight[~kept] != 0).sum()) == 0
    assert not torch.equal(model[0].weight[kept], before[kept])
    # the hooks are gone: gradients reach the removed weights again
    model(torch.ones(2, 6)).square().sum().backward()
    assert model[0].weight.grad[~kept].abs().sum() > 0


def test_training_that_moves_a_removed_weight_is_refused():
    model = small()
    with (
        pytest.raises(ConfigurationError, match="moved 30 pruned weights"),
        static_masks(model, MaskSet({"0.weight": torch.zeros(5, 6, dtype=torch.bool)})),
        torch.no_grad(),
    ):
        model[0].weight.add_(1)


def test_masks_of_transposed_matrices_are_turned_back():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(3, 5), nn.Linear(3, 3), nn.Linear(3, 2))
    targets = find_targets(model)
    masks = parameter_masks(targets, {t.name: t.matrix() > 0 for t in targets})
    assert masks["0.weight"].shape == (5, 3)
    assert torch.equal(masks["0.weight"], model[0].weight > 0)


def test_masks_of_stacked_experts_are_put_together():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(4, 3, 2))

    model = nn.Module()
    model.experts = Experts()
    targets = find_targets(model, exclude=())
    masks = parameter_masks(targets, {t.name: t.matrix() > 0 for t in targets})
    assert torch.equal(masks["experts.down_proj"], model.experts.down_proj > 0)

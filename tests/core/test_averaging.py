from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gossamer.core.averaging import average_models, recalibrate_batch_norm
from gossamer.core.masks import MaskSet
from gossamer.errors import CalibrationError, ConfigurationError, TargetError


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(4 * 9, 3))


def copies(count=3, sparsity=0.5):
    """Networks of different weights under one mask."""
    generator = torch.Generator().manual_seed(7)
    made = [network(seed) for seed in range(count)]
    masks = MaskSet({n: torch.rand(p.shape, generator=generator) >= sparsity for n, p in made[0].named_parameters()
                     if p.dim() > 1})  # fmt: skip
    for model in made:
        masks.apply_(model)
    return made, masks


def images(count=32, seed=1):
    return torch.randn(count, 1, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_the_mean_worked_by_hand():
    states = [{"w": torch.tensor([[1.0, 0.0]])}, {"w": torch.tensor([[4.0, 0.0]])}]
    assert average_models(states)["w"].tolist() == [[2.5, 0.0]]
    assert average_models(states, weights=[2, 1])["w"].tolist() == [[2.0, 0.0]]
    assert states[0]["w"].tolist() == [[1.0, 0.0]]


def test_copies_under_one_mask_keep_exactly_their_zeros():
    models, masks = copies()
    soup = average_models(models, masks=masks)
    assert MaskSet.from_model(soup, masks) == masks
    assert soup is not models[0]
    for name, tensor in soup.state_dict().items():
        if tensor.is_floating_point():
            expected = torch.stack([m.state_dict()[name].double() for m in models]).mean(0).float()
            assert torch.equal(tensor, expected), name


def test_one_model_is_its_own_mean():
    (model,), _ = copies(1)
    assert all(
        torch.equal(a, b) for a, b in zip(average_models([model]).state_dict().values(), model.state_dict().values())
    )


def test_many_half_precision_models_lose_no_digits():
    # summed in bfloat16, 256 ones followed by anything smaller than 2 would stand still
    states = [{"w": torch.full((2, 2), 1.0 + number % 2, dtype=torch.bfloat16)} for number in range(1000)]
    assert average_models(states)["w"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert average_models(states)["w"].dtype == torch.bfloat16


def test_counters_are_copied_and_not_averaged():
    models, _ = copies(2)
    models[0][1].num_batches_tracked.fill_(7)
    models[1][1].num_batches_tracked.fill_(100)
    assert int(average_models(models)[1].num_batches_tracked) == 7


@pytest.mark.parametrize("given", [True, False])
def test_a_weight_that_grew_back_is_named(given):
    models, masks = copies()
    place = (~masks["5.weight"]).nonzero()[0]
    with torch.no_grad():
        models[2][5].weight[tuple(place)] = 1e-30
    with pytest.raises(ConfigurationError, match=r"models\[2\].*'5\.weight'.* 1 places"):
        average_models(models, masks=masks if given else None)
    union = MaskSet.from_model(average_models(models, require_same_mask=False), masks)
    assert union.kept == masks.kept + 1


def test_different_masks_average_to_their_union():
    generator = torch.Generator().manual_seed(0)
    density, count = 0.1, 5
    states = [{"w": torch.randn(300, 300, generator=generator)} for _ in range(count)]
    for state in states:
        state["w"] *= torch.rand(300, 300, generator=generator) < density
    mean = average_models(states, require_same_mask=False)["w"]
    assert float((mean != 0).double().mean()) == pytest.approx(1 - (1 - density) ** count, abs=0.01)


def test_models_of_other_shapes_are_refused_by_name():
    with pytest.raises(TargetError, match=r"'weight' is \(2, 4\).*models\[1\]"):
        average_models([nn.Linear(3, 2), nn.Linear(4, 2)])
    with pytest.raises(TargetError, match="'bias'"):
        average_models([nn.Linear(3, 2), nn.Linear(3, 2, bias=False)])
    with pytest.raises(TargetError, match="no tensor 'other'"):
        average_models([nn.Linear(3, 2)], masks=MaskSet({"other": torch.ones(2, 3, dtype=torch.bool)}))


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, -1.0]])
def test_weights_that_make_no_mean_are_refused(weights):
    with pytest.raises(ConfigurationError, match="weights is"):
        average_models([nn.Linear(3, 2), nn.Linear(3, 2)], weights=weights)


def test_nothing_and_reparametrised_models_are_refused():
    with pytest.raises(ConfigurationError, match="models is empty"):
        average_models([])
    pruned = prune.l1_unstructured(nn.Linear(3, 2), "weight", 2)
    with pytest.raises(ConfigurationError, match=r"'weight_orig'.*prune\.remove"):
        average_models([pruned, pruned])


def test_recalibrated_statistics_are_those_of_the_batches():
    model = network().double()
    data = images().double()
    assert recalibrate_batch_norm(model, data.split(16)) == 2
    features = model[0](data).detach()
    torch.testing.assert_close(model[1].running_mean, features.mean((0, 2, 3)))
    halves = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in features.split(16)])
    torch.testing.assert_close(model[1].running_var, halves.mean(0))


def test_recalibration_changes_nothing_but_the_statistics():
    model = network().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    recalibrate_batch_norm(model, [(images(), torch.zeros(32))])
    assert model.training
    assert not model[1].training
    assert model[1].momentum == 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("running" not in name and "tracked" not in name), name


def test_the_mean_of_the_statistics_is_not_the_statistics_of_the_mean():
    models, _ = copies(2)
    data = images(256)
    for model in models:
        recalibrate_batch_norm(model, [data])
    soup = average_models(models)
    averaged = soup[1].running_var.clone()
    recalibrate_batch_norm(soup, [data])
    assert (soup[1].running_var < 0.9 * averaged).any()


def test_a_fraction_takes_the_first_batches():
    model, other = network(), network()
    batches = list(images(40).split(4))
    assert recalibrate_batch_norm(model, batches, fraction=0.2) == 2
    recalibrate_batch_norm(other, batches[:2])
    assert torch.equal(model[1].running_var, other[1].running_var)
    with pytest.raises(ConfigurationError, match="fraction is 0"):
        recalibrate_batch_norm(model, batches, fraction=0)
    with pytest.raises(ConfigurationError, match="no length"):
        recalibrate_batch_norm(model, iter(batches), fraction=0.5)


def test_without_batches_the_statistics_stay():
    model = network()
    model[1].running_mean.fill_(3)
    with pytest.raises(CalibrationError, match="no batch"):
        recalibrate_batch_norm(model, [])
    assert model[1].running_mean.tolist() == [3] * 4
    assert recalibrate_batch_norm(nn.Linear(2, 2), []) == 0

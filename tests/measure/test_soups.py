from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError, TargetError
from gossamer.measure.corruptions import SEVERITIES, corrupt, corruptions
from gossamer.measure.robustness import calibration_error, maximum_calibration_error
from gossamer.measure.soups import corrupted_accuracy, quality, soup_geometry, soup_metrics


def line(*weights):
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([weights], dtype=torch.float32)
    return layer


class Table(nn.Module):
    """Says what it is told to: logits by example."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, rows):
        return self.logits[rows[:, 0].long()]


def test_distances_and_angles_worked_by_hand():
    found = soup_geometry([line(3, 0), line(0, 4), line(3, 4)])
    assert (found.distance.low, found.distance.high) == (3, 5)
    assert found.distance.mean == pytest.approx(4)
    assert found.angle.high == pytest.approx(90)
    assert found.angle.low == pytest.approx(math.degrees(math.atan2(3, 4)))
    assert found.norm == pytest.approx(math.hypot(2, 8 / 3))
    assert found.from_barycentre.high == pytest.approx(math.hypot(1, 8 / 3))


def test_running_statistics_are_no_distance():
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    b.running_mean += 5
    assert soup_geometry([a, b]).distance.high == 0
    assert soup_geometry([a.state_dict(), b.state_dict()]).distance.high == 0


def test_one_model_or_different_shapes_have_no_distance():
    with pytest.raises(ConfigurationError, match="1 models"):
        soup_geometry([line(1, 2)])
    with pytest.raises(TargetError, match="weight"):
        soup_geometry([line(1, 2), nn.Linear(3, 1, bias=False)])


def test_an_ensemble_averages_probabilities_and_not_logits():
    # the first is sure of class 0, the others lean to class 1; logits would average to class 0
    members = [Table([[9.0, 0.0]]), Table([[0.0, 1.0]]), Table([[0.0, 1.0]]), Table([[0.0, 1.0]])]
    inputs, labels = torch.zeros(1, 1), torch.tensor([1])
    assert quality(members, inputs, labels).accuracy == 1
    share = (1 / (1 + math.exp(9)) + 3 / (1 + math.exp(-1))) / 4
    assert quality(members, inputs, labels).loss == pytest.approx(-math.log(share))


def test_the_worst_class_is_that_with_the_fewest_right_answers():
    model = Table([[2.0, 0.0]] * 3 + [[0.0, 2.0]] * 1)
    found = quality(model, torch.arange(4).unsqueeze(1).float(), torch.tensor([0, 1, 1, 1]))
    assert found.accuracy == 0.5
    assert found.worst_class == pytest.approx(1 / 3)


def test_maximum_calibration_error_is_that_of_the_worst_bin():
    confident, unsure = math.log(0.95 / 0.05), math.log(0.65 / 0.35)
    logits = torch.tensor([[confident, 0.0]] * 4 + [[unsure, 0.0]] * 2)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert maximum_calibration_error(logits, labels, bins=10) == pytest.approx(0.65, abs=1e-6)
    assert calibration_error(logits, labels, bins=10) == pytest.approx((4 * 0.2 + 2 * 0.65) / 6, abs=1e-6)


def test_modes_stay_and_missing_data_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    quality(model, torch.zeros(3, 2), torch.zeros(3).long())
    assert model[1].training
    for models, inputs in (([], torch.zeros(3, 2)), (model, torch.zeros(0, 2)), (model, torch.zeros(2, 2))):
        with pytest.raises(CalibrationError, match="one label"):
            quality(models, inputs, torch.zeros(3).long())


def test_everything_about_a_soup_in_one_place():
    candidates = [nn.Linear(2, 3) for _ in range(3)]
    inputs, labels = torch.randn(20, 2), torch.arange(20) % 3
    found = soup_metrics(candidates[0], candidates, inputs, labels)
    each = [quality(one, inputs, labels).accuracy for one in candidates]
    assert found["gain"] == pytest.approx(each[0] - sum(each) / 3)
    assert [one.accuracy for one in found["candidates"]] == each
    assert found["ensemble"] == quality(candidates, inputs, labels)


# ---------------------------------------------------------------------------------------------- corruptions


def images():
    return torch.rand(5, 1, 14, 14, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["noise", "blur", "contrast"])
def test_higher_severities_move_images_further_and_stay_in_range(name):
    whole = images()
    worse = [corrupt(whole, name, severity) for severity in SEVERITIES]
    distances = [float((one - whole).square().mean()) for one in worse]
    assert 0 < distances[0] < distances[1] < distances[2]
    for one in worse:
        assert one.shape == whole.shape
        assert one.min() >= 0
        assert one.max() <= 1


def test_contrast_and_blur_worked_by_hand():
    picture = torch.tensor([[[[0.0, 1.0]]]])
    assert corrupt(picture, "contrast", 1).flatten().tolist() == [0.25, 0.75]
    flat = torch.full((2, 3, 9, 9), 0.4)
    torch.testing.assert_close(corrupt(flat, "blur", 3), flat)
    point = torch.zeros(1, 1, 21, 21)
    point[..., 10, 10] = 1
    blurred = corrupt(point, "blur", 2)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
    width = (blurred[0, 0].sum(0) * (torch.arange(21) - 10) ** 2).sum().sqrt()
    assert float(width) == pytest.approx(1.3, abs=0.05)


def test_noise_is_the_same_for_a_seed():
    assert torch.equal(corrupt(images(), "noise", 1, seed=3), corrupt(images(), "noise", 1, seed=3))
    assert not torch.equal(corrupt(images(), "noise", 1, seed=3), corrupt(images(), "noise", 1, seed=4))
    assert len(list(corruptions(images()))) == 9
    with pytest.raises(ConfigurationError, match="no corruption 'fog' of severity 1"):
        corrupt(images(), "fog", 1)
    with pytest.raises(ConfigurationError, match="severity 4"):
        corrupt(images(), "blur", 4)


def test_corrupted_accuracy_is_the_mean_over_all_nine():
    model = nn.Sequential(nn.Flatten(), nn.Linear(196, 2))
    labels = torch.tensor([0, 1, 0, 1, 0])
    each = [quality(model, worse, labels).accuracy for _, _, worse in corruptions(images())]
    assert corrupted_accuracy(model, images(), labels) == pytest.approx(sum(each) / 9)

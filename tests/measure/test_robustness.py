from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gossamer.errors import CalibrationError, ConfigurationError
from gossamer.measure.robustness import auroc, calibration_error, fast_gradient_sign, robustness


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_calibration_error_as_by_hand():
    # two answers of confidence 0.9, one right; two of 0.6, both right
    logits = logits_of([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    labels = torch.tensor([0, 0, 0, 1])
    assert calibration_error(logits, labels, bins=10) == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.6))
    # one bin: 3 of 4 right, mean confidence 0.75
    assert calibration_error(logits, labels, bins=1) == pytest.approx(0)


def test_calibration_error_agrees_with_a_loop_over_bins():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(400, 5, generator=generator)
    labels = torch.randint(5, (400,), generator=generator)
    confidence, answer = logits.double().softmax(1).max(1)
    expected = 0.0
    for index in range(15):
        inside = (confidence > index / 15) & (confidence <= (index + 1) / 15)
        if inside.any():
            gap = (answer == labels)[inside].double().mean() - confidence[inside].mean()
            expected += float(inside.double().mean() * gap.abs())
    assert calibration_error(logits, labels) == pytest.approx(expected)


def test_auroc_counts_pairs_and_halves_ties():
    positive, negative = torch.tensor([0.9, 0.5, 0.5]), torch.tensor([0.5, 0.1])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert auroc(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(torch.ones(3), torch.ones(4)) == 0.5
    assert auroc(torch.tensor([2.0]), torch.tensor([1.0])) == 1
    with pytest.raises(CalibrationError, match="0 negative"):
        auroc(positive, torch.empty(0))


def test_the_attack_moves_every_number_against_the_label_and_stays_within_bounds():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))
    x = torch.tensor([[0.5, 0.5, 0.5], [0.05, 0.98, 0.5]])
    moved = fast_gradient_sign(model, x, torch.tensor([0, 0]), epsilon=0.1)
    torch.testing.assert_close(moved, torch.tensor([[0.4, 0.6, 0.5], [0.0, 1.0, 0.5]]))
    free = fast_gradient_sign(model, x, torch.tensor([1, 1]), epsilon=0.1, bounds=None)
    torch.testing.assert_close(free, torch.tensor([[0.6, 0.4, 0.5], [0.15, 0.88, 0.5]]))
    assert model.weight.grad is None
    with pytest.raises(ConfigurationError, match="epsilon"):
        fast_gradient_sign(model, x, torch.tensor([0, 0]), epsilon=-1)


def test_a_report_holds_all_views_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.rand(40, 4), torch.randint(3, (40,))
    found = robustness(model, zip(x.split(16), y.split(16)), [torch.rand(7, 4), torch.rand(5, 4)], epsilon=0.05)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    logits = model(x).detach().double()
    assert found.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert found.nll == pytest.approx(float(nn.functional.cross_entropy(logits, y)))
    assert found.calibration_error == pytest.approx(calibration_error(logits, y))
    assert found.attacked_accuracy <= found.accuracy
    assert 0 <= found.auroc <= 1
    assert robustness(model, [(x, y)]).auroc is None
    assert math.isclose(robustness(model, [(x, y)], epsilon=0).attacked_accuracy, found.accuracy)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(CalibrationError, match="at least one batch"):
        robustness(nn.Linear(2, 2), [])
    with pytest.raises(CalibrationError, match="2 rows of logits and 3 labels"):
        calibration_error(torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(ConfigurationError, match="bins"):
        calibration_error(torch.zeros(2, 2), torch.zeros(2), bins=0)

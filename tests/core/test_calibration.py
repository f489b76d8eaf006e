from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.core.calibration import (
    AbsoluteHistogram,
    Gram,
    InputMoments,
    InputNorm,
    Statistics,
    observe,
    per_weight,
    unfold_input,
)
from gossamer.core.targets import Target, find_targets
from gossamer.errors import NonFiniteError

KINDS = (InputNorm, InputMoments, Gram, AbsoluteHistogram)


@pytest.fixture
def rows():
    return torch.randn(101, 10, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 10) + 0.3


@pytest.mark.parametrize("split", [1, 7, 101])
def test_statistics_equal_float64_however_the_data_is_split(rows, split):
    stats = Statistics(KINDS, 10, "cpu")
    for part in rows.split(split):
        stats.update(part)
    exact = rows.double()
    torch.testing.assert_close(stats[InputNorm].norm, exact.norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[InputMoments].mean, exact.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[InputMoments].variance, exact.var(0, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(stats[Gram].matrix.double(), exact.t() @ exact, rtol=1e-4, atol=1e-2)
    assert stats.tokens == 101


def test_half_precision_inputs_do_not_overflow():
    stats = Statistics((InputNorm,), 2, "cpu")
    stats.update(torch.full((1000, 2), 60_000.0, dtype=torch.float16))
    assert torch.isfinite(stats[InputNorm].norm).all()


@pytest.mark.parametrize("split", [1, 64, 1024])
@pytest.mark.parametrize("drift", [0.0, 1000.0])
def test_the_variance_survives_a_large_mean(split, drift):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1024, 6, generator=generator, dtype=torch.float64)
    mean = torch.tensor([0.0, 1.0, 20.0, 500.0, -5000.0, 5000.0], dtype=torch.float64)
    rows = (noise + mean + drift * torch.linspace(0, 1, 1024, dtype=torch.float64)[:, None]).float()
    moments = InputMoments(6)
    for part in rows.split(split):
        moments.update(part)
    exact = rows.double()
    torch.testing.assert_close(moments.variance, exact.var(0, correction=0), rtol=2e-5, atol=0)
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.norm, exact.norm(dim=0), rtol=1e-6, atol=0)


def test_a_constant_feature_has_no_variance():
    moments = InputMoments(3)
    for _ in range(3):
        moments.update(torch.tensor([0.0, 7.7, -1e5]).expand(50, 3))
    assert moments.variance.tolist() == [0.0, 0.0, 0.0]


def test_moments_give_the_norm_to_the_bit_and_gather_once_for_both(rows):
    rows = rows * 3
    rows[:, 4] += 1e4
    both, alone = Statistics((InputNorm, InputMoments), 10, "cpu"), Statistics((InputNorm,), 10, "cpu")
    for part in rows.split(40):
        both.update(part)
        alone.update(part)
    same = both[InputNorm].norm == alone[InputNorm].norm
    first = rows[:40]
    usual = first.mean(0).abs() < 7.9 * first.std(0)
    assert usual.sum() >= 6
    assert same[usual].all()  # the others are counted from their mean on
    torch.testing.assert_close(both[InputNorm].norm, alone[InputNorm].norm, rtol=1e-6, atol=0)
    assert both[InputNorm] is both[InputMoments]
    assert both.tokens == 101
    assert set(both) == {InputNorm, InputMoments}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_notice_what_is_not_finite(value):
    stats = Statistics((InputNorm, InputMoments), 2, "cpu")
    stats.update(torch.randn(5, 2))
    stats.update(torch.tensor([[1.0, value]]))
    with pytest.raises(NonFiniteError, match=r"the input of some\.layer"):
        stats.check_finite("some.layer")


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_quantiles_are_within_their_stated_error(rows, q):
    histogram = AbsoluteHistogram(10)
    histogram.update(rows)
    exact = float(rows.abs().flatten().quantile(q, interpolation="lower"))
    assert histogram.quantile(q) == pytest.approx(exact, rel=1 / 16)


class _Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.out(self.query(x) * self.key(x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_layers_with_one_input_share_one_accumulator(mode):
    model = _Shared()
    targets = find_targets(model, heads=True)
    with mode(), observe(targets, (InputNorm,)) as seen:
        for _ in range(3):
            model(torch.randn(4, 6))
    assert seen["query.weight"] is seen["key.weight"]
    assert seen["out.weight"] is not seen["query.weight"]
    assert seen["query.weight"].tokens == 12
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_read_one_input_differently_do_not_share():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.point, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.point(x) + self.wide(x)

    model, x = Branches(), torch.randn(2, 3, 5, 5)
    with observe(find_targets(model, heads=True), [InputNorm]) as seen, torch.no_grad():
        model(x)
    assert seen["point.weight"] is not seen["wide.weight"]
    for name, layer in (("point.weight", model.point), ("wide.weight", model.wide)):
        rows = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(seen[name][InputNorm].norm, rows.double().norm(dim=0))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False),
        nn.Conv2d(4, 6, (1, 3), dilation=2, bias=False),
        nn.Conv1d(4, 6, 3, padding=1, bias=False),
    ],
)
def test_an_unfolded_convolution_is_a_product(layer):
    shape = (2, 4, 9, 9) if isinstance(layer, nn.Conv2d) else (2, 4, 9)
    inputs = torch.randn(shape)
    target = Target("weight", "", layer)
    product = unfold_input(target, inputs) @ target.matrix().flatten(1).t()
    expected = layer(inputs).flatten(2).transpose(1, 2).reshape(-1, 6)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5)


def test_values_of_a_grouped_convolution_reach_their_own_group():
    layer = nn.Conv2d(4, 6, 1, groups=2, bias=False)
    spread = per_weight(Target("weight", "", layer), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert spread[:3].flatten(1).unique(dim=0).tolist() == [[1.0, 2.0]]
    assert spread[3:].flatten(1).unique(dim=0).tolist() == [[3.0, 4.0]]
